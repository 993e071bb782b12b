"""An untrained model's evaluation in little, with doubles for what is outside: what the tests of it share."""

from __future__ import annotations

import conftest
import numpy as np
import pytest

from unif2ace.attributes.base import Attribute
from unif2ace.evaluation import suite
from unif2ace.evaluation.config import SuiteConfig
from unif2ace.evaluation.faces import Face, Faces, Question
from unif2ace.evaluation.suite import Suite
from unif2ace.evaluation.work import Work
from unif2ace.model.painting import PaintSettings

SIDE = conftest.SIDE
QUICK = PaintSettings(steps=2)


class Inception:
    """Inception in little."""

    def __init__(self, device):
        pass

    def __call__(self, images, step):
        step(len(images))
        return np.stack([image[::16, ::16].astype(float).ravel() for image in images])


@pytest.fixture
def doubles(monkeypatch):
    """No face encoder, and Inception in little."""
    monkeypatch.setattr("unif2ace.generation.reading.face_encoder", lambda: conftest._no_encoder)
    monkeypatch.setattr(suite, "Inception", Inception)


class Light:
    """Tells light faces from dark ones."""

    name = "light"
    categories = {"light": ("dark", "bright")}

    def __call__(self, images):
        return [[Attribute("light", "bright" if image.mean() > 127 else "dark", 1.0)] for image in images]


def some_faces(count=5, source=True):
    rng = np.random.default_rng(0)
    items = [
        Face(
            f"face-{index}", rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8),
            (f"a face with {('dark hair', 'big smile')[index % 2]} {index}",),
            (Question("how light is the hair?", ("dark", f"dark {index}"), "hair", "appearance"),
             Question("where does the face look?", ("left", "ahead", f"{index}"), "facing", "action")),
        )
        for index in range(count)
    ]  # fmt: skip

    def told(text):
        return {"light": "dark"} if "dark" in text else {"light": "bright"} if "big" in text else {}

    return Faces("five faces", "f", items, told, Light() if source else None)


def opened(checkpoint, folder, faces=None, **changes):
    config = SuiteConfig(paint=QUICK, answer_tokens=3, caption_tokens=3, repeats=2, **changes)
    return Suite(Work(checkpoint, folder), faces or some_faces(), config)


def by_name(rows):
    return {row.name: row for row in rows}
