"""`unif2ace train-attributes`: pictures and a labels file to a head, tested on faces it has not seen, with a report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unif2ace import settings
from unif2ace.attributes import head as heads
from unif2ace.attributes.features import Features
from unif2ace.attributes.fit import PARTS, TEST, TRAIN, FitConfig, fit, split
from unif2ace.attributes.labels import MISSING, Labels, LabelsConfig, read_labels
from unif2ace.attributes.measures import scores
from unif2ace.errors import UserError
from unif2ace.files import write_json
from unif2ace.parsing import read_arrays
from unif2ace.pictures import decode

REPORT = "report.json"
_CHUNK = 256


@dataclass(frozen=True)
class TrainConfig:
    """Attributes:
    labels: see `LabelsConfig`.
    out: folder for the head and its report.
    images: folder of the pictures; not needed where the labels' file holds them.
    features: what the head stands on, see `Features`.
    framed: the pictures stand in the frame of this project's synthetic faces; identity encoders then search for none.
    cache: folder where an encoder's features are kept.
    device: where features are computed.
    confidence: the head is silent where its likeliest answer is less likely than this.
    fewest: faces that the second commonest value of a category must have among those to train on, or it is left out.
    max_corrupt: pictures that may be missing or unreadable.
    fit: see `FitConfig`.
    """

    labels: LabelsConfig
    out: str
    images: str | None = None
    features: str = "sface"
    framed: bool = False
    cache: str | None = None
    device: str = "cpu"
    confidence: float = 0.8
    fewest: int = 20
    max_corrupt: int = 100
    fit: FitConfig = FitConfig()

    def check(self) -> TrainConfig:
        """The config itself.

        Raises:
            UserError: a value is not possible; the message names its key.
        """
        need, fitting = partial(settings.need, self), self.fit
        need(0 <= self.confidence < 1, "confidence", "a probability below 1")
        need(self.fewest >= 1, "fewest", "at least 1")
        need(self.max_corrupt >= 0, "max_corrupt", "at least 0")
        need(fitting.hidden >= 0, "fit.hidden", "a width, or 0")
        need(0 <= fitting.dropout < 1, "fit.dropout", "a probability below 1")
        need(fitting.balance >= 1, "fit.balance", "at least 1")
        need(fitting.rate > 0, "fit.rate", "a rate above 0")
        need(fitting.decay >= 0, "fit.decay", "at least 0")
        need(min(fitting.batch, fitting.epochs, fitting.patience) >= 1, "fit", "batch, epochs, patience >= 1")
        need(0 < fitting.validation < 1, "fit.validation", "a share above 0")
        need(0 < fitting.test < 1 - fitting.validation, "fit.test", "a share above 0; some are to train")
        return self


def train_attributes(
    config: TrainConfig, step: Callable[[int], object] = lambda count: None, say: Callable[[str], object] = print
) -> dict[str, Any]:
    """Train a head, write it and report.json into `config.out`, and return the report.

    Args:
        step: called with a number of pictures whose features are there.
        say: called with lines on what was noticed.

    Raises:
        UserError: labels or pictures are not there or wrong, or too few to train, stop and test with.
    """
    config.check()
    labels = read_labels(config.labels)
    features_of = Features(config.features, config.device, Path(config.cache) if config.cache else None, config.framed)
    features, rows, skipped = _features(labels, config, features_of, step)
    values = labels.values[rows]
    parts = split([labels.groups[row] for row in rows], config.fit.validation, config.fit.test)
    for part, name in enumerate(PARTS):
        if not (parts == part).any():
            raise UserError(f"no faces to {name} with: {len(rows)} faces are too few; give more")
    told = labels.told + [f"{name}: {count} pictures passed over" for name, count in skipped.items() if count]
    kept, left_out = _usable(labels, values, parts, config.fewest)
    told += left_out
    if not kept:
        raise UserError(
            f"no category has {config.fewest} faces of a second value; set fewest lower, or give more faces"
        )
    categories = {name: each for name, each in labels.categories.items() if name in kept}
    values = values[:, [list(labels.categories).index(name) for name in kept]]
    for line in told:
        say(line)
    torch.manual_seed(config.fit.seed)
    head = heads.AttributeHead(features.shape[1], categories, config.fit.hidden, config.fit.dropout)
    losses = fit(head, features, values, parts, config.fit)
    measured = _test(head, features[parts == TEST], values[parts == TEST], config.confidence)
    told_categories = tuple(name for name, each in measured.items() if each["told"])
    description = heads.Description(
        config.features, features_of.fingerprint, config.framed, config.confidence, told_categories
    )
    heads.save(head, description, Path(config.out))
    report = {
        "config": asdict(config),
        "faces": {name: int((parts == part).sum()) for part, name in enumerate(PARTS)},
        "people": {
            name: len({labels.groups[row] for row, each in zip(rows, parts) if each == part})
            for part, name in enumerate(PARTS)
        },
        "passed_over": skipped,
        "noticed": told,
        "epochs": len(losses),
        "best_epoch": int(np.argmin([validation for _, validation in losses])),
        "losses": losses,
        "categories": measured,
    }
    write_json(Path(config.out) / REPORT, report)
    return report


def _features(
    labels: Labels, config: TrainConfig, features_of: Features, step: Callable[[int], object]
) -> tuple[torch.Tensor, list[int], dict[str, int]]:
    """Features [M, D], the M rows of `labels` that they are of, and how many were passed over for what."""
    parts, rows, unreadable = [], [], 0
    without_face = 0
    reason = ""
    for chunk in _chunks(labels, config):
        for _, error in (each for each in chunk if not isinstance(each[1], np.ndarray)):
            unreadable, reason = unreadable + 1, reason or str(error)
        if unreadable > config.max_corrupt:
            raise UserError(
                f"{unreadable} pictures cannot be read, max_corrupt is {config.max_corrupt}; first: {reason}"
            )
        read = [(row, image) for row, image in chunk if isinstance(image, np.ndarray)]
        found, kept = features_of([image for _, image in read])
        without_face += len(read) - len(kept)
        if kept:
            parts.append(found)
            rows += [read[index][0] for index in kept]
        step(len(chunk))
    if not rows:
        raise UserError(f"no picture is left to train with: {unreadable} cannot be read, {without_face} show no face")
    return torch.cat(parts), rows, {"cannot be read": unreadable, "no face found": without_face}


def _chunks(labels: Labels, config: TrainConfig) -> Iterator[list[tuple[int, np.ndarray | str]]]:
    """Rows with their pictures, or with why there is none."""
    held = None
    if config.images is None:
        if Path(config.labels.path).suffix != ".npz":
            raise UserError("images: name the folder of the pictures")
        held = read_arrays(Path(config.labels.path), "faces.npz of the demo").get("images")
        if held is None or held.dtype != np.uint8 or held.ndim != 4 or len(held) < len(labels):
            raise UserError(f"{config.labels.path} has no pictures of its labels: give those of the demo")
    elif not Path(config.images).is_dir():
        raise UserError(f"images: {config.images} is not a folder")
    for start in range(0, len(labels), _CHUNK):
        rows = range(start, min(start + _CHUNK, len(labels)))
        if held is not None:
            yield [(row, held[row]) for row in rows]
        else:
            yield [(row, _read(Path(config.images or ""), labels.names[row])) for row in rows]


def _read(folder: Path, name: str) -> np.ndarray | str:
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        return f"{path} lies outside {folder}"
    try:
        return decode(path.read_bytes())
    except OSError as error:
        return f"cannot read {path}: {error.strerror or error}"
    except ValueError as error:
        return f"{path} {error}"


def _usable(labels: Labels, values: np.ndarray, parts: np.ndarray, fewest: int) -> tuple[list[str], list[str]]:
    """Categories that can be trained and tested, and a line for each that cannot."""
    kept, told = [], []
    for column, (name, each) in enumerate(labels.categories.items()):
        counts = [
            np.bincount(answers[answers != MISSING], minlength=len(each))
            for answers in (values[parts == part, column] for part in range(len(PARTS)))
        ]
        second = int(np.sort(counts[TRAIN])[-2]) if len(each) > 1 else 0
        if second < fewest:
            told.append(
                f"{name}: left out, {second} faces to train have its second commonest value, fewest is {fewest}"
            )
        elif any((count > 0).sum() < 2 for count in counts[1:]):
            told.append(f"{name}: left out, the faces to stop and test with have one value of it alone")
        else:
            kept.append(name)
    return kept, told


def _test(
    head: heads.AttributeHead, features: torch.Tensor, values: np.ndarray, confidence: float
) -> dict[str, dict[str, Any]]:
    with torch.no_grad():
        plain = [logits.softmax(1).numpy() for logits in head(features)]
    measured = {}
    for column, (name, calibrated) in enumerate(zip(head.categories, head.probabilities(features))):
        known = values[:, column] != MISSING
        answers = values[known, column].astype(np.int64)
        found = scores(calibrated.numpy()[known], answers, confidence)
        before = scores(plain[column][known], answers, confidence)
        found |= {
            "values": list(head.categories[name]),
            "calibration_error_before": before["calibration_error"],
            "bins_before": before["bins"],
            # what is not better than chance by two standard errors is never said
            "told": found["balanced"] - 2 * found["balanced_error"] > found["chance"],
        }
        measured[name] = found
    return measured
