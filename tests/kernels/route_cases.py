"""The edge grid of moe.route, and how any implementation's outputs are held against float64 and the torch path."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from unif2ace_kernels.moe import reference, route_torch

# Names and places of the floating outputs among an implementation's nine.
FLOATING = {"weight": 0, "frequency": 5, "probability": 6, "balance_loss": 7, "z_loss": 8}
EXACT = {"expert": 1, "counts": 2, "offsets": 3, "order": 4}
INF, NAN = float("inf"), float("nan")


@dataclass(frozen=True)
class RouteCase:
    """One call. mix: share of the tokens in each group; bad: value of the logits of a few tokens, or "ties"."""

    name: str
    tokens: int = 60
    sizes: tuple[int, ...] = (3, 5)
    top_k: int = 2
    shared: int = 1
    mix: tuple[float, ...] | None = None
    scoring: str = "softmax"
    normalize: bool = True
    biased: bool = False
    z_coef: float = 0.1
    dtype: torch.dtype = torch.float32
    ids: torch.dtype = torch.int64
    bad: float | str | None = None
    strided: bool = False

    def logits(self) -> torch.Tensor:
        rng = torch.Generator().manual_seed(7)
        logits = torch.randn(self.tokens, sum(self.sizes), generator=rng)
        if self.bad == "ties":
            logits = logits.round().clamp(-1, 1) * 0.5
            logits[::3] *= -0.0  # all of a row's scores are equal, and -0 is 0
        elif self.bad == "one expert":
            logits[:, 1] += 50
        elif self.bad is not None:
            logits[4] = self.bad
            logits[11, 1::2] = self.bad
            if self.bad != self.bad:  # a NaN may have a sign, and is the largest all the same
                logits[11, 1:4:2] = -self.bad
        logits = logits.to(self.dtype)
        if self.strided:  # neither stride is 1
            logits = torch.stack([logits.t(), logits.t() + 1], -1)[..., 0].t()
        return logits

    def arguments(self) -> tuple:
        """(logits, group_ids, sizes, top_k, shared, coefs, normalize, scoring, selection_bias, z_coef), on the CPU."""
        rng = torch.Generator().manual_seed(8)
        shares = torch.tensor(self.mix or (1,) * len(self.sizes)).float()
        ids = torch.multinomial(shares, max(self.tokens, 1), replacement=True, generator=rng)[: self.tokens]
        if self.strided:
            ids = torch.stack([ids, ids], 1)[:, 0]
        bias = torch.randn(sum(self.sizes), generator=rng) if self.biased else None
        coefs = [0.3 + 0.2 * g for g in range(len(self.sizes))]
        return (
            self.logits(), ids.to(self.ids), list(self.sizes), self.top_k, self.shared, coefs, self.normalize,
            self.scoring, bias, self.z_coef,
        )  # fmt: skip


CASES = [
    RouteCase("no token", tokens=0),
    RouteCase("one token", tokens=1),
    RouteCase("seven tokens", tokens=7, dtype=torch.bfloat16),
    RouteCase("many blocks", tokens=300, sizes=(7, 6), top_k=3),
    RouteCase("many columns", tokens=33, sizes=(33, 70), top_k=4, shared=2),
    RouteCase("every expert", sizes=(5, 5), top_k=5),
    RouteCase("16 experts", tokens=9, sizes=(8, 8), shared=0),  # a power of two: one offset more than fits it
    RouteCase("one group", tokens=150, sizes=(12,), top_k=1, shared=0),
    RouteCase("many groups", sizes=(1, 3, 2, 9, 4, 1, 6), top_k=1, shared=1),
    RouteCase("top 16", sizes=(24, 17), top_k=16, shared=0, z_coef=0.0),
    RouteCase("all on one expert", sizes=(4, 4), top_k=1, bad="one expert"),
    RouteCase("mix 100/0", mix=(1, 0)),
    RouteCase("mix 0/100", mix=(0, 1), scoring="sigmoid"),
    RouteCase("mix 90/10", mix=(0.9, 0.1), tokens=200),
    RouteCase("raw weights", normalize=False),
    RouteCase("sigmoid", scoring="sigmoid", normalize=False, z_coef=0.0),
    RouteCase("sigmoid, biased", scoring="sigmoid", biased=True, sizes=(8, 8), top_k=4),
    RouteCase("softmax, biased", biased=True),
    RouteCase("ties", bad="ties", sizes=(8, 8), top_k=3),
    RouteCase("ties of sigmoid", bad="ties", scoring="sigmoid", biased=False, sizes=(8, 9), top_k=3),
    RouteCase("NaN", bad=NAN),
    RouteCase("NaN, sigmoid", bad=NAN, scoring="sigmoid"),
    RouteCase("NaN, biased", bad=NAN, biased=True),
    RouteCase("inf", bad=INF),
    RouteCase("inf, sigmoid", bad=INF, scoring="sigmoid", z_coef=0.0),
    RouteCase("inf, biased", bad=INF, biased=True),
    RouteCase("-inf", bad=-INF),
    RouteCase("-inf, sigmoid", bad=-INF, scoring="sigmoid"),
    RouteCase("huge", bad=3e38, biased=True),
    RouteCase("int8 ids", ids=torch.int8, dtype=torch.float16),
    RouteCase("uint8 ids", ids=torch.uint8),
    RouteCase("int32 ids, strided", ids=torch.int32, strided=True),
    RouteCase("bfloat16, strided", dtype=torch.bfloat16, strided=True, scoring="sigmoid"),
]


def assert_within(actual: torch.Tensor, plain: torch.Tensor, truth: torch.Tensor, name: str) -> None:
    """The error of `actual` is at most twice that of `plain`, plus a tiny constant; neither is finite alone."""
    actual, plain = actual.detach().cpu().double(), plain.double()
    assert actual.shape == plain.shape, name
    finite = plain.isfinite()
    assert torch.equal(actual.isfinite(), finite), f"{name}: finite elsewhere"
    truth = torch.where(truth.isfinite(), truth, plain)  # the equations divide 0 by 0 where all scores underflow
    ours, theirs = ((each - truth)[finite].abs() for each in (actual, plain))
    if finite.any():
        of_order_1 = truth[finite].abs().max().clamp(min=1)
        assert ours.max() <= 2 * theirs.max() + 1e-6 * of_order_1, f"{name}: {ours.max()} against {theirs.max()}"


def _truth(arguments: tuple, cotangents: tuple[torch.Tensor, ...]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The reference's outputs and the gradient of the logits, in float64."""
    logits, ids, sizes, top_k, _, coefs, normalize, scoring, bias, z_coef = arguments
    exact = logits.double().requires_grad_()
    bias = None if bias is None else bias.double()
    options = {"normalize": normalize, "scoring": scoring, "selection_bias": bias, "z_coef": z_coef}
    truth = reference.route(exact, ids.long(), sizes, top_k, balance_coef=coefs, **options)
    weight, balance, z = (each.double() for each in cotangents)
    objective = (truth["weight"] * weight[:, :top_k]).sum() + truth["balance_loss"] * balance + truth["z_loss"] * z
    gradient = torch.autograd.grad(objective, exact)[0] if len(logits) else torch.zeros_like(exact)
    return {name: each.detach() for name, each in truth.items()}, gradient


