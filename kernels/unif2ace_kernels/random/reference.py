"""Gumbel noise in float64: the truth."""

from __future__ import annotations

import torch

from .._philox import random_words, uniform


def gumbel(seed: torch.Tensor, offset: torch.Tensor, rows: int, columns: int, stream: int) -> torch.Tensor:
    """float64 [rows, columns]: -log(-log1p(-u)), u = (word + 1/2) / 2**32 of the Philox words."""
    u = uniform(random_words(seed, offset, rows, columns, stream))
    return -torch.log(-torch.log1p(-u))
