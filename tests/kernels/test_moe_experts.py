"""experts: values and gradients against float64, edges, locality, repeatability, and what torch asks of an op."""

import pytest
import torch
from unif2ace_kernels.moe import experts, reference, route
from unif2ace_kernels.moe.experts_torch import ACTIVATIONS, GATED

TINY = 1e-5


def make(
    tokens, sizes=(3, 5), top_k=2, shared=1, hidden=12, width=7, activation="gelu_tanh", bias=True, seed=0, groups=None
):
    """Routing and parameters of a small mixture in float64, outputs of order 1."""
    rng = torch.Generator().manual_seed(seed)
    total = sum(sizes) + shared * len(sizes)
    double = {"dtype": torch.float64, "generator": rng}
    if groups is None:
        groups = torch.randint(len(sizes), (tokens,), generator=rng)
    routing = route(2 * torch.randn(tokens, sum(sizes), **double), groups, sizes, top_k, shared=shared)
    in_width = width * (2 if activation in GATED else 1)
    x = torch.randn(tokens, hidden, **double)
    w_in = torch.randn(total, hidden, in_width, **double) / hidden**0.5
    b_in = torch.randn(total, in_width, **double) if bias else None
    w_out = torch.randn(total, width, hidden, **double) / width**0.5
    b_out = torch.randn(total, hidden, **double) if bias else None
    return x, routing, (w_in, b_in, w_out, b_out)


def outcome(function, dtype, x, weight, parameters, grad_y):
    """y and the gradients of x, weight and the parameters, all as float64."""
    leaves = [None if each is None else each.detach().to(dtype).requires_grad_() for each in (x, *parameters)]
    weight = weight.detach().clone().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    y = function(leaves[0], weight, *leaves[1:])
    y.backward(grad_y.to(dtype))
    return [y.detach().double()] + [each.grad.double() for each in (weight, *leaves) if each is not None]


def through_ours(routing, activation):
    return lambda x, weight, *parameters: experts(
        x, routing._replace(weight=weight), *parameters, activation=activation
    )


def through_reference(routing, activation):
    return lambda x, weight, *parameters: reference.experts(
        x, routing.expert, weight.to(x.dtype), *parameters, activation
    )


def assert_as_good(x, routing, parameters, activation, dtype):
    """err(ours) <= 2 err(same-dtype torch) + tiny, both against float64; each output and gradient of order 1."""
    torch.manual_seed(1)
    grad_y = torch.randn(x.shape, dtype=torch.float64)
    arguments = x, routing.weight, parameters, grad_y
    truth = outcome(through_reference(routing, activation), torch.float64, *arguments)
    peer = outcome(through_reference(routing, activation), dtype, *arguments)
    ours = outcome(through_ours(routing, activation), dtype, *arguments)
    for name, t, p, o in zip(("y", "weight", "x", "w_in", "b_in", "w_out", "b_out"), truth, peer, ours, strict=False):
        assert o.shape == t.shape
        assert (o - t).abs().max() <= 2 * (p - t).abs().max() + TINY, name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float32_values_and_gradients(activation, bias):
    assert_as_good(*make(50, activation=activation, bias=bias), activation, torch.float32)
