"""The fused head: loss and gradients of labelled rows, logits of one chunk of rows at a time.

Shapes: T rows, M <= T of them labelled, D hidden, V vocabulary, C = end - start columns of the row's softmax.
The loss is a sum over rows whose weights are known beforehand, so its gradients are known as soon as the logits are:
three matrix products in all, with neither logits kept for the backward nor a second product to make them again.
csrc/d3diff/head.cpp is the same for the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .._dtypes import accumulation_dtype
from .objective import Coefficients
from .rows_torch import rows_torch

# Logits of a chunk: these bytes, which stay in cache and cost few fresh pages, or where that is more a share of the
# bytes of the weight's gradient in the dtype of accumulation, over which each chunk passes once. Change them and run
# python -m benchmarks.run --op d3diff.loss.
CHUNK_BYTES = 8 << 20
CHUNK_SHARE_OF_WEIGHT = 2


class HeadLoss(NamedTuple):
    """What loss the op is asked for, after hidden, weight and bias.

    In the order of the op's schema, so that an implementation takes ``*arguments`` and makes ``HeadLoss(*arguments)``.

    Attributes:
        targets: int64 [T]. group: int64 [T], which span of columns a row's softmax takes; None: there is one.
        ce_weight, penalty_weight, shift, mass_weight: of the rows, [T] in the dtype of accumulation.
        starts, ends: of each group's columns. codes: start and end of those whose probabilities P sums.
        ignore_index: the target of a row without a label. compute_dtype: of the products.
        grad_hidden, grad_weight, grad_bias: which gradients are made.
    """

    targets: torch.Tensor
    group: torch.Tensor | None
    ce_weight: torch.Tensor
    penalty_weight: torch.Tensor | None
    shift: torch.Tensor | None
    mass_weight: torch.Tensor | None
    starts: Sequence[int]
    ends: Sequence[int]
    codes: Sequence[int]
    ignore_index: int
    compute_dtype: torch.dtype
    grad_hidden: bool
    grad_weight: bool
    grad_bias: bool

    @property
    def weights(self) -> Coefficients:
        return Coefficients(self.ce_weight, self.penalty_weight, self.shift, self.mass_weight)

    @property
    def gradients(self) -> tuple[bool, bool, bool]:
        """Which of hidden, weight and bias get one."""
        return self.grad_hidden, self.grad_weight, self.grad_bias

    @property
    def first(self) -> int:
        """The first column of any row."""
        return min(self.starts)

    @property
    def columns(self) -> int:
        """How many there are from `first` to the last of any row."""
        return max(self.ends) - self.first

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of accumulation."""
        return accumulation_dtype(self.compute_dtype)


class HeadOutputs(NamedTuple):
    """What the op returns; the last three are empty when their gradient is not asked for.

    Attributes:
        loss: scalar, float32 (float64 when computed in float64).
        ce, lse, mass: [T], 0 in rows without a label; `mass` is P where it is asked for, else 0.
        hit: bool [T], whether the target has the row's largest logit.
        grad_hidden: [T, D], in hidden's dtype; grad_weight: [columns of any row, D], in weight's; grad_bias likewise.
    """

    loss: torch.Tensor
    ce: torch.Tensor
    lse: torch.Tensor
    mass: torch.Tensor
    hit: torch.Tensor
    grad_hidden: torch.Tensor
    grad_weight: torch.Tensor
    grad_bias: torch.Tensor


def head_torch(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *arguments: Any) -> HeadOutputs:
    """Torch implementation of `unif2ace::d3diff_head`."""
    asked = HeadLoss(*arguments)
    dtype, targets, first = asked.dtype, asked.targets, asked.first
    rows_total = hidden.shape[0]
    loss = hidden.new_zeros((), dtype=torch.float64)
    ce, lse, mass = (hidden.new_zeros(rows_total, dtype=dtype) for _ in range(3))
    hit = torch.zeros(rows_total, dtype=torch.bool, device=hidden.device)
    d_hidden = hidden.new_zeros(hidden.shape) if asked.grad_hidden else hidden.new_empty(0)
    d_weight = _WeightGradient(weight, asked.columns if asked.grad_weight else 0, dtype)
    d_bias = hidden.new_zeros(asked.columns if asked.grad_bias else 0, dtype=dtype)

    for index, (start, end) in enumerate(zip(asked.starts, asked.ends, strict=True)):
        labelled = targets != asked.ignore_index
        rows = (labelled if asked.group is None else labelled & (asked.group == index)).nonzero()[:, 0]
        inside = slice(start - first, end - first)
        w = weight[start:end].to(asked.compute_dtype)
        b = None if bias is None else bias[start:end].to(dtype).contiguous()
        only = len(asked.starts) == 1
        for chunk, z in _chunks(rows, w):
            x = (hidden if chunk.numel() == rows_total else hidden.index_select(0, chunk)).to(asked.compute_dtype)
            torch.mm(x, w.t(), out=z)
            loss += rows_torch(
                z, b, chunk, targets, asked.weights, ce, lse, mass, hit, d_bias[inside] if asked.grad_bias else None,
                start, asked.codes, any(asked.gradients),
            )  # fmt: skip
            if asked.grad_hidden:
                d_hidden.index_copy_(0, chunk, torch.mm(z, w).to(hidden.dtype))
            if asked.grad_weight:
                d_weight.add(z, x, inside, whole=only and chunk.numel() == rows.numel())
    return HeadOutputs(
        loss.to(dtype), ce, lse, mass, hit, d_hidden, d_weight.result(),
        d_bias if bias is None else d_bias.to(bias.dtype),
    )  # fmt: skip


class _WeightGradient:
    """Sum of g^T x over chunks: [C, D] in the accumulation dtype, or at once in the weight's for a single chunk."""

    def __init__(self, weight: torch.Tensor, columns: int, dtype: torch.dtype) -> None:
        self._weight, self._columns, self._dtype = weight, columns, dtype
        self._sum: torch.Tensor | None = None

    def add(self, g: torch.Tensor, x: torch.Tensor, rows: slice, *, whole: bool) -> None:
        """Add g^T x [C', D] to its `rows`; `whole`: this is all there is to add, and `rows` are all rows."""
        if whole:
            self._sum = torch.mm(g.t(), x)
            return
        if self._sum is None:
            self._sum = self._weight.new_zeros(self._columns, x.shape[1], dtype=self._dtype)
        if g.dtype == self._dtype:
            self._sum[rows].addmm_(g.t(), x)
        else:
            self._sum[rows] += torch.mm(g.t(), x)

    def result(self) -> torch.Tensor:
        """In the weight's dtype."""
        if self._sum is None:
            return self._weight.new_zeros((self._columns, self._weight.shape[1]) if self._columns else 0)
        return self._sum.to(self._weight.dtype)


def _chunks(rows: torch.Tensor, w: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Rows of a chunk and memory [m, C] for their logits, allocated once: fresh pages cost more than a pass."""
    total = rows.numel()
    if total == 0:
        return
    share = w.numel() * accumulation_dtype(w.dtype).itemsize // CHUNK_SHARE_OF_WEIGHT
    size = max(1, max(CHUNK_BYTES, share) // (w.element_size() * w.shape[0]))
    size = -(-total // -(-total // size))
    z = w.new_empty(size, w.shape[0])
    for begin in range(0, total, size):
        chunk = rows[begin : begin + size]
        yield chunk, z[: chunk.numel()]
