"""Shares and means with 95 % bootstrap intervals; what is measured on one face stays together when faces are drawn."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.stats import bootstrap

LEVEL, RESAMPLES = 0.95, 2000


class Estimate(NamedTuple):
    """A value and its interval.

    Attributes:
        value: of all. low, high: of 95 % of the resamples; None where there is one group and nothing to resample.
        size: how many numbers it is the mean of. groups: faces (or seeds) that were resampled.
    """

    value: float
    low: float | None
    high: float | None
    size: int
    groups: int


def mean(values: Sequence[float] | np.ndarray, groups: Sequence[Hashable] | None = None, seed: int = 0) -> Estimate:
    """Mean of `values` with its percentile interval, resampling whole groups.

    Args:
        groups: of each value, whose it is (a face's key); each value its own by default.

    Raises:
        ValueError: there is no value, or not a group for each.
    """
    numbers = np.asarray(values, np.float64)
    if numbers.ndim != 1 or not len(numbers):
        raise ValueError(f"values: expected at least one number, got shape {list(numbers.shape)}")
    if groups is not None and len(groups) != len(numbers):
        raise ValueError(f"groups: expected one for each of {len(numbers)} values, got {len(groups)}")
    places: dict[Hashable, int] = {}
    index = [places.setdefault(each, len(places)) for each in (range(len(numbers)) if groups is None else groups)]
    sums, counts = np.bincount(index, numbers), np.bincount(index).astype(float)
    value = float(numbers.mean())
    if len(sums) < 2:
        return Estimate(value, None, None, len(numbers), len(sums))
    if np.ptp(sums / counts) == 0:  # nothing varies, and scipy makes NaN of it
        return Estimate(value, value, value, len(numbers), len(sums))
    found = bootstrap(
        (sums, counts), lambda top, bottom, axis: top.sum(axis) / bottom.sum(axis), paired=True, vectorized=True,
        n_resamples=RESAMPLES, confidence_level=LEVEL, method="percentile", rng=np.random.default_rng(seed),
    ).confidence_interval  # fmt: skip
    return Estimate(value, float(found.low), float(found.high), len(numbers), len(sums))
