"""Torch implementation of the fused head: loss and gradients of labelled rows, logits of one chunk at a time.

Shapes: T rows, M <= T of them labelled, D hidden, V vocabulary, C = end - start columns of the row's softmax.
With p = softmax(z), d = onehot(target), u = lse + shift and P = sum of p over the codes, one row's loss is

    a CE + b (e^u - 1 - u) + c P,        dl/dz = a (kappa p - d) + c p (1[code] - P),    kappa = 1 + (b / a)(e^u - 1)

The loss is a sum over rows, so its gradients are known as soon as the logits are: three matrix products in all,
with neither logits kept for the backward nor a second product to make them again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .objective import Coefficients

# Float32 logits of a chunk. With less, the sum for the weight's gradient passes over memory too often; more gains
# little (change it and run python -m benchmarks.run --op d3diff.loss).
CHUNK_BYTES = 16 << 20
MIN_CHUNK_ROWS = 128
# e^u goes on as its tangent beyond this, in value and gradient alike, so that float32 neither overflows nor lies.
MAX_EXPONENT = 80.0


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


class RowTerms(NamedTuple):
    """Softmax statistics of a chunk of rows, [M] each; p is [M, C], mass is P (0 where there are no codes)."""

    p: torch.Tensor
    ce: torch.Tensor
    lse: torch.Tensor
    mass: torch.Tensor
    hit: torch.Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_terms_(z: torch.Tensor, target: torch.Tensor, codes: tuple[int, int]) -> RowTerms:
    """Statistics of logits z [M, C], targets and codes counted from column 0; p takes the memory of z."""
    top = z.amax(-1)
    if z.device.type == "cpu" and bool(torch.isneginf(top).any()):
        raise ValueError("logits: expected a logit above -inf in every row, got a row of -inf")
    at_target = z.gather(-1, target[:, None])[:, 0]
    p = torch.softmax(z, -1, out=z)
    # The largest p is 1 / sum(exp(z - top)) in [1 / C, 1]: its log never underflows, unlike log p_target.
    log_sum = -torch.log(p.amax(-1))
    mass = p[:, codes[0] : codes[1]].sum(-1)
    return RowTerms(p, (top - at_target) + log_sum, top + log_sum, mass, at_target >= top)


def code_columns(codes: Sequence[int], start: int, mass_weight: torch.Tensor | None) -> tuple[int, int]:
    """The codes counted from column `start`; none of them where P is not asked for."""
    return (0, 0) if mass_weight is None else (codes[0] - start, codes[1] - start)


def exponent(lse: torch.Tensor, shift: torch.Tensor | None) -> torch.Tensor:
    """u = lse + shift."""
    return lse if shift is None else lse + shift


def penalty(u: torch.Tensor) -> torch.Tensor:
    """e^u - 1 - u >= 0, the tangent of e^u taken beyond MAX_EXPONENT."""
    low = u.clamp(max=MAX_EXPONENT)
    return torch.expm1(low) + torch.exp(low) * (u - low) - u


def row_losses(terms: RowTerms, row: Coefficients) -> torch.Tensor:
    """a CE + b (e^u - 1 - u) + c P, [M]; a row of weight 0 is 0 even where CE is infinite."""
    loss = torch.where(row.ce == 0, 0, row.ce * terms.ce)
    if row.penalty is not None:
        loss = loss + torch.where(row.penalty == 0, 0, row.penalty * penalty(exponent(terms.lse, row.shift)))
    if row.mass is not None:
        loss = loss + row.mass * terms.mass
    return loss


def logit_gradient_(
    terms: RowTerms, target: torch.Tensor, row: Coefficients, codes: tuple[int, int]
) -> torch.Tensor:
    """G / a [M, C] in place of p; rows with a = 0 are 0, as b and c are multiples of a's parts."""
    p, inverse = terms.p, torch.where(row.ce == 0, 0, 1 / row.ce)
    if row.penalty is not None:
        u = exponent(terms.lse, row.shift)
        kappa = 1 + row.penalty * inverse * torch.expm1(u.clamp(max=MAX_EXPONENT))
        p.mul_(kappa[:, None])
    if row.mass is not None:
        pull = row.mass * inverse
        inside = 1 + pull * (1 - terms.mass)
        outside = 1 - pull * terms.mass
        p[:, codes[0] : codes[1]].mul_(inside[:, None])
        p[:, : codes[0]].mul_(outside[:, None])
        p[:, codes[1] :].mul_(outside[:, None])
    return p.scatter_add_(1, target[:, None], p.new_full((), -1.0).expand(p.shape[0], 1))