def check(
    case: RouteCase, forward: Callable, backward: Callable, move: Callable = lambda each: each, alone: bool = True
) -> None:
    """Hold an implementation's forward and backward against float64 and the torch path.

    forward, backward: as route_torch's.
    move: takes the tensors among the arguments to their device.
    alone: whether each gradient is tried with the others None, too.
    """
    arguments = case.arguments()
    logits, ids, sizes, top_k, shared, coefs, normalize, scoring, _, z_coef = arguments
    plain = route_torch.forward(*arguments)
    ours = forward(*(move(each) if isinstance(each, torch.Tensor) else each for each in arguments))
    assert [(each.shape, each.dtype) for each in ours] == [(each.shape, each.dtype) for each in plain]
    rng = torch.Generator().manual_seed(9)
    # Expanded, as autograd gives them: no stride may be taken for granted.
    cotangents = (
        torch.randn(len(logits), 1, generator=rng).expand(-1, top_k + shared),
        torch.tensor(2.0),
        torch.tensor(3.0),
    )
    if case.tokens % 2 == 0:
        cotangents = torch.randn(len(logits), top_k + shared, generator=rng), *cotangents[1:]
    truth, gradient = _truth(arguments, cotangents)
    for name, place in EXACT.items():
        assert torch.equal(ours[place].cpu(), plain[place]), name
    if case.bad is None or isinstance(case.bad, str):
        assert torch.equal(ours[1][:, :top_k].cpu(), truth["expert"]), "expert is not the reference's"
    for name, place in FLOATING.items():
        exact = truth[name]
        if name == "weight":
            exact = torch.cat([exact, torch.ones(len(logits), shared)], 1)
        assert_within(ours[place], plain[place], exact, name)

    options = sizes, top_k, coefs, normalize, scoring, z_coef
    given = cotangents[0], None, *cotangents[1:], logits, ids, plain[1], plain[2]
    by_torch = route_torch.backward(*given, *options)
    by_ours = backward(*(None if each is None else move(each) for each in given), *options)
    assert by_ours.dtype == logits.dtype and by_ours.is_contiguous()
    assert_within(by_ours, by_torch, gradient, "gradient")
    for one in range(4 if alone else 0):
        only = [None] * 4
        only[one] = (*cotangents[:1], torch.linspace(-1, 1, 2 * sum(sizes))[::2], *cotangents[1:])[one]
        by_torch = route_torch.backward(*only, *given[4:], *options)
        moved = (None if each is None else move(each) for each in (*only, *given[4:]))
        by_ours = backward(*moved, *options).cpu()
        assert torch.equal(by_ours.isfinite(), by_torch.isfinite())
        rounding = 2.0**-7 if case.dtype != torch.float32 else 2e-6
        torch.testing.assert_close(by_ours, by_torch, rtol=rounding, atol=2e-6, equal_nan=True)


class ZerosMade(TorchDispatchMode):
    """Elements of each tensor of zeros that torch makes meanwhile, such as gradients of outputs that nothing reads."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function.name() in ("aten::zeros", "aten::zeros_like", "aten::new_zeros"):
            self.sizes.append(made.numel())
        return made


class Called(TorchDispatchMode):
    """What each call of an op, "namespace::name", returned meanwhile."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.results = name, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.name() == self.name:
            self.results.append(result)
        return result
