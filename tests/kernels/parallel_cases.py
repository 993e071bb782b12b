"""Mixtures whose experts are spread over ranks, and how they are held to those of one process."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.distributed as dist

from unif2ace_kernels import moe

D, F = 6, 4


class Case(NamedTuple):
    """Tokens of each rank; experts; slots of a token; which experts they choose."""

    tokens: tuple[int, ...]
    experts: int
    slots: int
    choice: str = "any"
    activation: str = "gelu_tanh"
    bias: bool = True


CASES = {
    "uneven experts, uneven tokens": Case((7, 5), 5, 2),
    "no tokens on one rank": Case((0, 6), 4, 2),
    "no tokens at all": Case((0, 0), 4, 2),
    "one token": Case((0, 1, 0), 6, 3),
    "all to the first rank": Case((5, 4, 3), 7, 2, "first"),
    "all to the last rank": Case((5, 4, 3), 7, 1, "last"),
    "one expert has all": Case((5, 4, 3), 6, 1, "last"),
    "an expert twice": Case((5, 4), 5, 4, "repeated"),
    "every expert": Case((3, 4), 5, 5, "all"),
    "a rank without experts": Case((5, 4, 3), 4, 2),
    "fewer experts than ranks": Case((5, 0, 3), 2, 2, activation="swiglu"),
    "one expert": Case((5, 2, 3), 1, 1, bias=False),
    "swiglu": Case((6, 7, 5), 8, 3, activation="swiglu"),
    "without biases": Case((6, 5), 5, 2, bias=False),
    "swiglu without biases": Case((6, 0, 5), 6, 2, activation="swiglu", bias=False),
    "shared slots": Case((6, 7, 5), 9, 3, "groups"),
    "one rank alone": Case((6,), 5, 2),
}


class Problem(NamedTuple):
    """All ranks' tokens and all experts, float64, the same on each rank."""

    x: list[torch.Tensor]
    logits: list[torch.Tensor]
    parameters: list[torch.Tensor | None]
    grad: list[torch.Tensor]


def problem(case: Case, dtype=torch.float64) -> Problem:
    generator = torch.Generator().manual_seed(len(case.tokens) + 10 * case.experts)
    width = F * (2 if case.activation == "swiglu" else 1)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    held = case.experts
    w_in, w_out = normal(held, D, width) / D**0.5, normal(held, F, D) / F**0.5
    b_in, b_out = (normal(held, width), normal(held, D)) if case.bias else (None, None)
    return Problem(
        [normal(t, D) for t in case.tokens], [normal(t, held).double() for t in case.tokens],
        [w_in, b_in, w_out, b_out], [normal(t, D) for t in case.tokens],
    )  # fmt: skip


def routed(case: Case, logits: torch.Tensor) -> moe.Routing:
    """As the case chooses; by `route` with two groups and a shared expert each, or by hand."""
    if case.choice == "groups":  # 4 + 3 routed experts and a shared one each
        groups = torch.arange(len(logits)) % 2
        return moe.route(logits[:, :7], groups, (4, 3), case.slots - 1, shared=1, balance_coef=0.1)
    weight, expert = logits.sigmoid().topk(case.slots)
    expert = expert.clone()  # autograd keeps the other
    if case.choice == "first":
        expert = expert % min(case.slots, -(-case.experts // len(case.tokens)))
    elif case.choice == "last":
        expert = torch.full_like(expert, case.experts - 1)
    elif case.choice == "repeated":
        expert[:, 1:] = expert[:, :1]
    return moe.arrange(expert, weight, case.experts)


def leaves(tensors):
    return [None if each is None else each.detach().clone().requires_grad_() for each in tensors]


def alone(case: Case, given: Problem):
    """y and the gradients of x, the logits and the parameters by `moe.experts` on all ranks' tokens."""
    x, logits, parameters = leaves(given.x), leaves(given.logits), leaves(given.parameters)
    ys = []
    for each, logit in zip(x, logits):  # a routing a rank, as its router makes it
        ys.append(moe.experts(each, routed(case, logit), *parameters, activation=case.activation))
    sum((y * grad).sum() for y, grad in zip(ys, given.grad)).backward()
    return ys, [each.grad for each in x], [each.grad for each in logits], gradients(parameters)


def gradients(parameters):
    return [None if each is None else each.grad for each in parameters]


def together(case: Case, given: Problem, group, run=None):
    """The same of this rank's tokens and experts by `moe.parallel_experts`, called by `run`."""
    rank, own = dist.get_rank(group), moe.local_experts(case.experts, group)
    x, logits = leaves([given.x[rank], given.logits[rank]])
    parameters = leaves([None if each is None else each[own] for each in given.parameters])
    routing = routed(case, logits)
    call = functools.partial(moe.parallel_experts, activation=case.activation, group=group)
    y = call(x, routing, *parameters) if run is None else run(call, x, routing, *parameters)
    (y * given.grad[rank]).sum().backward()
    return y, x.grad, logits.grad, gradients(parameters)


def assert_equal_to_one_process(case, group, run=None, tolerance=1e-12):
    given, rank = problem(case), dist.get_rank(group)
    y, x, logits, parameters = together(case, given, group, run)
    want_y, want_x, want_logits, want = alone(case, given)
    own = moe.local_experts(case.experts, group)
    close = functools.partial(torch.testing.assert_close, rtol=0, atol=tolerance)
    close(y.detach(), want_y[rank].detach())
    close(x, want_x[rank])
    close(logits, want_logits[rank])
    for got, exact in zip(parameters, want):
        assert (got is None) == (exact is None)
        if exact is not None:
            close(got, exact[own])
