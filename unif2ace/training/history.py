"""What a run's folder tells of it: the log as columns, loads of the experts over time, events, samples.

Whatever is missing is missing: a key that some records do not have, a line that was cut short, a config, samples.
"""

from __future__ import annotations

import contextlib
import math
from array import array
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from unif2ace.errors import UserError
from unif2ace.files import read_json
from unif2ace.parsing import reading
from unif2ace.training import journal
from unif2ace.training.load import Load, loads

LOG, CONFIG = "log.jsonl", "config.yaml"
MOST_LOADS = 512  # moments at which loads of experts are kept; with more, neighbours are added up
PAINTINGS, FACES, WORDS = "paintings.png", "faces.png", "samples.json"


@dataclass
class Sample:
    """Paintings and answers after `step` steps; a picture that there is not is None."""

    step: int
    prompts: list[str]
    answers: list[dict[str, Any]]
    paintings: Path | None
    faces: Path | None


@dataclass
class Loads:
    """A group of experts of one layer over time.

    Attributes:
        steps: [M] where each moment begins.
        counts: [M, N] choices of each expert, added up from there to the next moment.
    """

    steps: list[int] = field(default_factory=list)
    counts: list[np.ndarray] = field(default_factory=list)

    def share(self) -> np.ndarray:
        """[M, N] of each expert against an even load, NaN where the group had nothing to do."""
        counts = np.array(self.counts, float)
        total = counts.sum(1, keepdims=True)
        return np.divide(counts * counts.shape[1], total, out=np.full_like(counts, np.nan), where=total > 0)

    def fewer(self, most: int) -> Loads:
        """At most so many moments, neighbours added up."""
        size = -(-len(self.steps) // most)
        counts = [np.sum(self.counts[first : first + size], axis=0) for first in range(0, len(self.steps), size)]
        return Loads(self.steps[::size], counts)

    def last(self, level: str, group: str, layer: int, window: int) -> Load:
        """The load of the last `window` moments together."""
        counts = np.sum(self.counts[-window:], axis=0)
        return Load(level, group, layer, tuple(int(each) for each in counts))


Key = tuple[str, str, int]  # level, group, layer


@dataclass
class Run:
    """A training run.

    Attributes:
        folder: of the run. config: plain values; {} where there is none.
        steps: [n] that the log has, in order, each once.
        columns: numbers by name, [n] each, NaN where a record has none: loss, terms.mask, grad_norms.head, ...
        stages: name and first step of each stage.
        events: records of events, in order.
        experts: loads of each group of experts.
        samples: by step.
    """

    folder: Path
    config: dict[str, Any]
    steps: np.ndarray
    columns: dict[str, np.ndarray]
    stages: list[tuple[str, int]]
    events: list[dict[str, Any]]
    experts: dict[Key, Loads]
    samples: list[Sample]

    def column(self, name: str) -> np.ndarray:
        """[n]; all NaN where no record has it."""
        return self.columns.get(name, np.full(len(self.steps), np.nan))

    def parts(self, prefix: str) -> dict[str, np.ndarray]:
        """Columns below a name that have any number, by the rest of theirs."""
        found = {name[len(prefix) + 1 :]: each for name, each in self.columns.items() if name.startswith(f"{prefix}.")}
        return {name: each for name, each in found.items() if np.isfinite(each).any()}

    @property
    def resumed(self) -> list[int]:
        """Steps at which the run was gone on with."""
        return [each["step"] for each in self.events if each.get("event") == "resumed" and _is_step(each)]

    @property
    def total(self) -> int | None:
        """Steps of the whole run, where that is known."""
        told = [each.get("total_steps") for each in self.events if isinstance(each.get("total_steps"), int)]
        return told[-1] if told else None

    @classmethod
    def read(cls, folder: Path) -> Run:
        """The run in `folder`.

        Raises:
            UserError: there is no log, it has no step, or it cannot be read.
        """
        folder = Path(folder)
        path = folder / LOG
        reader = _Reader()
        try:
            for record in journal.read(path):
                reader.add(record)
        except FileNotFoundError as error:
            raise UserError(f"{path} is missing: name the folder of a run of unif2ace train") from error
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        if not reader.steps:
            raise UserError(f"{path} has no step yet: there is nothing to draw")
        steps, columns = reader.arrays()
        return cls(
            folder, _config(folder), steps, columns, reader.stages, reader.events, reader.loads, _samples(folder)
        )


def _is_step(record: dict[str, Any]) -> bool:
    return type(record.get("step")) is int


class _Reader:
    """Takes the records of a log in order, in little memory."""

    def __init__(self) -> None:
        self.steps = array("q")
        self.columns: dict[str, array] = {}
        self.stages: list[tuple[str, int]] = []
        self.events: list[dict[str, Any]] = []
        self.loads: dict[Key, Loads] = {}

    def add(self, record: dict[str, Any]) -> None:
        if "event" in record:
            self.events.append(record)
        elif _is_step(record):
            self._step(record)

    def _step(self, record: dict[str, Any]) -> None:
        count = len(self.steps)
        for name, value in _numbers(record, ""):
            column = self.columns.setdefault(name, array("d"))
            column.extend([np.nan] * (count - len(column)))
            column.append(value)
        self.steps.append(record["step"])
        stage = record.get("stage")
        if isinstance(stage, str) and (not self.stages or self.stages[-1][0] != stage):
            self.stages.append((stage, record["step"]))
        with contextlib.suppress(AttributeError, TypeError, ValueError):  # no experts' entry of ours
            for load in loads(record.get("experts")):
                self._load(record["step"], load)

    def _load(self, step: int, load: Load) -> None:
        kept = self.loads.setdefault((load.level, load.group, load.layer), Loads())
        if kept.counts and len(kept.counts[0]) != len(load.counts):
            return  # another model's log
        kept.steps.append(step)
        kept.counts.append(np.array(load.counts, np.int64))
        if len(kept.steps) == 2 * MOST_LOADS:
            kept.steps = kept.steps[::2]
            kept.counts = [a + b for a, b in zip(kept.counts[::2], kept.counts[1::2])]

    def arrays(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Steps in order, of one that stands twice the last; and the columns at them."""
        steps = np.array(self.steps)
        _, last = np.unique(steps[::-1], return_index=True)
        index = len(steps) - 1 - last
        columns = {}
        for name, column in self.columns.items():
            column.extend([np.nan] * (len(steps) - len(column)))
            columns[name] = np.array(column)[index]
        if {"data_seconds", "step_seconds"} <= columns.keys():
            whole = np.where(columns["step_seconds"] > 0, columns["step_seconds"], np.nan)
            columns["data_wait"] = np.clip(columns["data_seconds"] / whole, 0, 1)
        return steps[index], columns


def _numbers(record: dict[str, Any], prefix: str) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    for key, value in record.items():
        if isinstance(value, dict):
            found += _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and f"{prefix}{key}" != "step":
            with contextlib.suppress(OverflowError):  # a whole number that no float holds
                found.append((f"{prefix}{key}", float(value) if math.isfinite(value) else math.nan))
    return found


def _config(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(UserError), reading(folder / CONFIG, "YAML"):  # shown where it is there
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        return config if isinstance(config, dict) else {}
    return {}


def _samples(folder: Path) -> list[Sample]:
    found = []
    for path in sorted(folder.glob(f"samples/step-*/{WORDS}")):
        with contextlib.suppress(UserError, AttributeError, KeyError, TypeError, ValueError):  # not whole: left out
            words = read_json(path)
            pictures = [each if each.is_file() else None for each in (path.with_name(PAINTINGS), path.with_name(FACES))]
            answers = [
                {"image": int(each["image"]), "question": str(each["question"]), "answer": str(each["answer"])}
                for each in words.get("answers", [])
            ]
            prompts = [str(each) for each in words.get("prompts", [])]
            found.append(Sample(int(path.parent.name.partition("-")[2]), prompts, answers, *pictures))
    return sorted(found, key=lambda each: each.step)
