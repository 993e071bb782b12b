"""Faces of photographs brought into the frame that the synthetic faces stand in.

Synthetic faces are aligned by fixed landmarks and never searched for; a photograph is searched once and then brought
into that same frame, so that a user's face reaches the model and the encoder as the training faces did.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from unif2ace.data.faces import SIZE
from unif2ace.encoders.alignment import similarity, warp
from unif2ace.encoders.sface import SFace, find_faces
from unif2ace.errors import UserError
from unif2ace.pictures import decode

# Eyes (viewer's left, right), nose tip, mouth corners, (x, y), in a frame of side 1: YuNet's mean over 300 faces
FRAME = np.array([[23.82, 29.36], [40.20, 29.20], [31.82, 39.10], [24.54, 46.00], [38.91, 46.34]]) / SIZE
_BYSTANDER = 0.25  # of the largest face's side: a smaller one is not whom the picture is of


def face_encoder() -> SFace:
    """The identity encoder of faces that stand in the frame.

    Raises:
        UserError: its package is missing.
    """
    return SFace(FRAME)


def find_face(image: np.ndarray) -> np.ndarray | None:
    """Landmarks [5, 2] (eyes, nose, mouth corners; x, y) of the largest face in `image` [H, W, 3] uint8, or None."""
    landmarks = clear_faces(image)
    return landmarks[0] if len(landmarks) else None


def clear_faces(image: np.ndarray) -> np.ndarray:
    """Landmarks [F, 5, 2] of the faces that are not much smaller than the largest, it first."""
    boxes, landmarks = find_faces(image)
    if not len(boxes):
        return landmarks
    sides = np.sqrt((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    order = np.argsort(-sides)
    return landmarks[order[sides[order] >= _BYSTANDER * sides.max()]]


def crop_face(image: np.ndarray, landmarks: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Bring a face into the training frame: [size, size, 3] uint8 of `image` [H, W, 3], by its five landmarks."""
    matrix = similarity(landmarks, FRAME * size)
    # A large face is warped at a multiple of the size and averaged down, else it would alias
    factor = max(1, int(np.ceil(1 / np.hypot(*matrix[:, 0]))))
    large = warp(image, matrix * factor, size * factor)
    return cv2.resize(large, (size, size), interpolation=cv2.INTER_AREA) if factor > 1 else large


def read_image(path: Path) -> np.ndarray:
    """Read a picture file as [H, W, 3] uint8 RGB.

    Raises:
        UserError: it is missing, not a picture, or too large a one.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        return decode(content)
    except ValueError as error:
        raise UserError(f"{path} {error}") from error
