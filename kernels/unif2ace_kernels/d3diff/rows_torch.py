"""Torch implementation of the pass between the head's products: logits of some rows to loss terms and gradients.

Shapes: m rows of T, C columns of the softmax. With p = softmax(z), d = onehot(target), u = lse + shift and P = sum of p
over the codes, one row's loss and the gradient of its logits are

    a CE + b (e^u - 1 - u) + c P,        dl/dz = (a + b (e^u - 1)) p - a d + c p (1[code] - P)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .._dtypes import accumulation_dtype
from .objective import Coefficients

# e^u goes on as its tangent beyond this, in value and gradient alike, so that float32 neither overflows nor lies.
MAX_EXPONENT = 80.0


class RowTerms(NamedTuple):
    """Softmax statistics of rows, [m] each; p is [m, C], mass is P (0 where there are no codes)."""

    p: torch.Tensor
    ce: torch.Tensor
    lse: torch.Tensor
    mass: torch.Tensor
    hit: torch.Tensor


def row_terms_(z: torch.Tensor, target: torch.Tensor, codes: tuple[int, int]) -> RowTerms:
    """Statistics of logits z [m, C], targets and codes counted from column 0; p takes the memory of z."""
    top = z.amax(-1)
    at_target = z.gather(-1, target[:, None])[:, 0]
    p = torch.softmax(z, -1, out=z)
    # The largest p is 1 / sum(exp(z - top)) in [1 / C, 1]: its log never underflows, unlike log p_target.
    log_sum = -torch.log(p.amax(-1))
    mass = p[:, codes[0] : codes[1]].sum(-1)
    lse = torch.where(top == -torch.inf, top, top + log_sum)
    return RowTerms(p, (top - at_target) + log_sum, lse, mass, at_target >= top)


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
    """a CE + b (e^u - 1 - u) + c P, [m]; a row of weight 0 is 0 even where its terms are not finite."""
    loss = torch.where(row.ce == 0, 0, row.ce * terms.ce)
    if row.penalty is not None:
        loss = loss + torch.where(row.penalty == 0, 0, row.penalty * penalty(exponent(terms.lse, row.shift)))
    if row.mass is not None:
        loss = loss + torch.where(row.mass == 0, 0, row.mass * terms.mass)
    return loss


def logit_gradient_(terms: RowTerms, target: torch.Tensor, row: Coefficients, codes: tuple[int, int]) -> torch.Tensor:
    """dl/dz [m, C] in place of p; rows with a = 0 are 0, as b and c are multiples of a's parts."""
    slope = row.ce
    if row.penalty is not None:
        u = exponent(terms.lse, row.shift)
        slope = slope + row.penalty * torch.expm1(u.clamp(max=MAX_EXPONENT))
    outside = slope if row.mass is None else slope - row.mass * terms.mass
    p = terms.p
    if row.mass is not None:
        inside = outside + row.mass
        p[:, codes[0] : codes[1]].mul_(inside[:, None])
        p[:, : codes[0]].mul_(outside[:, None])
        p[:, codes[1] :].mul_(outside[:, None])
    else:
        p.mul_(outside[:, None])
    p.scatter_add_(1, target[:, None], -row.ce[:, None])
    return p.masked_fill_((row.ce == 0)[:, None], 0)


def rows_torch(
    z: torch.Tensor,
    bias: torch.Tensor | None,
    rows: torch.Tensor,
    targets: torch.Tensor,
    weights: Coefficients,
    ce: torch.Tensor,
    lse: torch.Tensor,
    mass: torch.Tensor,
    hit: torch.Tensor,
    grad_bias: torch.Tensor | None,
    start: int,
    codes: Sequence[int],
    gradient: bool,
) -> torch.Tensor:
    """The loss of rows `rows` [m] of T, a float64 scalar.

    z [m, C], their logits from column `start` without the bias, becomes their gradient if `gradient`, which is then
    added up into grad_bias [C]; the rows' places in ce, lse, mass and hit [T] are written.
    """
    dtype = accumulation_dtype(z.dtype)
    wide = z if z.dtype == dtype else z.to(dtype)
    if bias is not None:
        wide.add_(bias)
    target, local_codes = targets.index_select(0, rows) - start, code_columns(codes, start, weights.mass)
    row = weights.at(rows, dtype)
    terms = row_terms_(wide, target, local_codes)
    for out, value in zip((ce, lse, mass, hit), terms[1:], strict=True):
        out.index_copy_(0, rows, value)
    loss = row_losses(terms, row).sum(dtype=torch.float64)
    if gradient:
        g = logit_gradient_(terms, target, row, local_codes)
        if grad_bias is not None:
            grad_bias.add_(g.sum(0))
        if g is not z:
            z.copy_(g)
    return loss
