"""What a user would otherwise run for the cross entropy of a language-model head over some rows and columns."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..case import FORWARD, Baseline, Outputs, bind, compiled

IGNORE = -100
Contender = Callable[..., Outputs]


@dataclass(frozen=True)
class Rows:
    """The rows that have a label.

    Attributes:
        index: their places among the B N rows, [M]; labels: counted from the first column, [M].
        weights: of each row's cross entropy [M]; None: their mean.
    """

    index: Tensor
    labels: Tensor
    weights: Tensor | None

    def reduce(self, ce: Tensor) -> Outputs:
        return (ce.mean() if self.weights is None else (ce * self.weights).sum(),)


@dataclass(frozen=True)
class Problem:
    """A head's cross entropy over the columns [first, end) of the vocabulary.

    Attributes:
        select: finds the rows, as a part of the work.
        labels: [B, N] tokens, IGNORE where there is none.
        inputs: hidden [B, N, D], weight [V, D], bias [V].
    """

    select: Callable[[], Rows]
    labels: Tensor
    columns: tuple[int, int]
    inputs: Sequence[Tensor]
    mode: str
    seeds: Sequence[Tensor]

    def bind(self, contender: Contender, *, without_bias: bool = False, **kind: bool) -> Baseline:
        inputs = self.inputs[:-1] if without_bias else self.inputs
        return Baseline(bind(contender, inputs, self.mode, self.seeds), **kind)

    def of_rows(self, function: Callable[..., Tensor]) -> Contender:
        """`function` of the labelled rows' (hidden [M, D], weight [C, D], bias [C], labels [M]) -> CE [M], reduced."""
        first, end = self.columns

        def contender(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Outputs:
            rows = self.select()
            x = hidden.flatten(0, 1)[rows.index]
            columns = None if bias is None else bias[first:end]
            return rows.reduce(function(x, weight[first:end], columns, rows.labels))

        return contender

    def mean_of_rows(self, function: Callable[..., Tensor]) -> Contender:
        """Likewise with a function that gives the mean: one that takes no weights of rows."""
        first, end = self.columns

        def contender(hidden: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
            rows = self.select()
            x = hidden.flatten(0, 1)[rows.index]
            return (function(x, weight[first:end], bias[first:end], rows.labels),)

        return contender

    def full_logits(self, hidden: Tensor, weight: Tensor, bias: Tensor) -> Outputs:
        """Show-o's way: float32 logits of every row over the vocabulary, and their cross entropy."""
        labels = self.labels.flatten()
        logits = at_least_float32(F.linear(hidden, weight, bias)).flatten(0, 1)
        ce = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
        return self.select().reduce(ce[labels != IGNORE])

    @property
    def is_full(self) -> bool:
        return self.columns == (0, self.inputs[1].shape[0])


def at_least_float32(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def sliced_ce(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy [M] of materialised logits."""
    return F.cross_entropy(at_least_float32(F.linear(x, weight, bias)), labels, reduction="none")


def package(name: str) -> ModuleType | str:
    """The module `name`, or why it cannot be imported."""
    try:
        return __import__(name, fromlist=["_"])
    except Exception as error:  # a package for another device may raise anything when it is imported
        return f"{name.partition('.')[0]} cannot be imported: {type(error).__name__}: {error}"


def peers(problem: Problem) -> dict[str, Baseline]:
    """Every way that is known to get the loss, or the reason why it is missing here."""
    return {
        # Over fewer columns than the vocabulary's it is another loss: what Show-o spends, not what it gives.
        "full float32 logits, CE": _full_logits(problem),
        "masked rows, sliced logits": problem.bind(problem.of_rows(sliced_ce)),
        "torch.compile, sliced logits": problem.bind(problem.of_rows(compiled(sliced_ce)), compiles=True),
        **_torch_peers(problem),
        "Liger fused linear CE": _liger(problem),
        "cut-cross-entropy": _cut_cross_entropy(problem),
    }


def _full_logits(problem: Problem) -> Baseline:
    hidden, weight = problem.inputs[:2]
    work = 2.0 * hidden[..., 0].numel() * weight.numel() * (1 if problem.mode == FORWARD else 3)
    if work > 1e12 and hidden.dtype == torch.float32 and not _on_gpu(hidden.device):
        return Baseline(None, missing=f"{work / 1e12:.1f} TFLOP in float32: ten seconds a call; bfloat16 has it")
    return problem.bind(problem.full_logits, rate_only=not problem.is_full)


def _torch_peers(problem: Problem) -> Mapping[str, Baseline]:
    names = ("F.linear_cross_entropy", "F.linear_cross_entropy, chunked", "F.linear_cross_entropy, one chunk")
    if not (hasattr(F, "linear_cross_entropy") and hasattr(torch.nn, "LinearCrossEntropyOptions")):
        why = f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy with its options"
        return dict.fromkeys(names, Baseline(None, missing=why))

    def plain(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return F.linear_cross_entropy(x, weight, labels, linear_bias=bias, reduction="none")

    def mean(**options: object) -> Contender:
        """With options it makes the gradients in the forward, for the mean alone: the same work but for weights."""
        chosen = torch.nn.LinearCrossEntropyOptions(**options)

        def chunked(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
            return F.linear_cross_entropy(x, weight, labels, linear_bias=bias, options=chosen)

        return problem.mean_of_rows(chunked)

    whole = {"chunking_method": None, "acc_policy": "compact"}
    contenders = problem.of_rows(plain), mean(), mean(**whole)
    return {
        name: problem.bind(contender, rate_only="chunk" in name)
        for name, contender in zip(names, contenders, strict=True)
    }


def _liger(problem: Problem) -> Baseline:
    if not _on_gpu(problem.labels.device):
        return Baseline(None, missing="Liger runs on GPUs alone")
    module = package("liger_kernel.transformers")
    if isinstance(module, str):
        return Baseline(None, missing=module)
    fused = module.LigerFusedLinearCrossEntropyLoss(reduction="mean")  # its gradients know no weights of rows

    def mean(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return fused(weight, x, labels, bias)

    return problem.bind(problem.mean_of_rows(mean), rate_only=True)


def _cut_cross_entropy(problem: Problem) -> Baseline:
    module = _cce_module(problem.labels.device)
    if isinstance(module, str):
        return Baseline(None, missing=module)
    loss = module.linear_cross_entropy

    def rows(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> Tensor:
        return loss(x, weight, labels, bias=bias, reduction="none")

    def rows_without_bias(x: Tensor, weight: Tensor, bias: None, labels: Tensor) -> Tensor:
        return loss(x, weight, labels, reduction="none")

    if has_bias(loss):
        return problem.bind(problem.of_rows(rows))
    # The released one: less work than was asked for, so a yardstick of speed.
    return problem.bind(problem.of_rows(rows_without_bias), without_bias=True, rate_only=True)


def has_bias(loss: Callable) -> bool:
    """Whether a cut_cross_entropy's loss takes one: 25.1.1 does not, later source does."""
    return "bias" in inspect.signature(loss).parameters


def cut_cross_entropy_with_lse(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]] | str:
    """(x, weight, bias, labels) -> (CE, lse) [M], differentiable both; or why there is none."""
    module = _cce_module(device)
    if isinstance(module, str):
        return module
    loss = module.linear_cross_entropy
    if not (has_bias(loss) and "return_lse" in inspect.signature(loss).parameters):
        return f"cut_cross_entropy {module.__version__} has no bias and no return_lse"

    def both(x: Tensor, weight: Tensor, bias: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return loss(x, weight, labels, bias=bias, reduction="none", return_lse=True)

    return both


def _cce_module(device: torch.device) -> ModuleType | str:
    return package("cut_cross_entropy") if _on_gpu(device) else "cut-cross-entropy runs on GPUs alone"


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"
