"""The D3Diff loss on the language-model head, the next-token loss beside it, the loss from logits, and the noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from unif2ace_kernels import d3diff

from ..case import FORWARD, TOLERANCE, TRAINING, Baseline, Case, Outputs, Work, bind, compiled, error_against, truth_of
from .heads import IGNORE, Problem, Rows, at_least_float32, cut_cross_entropy_with_lse, peers, sliced_ce

ALPHA = 0.01


@dataclass(frozen=True)
class Head:
    """Sizes: B samples of N image tokens, D hidden, V vocabulary with C codes from `first`."""

    B: int
    N: int
    D: int
    V: int
    first: int
    C: int

    @property
    def codes(self) -> tuple[int, int]:
        return self.first, self.first + self.C

    def mask_prob(self) -> Tensor:
        """Evenly spread times of the cosine schedule: the mean share of masked tokens is 2 / pi."""
        u = (torch.arange(self.B, dtype=torch.float64) + 0.5) / self.B
        return torch.cos(math.pi / 2 * u)

    @property
    def masked(self) -> int:
        return int((self.N * self.mask_prob()).round().clamp(min=1).sum())

    def flops(self, columns: int, mode: str, rows: int | None = None) -> float:
        product = 2.0 * (self.masked if rows is None else rows) * columns * self.D
        return product if mode == FORWARD else 3 * product

    def bytes(self, columns: int, mode: str, itemsize: int, rows: int | None = None) -> float:
        once = float(((self.masked if rows is None else rows) + columns) * self.D * itemsize)
        return once if mode == FORWARD else 2 * once  # hidden and weight in; their gradients out


SHOWO = {"V": 58498, "first": 50305, "C": 8192, "D": 2048}
BOTH, CUDA = ("cpu", "cuda"), ("cuda",)
HEADS = [
    ("smoke", Head(4, 16, 32, 96, 40, 48), "made up, tiny", BOTH),
    ("demo", Head(24, 64, 192, 1439, 414, 1024), "the demo's model, 24 faces a step", BOTH),
    ("paper-2x256", Head(2, 256, **SHOWO), "Show-o's head, 2 images of 256 tokens", CUDA),
    ("paper-16x256", Head(16, 256, **SHOWO), "Show-o's head, 16 images of 256 tokens", CUDA),
]
# Too much work for every op and mode: the loss over the codes, trained.
LARGE_HEADS = [
    ("paper-8x256", Head(8, 256, **SHOWO), "Show-o's head, 8 images of 256 tokens", BOTH),
    ("paper-64x256", Head(64, 256, **SHOWO), "Show-o's head, 64 images of 256 tokens", CUDA),
    ("paper-16x1024", Head(16, 1024, **SHOWO), "Show-o's head, 16 images of 1,024 tokens", CUDA),
    ("paper-64x1024", Head(64, 1024, **SHOWO), "Show-o's head, 64 images of 1,024 tokens", CUDA),
]


def _batch(size: Head, device: torch.device) -> tuple[Tensor, Tensor]:
    """targets [B, N] (a code where masked, else ignored) and m [B]; sample b has round(N m_b) masked tokens."""
    mask_prob = size.mask_prob()
    count = (size.N * mask_prob).round().clamp(min=1)
    masked = torch.rand(size.B, size.N).argsort(-1) < count[:, None]
    codes = torch.randint(*size.codes, (size.B, size.N))
    return torch.where(masked, codes, IGNORE).to(device), mask_prob.to(device)


def _parameters(size: Head, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """[hidden [B, N, D], weight [V, D], bias [V]], logits of order 1."""
    hidden = torch.randn(size.B, size.N, size.D, device=device)
    weight = torch.randn(size.V, size.D, device=device) * size.D**-0.5
    return [hidden.to(dtype), weight.to(dtype), (torch.randn(size.V, device=device) * 0.1).to(dtype)]


def score_weights(targets: Tensor, mask_prob: Tensor) -> Tensor:
    """alpha w / B of each masked row, w = m'/m of the cosine schedule."""
    w = math.pi / 2 * torch.sqrt(1 - mask_prob**2) / mask_prob
    return (ALPHA / len(mask_prob) * w[:, None]).expand(targets.shape)[targets != IGNORE]


def row_weights(targets: Tensor, mask_prob: Tensor) -> Tensor:
    """Weight of each masked row's cross entropy: 1 / M + alpha w / B."""
    return 1 / (targets != IGNORE).sum() + score_weights(targets, mask_prob)


