"""Mixtures that the experts' Triton kernels are held to, and how they are compared: by the rule of twice the error."""

from __future__ import annotations

import torch

from unif2ace_kernels.moe import experts_triton, reference, route
from unif2ace_kernels.moe.activation_torch import GATED
from unif2ace_kernels.moe.configs import Launch

TINY = 1e-5
SMALL = Launch(16, 32, 16, 2, 1, 2)
NAMES = ("y", "x", "weight", "w_in", "b_in", "w_out", "b_out")


def small(*_sizes) -> Launch:
    return SMALL


def mixture(tokens, *, hidden=20, width=40, sizes=(2, 3), top_k=2, shared=1, activation="gelu_tanh", bias=True,
            logits=None, groups=None):  # fmt: skip
    """(x, routing, (w_in, b_in, w_out, b_out), grad_y) in float64, outputs of order 1."""
    rng = torch.Generator().manual_seed(0)
    double = {"dtype": torch.float64, "generator": rng}
    total, columns = sum(sizes) + shared * len(sizes), width * (2 if activation in GATED else 1)
    groups = torch.randint(len(sizes), (tokens,), generator=rng) if groups is None else groups
    logits = 2 * torch.randn(tokens, sum(sizes), **double) if logits is None else logits.double()
    routing = route(logits, groups, sizes, top_k, shared=shared)
    x, grad_y = (torch.randn(tokens, hidden, **double) for _ in range(2))
    w_in = torch.randn(total, hidden, columns, **double) / hidden**0.5
    w_out = torch.randn(total, width, hidden, **double) / width**0.5
    b_in, b_out = (torch.randn(total, size, **double) if bias else None for size in (columns, hidden))
    return x, routing, (w_in, b_in, w_out, b_out), grad_y


def cast(dtype, x, routing, parameters, grad_y):
    """The mixture in a dtype, the routing's weight in float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    to = [None if each is None else each.to(dtype) for each in (x, *parameters, grad_y)]
    return to[0], routing._replace(weight=routing.weight.detach().to(wide)), tuple(to[1:5]), to[5]


def by_autograd(function, x, routing, parameters, grad_y):
    """y and the gradients in the order of NAMES, through `function(x, routing, *parameters)`; zeros where unused."""
    leaves = [None if e is None else e.detach().clone().requires_grad_() for e in (x, routing.weight, *parameters)]
    y = function(leaves[0], routing._replace(weight=leaves[1]), *leaves[2:])
    y.backward(grad_y)
    grads = [None if e is None else torch.zeros_like(e) if e.grad is None else e.grad for e in leaves]
    return [y.detach(), *grads]


def in_torch(activation):
    return lambda x, routing, *parameters: reference.experts(
        x, routing.expert, routing.weight.to(x.dtype), *parameters, activation
    )


def in_triton(activation, x, routing, parameters, grad_y, choose=small):
    w_in, b_in, w_out, b_out = parameters
    where = routing.weight, routing.order, routing.offsets
    y, h = experts_triton.forward(x, *where, *parameters, activation, choose=choose)
    grads = experts_triton.backward(
        grad_y, x, h, *where, w_in, w_out, b_out, b_in is not None, activation, choose
    )  # fmt: skip
    assert (grads[3].shape[0] == 0) == (b_in is None) and (grads[5].shape[0] == 0) == (b_out is None)
    return [y, *(None if bias is None else g for g, bias in zip(grads, (x, x, w_in, b_in, w_out, b_out), strict=True))]


def assert_as_good(got, peer, exact):
    """err(ours) <= 2 err(torch in the same dtype) + tiny, both against float64."""
    for name, g, p, e in zip(NAMES, got, peer, exact, strict=True):
        assert (g is None) == (e is None), name
        if e is not None:
            assert g.shape == e.shape and g.dtype == p.dtype, name
        if e is not None and e.numel():
            assert (g.double() - e).abs().max() <= 2 * (p.double() - e).abs().max() + TINY, name


def check(activation, dtype, *problem, choose=small):
    exact = by_autograd(in_torch(activation), *problem)
    low = cast(dtype, *problem)
    got = in_triton(activation, *low, choose=choose)
    assert_as_good(got, by_autograd(in_torch(activation), *low), exact)


EDGES = {
    "no token": {"tokens": 0},
    "one token": {"tokens": 1},
    "seven tokens": {"tokens": 7},
    "every expert chosen": {"tokens": 9, "sizes": (3, 3), "top_k": 3},
    "one expert, one slot": {"tokens": 20, "sizes": (1,), "top_k": 1, "shared": 0},
    "one slot": {"tokens": 30, "sizes": (5,), "top_k": 1, "shared": 0},
    "a group without tokens": {"tokens": 20, "groups": torch.zeros(20).long()},
    "no bias": {"tokens": 20, "bias": False},
    "blocks divide all sizes": {"tokens": 32, "hidden": 32, "width": 64},
    "one beyond the blocks": {"tokens": 17, "hidden": 17, "width": 33, "sizes": (1,), "top_k": 1, "shared": 0},
    "odd sizes": {"tokens": 20, "hidden": 7, "width": 3, "sizes": (2, 3)},
    "many experts": {"tokens": 12, "sizes": (13, 20), "shared": 0, "hidden": 8, "width": 8},
    "all on one expert": {"tokens": 50, "sizes": (6,), "top_k": 1, "shared": 0,
                          "logits": torch.eye(6)[4].expand(50, 6), "hidden": 8, "width": 8},
    "Zipf": {"tokens": 60, "sizes": (11,), "shared": 0, "hidden": 8, "width": 8,
             "logits": torch.rand(60, 11, generator=torch.Generator().manual_seed(0)) - 2 * torch.arange(1, 12).log()},
}  # fmt: skip
