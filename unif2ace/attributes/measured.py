"""The attributes that the demo measures from pixels, as a source: light, colours, how the head is held."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from unif2ace.attributes.base import Attribute
from unif2ace.data.attributes import ATTRIBUTES, classify, measure
from unif2ace.data.faces import SIZE


class Measured:
    """Measures of faces that stand in the training frame.

    Args:
        thresholds: [A, 2] cut points of the classes, as `unif2ace.data.dataset.FaceSet` has them.

    What it says is measured, so its probability is 1; what the measures are worth is told where they are defined.
    """

    name = "measured"
    categories = {each.name: each.words for each in ATTRIBUTES}

    def __init__(self, thresholds: np.ndarray) -> None:
        self.thresholds = thresholds

    def __call__(self, images: Sequence[np.ndarray]) -> list[list[Attribute]]:
        if not len(images):
            return []
        small = [cv2.resize(each, (SIZE, SIZE), interpolation=cv2.INTER_AREA) for each in images]
        return [
            [Attribute(each.name, each.words[value], 1.0) for each, value in zip(ATTRIBUTES, row)]
            for row in classify(measure(np.stack(small)), self.thresholds)
        ]
