"""Torch implementation of the loss of ready logits; it keeps the logits and a few numbers a row for the backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .._dtypes import accumulation_dtype
from .objective import Coefficients
from .rows_torch import RowTerms, code_columns, logit_gradient_, row_losses, row_terms_


def logits_torch(
    logits: torch.Tensor,
    targets: torch.Tensor,
    ce_weight: torch.Tensor,
    penalty_weight: torch.Tensor | None,
    shift: torch.Tensor | None,
    mass_weight: torch.Tensor | None,
    start: int,
    end: int,
    codes: Sequence[int],
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Torch implementation of `unif2ace::d3diff_logits`: loss, and ce, lse, mass, hit of each row of logits [T, V]."""
    dtype = accumulation_dtype(logits.dtype)
    ce, lse, mass = (logits.new_zeros(logits.shape[0], dtype=dtype) for _ in range(3))
    hit = torch.zeros(logits.shape[0], dtype=torch.bool, device=logits.device)
    rows = (targets != ignore_index).nonzero()[:, 0]
    if rows.numel() == 0:
        return logits.new_zeros((), dtype=dtype), ce, lse, mass, hit
    z = logits[:, start:end].index_select(0, rows).to(dtype)
    terms = row_terms_(z, targets.index_select(0, rows) - start, code_columns(codes, start, mass_weight))
    ce[rows], lse[rows], mass[rows], hit[rows] = terms.ce, terms.lse, terms.mass, terms.hit
    row = Coefficients(ce_weight, penalty_weight, shift, mass_weight).at(rows, dtype)
    return row_losses(terms, row).sum(dtype=torch.float64).to(dtype), ce, lse, mass, hit


def logits_backward_torch(
    grad_loss: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    ce_weight: torch.Tensor,
    penalty_weight: torch.Tensor | None,
    shift: torch.Tensor | None,
    mass_weight: torch.Tensor | None,
    lse: torch.Tensor,
    mass: torch.Tensor,
    start: int,
    end: int,
    codes: Sequence[int],
    ignore_index: int,
) -> torch.Tensor:
    """Torch implementation of `unif2ace::d3diff_logits_backward`: the gradient of the logits [T, V]."""
    dtype = accumulation_dtype(logits.dtype)
    gradient = logits.new_zeros(logits.shape)
    rows = (targets != ignore_index).nonzero()[:, 0]
    if rows.numel() == 0:
        return gradient
    lse, mass = lse.index_select(0, rows), mass.index_select(0, rows)
    p = logits[:, start:end].index_select(0, rows).to(dtype).sub_(lse[:, None]).exp_()
    terms = RowTerms(p, lse, lse, mass, lse)
    row = Coefficients(ce_weight, penalty_weight, shift, mass_weight).at(rows, dtype)
    local_codes = code_columns(codes, start, mass_weight)
    g = logit_gradient_(terms, targets.index_select(0, rows) - start, row, local_codes)
    gradient[rows, start:end] = (g * grad_loss).to(logits.dtype)
    return gradient