def head_torch(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    group: torch.Tensor | None,
    ce_weight: torch.Tensor,
    penalty_weight: torch.Tensor | None,
    shift: torch.Tensor | None,
    mass_weight: torch.Tensor | None,
    starts: Sequence[int],
    ends: Sequence[int],
    codes: Sequence[int],
    ignore_index: int,
    compute_dtype: torch.dtype,
    grad_hidden: bool,
    grad_weight: bool,
    grad_bias: bool,
) -> HeadOutputs:
    """Torch implementation of `unif2ace::d3diff_head`; see ops.py for the arguments."""
    dtype = accumulation_dtype(compute_dtype)
    rows_total, features = hidden.shape
    first, columns = min(starts), max(ends) - min(starts)
    loss = hidden.new_zeros((), dtype=torch.float64)
    ce, lse, mass = (hidden.new_zeros(rows_total, dtype=dtype) for _ in range(3))
    hit = torch.zeros(rows_total, dtype=torch.bool, device=hidden.device)
    d_hidden = torch.zeros_like(hidden) if grad_hidden else hidden.new_empty(0)
    d_weight = hidden.new_zeros((columns, features) if grad_weight else 0, dtype=dtype)
    d_bias = hidden.new_zeros(columns if grad_bias else 0, dtype=dtype)
    any_grad = grad_hidden or grad_weight or grad_bias
    coefficients = Coefficients(ce_weight, penalty_weight, shift, mass_weight)

    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        labelled = targets != ignore_index if group is None else (targets != ignore_index) & (group == index)
        rows = labelled.nonzero()[:, 0]
        w = weight[start:end].to(compute_dtype)
        b = None if bias is None else bias[start:end].to(dtype)
        local_codes = code_columns(codes, start, mass_weight)
        for chunk, buffers in _chunks(rows, end - start, compute_dtype, dtype):
            x = hidden.index_select(0, chunk).to(compute_dtype)
            target = targets.index_select(0, chunk) - start
            row = coefficients.at(chunk, dtype)
            terms = row_terms_(_logits(x, w, b, buffers), target, local_codes)
            loss += row_losses(terms, row).sum(dtype=torch.float64)
            ce[chunk], lse[chunk], mass[chunk], hit[chunk] = terms.ce, terms.lse, terms.mass, terms.hit
            if not any_grad:
                continue
            g = logit_gradient_(terms, target, row, local_codes)
            if grad_bias:
                d_bias[start - first : end - first].addmv_(g.t(), row.ce)
            g = torch.mul(g, row.ce[:, None], out=g if buffers.low is None else buffers.low)
            if grad_hidden:
                d_hidden[chunk] = (g @ w).to(hidden.dtype)
            if grad_weight:
                part = d_weight[start - first : end - first]
                if part.dtype == compute_dtype:
                    part.addmm_(g.t(), x)
                else:
                    part += g.t() @ x
    return HeadOutputs(
        loss.to(dtype), ce, lse, mass, hit, d_hidden, d_weight.to(weight.dtype),
        d_bias if bias is None else d_bias.to(bias.dtype),
    )  # fmt: skip


class _Buffers(NamedTuple):
    """Chunk-sized [m, C] memory, allocated once: fresh pages for each chunk cost more than a pass over it."""

    z: torch.Tensor
    low: torch.Tensor | None


def _chunks(
    rows: torch.Tensor, columns: int, compute_dtype: torch.dtype, dtype: torch.dtype
) -> Iterator[tuple[torch.Tensor, _Buffers]]:
    total = rows.numel()
    if total == 0:
        return
    count = -(-total // max(MIN_CHUNK_ROWS, CHUNK_BYTES // (dtype.itemsize * columns)))
    size = -(-total // count)
    z = torch.empty(size, columns, dtype=dtype, device=rows.device)
    low = None if compute_dtype == dtype else torch.empty_like(z, dtype=compute_dtype)
    for begin in range(0, total, size):
        chunk = rows[begin : begin + size]
        m = chunk.numel()
        yield chunk, _Buffers(z[:m], None if low is None else low[:m])


def _logits(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None, buffers: _Buffers) -> torch.Tensor:
    """x w^T + b in the accumulation dtype; the product of half types is rounded to them before the bias."""
    if buffers.low is None:
        return torch.mm(x, w.t(), out=buffers.z) if b is None else torch.addmm(b, x, w.t(), out=buffers.z)
    torch.mm(x, w.t(), out=buffers.low)
    return buffers.z.copy_(buffers.low) if b is None else torch.add(buffers.low, b, out=buffers.z)
