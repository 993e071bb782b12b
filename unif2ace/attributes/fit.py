"""Fitting a head: weights on one part of the faces, when to stop and the calibration on another, the rest only to test.

A face's part hangs on a hash of who it is of: one person is never on two sides, whatever else is in the set, and a face
keeps its side when the set grows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F

from unif2ace.attributes.head import AttributeHead
from unif2ace.attributes.labels import MISSING

TRAIN, VALIDATION, TEST = 0, 1, 2
PARTS = ("train", "validate", "test")
_PULL = 1e-3  # of the calibration towards none: the bias of a value that no face shows would run away


@dataclass(frozen=True)
class FitConfig:
    """Attributes:
    hidden: width of a hidden layer; 0: none.
    dropout: of features.
    balance: weigh classes by the inverse of their share, at most so much; 1: not at all.
    rate, decay: of AdamW. batch: faces of a step.
    epochs: at most. patience: stop after so many without a better loss on the validation faces.
    validation, test: shares of the people.
    seed: of weights, order and dropout.
    """

    hidden: int = 0
    dropout: float = 0.2
    balance: float = 10.0
    rate: float = 1e-3
    decay: float = 1e-2
    batch: int = 128
    epochs: int = 200
    patience: int = 20
    validation: float = 0.15
    test: float = 0.15
    seed: int = 0


def split(groups: Sequence[str], validation: float, test: float) -> np.ndarray:
    """[N] of TRAIN, VALIDATION, TEST: by a hash of each face's group."""
    place = [int.from_bytes(hashlib.sha256(each.encode()).digest()[:8], "big") / 2**64 for each in groups]
    return np.select([np.less(place, test), np.less(place, test + validation)], [TEST, VALIDATION], TRAIN)


def class_weights(values: np.ndarray, sizes: Sequence[int], largest: float) -> list[torch.Tensor]:
    """Of each category [K]: the inverse of a class's share, mean 1 over the faces, at most `largest`; 0 if never seen.

    Args:
        values: [N, C], MISSING where there is no answer.
    """
    weights = []
    for column, size in zip(values.T, sizes):
        counts = np.bincount(column[column != MISSING], minlength=size)
        share = counts.sum() / np.maximum(counts, 1) / max((counts > 0).sum(), 1)
        weights.append(torch.tensor(np.where(counts > 0, np.minimum(share, largest), 0.0), dtype=torch.float32))
    return weights


def loss(logits: Sequence[torch.Tensor], values: torch.Tensor, weights: Sequence[torch.Tensor]) -> torch.Tensor:
    """Mean over categories of the weighted cross-entropy of the faces [B, C] that have an answer."""
    terms = []
    for each, column, weight in zip(logits, values.T, weights):
        known = column != MISSING
        if known.any():
            terms.append((F.cross_entropy(each[known], column[known], reduction="none") * weight[column[known]]).mean())
    return torch.stack(terms).mean() if terms else logits[0].sum() * 0


def fit(
    head: AttributeHead,
    features: torch.Tensor,
    values: np.ndarray,
    parts: np.ndarray,
    config: FitConfig,
    step: Callable[[int, float, float], object] = lambda epoch, train, validation: None,
) -> list[tuple[float, float]]:
    """Train `head` in place, to its best epoch, and calibrate it.

    Args:
        features: [N, D]. values: [N, C], MISSING where there is no answer. parts: [N] as of `split`.
        step: called after each epoch with its number and the two losses.

    Returns:
        Loss on train and validation faces of each epoch.
    """
    answers = torch.from_numpy(values).long()
    weights = class_weights(values[parts == TRAIN], head.sizes, config.balance)
    rows, held = (torch.from_numpy(np.nonzero(parts == part)[0]) for part in (TRAIN, VALIDATION))
    head.mean.copy_(features[rows].mean(0))
    head.scale.copy_(features[rows].std(0).clamp(min=1e-6))
    order = torch.Generator().manual_seed(config.seed)
    torch.manual_seed(config.seed)  # dropout's
    optimizer = torch.optim.AdamW(head.parameters(), config.rate, weight_decay=config.decay)
    best, best_state, waited, losses = float("inf"), head.state_dict(), 0, []
    for epoch in range(config.epochs):
        head.train()
        total = 0.0
        for chosen in rows[torch.randperm(len(rows), generator=order)].split(config.batch):
            value = loss(head(features[chosen]), answers[chosen], weights)
            optimizer.zero_grad()
            value.backward()
            optimizer.step()
            total += value.item() * len(chosen)
        head.eval()
        with torch.no_grad():
            losses.append((total / len(rows), loss(head(features[held]), answers[held], weights).item()))
        step(epoch, *losses[-1])
        waited += 1
        if losses[-1][1] < best:
            best, waited = losses[-1][1], 0
            best_state = {name: each.clone() for name, each in head.state_dict().items()}
        if waited >= config.patience:
            break
    head.load_state_dict(best_state)
    calibrate(head, features[held], answers[held])
    return losses


def calibrate(head: AttributeHead, features: torch.Tensor, answers: torch.Tensor) -> None:
    """Fit the sharpness and the biases of each category to faces [N, D] and their answers [N, C]."""
    with torch.no_grad():
        logits = head(features)
    biases = head.bias.split(head.sizes)
    for category, (each, column) in enumerate(zip(logits, answers.T)):
        known = column != MISSING
        if known.any():
            head.sharpness[category], fitted = _calibration(each[known], column[known])
            biases[category].copy_(fitted)


def _calibration(logits: torch.Tensor, answers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Sharpness and biases [K] under which `answers` [N] are likeliest, given logits [N, K]."""
    sharpness, bias = torch.zeros((), requires_grad=True), torch.zeros(logits.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([sharpness, bias], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(logits * sharpness.exp() + bias, answers)
        value = value + _PULL * (sharpness.square() + bias.square().sum())
        value.backward()
        return value

    optimizer.step(closure)
    return sharpness.detach(), bias.detach()
