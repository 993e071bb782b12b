"""Torch implementations around the loss of one task's rows: what they weigh, and the statistics told beside it."""

from __future__ import annotations

import torch

from .rows_torch import exponent, penalty


def row_weights_torch(
    valid: torch.Tensor, weight: torch.Tensor | None, sample_id: torch.Tensor | None, token_mean: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """number, share and score of `weights.RowWeights` from each sample's weight [B]; an empty score without it.

    The weight of a row is its sample's over the number of rows with a label, if `token_mean`, or of samples; 0 where
    `valid` [T] is not. sample_id [T]; None: each sample has T / B rows, in order.
    """
    number = valid.sum()
    share = number.clamp(min=1).to(torch.float64).reciprocal()
    if weight is None:
        return number, share, share.new_empty(0)
    samples = max(weight.numel(), 1)
    reduced = weight * (share if token_mean else 1 / samples)
    if sample_id is None:
        rows = reduced[:, None].expand(-1, valid.numel() // samples).reshape(-1)
    else:
        rows = reduced[sample_id]
    return number, share, torch.where(valid, rows, 0)


def statistics_torch(
    valid: torch.Tensor,
    share: torch.Tensor,
    score: torch.Tensor | None,
    penalty_weight: torch.Tensor | None,
    shift: torch.Tensor | None,
    mass_weight: torch.Tensor | None,
    constant: torch.Tensor | None,
    ce: torch.Tensor,
    lse: torch.Tensor,
    mass: torch.Tensor,
    hit: torch.Tensor,
    one_of_two: bool,
) -> torch.Tensor:
    """ce, score, score_constant, lse and accuracy of `losses.LossStats`, [5] in ce's dtype.

    The arguments are those of `weights.RowWeights` without the number, and the rows' terms; `one_of_two`: rows that
    are not `valid` may have a label of another task, otherwise their terms are 0.
    """
    if one_of_two:
        ce, lse, hit = (torch.where(valid, each, 0) for each in (ce, lse, hit))

    def total(weight: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        # A row of weight 0, as one without a label, is 0 even where its value is infinite.
        return torch.where(weight != 0, weight * value, 0).sum()

    sum_score = torch.zeros_like(share) if score is None else total(score, ce)
    if penalty_weight is not None:
        sum_score = sum_score + total(penalty_weight, penalty(exponent(lse, shift)))
    if mass_weight is not None:
        sum_score = sum_score + total(mass_weight, mass)
    constant = torch.zeros_like(share) if constant is None else constant
    return torch.stack([ce.sum() * share, sum_score, constant, lse.sum() * share, hit.sum() * share]).to(ce.dtype)
