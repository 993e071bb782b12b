"""Scores by models that are asked at an endpoint: Desc- and Conv- by a judge of texts, VQAScore and VLM-score by one
that sees pictures.

Each question is asked `repeats` times, each time with a seed of its own. The client keeps every answer, so what an
endpoint answered before it failed is not asked again. A judge of texts sees no picture; nobody is sent an embedding.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from unif2ace.endpoint.client import Endpoint, Question
from unif2ace.endpoint.prompts import Prompt, load_prompt

_MARKS = re.compile(r"[<>]{3,}")  # stand around a text that is judged: none in it ends it early


class Asked(NamedTuple):
    """Attributes:
    face: whose it is. repeat: which time. score: of it.
    """

    face: str
    repeat: int
    score: float


class Verdict(NamedTuple):
    """What came of the questions.

    Attributes:
        asked: those that were answered rightly. refused: how many never were. missing: how many were not answered, and
            will be when the evaluation runs again.
    """

    asked: list[Asked]
    refused: int
    missing: int

    @property
    def spread(self) -> float | None:
        """Standard deviation between the repetitions' means, None with one."""
        means = [
            statistics.fmean(each.score for each in self.asked if each.repeat == number)
            for number in sorted({each.repeat for each in self.asked})
        ]
        return statistics.stdev(means) if len(means) > 1 else None


class Item(NamedTuple):
    """What is scored: `name` its own, `face` whose it is, the prompt's values, and a picture where it shows one."""

    name: str
    face: str
    values: dict[str, str]
    image: np.ndarray | None = None


def ask(
    endpoint: Endpoint, prompt: Prompt, items: Sequence[Item], repeats: int, score: Callable[[Any], float | None]
) -> Verdict:
    """Every item's scores.

    Args:
        score: of an answer's value; None where it holds none, then it is asked again.

    Raises:
        UserError: the endpoint cannot be asked, or does not answer any more; what it answered is kept.
    """

    def questions() -> Iterator[Question]:
        for repeat in range(repeats):
            for item in items:
                values = {name: _MARKS.sub(" ", value) for name, value in item.values.items()}
                yield Question(
                    f"{item.face}|{item.name}|{repeat}", prompt, values, item.image,
                    check=lambda value: None if score(value) is not None else "there is no score in it", seed=repeat,
                )  # fmt: skip

    places = {f"{item.face}|{item.name}|{repeat}": (item.face, repeat) for item in items for repeat in range(repeats)}
    asked, refused, missing = [], 0, 0
    for outcome in endpoint.ask_all(questions()):
        if outcome.kind == "answered":
            face, repeat = places[outcome.question.name]
            value = score(outcome.value)
            asked.append(Asked(face, repeat, float(value if value is not None else 0)))
        elif outcome.kind == "quarantined":
            refused += 1
        else:
            missing += 1
    return Verdict(sorted(asked), refused, missing)


def prompt_of(name: str) -> Prompt:
    """A prompt of this room."""
    return load_prompt(name, "unif2ace.evaluation")


def judged(value: Any) -> float:
    """The score of a judge's JSON."""
    return float(value["score"])


def said_yes(value: str) -> float:
    """1 where an answer begins with yes: its mean is the share of yes, which VQAScore's probability is the limit of."""
    return float(value.strip(" \"'*.").lower().startswith("yes"))
