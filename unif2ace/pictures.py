"""Pictures: files from outside, decoded only after their header has said how large they are; other sizes; sheets."""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from unif2ace.errors import UserError
from unif2ace.parsing import parsing, reading

# Of one picture. A file of a few kilobytes can claim a billion, which would be decoded into gigabytes.
LARGEST_PIXELS = 64_000_000
LONGEST = 100  # times the other side: of what is thinner, face finders' smaller copies would have no pixel
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "PPM", "TIFF")  # JPEG reads MPO as well


def decode(content: bytes) -> np.ndarray:
    """A picture's file as [H, W, 3] uint8 RGB, turned as it says that it was held, transparent parts on white.

    Raises:
        ValueError: it is no picture, has more than `LARGEST_PIXELS`, or is too thin; the message ends a sentence on
            the file.
    """
    import cv2  # whoever reads no picture, as training on shards, has no need of it

    header = _header(content)
    width, height = header.size
    if max(width, height) > LONGEST * min(width, height):
        raise ValueError(f"is a picture of {width} x {height} pixels, too thin to show a face")
    if header.has_transparency_data:
        return _on_white(header)
    with parsing(_no_picture):
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise _no_picture("")
    return np.ascontiguousarray(image[..., ::-1])


def read_png(path: Path) -> np.ndarray:
    """A PNG that this project wrote, as [H, W, 3] uint8 RGB.

    Raises:
        UserError: it is missing, damaged, or another picture.
    """
    mend = "delete it, and it is painted again"
    with reading(path, "picture", mend):
        content = Path(path).read_bytes()
    try:
        header = _header(content, ("PNG",))
    except ValueError as error:
        raise UserError(f"{path} is damaged or no picture: {mend}") from error
    with reading(path, "picture", mend):
        return np.asarray(header.convert("RGB"))


def resized(image: np.ndarray, side: int) -> np.ndarray:
    """A picture [H, W, C] as [side, side, C]: averaged down, or enlarged by cubic interpolation."""
    import cv2

    shrinks = min(image.shape[:2]) > side
    return cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)


def sheet(images: np.ndarray, columns: int) -> np.ndarray:
    """Pictures [N, H, W, 3] uint8 in rows of `columns`; a row that is not full is filled up with white."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    full = np.full((rows * columns, height, width, 3), 255, np.uint8)
    full[:count] = images
    return full.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def _no_picture(why: str) -> ValueError:
    return ValueError("is not a picture that can be read: give a PNG or JPEG file")


def _header(content: bytes, formats: tuple[str, ...] = _FORMATS) -> Image.Image:
    """The picture, not decoded yet, of no more pixels than are taken."""
    try:
        with parsing(_no_picture), warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is lower
            header = Image.open(io.BytesIO(content), formats=formats)
    except ValueError as error:
        if isinstance(error.__cause__, Image.DecompressionBombError):
            raise ValueError(f"is a picture of more than {LARGEST_PIXELS} pixels: give a smaller one") from error
        raise
    width, height = header.size
    if width * height > LARGEST_PIXELS:
        raise ValueError(f"is a picture of {width} x {height} pixels, more than {LARGEST_PIXELS}: give a smaller one")
    return header


def _on_white(picture: Image.Image) -> np.ndarray:
    """A picture with transparent parts as a page shows it: OpenCV would show what lies hidden under them."""
    with parsing(_no_picture):
        picture = ImageOps.exif_transpose(picture).convert("RGBA")
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB"))
