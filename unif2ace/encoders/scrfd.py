"""SCRFD, the face detector of InsightFace's packages, on ONNX Runtime (Guo et al., arXiv 2105.04714)."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import torch

from unif2ace.encoders.runtime import session
from unif2ace.errors import UserError

STRIDES = (8, 16, 32)
ANCHORS = 2  # of each place
SIDE, SCORE, OVERLAP = 640, 0.5, 0.4
_WIDTHS = (1, 4, 10)  # of scores, distances to a box's sides, distances to five landmarks: each for three strides


class Scrfd:
    """A detector of boxes and five landmarks.

    Args:
        side: pictures are fitted into a square of this many pixels; a multiple of 32.

    Raises:
        UserError: the file is no SCRFD with landmarks.
    """

    def __init__(self, path: Path, device: torch.device, side: int = SIDE) -> None:
        if side < 32 or side % 32:
            raise ValueError(f"side: expected a multiple of 32 from 32, got {side}")
        self._session = session(path, device)
        outputs = self._session.get_outputs()
        found = [each.shape[-1] for each in outputs]
        if found != [width for width in _WIDTHS for _ in STRIDES]:
            raise UserError(f"{path} is no SCRFD with landmarks: its outputs are {found} wide")
        self._input, self._names, self.side = self._session.get_inputs()[0].name, [o.name for o in outputs], side

    def __call__(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Boxes [F, 4] (left, top, right, bottom) and landmarks [F, 5, 2] in a picture [H, W, 3] uint8 RGB."""
        height, width = image.shape[:2]
        if height > width:
            size = (max(1, int(self.side / (height / width))), self.side)
        else:
            size = (self.side, max(1, int(self.side * (height / width))))
        square = np.zeros((self.side, self.side, 3), np.uint8)
        square[: size[1], : size[0]] = cv2.resize(image, size)
        blob = cv2.dnn.blobFromImage(square, 1 / 128, mean=(127.5, 127.5, 127.5))
        values = [out.reshape(-1, out.shape[-1]) for out in self._session.run(self._names, {self._input: blob})]
        scale = size[1] / height
        scores, boxes, landmarks = [], [], []
        for level, stride in enumerate(STRIDES):
            score, sides, points = values[level :: len(STRIDES)]
            places = np.mgrid[: self.side // stride, : self.side // stride][::-1].reshape(2, -1).T * stride
            centres = np.repeat(places, ANCHORS, axis=0)
            found = score[:, 0] >= SCORE
            centre, sides = centres[found], sides[found] * stride
            scores.append(score[found, 0])
            boxes.append(np.hstack([centre - sides[:, :2], centre + sides[:, 2:]]) / scale)
            landmarks.append((centre[:, None] + points[found].reshape(-1, 5, 2) * stride) / scale)
        score, box, landmark = np.concatenate(scores), np.concatenate(boxes), np.concatenate(landmarks)
        corners_and_sizes = np.hstack([box[:, :2], box[:, 2:] - box[:, :2]])
        kept = np.array(cv2.dnn.NMSBoxes(corners_and_sizes.tolist(), score.tolist(), SCORE, OVERLAP), np.int64)
        return box[kept], landmark[kept]
