"""How far two sets of pictures are apart, from their features: Fréchet's distance and the kernel distance.

Fréchet's (FID; Heusel et al., 2017): |mu_1 - mu_2|^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)), means and covariances.
Kernel (KID; Binkowski et al., 2018): the unbiased squared maximum mean discrepancy of k(x, y) = (x.y / d + 1)^3.
Both are of float64 [N, D] features, whatever made them.
"""

from __future__ import annotations

import numpy as np


def kid(first: np.ndarray, second: np.ndarray) -> float:
    """The unbiased squared MMD of all of both sets; below zero by chance where they are alike.

    Raises:
        ValueError: fewer than two rows, or other columns in the one than in the other.
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise ValueError(f"features: expected two of [at least 2, D], got {list(first.shape)} and {list(second.shape)}")
    first, second = first.astype(np.float64), second.astype(np.float64)

    def within(x: np.ndarray) -> float:
        kernel = _kernel(x, x)
        return float((kernel.sum() - np.trace(kernel)) / (len(x) * (len(x) - 1)))

    return within(first) + within(second) - 2 * float(_kernel(first, second).mean())


def _kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[1] + 1) ** 3
