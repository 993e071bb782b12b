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

ALPHA, IGNORE = 0.01, -100


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
HEADS = [
    ("smoke", Head(4, 16, 32, 96, 40, 48), "made up, tiny", ("cpu", "cuda")),
    ("demo", Head(24, 64, 192, 1439, 414, 1024), "the demo's model, 24 faces a step", ("cpu", "cuda")),
    ("paper-2x256", Head(2, 256, **SHOWO), "Show-o's head, 2 images of 256 tokens", ("cpu", "cuda")),
    ("paper-16x256", Head(16, 256, **SHOWO), "Show-o's head, 16 images of 256 tokens", ("cuda",)),
    ("paper-16x1024", Head(16, 1024, **SHOWO), "Show-o's head, 16 images of 1,024 tokens", ("cuda",)),
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


def row_weights(targets: Tensor, mask_prob: Tensor) -> Tensor:
    """Weight of each masked row's cross entropy: 1 / M + alpha w / B, w = m'/m of the cosine schedule."""
    masked = targets != IGNORE
    w = math.pi / 2 * torch.sqrt(1 - mask_prob**2) / mask_prob
    return (1 / masked.sum() + ALPHA / len(mask_prob) * w[:, None]).expand(targets.shape)[masked]


def _contenders(size: Head, full: bool, targets: Tensor, mask_prob: Tensor) -> Mapping[str, object]:
    """Functions of (hidden, weight, bias) that give the loss; `full`: the softmax runs over the vocabulary."""
    first, end = (0, size.V) if full else size.codes
    objective = d3diff.Objective(code_range=size.codes, alpha=ALPHA, normalizer="full" if full else "slice")

    def select() -> tuple[Tensor, Tensor, Tensor]:
        """Positions, labels and weights of the masked rows."""
        masked = targets != IGNORE
        return masked.flatten().nonzero()[:, 0], targets[masked] - first, row_weights(targets, mask_prob)

    def ours(hidden, weight, bias) -> Outputs:
        return (d3diff.loss(hidden, weight, bias, targets, mask_prob, objective=objective)[0],)

    def full_logits(hidden, weight, bias) -> Outputs:
        """Show-o's way: float32 logits of every row over the vocabulary, then the columns that are needed."""
        logits = F.linear(hidden, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))[..., first:end].flatten(0, 1)
        labels = torch.where(targets == IGNORE, IGNORE, targets - first).flatten()
        ce = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
        return ((ce[labels != IGNORE] * row_weights(targets, mask_prob)).sum(),)

    def sliced(hidden, weight, bias, index, labels, weights) -> Outputs:
        logits = F.linear(hidden.flatten(0, 1)[index], weight[first:end], bias[first:end])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return ((F.cross_entropy(logits, labels, reduction="none") * weights).sum(),)

    def masked_slice(hidden, weight, bias) -> Outputs:
        """Logits of the masked rows and the needed columns, kept for the backward."""
        return sliced(hidden, weight, bias, *select())

    fast_sliced = compiled(sliced)

    def masked_slice_compiled(hidden, weight, bias) -> Outputs:
        return fast_sliced(hidden, weight, bias, *select())

    def linear_cross_entropy(hidden, weight, bias) -> Outputs:
        index, labels, weights = select()
        ce = F.linear_cross_entropy(
            hidden.flatten(0, 1)[index], weight[first:end], labels, linear_bias=bias[first:end], reduction="none"
        )
        return ((ce * weights).sum(),)

    def chunked(hidden, weight, bias) -> Outputs:
        """torch's chunked path takes no row weights: the mean, the same work."""
        index, labels, _ = select()
        return (F.linear_cross_entropy(
            hidden.flatten(0, 1)[index], weight[first:end], labels, linear_bias=bias[first:end],
            options=torch.nn.LinearCrossEntropyOptions(),
        ),)  # fmt: skip

    return {
        "ours": ours,
        "full logits": full_logits,
        "masked slice": masked_slice,
        "compiled": masked_slice_compiled,
        "linear_cross_entropy": linear_cross_entropy,
        "chunked": chunked,
    }


