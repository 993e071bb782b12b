"""The D3Diff objective as data.

The loss of UniF2ace is ce_coef * (masked cross entropy) + alpha * (score entropy). Each reading of the score entropy
is, for a masked row, A CE + B (e^u - 1 - u) + C P plus a constant of theta, so one op serves them all:
weights.py turns a reading, a schedule and a reduction into the rows' A, B, C.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .._checks import expect, expect_choice, expect_pair
from .schedules import Schedule, schedule

READINGS = ("radd", "paper", "bayes", "unnormalized", "full_vocab")
REDUCTIONS = ("sum_per_sample", "token_mean")
NORMALIZERS = ("slice", "full")


@dataclass(frozen=True)
class Objective:
    """What the D3Diff loss is: ce_coef * CE + alpha * score entropy.

    Attributes:
        code_range: [start, end) of the image codes in the vocabulary.
        alpha: weight of the score term; 0 is "mask only".
        ce_coef: weight of the mask term; 0 is "score only".
        score: the reading, one of `READINGS` (table in the room's README).
        schedule: gives the score term's weight w = (dm/dt) / m; a name or a `Schedule`.
        score_reduction: "sum_per_sample" sums over a sample's masked tokens and averages over the B samples (SEDD);
            "token_mean" averages over all masked tokens. The mask term is always a token mean.
        normalizer: "slice" takes the softmax over `code_range`; "full" over the vocabulary (Show-o), where a target
            may be any token. `full_vocab` is "full" by its meaning, and a target must be a code all the same.
        max_weight: upper bound of the score term's row weight; None for none.
        log_scale: log(k / r), s_v = k e^{z_v} in `unnormalized` (None: -log of the number of columns, SEDD's scaling)
            and s_v = k p_v in `full_vocab` (None: 0).
        bayes_sigma: weigh `bayes` by sigma' / m instead of 1 / m.

    Raises:
        ValueError: an attribute outside its choices or range.
    """

    code_range: tuple[int, int]
    alpha: float = 0.01
    ce_coef: float = 1.0
    score: str = "radd"
    schedule: str | Schedule = "cosine"
    score_reduction: str = "sum_per_sample"
    normalizer: str = "slice"
    max_weight: float | None = None
    log_scale: float | None = None
    bayes_sigma: bool = False

    def __post_init__(self) -> None:
        expect_pair(self.code_range, "code_range")
        start, end = self.code_range
        expect(0 <= start < end, "code_range", "0 <= start < end", self.code_range)
        expect(self.alpha >= 0, "alpha", "a number >= 0", self.alpha)
        expect(self.ce_coef >= 0, "ce_coef", "a number >= 0", self.ce_coef)
        expect_choice(self.score, "score", READINGS)
        expect_choice(self.score_reduction, "score_reduction", REDUCTIONS)
        expect_choice(self.normalizer, "normalizer", NORMALIZERS)
        expect(self.max_weight is None or self.max_weight > 0, "max_weight", "None or a number > 0", self.max_weight)
        schedule(self.schedule)

    def columns(self, vocabulary: int) -> tuple[int, int]:
        """[start, end) of the columns that the softmax runs over."""
        start, end = self.code_range
        expect(end <= vocabulary, "code_range", f"end <= V = {vocabulary}", self.code_range)
        return (0, vocabulary) if self.normalizer == "full" or self.score == "full_vocab" else (start, end)

    def target_range(self, vocabulary: int) -> tuple[int, int]:
        """[start, end) of the tokens that may be targets."""
        return self.code_range if self.score == "full_vocab" else self.columns(vocabulary)


class Coefficients(NamedTuple):
    """Of rows whose loss is a CE + b (e^u - 1 - u) + c P, u = lse + shift; [T] each, None: no such term, no shift."""

    ce: torch.Tensor
    penalty: torch.Tensor | None
    shift: torch.Tensor | None
    mass: torch.Tensor | None

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Coefficients:
        """`function` of each that there is."""
        penalty, shift, mass = (None if each is None else function(each) for each in self[1:])
        return Coefficients(function(self.ce), penalty, shift, mass)

    def at(self, rows: torch.Tensor, dtype: torch.dtype) -> Coefficients:
        """Those of the rows at `rows` [M], in `dtype`."""
        return self.map(lambda each: each.index_select(0, rows).to(dtype))
