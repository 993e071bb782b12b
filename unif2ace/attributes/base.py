"""What every source of attributes answers: of each picture, what it has, in which category, and how likely."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Attribute(NamedTuple):
    """One thing that a source says of a face.

    Attributes:
        category: what is asked: "eyeglasses", "hair".
        value: the answer: "yes" or "no", or one of the category's classes.
        probability: of `value`, in [0, 1], as far as the source's calibration goes; 1 for what is measured.
    """

    category: str
    value: str
    probability: float


class AttributeSource(Protocol):
    """Something that reads attributes off pictures: a trained classifier, a face parser, a measurement.

    Attributes:
        name: of the source, as in reports.
        categories: of each category it speaks of, the values it may answer.
    """

    name: str
    categories: dict[str, tuple[str, ...]]

    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Attribute]]:
        """Of each image [H, W, 3] uint8 RGB, of any sizes, its attributes; a category it cannot tell is left out."""
        ...
