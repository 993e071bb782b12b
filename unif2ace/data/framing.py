"""Any picture to what the model reads: a square of its own size with one face where the training faces stand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from unif2ace.data.encode import square_frame
from unif2ace.data.identity import clear_faces, crop_face, read_image
from unif2ace.errors import UserError


class Framed(NamedTuple):
    """A picture in the frame.

    Attributes:
        face: [side, side, 3] uint8 RGB.
        bring: brings another picture of the given one's size into the same frame, a mask for instance.
        size: height and width of the given picture.
    """

    face: np.ndarray
    bring: Callable[[np.ndarray], np.ndarray]
    size: tuple[int, int]


def framed(picture: np.ndarray | Path, side: int, crop: bool = True) -> Framed:
    """The one face of a picture, in the frame.

    A picture that has the frame's size already (a painting of the model's) is taken as it is.

    Args:
        picture: a file, or [H, W, 3] uint8 RGB.
        side: of the frame.
        crop: look for the face; else the middle square of the picture is the frame.

    Raises:
        UserError: it cannot be read, or shows no face, or several of about one size.
    """
    name = "the picture" if isinstance(picture, np.ndarray) else str(picture)
    image = picture if isinstance(picture, np.ndarray) else read_image(picture)
    height, width = image.shape[:2]
    if height == width == side:
        return Framed(image, lambda other: other, (height, width))
    if not crop:
        return Framed(square_frame(image, side), lambda other: square_frame(other, side), (height, width))
    faces = clear_faces(image)
    if len(faces) != 1:
        found = f"{len(faces)} faces" if len(faces) else "no face"
        raise UserError(f"{found} found in {name}: give a picture with one clear, upright face")
    return Framed(crop_face(image, faces[0], side), lambda other: crop_face(other, faces[0], side), (height, width))


def bring_mask(frame: Framed, mask: np.ndarray) -> np.ndarray:
    """A mask [H, W] bool of the given picture in its frame, [side, side]: every pixel that it reaches into.

    Raises:
        UserError: nothing of it is in the frame.
    """
    inside = frame.bring(np.repeat(mask[:, :, None].astype(np.uint8) * 255, 3, axis=2))[:, :, 0] >= 64
    if not inside.any():
        raise UserError("nothing of what is to be painted anew lies in the face's part of the picture")
    return inside
