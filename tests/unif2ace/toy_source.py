"""Pictures of nobody in which faces are said to be found, and an AttributeSource that reads their colours."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from unif2ace.attributes.base import Attribute
from unif2ace.data.identity import FRAME

SIDE = 160
HAIR = {0: "black", 1: "blond"}


class Toy:
    """Eyeglasses by red, hair colour by green; unsure of a hat."""

    name = "toy"
    categories = {"eyeglasses": ("yes", "no"), "hair colour": ("black", "blond"), "hat": ("yes", "no")}
    calls = 0

    def __call__(self, images):
        Toy.calls += len(images)
        means = [image.reshape(-1, 3).mean(0) for image in images]
        return [
            [
                Attribute("eyeglasses", "yes" if red > 128 else "no", 0.95),
                Attribute("hair colour", HAIR[int(green > 128)], 0.9),
                Attribute("hat", "yes", 0.3),
            ]
            for red, green, _ in means
        ]


def picture(red: bool, green: bool, seed: int) -> np.ndarray:
    """A sharp texture of that colour."""
    noise = np.random.default_rng(seed).integers(-60, 60, (40, 40, 1))
    colour = np.array([190 if red else 66, 190 if green else 66, 120])
    small = (colour + noise).clip(0, 255).astype(np.uint8)
    return cv2.resize(small, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)


def save(folder: Path, name: str, image: np.ndarray) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(folder / name), image[..., ::-1])


@pytest.fixture
def stand_ins(monkeypatch):
    """Faces fill their picture; a black one has none, a wide one has two; vectors are of what pictures look like."""

    def clear_faces(image):
        height, width = image.shape[:2]
        count = 0 if image.max() < 5 else 2 if width > 1.5 * height else 1
        return np.repeat((FRAME * [height, height])[None], count, 0)

    def encoder(crops):
        small = [cv2.resize(crop, (10, 10), interpolation=cv2.INTER_AREA).mean(2).reshape(-1) for crop in crops]
        vectors = torch.from_numpy(np.stack(small).astype(np.float32))
        return torch.nn.functional.normalize(vectors - vectors.mean(1, keepdim=True), dim=1)

    monkeypatch.setattr("unif2ace.curation.faces.clear_faces", clear_faces)
    monkeypatch.setattr("unif2ace.curation.faces.face_encoder", lambda: encoder)


def eight(folder: Path) -> Path:
    """Eight faces in a folder, face0.png to face7.png."""
    for number in range(8):
        save(folder, f"face{number}.png", picture(bool(number & 1), bool(number & 2), number))
    return folder
