"""The experts on a GPU: values, gradients, bits, graphs, and nothing that waits."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from experts_cases import EDGES, NAMES, assert_as_good, by_autograd, cast, in_torch, mixture  # noqa: E402

from unif2ace_kernels.moe import Routing, experts  # noqa: E402
from unif2ace_kernels.moe.activation_torch import ACTIVATIONS  # noqa: E402


def gpu_problem(device, dtype, tokens=300, hidden=192, width=136, **options):
    x, routing, parameters, grad_y = cast(dtype, *mixture(tokens, hidden=hidden, width=width, **options))
    move = [None if each is None else each.to(device) for each in (x, *parameters, grad_y)]
    return move[0], Routing(*(each.detach().to(device) for each in routing)), tuple(move[1:5]), move[5]


def through_the_op(activation):
    return lambda x, routing, *parameters: experts(x, routing, *parameters, activation=activation)


def check_on(device, dtype, activation, **options):
    """The op on a device against float64, with the loop in the same dtype as the peer."""
    problem = mixture(300, hidden=192, width=136, activation=activation, **options)
    exact = by_autograd(in_torch(activation), *problem)
    low = gpu_problem(device, dtype, activation=activation, **options)
    peer = by_autograd(in_torch(activation), *cast(dtype, *problem))
    got = by_autograd(through_the_op(activation), *low)
    assert_as_good([None if each is None else each.cpu() for each in got], peer, exact)


class TestGpu:
    pytestmark = pytest.mark.gpu

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_values_and_gradients(self, activation, dtype):
        check_on("cuda", torch.float32 if activation == "relu" else dtype, activation)

    @pytest.mark.parametrize("options", [{"bias": False}, {"sizes": (33,), "top_k": 4, "shared": 0}], ids=str)
    def test_options(self, options):
        check_on("cuda", torch.bfloat16, "gelu_tanh", **options)

    @pytest.mark.parametrize("name", EDGES)
    def test_edges(self, name):
        problem = mixture(**{"activation": "swiglu", **EDGES[name]})
        exact, low = by_autograd(in_torch("swiglu"), *problem), cast(torch.float32, *problem)
        x, routing, parameters, grad_y = low
        moved = [None if each is None else each.cuda() for each in (x, *parameters, grad_y)]
        on_gpu = moved[0], Routing(*(each.cuda() for each in routing)), moved[1:5], moved[5]
        got = by_autograd(through_the_op("swiglu"), *on_gpu)
        got = [None if each is None else each.cpu() for each in got]
        assert_as_good(got, by_autograd(in_torch("swiglu"), *low), exact)

    def test_same_bits_on_every_run_and_under_compilation(self):
        problem = gpu_problem("cuda", torch.bfloat16, tokens=3000)
        first = by_autograd(through_the_op("gelu_tanh"), *problem)
        runs = [by_autograd(through_the_op("gelu_tanh"), *problem) for _ in range(3)]
        runs.append(by_autograd(torch.compile(through_the_op("gelu_tanh"), fullgraph=True), *problem))
        for run in runs:
            for name, a, b in zip(NAMES, first, run, strict=True):
                assert torch.equal(a, b), name

    def test_captured_with_its_backward(self):
        """A graph replayed with other tokens and another routing in its inputs gives what eager calls give."""
        x, routing, parameters, grad_y = gpu_problem("cuda", torch.bfloat16)
        leaves = [each.detach().clone().requires_grad_() for each in (x, routing.weight, *parameters)]

        def run():
            y = experts(leaves[0], routing._replace(weight=leaves[1]), *leaves[2:], activation="gelu_tanh")
            return y, *torch.autograd.grad(y, leaves, grad_y)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        logits = torch.zeros(300, 5)
        logits[:, 1] = logits[:, 4] = 5
        _, other, _, _ = gpu_problem("cuda", torch.bfloat16, logits=logits)
        with torch.no_grad():
            leaves[0].mul_(-1.5)
            leaves[1].copy_(other.weight)
            routing.order.copy_(other.order)
            routing.offsets.copy_(other.offsets)
        graph.replay()
        for name, a, b in zip(NAMES, outputs, run(), strict=True):
            assert torch.equal(a, b), name

    def test_nothing_waits_for_the_device(self, no_wait):
        problem = gpu_problem("cuda", torch.bfloat16)
        by_autograd(through_the_op("gelu_tanh"), *problem)
        with no_wait():
            by_autograd(through_the_op("gelu_tanh"), *problem)


def test_the_gpu_checks_pass_where_they_can_run_here():
    """The body of the GPU tests on the CPU's implementation, so that it is the kernels that a GPU run tests."""
    check_on("cpu", torch.bfloat16, "swiglu", bias=False)
