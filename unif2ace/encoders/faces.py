"""Identity encoders: one face is found in each picture, aligned by its landmarks, and becomes one unit vector.

Vectors tell who a person is. They go to the caller and nowhere else: no line that is printed, logged or raised holds
a number of one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import cv2
import numpy as np
import torch

from unif2ace.encoders.alignment import ARCFACE, SIDE, similarity, warp
from unif2ace.encoders.base import Encoder, FaceCountError


class FaceEncoder(Encoder):
    """A detector and a recogniser.

    Args:
        frame: landmarks [5, 2] (eyes, nose tip, mouth corners; x, y) in a frame of side 1, where every picture holds
            its face in the same place: nothing is searched then.
        largest: of several faces take the largest, instead of refusing.
    """

    def __init__(self, frame: np.ndarray | None = None, largest: bool = False) -> None:
        self.frame, self.largest = frame, largest

    @abstractmethod
    def find(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [F, 4] (left, top, right, bottom) and landmarks [F, 5, 2] of all faces in a picture."""

    @abstractmethod
    def _embed(self, crops: np.ndarray) -> np.ndarray:
        """Vectors [B, C] of aligned faces [B, 112, 112, 3] uint8 RGB."""

    def landmarks(self, image: np.ndarray, index: int = 0) -> np.ndarray:
        """The five landmarks [5, 2] of the face in a picture [H, W, 3] uint8 RGB.

        Raises:
            FaceCountError: there is no face in it, or more than one; `index` is its number in the message.
        """
        if self.frame is not None:
            return self.frame * [image.shape[1], image.shape[0]]
        boxes, landmarks = self.find(image)
        if not len(boxes) or (len(boxes) > 1 and not self.largest):
            raise FaceCountError(index, len(boxes))
        return landmarks[np.argmax((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))]

    def _align(self, image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        return warp(image, similarity(landmarks, ARCFACE), SIDE)

    def _vectors(self, images: Sequence[np.ndarray] | np.ndarray, landmarks: Sequence[np.ndarray]) -> np.ndarray:
        return self._embed(np.stack([self._align(*each) for each in zip(images, landmarks)]))

    def _encode(self, images: Sequence[np.ndarray] | np.ndarray, first: int) -> torch.Tensor:
        landmarks = [self.landmarks(image, first + number) for number, image in enumerate(images)]
        vectors = torch.from_numpy(self._vectors(images, landmarks)).float()
        return torch.nn.functional.normalize(vectors, dim=1)


def widened(image: np.ndarray) -> tuple[np.ndarray, int]:
    """The picture with a black border of half its longer side around it, and the border's width.

    A face that fills the picture to its edges is larger than any a detector was trained on.
    """
    border = max(image.shape[:2]) // 2
    return cv2.copyMakeBorder(image, border, border, border, border, cv2.BORDER_CONSTANT), border
