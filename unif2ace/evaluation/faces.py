"""What a model is evaluated on: faces in its frame, with the captions, questions and attributes that are known of them.

From any set of `unif2ace.data` sources, or from a demo run's faces.npz, whose held-out faces are taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unif2ace.attributes.base import AttributeSource
from unif2ace.attributes.categories import CATEGORIES, phrases
from unif2ace.attributes.lexicon import Lexicon
from unif2ace.attributes.measured import Measured
from unif2ace.data import captions
from unif2ace.data.attributes import ATTRIBUTES
from unif2ace.data.config import SetConfig
from unif2ace.data.dataset import FaceSet
from unif2ace.data.encode import face_frame, square_frame
from unif2ace.data.samples import Sample, SampleError
from unif2ace.data.sources import open_source
from unif2ace.errors import UserError
from unif2ace.files import digest
from unif2ace.training.recipe import EVALUATION

OTHER = "other"  # of a question whose category is not known
Told = Callable[[str], dict[str, str]]


class Question(NamedTuple):
    """A question with every answer that counts, the category that it is on and that one's kind."""

    text: str
    references: tuple[str, ...]
    category: str
    kind: str


@dataclass(frozen=True)
class Face:
    """Attributes:
    key: its name, its own in the set.
    image: [side, side, 3] uint8 RGB in the model's frame.
    captions, questions: what is known to be right of it; () for nothing.
    """

    key: str
    image: np.ndarray
    captions: tuple[str, ...]
    questions: tuple[Question, ...]


@dataclass
class Faces:
    """A set.

    Attributes:
        name: for the report. fingerprint: of what is in it.
        told: caption to the attributes that it tells, by category.
        source: measures attributes of pictures; None where nothing is known that does.
        left_out: (where, reason) of samples that could not be used.
    """

    name: str
    fingerprint: str
    items: list[Face]
    told: Told
    source: AttributeSource | None = None
    left_out: list[tuple[str, str]] = field(default_factory=list)

    @property
    def captioned(self) -> list[Face]:
        return [each for each in self.items if each.captions]

    @property
    def asked(self) -> list[Face]:
        return [each for each in self.items if each.questions]


# The demo's attributes in the paper's three kinds.
_KINDS = {each.name: "action" if each.name in ("mouth", "facing") else "appearance" for each in ATTRIBUTES}


_VALUES = {name: each.values for name, each in CATEGORIES.items()}
_MEASURED = {each.name: each.words for each in ATTRIBUTES}


def kind_of(category: str) -> str:
    """Appearance, action or emotion; `OTHER` of a category that is not known."""
    return CATEGORIES[category].kind if category in CATEGORIES else _KINDS.get(category, OTHER)


def demo_faces(path: Path, limit: int, questions: int, seed: int) -> Faces:
    """The held-out faces of a demo run's faces.npz, a question on each attribute of each, or on the first so many."""
    faces = FaceSet.load(path)
    rng = np.random.default_rng((seed, EVALUATION))
    items = []
    for index in faces.test[:limit]:
        classes = faces.classes[index]
        asked = []
        for number, each in enumerate(ATTRIBUTES):
            text, answer = captions.question_answer(classes, number, rng)
            asked.append(Question(text, (answer,), each.name, kind_of(each.name)))
        items.append(
            Face(f"face-{index}", faces.images[index], (captions.full_caption(classes),), tuple(asked[:questions]))
        )

    def told(text: str) -> dict[str, str]:
        found = captions.told(text)
        return {each.name: each.words[value] for each, value in zip(ATTRIBUTES, found) if value >= 0}

    told_of = repr([(each.captions, each.questions) for each in items])
    fingerprint = digest(faces.images[faces.test[:limit]].tobytes(), told_of.encode())
    return Faces("held-out faces of a demo run", fingerprint, items, told, Measured(faces.thresholds))


def open_faces(
    config: SetConfig, side: int, frame: str, limit: int, questions: int, seed: int, source: AttributeSource | None
) -> Faces:
    """The first `limit` faces of a set that can be used.

    Args:
        side: of the model's pictures. frame: `face`, which finds it, or `square`.
        questions: at most so many of a face.
        source: of attributes; None: the demo's own measure for a faces.npz, none for other sets.

    Raises:
        UserError: there is no such set, or no face in it can be used.
    """
    path = Path(config.path)
    if path.suffix == ".npz":
        faces = demo_faces(path, limit, questions, seed)
        faces.source = source or faces.source
        if faces.items and faces.items[0].image.shape[0] != side:
            raise UserError(f"{path} has pictures of {faces.items[0].image.shape[0]} pixels, the model paints {side}")
        return faces
    opened = open_source(config, "data")
    framed = {"face": face_frame, "square": square_frame}[frame]
    told = teller(source.categories if source is not None else _VALUES)
    items: list[Face] = []
    left_out: list[tuple[str, str]] = list(opened.damaged)
    keys: set[str] = set()
    parts = []
    for index in range(len(opened)):
        if len(items) == limit:
            break
        try:
            sample = opened[index]
            image = framed(sample.pixels(), side)
        except SampleError as error:
            left_out.append((error.where, error.reason))
            continue
        except ValueError as error:
            left_out.append((sample.where, str(error)))
            continue
        key = sample.key if sample.key not in keys else f"{sample.key}#{index}"
        keys.add(key)
        items.append(Face(key, image, sample.captions, _questions(sample)[:questions]))
        parts.append(digest(image.tobytes(), repr((key, sample.captions, items[-1].questions)).encode()))
    if not items:
        reason = f": {': '.join(left_out[0])}" if left_out else ""
        raise UserError(f"{path}: there is no face in it that can be used{reason}")
    return Faces(path.name, digest(*(each.encode() for each in parts)), items, told, source, left_out)


def _questions(sample: Sample) -> tuple[Question, ...]:
    """Every question, to be asked alone, with all answers that there are to it."""
    answers: dict[str, list[str]] = {}
    for conversation in sample.conversations:
        for asked, said in conversation:
            answers.setdefault(asked, []).append(said)
    return tuple(Question(asked, tuple(said), *subject(asked, said[0])) for asked, said in answers.items())


def subject(question: str, answer: str) -> tuple[str, str]:
    """The category that a question is on, and its kind: the longest name of one, or phrase of a value, that it says.

    What the question says comes before what the answer does, and the label sets' categories before the demo's.
    """
    for known in (_VALUES, _MEASURED):
        for part in (question, answer):
            said = [
                (len(words), name)
                for name, values in known.items()
                for words in (name, *(each for value in values for each in phrases(name, value)))
                if _says(part, words)
            ]
            if said:
                name = max(said, key=lambda each: each[0])[1]
                return name, kind_of(name)
    return OTHER, kind_of(OTHER)


def teller(categories: dict[str, tuple[str, ...]]) -> Told:
    """Of a caption, each category's value where it says one, and one alone."""
    lexicon = Lexicon(categories)

    def told(text: str) -> dict[str, str]:
        return {name: next(iter(said)) for name, said in lexicon.claims(text).items() if len(said) == 1}

    return told


def _says(text: str, words: str) -> bool:
    """Whether a text has these words, without the article that they begin with."""
    wanted = re.sub(r"^(a|an|the) ", "", words.lower())
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text.lower()) is not None