def _ours(size: Head, targets: Tensor, mask_prob: Tensor, **options) -> Callable[[Tensor, Tensor, Tensor], Outputs]:
    objective = d3diff.Objective(code_range=size.codes, **{"alpha": ALPHA, **options})

    def ours(hidden: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
        return (d3diff.loss(hidden, weight, bias, targets, mask_prob, objective=objective)[0],)

    return ours


def _problem(
    size: Head, full: bool, targets: Tensor, mask_prob: Tensor, dtype: torch.dtype, mode: str, device: torch.device
) -> Problem:
    columns = (0, size.V) if full else size.codes

    def select() -> Rows:
        masked = targets != IGNORE
        return Rows(masked.flatten().nonzero()[:, 0], targets[masked] - columns[0], row_weights(targets, mask_prob))

    inputs, seeds = _parameters(size, dtype, device), [torch.ones((), device=device)]
    return Problem(select, targets, columns, inputs, mode, seeds)


def _work(problem: Problem, ours: Callable, baselines: Mapping[str, Baseline], truth: Callable) -> Work:
    dtype = problem.inputs[0].dtype
    return Work(
        ours=bind(ours, problem.inputs, problem.mode, problem.seeds),
        baselines=baselines,
        error=error_against(truth_of(truth, problem.inputs, problem.mode, problem.seeds)),
        tolerance=TOLERANCE[dtype],
    )


def _loss_work(size: Head, full: bool, dtype: torch.dtype, mode: str, device: torch.device) -> Work:
    targets, mask_prob = _batch(size, device)
    problem = _problem(size, full, targets, mask_prob, dtype, mode, device)
    normalizer = "full" if full else "slice"
    ours = _ours(size, targets, mask_prob, normalizer=normalizer)
    alone = problem.bind(_ours(size, targets, mask_prob, normalizer=normalizer, alpha=0), rate_only=True)
    return _work(problem, ours, {**peers(problem), "ours without the score term": alone}, problem.of_rows(sliced_ce))


def _unnormalized_work(size: Head, dtype: torch.dtype, mode: str, device: torch.device) -> Work:
    """The reading whose loss has the log-sum-exp beside the cross entropy."""
    targets, mask_prob = _batch(size, device)
    problem = _problem(size, False, targets, mask_prob, dtype, mode, device)
    first, end = size.codes

    def composed(function: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Tensor, Tensor, Tensor], Outputs]:
        def contender(hidden: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
            rows = problem.select()
            x = hidden.flatten(0, 1)[rows.index]
            ce, lse = function(x, weight[first:end], bias[first:end], rows.labels)
            u = lse - math.log(end - first)
            return ((rows.weights * ce + score_weights(targets, mask_prob) * (torch.expm1(u) - u)).sum(),)

        return contender

    def sliced(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = at_least_float32(F.linear(x, weight, bias))
        return F.cross_entropy(logits, labels, reduction="none"), logits.logsumexp(-1)

    cce = cut_cross_entropy_with_lse(device)
    baselines = {
        "masked rows, sliced logits": problem.bind(composed(sliced)),
        "torch.compile, sliced logits": problem.bind(composed(compiled(sliced)), compiles=True),
        "cut-cross-entropy, return_lse": Baseline(None, missing=cce)
        if isinstance(cce, str)
        else problem.bind(composed(cce)),
        "ours without the score term": problem.bind(_ours(size, targets, mask_prob, alpha=0), rate_only=True),
    }
    return _work(problem, _ours(size, targets, mask_prob, score="unnormalized"), baselines, composed(sliced))


def _next_token_work(size: Head, dtype: torch.dtype, mode: str, device: torch.device) -> Work:
    labels = torch.randint(size.first, (size.B, size.N), device=device)
    labels[:, : size.N // 2] = IGNORE  # the question; the loss is on the answer

    def select() -> Rows:
        answer = labels != IGNORE
        return Rows(answer.flatten().nonzero()[:, 0], labels[answer], None)

    def ours(hidden, weight, bias) -> Outputs:
        return (d3diff.next_token_loss(hidden, weight, bias, labels)[0],)

    inputs, seeds = _parameters(size, dtype, device), [torch.ones((), device=device)]
    problem = Problem(select, labels, (0, size.V), inputs, mode, seeds)
    return _work(problem, ours, peers(problem), problem.of_rows(sliced_ce))


def _logits_work(size: Head, dtype: torch.dtype, mode: str, device: torch.device) -> Work:
    targets, mask_prob = _batch(size, device)
    first, end = size.codes
    inputs = [torch.randn(size.B, size.N, size.V, device=device).to(dtype)]
    seeds = [torch.ones((), device=device)]
    objective = d3diff.Objective(code_range=size.codes, alpha=ALPHA)

    def ours(logits) -> Outputs:
        return (d3diff.loss_from_logits(logits, targets, mask_prob, objective=objective)[0],)

    def sliced(logits, index, labels, weights) -> Outputs:
        rows = logits.flatten(0, 1)[:, first:end][index]
        ce = F.cross_entropy(at_least_float32(rows), labels, reduction="none")
        return ((ce * weights).sum(),)

    def through(function) -> Callable[[Tensor], Outputs]:
        def cross_entropy(logits) -> Outputs:
            masked = targets != IGNORE
            index, weights = masked.flatten().nonzero()[:, 0], row_weights(targets, mask_prob)
            return function(logits, index, targets[masked] - first, weights)

        return cross_entropy

    return Work(
        ours=bind(ours, inputs, mode, seeds),
        baselines={
            "slice, cross_entropy": Baseline(bind(through(sliced), inputs, mode, seeds)),
            "torch.compile": Baseline(bind(through(compiled(sliced)), inputs, mode, seeds), compiles=True),
        },
        error=error_against(truth_of(through(sliced), inputs, mode, seeds)),
        tolerance=TOLERANCE[dtype],
    )


def _noise_work(size: Head, device: torch.device) -> Work:
    tokens = torch.randint(*size.codes, (size.B, size.N), device=device)
    mask_prob, mask_id = size.mask_prob().to(device), size.V - 1
    count = (size.N * mask_prob).round().clamp(min=1)

    def permutation() -> Outputs:
        mask = torch.rand(tokens.shape, device=device).argsort(-1) < count[:, None]
        return torch.where(mask, mask_id, tokens), mask

    def error(outputs: Outputs) -> float:
        """Other random numbers, the same law: round(N m) positions a row, replaced where masked and kept elsewhere."""
        noised, mask = outputs
        right = (mask.sum(-1) == count).all() and torch.equal(noised, torch.where(mask, mask_id, tokens))
        return 0.0 if right else math.inf

    return Work(
        ours=lambda: d3diff.noise(tokens, mask_prob, mask_id, seed=1, offset=2),
        baselines={"rand, argsort (Show-o)": Baseline(permutation)},
        error=error,
        tolerance=0.0,
    )


def loss_case(
    shape: str, size: Head, source: str, devices: tuple[str, ...], mode: str, dtype: torch.dtype, full: bool
) -> Case:
    columns = size.V if full else size.C
    return Case(
        "d3diff.loss", f"{shape} {'full' if full else 'slice'}", _sizes(size), source, mode, dtype,
        size.flops(columns, mode), size.bytes(columns, mode, dtype.itemsize),
        lambda device: _loss_work(size, full, dtype, mode, device), devices, shape == "smoke",
    )  # fmt: skip


def noise_case(shape: str, size: Head, source: str, devices: tuple[str, ...]) -> Case:
    return Case(
        "d3diff.noise", shape, _sizes(size), source, FORWARD, torch.int64, 0, 17.0 * size.B * size.N,
        lambda device: _noise_work(size, device), devices, shape == "smoke",
    )  # fmt: skip


def _sizes(size: Head) -> dict[str, int]:
    return {"B": size.B, "N": size.N, "masked": size.masked, "D": size.D, "V": size.V, "codes": size.C}


def _other_cases(
    shape: str, size: Head, source: str, devices: tuple[str, ...], mode: str, dtype: torch.dtype
) -> Iterator[Case]:
    """The other readings, entries and tasks."""
    item, common = dtype.itemsize, (devices, shape == "smoke")
    answers = size.B * (size.N - size.N // 2)
    yield Case(
        "d3diff.loss", f"{shape} unnormalized", _sizes(size), source, mode, dtype,
        size.flops(size.C, mode), size.bytes(size.C, mode, item),
        lambda device: _unnormalized_work(size, dtype, mode, device), *common,
    )  # fmt: skip
    yield Case(
        "d3diff.next_token_loss", shape, {**_sizes(size), "labelled": answers}, source, mode, dtype,
        size.flops(size.V, mode, answers), size.bytes(size.V, mode, item, answers),
        lambda device: _next_token_work(size, dtype, mode, device), *common,
    )  # fmt: skip
    written = 0.0 if mode == FORWARD else float(size.B * size.N * size.V * item)
    yield Case(
        "d3diff.loss_from_logits", shape, _sizes(size), source, mode, dtype, 0,
        float(size.masked * size.C * item) + written,
        lambda device: _logits_work(size, dtype, mode, device), *common,
    )  # fmt: skip


def _cases() -> Iterator[Case]:
    for shape, size, source, devices in HEADS:
        for mode in (FORWARD, TRAINING):
            for dtype in (torch.float32,) if shape == "smoke" else (torch.float32, torch.bfloat16):
                for full in (False, True):
                    yield loss_case(shape, size, source, devices, mode, dtype, full)
                yield from _other_cases(shape, size, source, devices, mode, dtype)
        yield noise_case(shape, size, source, devices)
    for shape, size, source, devices in LARGE_HEADS:
        for dtype in (torch.float32, torch.bfloat16) if "cpu" in devices else (torch.bfloat16,):
            yield loss_case(shape, size, source, devices, TRAINING, dtype, False)
        yield noise_case(shape, size, source, devices)


CASES = list(_cases())
