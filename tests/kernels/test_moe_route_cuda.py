"""route in CUDA C++: on fibers over the edge grid, against float64 and the torch path; on a GPU, with Triton, below."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from cuda_on_cpu import execute
from route_cases import CASES, RouteCase, check

from unif2ace_kernels import _library
from unif2ace_kernels.moe import route_torch

# The order of unif2ace::Number.
NUMBERS = (
    torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8
)  # fmt: skip
SEEDS = (1, 2)  # threads in any order, and warps that run ahead


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a tensor from its first element to its last."""
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((reach if tensor.numel() else 0,), (1,))


def _bytes(tensor: torch.Tensor | None) -> tuple:
    """(bytes, type, stride, stride) of a tensor, which may be None."""
    if tensor is None:
        tensor = torch.zeros(0)
    strides = (*tensor.stride(), 0, 0)[:2]
    return _flat(tensor).contiguous().view(torch.uint8).numpy(), NUMBERS.index(tensor.dtype), *strides


def _on_fibers(seeds=SEEDS):
    def forward(logits, ids, sizes, top_k, shared, coefs, normalize, scoring, bias, z_coef):
        options = sizes, coefs, top_k, shared, normalize, scoring == "softmax", z_coef
        tensors = _bytes(logits), _bytes(ids), _bytes(bias)
        outputs = execute("route.cpp", "forward", *tensors, len(logits), *options, seeds=seeds)
        return tuple(map(torch.from_numpy, outputs))

    def backward(
        weight, probability, balance, z, logits, ids, expert, counts, sizes, top_k, coefs, normalize, scoring, z_coef
    ):
        scalars = ([] if each is None else [each.item()] for each in (balance, z if z_coef else None))
        options = sizes, coefs, top_k, expert.shape[1] - top_k, normalize, scoring == "softmax", z_coef
        flat = execute(
            "route.cpp", "backward", _bytes(weight), _bytes(probability), *scalars, _bytes(logits), _bytes(ids),
            expert.numpy(), counts.numpy(), len(logits), *options, logits.itemsize, seeds=seeds,
        )  # fmt: skip
        return torch.from_numpy(flat).view(logits.dtype).view(logits.shape)

    return forward, backward


# The others add no path through the kernels, only values.
QUICK = ("no token", "one token", "many blocks", "every expert", "many groups", "mix 100/0", "sigmoid, biased", "ties")
QUICK += ("raw weights", "NaN", "inf, sigmoid", "-inf", "int8 ids", "int32 ids, strided", "bfloat16, strided")


@pytest.mark.parametrize(
    "case",
    [case if case.name in QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES],
    ids=lambda case: case.name,
)
def test_on_fibers(case):
    if case.tokens == 60:  # more would only take longer: a block has 64, a warp 16
        case = replace(case, tokens=19)
    check(case, *_on_fibers(), alone=False)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_on_fibers_each_gradient_alone(scoring):
    check(RouteCase("alone", tokens=5, scoring=scoring), *_on_fibers(seeds=(1,)))


def test_on_fibers_ids_out_of_range_stay_in_bounds():
    logits, ids, *rest = RouteCase("bad ids").arguments()
    ids[3], ids[9], ids[20] = -1, 2, 2**62
    forward, backward = _on_fibers()
    outputs, clamped = forward(logits, ids, *rest), route_torch.forward(logits, ids.clamp(0, 1), *rest)
    for place in (1, 2, 3, 4):
        assert torch.equal(outputs[place], clamped[place])
    given = torch.ones(60, 3), None, torch.ones(()), None, logits, ids, *outputs[1:3]
    assert backward(*given, [3, 5], 2, [0.1, 0.1], True, "softmax", 0.0).isfinite().all()


@pytest.mark.slow
def test_on_fibers_many_columns():
    """Eight columns a lane, and 32."""
    for size in (200, 300):
        case = RouteCase("wide", tokens=3, sizes=(size, 3), top_k=3, mix=(1, 0))
        check(case, *_on_fibers(seeds=(1,)))