def _peers(contenders: Mapping, inputs: list[Tensor], mode: str, seeds: list[Tensor]) -> dict[str, Baseline]:
    def baseline(function, **kind: bool) -> Baseline:
        return Baseline(bind(function, inputs, mode, seeds), **kind)

    peers = {
        "full float32 logits, CE": baseline(contenders["full logits"]),
        "masked rows, sliced logits": baseline(contenders["masked slice"]),
        "torch.compile, sliced logits": baseline(contenders["compiled"], compiles=True),
    }
    absent = Baseline(None, missing=f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy")
    there = hasattr(F, "linear_cross_entropy")
    peers["F.linear_cross_entropy"] = baseline(contenders["linear_cross_entropy"]) if there else absent
    peers["F.linear_cross_entropy, chunked"] = (
        baseline(contenders["chunked"], rate_only=True)
        if hasattr(torch.nn, "LinearCrossEntropyOptions")
        else Baseline(None, missing=f"torch {torch.__version__} has no torch.nn.LinearCrossEntropyOptions")
    )
    return peers


def _loss_work(size: Head, full: bool, dtype: torch.dtype, mode: str, device: torch.device) -> Work:
    targets, mask_prob = _batch(size, device)
    inputs, seeds = _parameters(size, dtype, device), [torch.ones((), device=device)]
    contenders = _contenders(size, full, targets, mask_prob)
    return Work(
        ours=bind(contenders["ours"], inputs, mode, seeds),
        baselines=_peers(contenders, inputs, mode, seeds),
        error=error_against(truth_of(contenders["masked slice"], inputs, mode, seeds)),
        tolerance=TOLERANCE[dtype],
    )


def _next_token_work(size: Head, dtype: torch.dtype, mode: str, device: torch.device) -> Work:
    inputs, seeds = _parameters(size, dtype, device), [torch.ones((), device=device)]
    labels = torch.randint(size.first, (size.B, size.N), device=device)
    labels[:, : size.N // 2] = IGNORE  # the question; the loss is on the answer

    def select() -> tuple[Tensor, Tensor]:
        answer = labels != IGNORE
        return answer.flatten().nonzero()[:, 0], labels[answer]

    def ours(hidden, weight, bias) -> Outputs:
        return (d3diff.next_token_loss(hidden, weight, bias, labels)[0],)

    def full_logits(hidden, weight, bias) -> Outputs:
        logits = F.linear(hidden, weight, bias).flatten(0, 1)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return (F.cross_entropy(logits, labels.flatten(), ignore_index=IGNORE),)

    def sliced(hidden, weight, bias, index, kept) -> Outputs:
        logits = F.linear(hidden.flatten(0, 1)[index], weight, bias)
        return (F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), kept),)

    def masked_slice(hidden, weight, bias) -> Outputs:
        return sliced(hidden, weight, bias, *select())

    fast_sliced = compiled(sliced)

    def masked_slice_compiled(hidden, weight, bias) -> Outputs:
        return fast_sliced(hidden, weight, bias, *select())

    def linear_cross_entropy(hidden, weight, bias) -> Outputs:
        index, kept = select()
        return (F.linear_cross_entropy(hidden.flatten(0, 1)[index], weight, kept, linear_bias=bias),)

    def chunked(hidden, weight, bias) -> Outputs:
        index, kept = select()
        options = torch.nn.LinearCrossEntropyOptions()
        rows = hidden.flatten(0, 1)[index]
        return (F.linear_cross_entropy(rows, weight, kept, linear_bias=bias, options=options),)

    contenders = {"full logits": full_logits, "masked slice": masked_slice, "compiled": masked_slice_compiled,
                  "linear_cross_entropy": linear_cross_entropy, "chunked": chunked}  # fmt: skip
    return Work(
        ours=bind(ours, inputs, mode, seeds),
        baselines=_peers(contenders, inputs, mode, seeds),
        error=error_against(truth_of(masked_slice, inputs, mode, seeds)),
        tolerance=TOLERANCE[dtype],
    )


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
        ce = F.cross_entropy(rows.to(torch.promote_types(rows.dtype, torch.float32)), labels, reduction="none")
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


def _cases() -> Iterator[Case]:
    for shape, size, source, devices in HEADS:
        sizes = {"B": size.B, "N": size.N, "masked": size.masked, "D": size.D, "V": size.V, "codes": size.C}
        smoke = shape == "smoke"
        answers = size.B * (size.N - size.N // 2)
        common = (devices, smoke)
        for mode in (FORWARD, TRAINING):
            for dtype in (torch.float32,) if smoke else (torch.float32, torch.bfloat16):
                item = dtype.itemsize
                for full in (False, True):
                    columns = size.V if full else size.C
                    yield Case(
                        "d3diff.loss", f"{shape} {'full' if full else 'slice'}", sizes, source, mode, dtype,
                        size.flops(columns, mode), size.bytes(columns, mode, item),
                        lambda device, size=size, full=full, dtype=dtype, mode=mode: _loss_work(
                            size, full, dtype, mode, device), *common,
                    )  # fmt: skip
                yield Case(
                    "d3diff.next_token_loss", shape, {**sizes, "labelled": answers}, source, mode, dtype,
                    size.flops(size.V, mode, answers), size.bytes(size.V, mode, item, answers),
                    lambda device, size=size, dtype=dtype, mode=mode: _next_token_work(size, dtype, mode, device),
                    *common,
                )  # fmt: skip
                read = float(size.masked * size.C * item)
                written = 0.0 if mode == FORWARD else float(size.B * size.N * size.V * item)
                yield Case(
                    "d3diff.loss_from_logits", shape, sizes, source, mode, dtype, 0, read + written,
                    lambda device, size=size, dtype=dtype, mode=mode: _logits_work(size, dtype, mode, device),
                    *common,
                )  # fmt: skip
        yield Case(
            "d3diff.noise", shape, sizes, source, FORWARD, torch.int64, 0, 17.0 * size.B * size.N,
            lambda device, size=size: _noise_work(size, device), *common,
        )  # fmt: skip


CASES = list(_cases())
