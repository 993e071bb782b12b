"""What an objective comes to row by row: the weights of each row's terms in the loss and in its statistics."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from .objective import Coefficients, Objective
from .ops import row_weights_op
from .schedules import schedule


class RowWeights(NamedTuple):
    """What the rows of one task weigh, as float64 [T], or None where the reading has no such term.

    Attributes:
        valid: bool [T], rows with a label.
        number: how many, int64; share: 1 / max(number, 1), CE's weight in the mask term. Scalars.
        score: of CE in the score term (reduction included, alpha not), 0 in rows without a label; None: the task has
            no score term.
        penalty: of e^u - 1 - u, u = lse + shift; mass: of P. Both in the score term.
        constant: what the rows add to the score term without theta, a scalar.
    """

    valid: torch.Tensor
    number: torch.Tensor
    share: torch.Tensor
    score: torch.Tensor | None
    penalty: torch.Tensor | None
    shift: torch.Tensor | None
    mass: torch.Tensor | None
    constant: torch.Tensor | None

    def combined(self, ce_coef: float, alpha: float) -> Coefficients:
        """A, B, shift and C of the whole loss."""
        ce = ce_coef * self.share
        ce = ce.expand(self.valid.shape) if self.score is None else torch.add(ce, self.score, alpha=alpha)
        penalty = None if self.penalty is None else alpha * self.penalty
        mass = None if self.mass is None else alpha * self.mass
        return Coefficients(ce, penalty, self.shift, mass)


def row_weights(
    objective: Objective,
    valid: torch.Tensor,
    mask_prob: torch.Tensor,
    sample_id: torch.Tensor | None,
    columns: int,
) -> RowWeights:
    """Weights of T rows of which `valid` [T] have a label; C = `columns`.

    mask_prob [B]; sample_id [T], or None where each of the B samples has T / B rows in order.
    """
    m = mask_prob.detach().to(torch.float64)  # the backward has no gradient of it
    token_mean = objective.score_reduction == "token_mean"
    weight = 1 / m if objective.score == "bayes" else schedule(objective.schedule).score_weight(m)
    if objective.score == "paper" or objective.bayes_sigma:
        # w is 0 at m = 1 under cosine, sigma' is not.
        sigma = torch.where(m < 1, schedule(objective.schedule).score_weight(m) * m / (1 - m), torch.inf)
    if objective.score == "bayes" and objective.bayes_sigma:
        weight = sigma / m
    if objective.max_weight is not None:
        weight = weight.clamp(max=objective.max_weight)

    number, share, score = row_weights_op(valid, weight, sample_id, token_mean)
    penalty = shift = mass = constant = None
    if objective.score == "paper":
        # sigma' (1 - r sbar), sbar = -log(1 - m); r sbar -> 0 as m -> 1.
        r_sbar = -torch.special.xlogy(1 - m, 1 - m) / m
        constant = row_weights_op(valid, sigma * (1 - r_sbar), sample_id, token_mean)[2].sum()
    elif objective.score == "unnormalized":
        log_scale = -math.log(columns) if objective.log_scale is None else objective.log_scale
        penalty, shift = score, torch.full_like(score, log_scale)
    elif objective.score == "full_vocab":
        log_scale = 0.0 if objective.log_scale is None else objective.log_scale
        mass, constant = score * math.exp(log_scale), score.sum() * -(1 + log_scale)
    return RowWeights(valid, number, share, score, penalty, shift, mass, constant)


def mean_rows(valid: torch.Tensor) -> RowWeights:
    """Weights of T rows of which `valid` [T] have a label: their mean cross entropy alone, no score term."""
    number, share, _ = row_weights_op(valid, None, None, False)
    return RowWeights(valid, number, share, None, None, None, None, None)
