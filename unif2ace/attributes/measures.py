"""How good answers are, and how honest their probabilities: of one category, on faces that nothing was fitted to."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.stats import binomtest

BINS = 10


def scores(probabilities: np.ndarray, answers: np.ndarray, confidence: float) -> dict[str, Any]:
    """Measures of N faces.

    Args:
        probabilities: [N, K], rows of sum 1.
        answers: [N] the right values, in [0, K).
        confidence: an answer is given where it is at least so likely.

    Returns:
        faces; counts [K] of the right values; accuracy with its 95 % interval (Wilson); majority, what always saying
        the commonest value would reach; balanced, the mean of each value's recall, its standard error and chance, one
        over the number of values that occur; average_precision, the mean over values of what is under the curve of
        precision over recall; calibration_error, the mean over faces of how far confidence is from accuracy in its
        bin; bins of the reliability plot; answered, the share given; accuracy_answered (None: none was given).
    """
    values = probabilities.shape[1]
    counts = np.bincount(answers, minlength=values)
    likely, said = probabilities.max(1), probabilities.argmax(1)
    right = said == answers
    occurring = np.nonzero(counts)[0]
    recalls = np.array([right[answers == value].mean() for value in occurring])
    spread = np.array([recall * (1 - recall) / counts[value] for value, recall in zip(occurring, recalls)])
    interval = binomtest(int(right.sum()), len(right)).proportion_ci(method="wilson")
    bins = reliability(likely, right)
    given = likely >= confidence
    return {
        "faces": len(answers),
        "counts": counts.tolist(),
        "accuracy": float(right.mean()),
        "interval": [float(interval.low), float(interval.high)],
        "majority": float(counts.max() / counts.sum()),
        "balanced": float(recalls.mean()),
        "balanced_error": float(np.sqrt(spread.sum()) / len(occurring)),
        "chance": 1 / len(occurring),
        "average_precision": float(
            np.mean([average_precision(probabilities[:, value], answers == value) for value in occurring])
        ),
        "calibration_error": calibration_error(bins),
        "bins": bins,
        "answered": float(given.mean()),
        "accuracy_answered": float(right[given].mean()) if given.any() else None,
    }


def average_precision(score: np.ndarray, positive: np.ndarray) -> float:
    """sum over thresholds of (recall gained) x (precision there); faces of one score come in together.

    Args:
        score: [N]. positive: [N] bool, at least one of them.
    """
    order = np.argsort(-score, kind="stable")
    ends = np.append(np.nonzero(np.diff(score[order]))[0], len(score) - 1)  # the last face of each score
    found = np.cumsum(positive[order])[ends]
    precision, recall = found / (ends + 1), found / positive.sum()
    return float((np.diff(recall, prepend=0.0) * precision).sum())


def reliability(likely: np.ndarray, right: np.ndarray) -> list[dict[str, float]]:
    """Of BINS equal bins of probability that are not empty: mean probability, share right, faces."""
    place = np.minimum((likely * BINS).astype(int), BINS - 1)
    bins = []
    for each in np.unique(place):
        inside = place == each
        bins.append(
            {
                "confidence": float(likely[inside].mean()),
                "accuracy": float(right[inside].mean()),
                "faces": int(inside.sum()),
            }
        )
    return bins


def calibration_error(bins: list[dict[str, float]]) -> float:
    """Expected calibration error: |confidence - accuracy|, bins weighted by their faces."""
    total = sum(each["faces"] for each in bins)
    return sum(each["faces"] * abs(each["confidence"] - each["accuracy"]) for each in bins) / total
