"""How far two sets of pictures are apart, from their features: Fréchet's distance and the kernel distance.

Fréchet's (FID; Heusel et al., 2017)   |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), means and covariances
Kernel (KID; Binkowski et al., 2018)   the unbiased squared maximum mean discrepancy of k(x, y) = (x.y / d + 1)^3

Both are of [N, D] features, whatever made them, in float64. With S = F' F the trace of the root is the sum of the
singular values of F_1 F_2', and of N < D pictures F has N rows: no D x D root is taken of a few pictures, which is what
makes resampling affordable. Equal to torchmetrics and to scipy's matrix root (tests).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

RESAMPLES, FEW_RESAMPLES, MANY = 100, 20, 1000  # resamples of a bootstrap; fewer of many pictures
Distance = Callable[[np.ndarray, np.ndarray], float]


def frechet(first: np.ndarray, second: np.ndarray) -> float:
    """Fréchet's distance of two Gaussians with the sets' means and (unbiased) covariances.

    It falls with the number of pictures: compare only values of equal numbers.

    Raises:
        ValueError: fewer than two rows, or other columns in the one than in the other.
    """
    _check(first, second)
    (mean, factor), (other_mean, other_factor) = _moments(first), _moments(second)
    root = np.linalg.svd(factor @ other_factor.T, compute_uv=False).sum()
    apart = ((mean - other_mean) ** 2).sum()
    return float(apart + (factor**2).sum() + (other_factor**2).sum() - 2 * root)


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and a factor F [at most D, D] of the covariance F' F."""
    x = x.astype(np.float64)
    mean = x.mean(0)
    factor = (x - mean) / np.sqrt(len(x) - 1)
    return mean, np.asarray(np.linalg.qr(factor, mode="r")) if len(x) > x.shape[1] else factor


def kid(first: np.ndarray, second: np.ndarray) -> float:
    """The unbiased squared MMD of all of both sets; below zero by chance where they are alike.

    Raises:
        ValueError: as `frechet`.
    """
    _check(first, second)
    first, second = first.astype(np.float64), second.astype(np.float64)

    def within(x: np.ndarray) -> float:
        kernel = _kernel(x, x)
        return float((kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1)))

    return within(first) + within(second) - 2 * float(_kernel(first, second).mean())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _check(first: np.ndarray, second: np.ndarray) -> None:
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise ValueError(f"features: expected two of [at least 2, D], got {list(first.shape)} and {list(second.shape)}")


def spread(
    distance: Distance, first: np.ndarray, second: np.ndarray, seed: int = 0, resamples: int | None = None
) -> float:
    """The bootstrap's standard error of a distance: both sets drawn anew with replacement.

    Its resamples lie above the distance itself, since a picture that is drawn twice takes the place of another; only
    their spread is used.
    """
    rng = np.random.default_rng(seed)
    if resamples is None:
        resamples = RESAMPLES if max(len(first), len(second)) <= MANY else FEW_RESAMPLES
    drawn = [
        distance(first[rng.integers(len(first), size=len(first))], second[rng.integers(len(second), size=len(second))])
        for _ in range(resamples)
    ]
    return float(np.std(drawn, ddof=1))
