"""Mask schedules of absorbing diffusion: how likely a token is masked, and what its score term weighs.

Time: u in [0, 1] is the progress of generation. u = 0 is pure noise (every token masked), u = 1 is clean data;
training draws u ~ U(0, 1), a sampler walks u from 0 to 1. The forward process of the papers runs the other way,
t = 1 - u. With m the probability that a token is masked at time t:

    a = 1 - m = exp(-sbar)                probability that it is not, sbar the total noise of SEDD
    r = a / m = 1 / expm1(sbar)           the ratio q(x0) / q(mask) that the score estimates
    w = sigma' r = (dm/dt) / m            weight of a masked position's score entropy

w is formed directly from m: at m -> 1, r -> 0 while sigma' -> infinity, and their product is lost.

Sources: Lou et al., SEDD (2024), for a, sbar, r and log-linear; Chang et al., MaskGIT (2022), for the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .._checks import expect_choice

LOG_LINEAR_EPS = 1e-3
_HALF_PI = math.pi / 2


@dataclass(frozen=True)
class Schedule:
    """A mask schedule m(u), decreasing from m(0) to m(1) = 0.

    Attributes:
        name: what `schedule` calls it.
    """

    name: str
    _mask_prob: Callable[[torch.Tensor], torch.Tensor]
    _score_weight: Callable[[torch.Tensor], torch.Tensor]

    def mask_prob(self, u: torch.Tensor, *, length: int | None = None) -> torch.Tensor:
        """Mask probability at progress `u`.

        Args:
            u: any shape, values in [0, 1].
            length: with it, the result is at least 1 / length: a sequence of `length` tokens with at least one masked
                position, as `noise` leaves it. The loss needs m > 0; its weight grows like 1 / m.

        Returns:
            float64, shape of `u`, relative error of a few roundings at both ends.
        """
        mask_prob = self._mask_prob(u.to(torch.float64))
        return mask_prob if length is None else mask_prob.clamp(min=1 / length)

    def score_weight(self, mask_prob: torch.Tensor) -> torch.Tensor:
        """w = (dm/dt) / m at mask probability m in (0, 1], as float64."""
        return self._score_weight(mask_prob.to(torch.float64))


def log_ratio(mask_prob: torch.Tensor) -> torch.Tensor:
    """log r = log((1 - m) / m) for m in (0, 1], as float64; -inf at m = 1."""
    mask_prob = mask_prob.to(torch.float64)
    return torch.log1p(-mask_prob) - torch.log(mask_prob)


def ratio(mask_prob: torch.Tensor) -> torch.Tensor:
    """r = (1 - m) / m for m in (0, 1], as float64; 0 at m = 1."""
    mask_prob = mask_prob.to(torch.float64)
    return (1 - mask_prob) / mask_prob


def _cosine(u: torch.Tensor) -> torch.Tensor:
    # cos(pi u / 2) cancels as u -> 1, where 1 - u is exact.
    return torch.where(u < 0.5, torch.cos(_HALF_PI * u), torch.sin(_HALF_PI * (1 - u)))


def _arccos(u: torch.Tensor) -> torch.Tensor:
    return ((2 / math.pi) * torch.acos(u)).clamp(max=1)  # u = 0 may round to above 1


_SCHEDULES = {
    each.name: each
    for each in (
        Schedule("cosine", _cosine, lambda m: _HALF_PI * torch.sqrt((1 - m) * (1 + m)) / m),
        Schedule("log_linear", lambda u: (1 - LOG_LINEAR_EPS) * (1 - u), lambda m: (1 - LOG_LINEAR_EPS) / m),
        Schedule("linear", lambda u: 1 - u, lambda m: 1 / m),
        Schedule("arccos", _arccos, lambda m: 1 / (_HALF_PI * m * torch.sin(_HALF_PI * m))),
    )
}


def schedule(name: str | Schedule) -> Schedule:
    """The mask schedule called `name`: "cosine" (MaskGIT, Show-o), "log_linear" (SEDD), "linear" or "arccos".

    A `Schedule` is returned as it is.

    Raises:
        ValueError: no schedule has this name.
    """
    if isinstance(name, Schedule):
        return name
    expect_choice(name, "schedule", tuple(_SCHEDULES))
    return _SCHEDULES[name]