@pytest.mark.parametrize("blocks", [1, 256, 600])
def test_scan_on_fibers(blocks):
    """Of more blocks of tokens than a block has threads, whose memory is then used again."""
    random = np.random.default_rng(0)
    block_counts = random.integers(0, 500, (5, blocks)).astype(np.int32)
    block_sums = random.integers(0, 500, (4, blocks)).astype(np.float32)  # sums of any order are exact
    running, counts, sums = execute("route.cpp", "scan", block_counts, block_sums, seeds=(0, 1, 2, 4))
    np.testing.assert_array_equal(running, block_counts.cumsum(1) - block_counts)
    np.testing.assert_array_equal(counts, block_counts.sum(1))
    np.testing.assert_array_equal(sums, block_sums.sum(1))


def _on_gpu(name: str) -> tuple:
    """Forward and backward of the implementation "triton" or "cuda c++"."""
    found = []
    for op in ("moe_route", "moe_route_backward"):
        (candidate,) = (each for each in _library._IMPLEMENTATIONS[op] if each.name == name)
        if candidate.missing:
            pytest.skip(f"extension not built or Triton missing: {candidate.missing}")
        found.append(candidate.function)
    return tuple(found)


def _to_gpu(tensor: torch.Tensor) -> torch.Tensor:
    return _flat(tensor).cuda().as_strided(tensor.shape, tensor.stride())


def gpu(test):
    return pytest.mark.gpu(pytest.mark.parametrize("name", ["triton", "cuda c++"])(test))


@gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gpu(name, case):
    check(case, *_on_gpu(name), move=_to_gpu)


@gpu
def test_gpu_long_batch_is_that_of_the_cpu_and_the_same_on_every_run(name):
    forward, backward = _on_gpu(name)
    for sizes, top_k in [((64, 40), 4), ((8, 8), 2), ((256,), 8)]:
        arguments = RouteCase("long", tokens=70_001, sizes=sizes, top_k=top_k).arguments()
        moved = [_to_gpu(each) if isinstance(each, torch.Tensor) else each for each in arguments]
        plain, first, second = route_torch.forward(*arguments), forward(*moved), forward(*moved)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        for place in (1, 2, 3, 4):
            assert torch.equal(first[place].cpu(), plain[place])
        for place in (0, 5, 6, 7, 8):
            torch.testing.assert_close(first[place].cpu(), plain[place], rtol=1e-5, atol=1e-6)
        given = torch.randn_like(plain[0]), None, torch.tensor(1.0), torch.tensor(1.0), *arguments[:2], *plain[1:3]
        options = arguments[2], top_k, *arguments[5:8], arguments[9]
        on_gpu = [None if each is None else _to_gpu(each) for each in given]
        gradients = [backward(*on_gpu, *options) for _ in range(2)]
        assert torch.equal(*gradients)
        expected = route_torch.backward(*given, *options)
        torch.testing.assert_close(gradients[0].cpu(), expected, rtol=1e-5, atol=1e-6)


@gpu
def test_gpu_in_a_captured_graph_and_without_waiting(name, no_wait):
    forward, backward = _on_gpu(name)
    arguments = RouteCase("graph", tokens=300, sizes=(6, 11), top_k=3).arguments()
    moved = [_to_gpu(each) if isinstance(each, torch.Tensor) else each for each in arguments]
    grads = torch.ones(300, 4).cuda(), None, torch.ones((), device="cuda"), torch.ones((), device="cuda")
    options = arguments[2], 3, *arguments[5:8], arguments[9]

    def step() -> tuple:
        outputs = forward(*moved)
        return *outputs, backward(*grads, *moved[:2], outputs[1], outputs[2], *options)

    step()
    with no_wait():
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(2):
        moved[0].copy_(torch.randn(300, 17))
        moved[1].copy_(torch.randint(2, (300,)))
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
