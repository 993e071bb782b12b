"""Attributes of a face measured from its pixels; words.py has the words for them.

The faces stand in one frame (FFHQ's: pupils at rows 29, mouth at row 46 of 64), so every measure reads fixed regions.
Cut points are quantiles of the training faces, so classes are balanced there by construction. Nothing here says who a
person is: light, colours, how the head is held, whether teeth show.

How far to trust them. "Kept" is the share of 3,360 faces whose class survives a blur of 0.8 px and smooth noise,
25.4 dB together, about what a small image tokenizer does; the reading is from contact sheets of random members of
the classes.

    attribute    kept  what the sheets show
    background   .98   as named
    tint         .89   cool is grey to blue, warm is beige to orange and brown
    greenery     .85   green third: mostly plants; around the cut it is a matter of taste
    hair         .93   as named, but a hat or a bald head is read as hair
    lighting     .89   light on the cheeks and skin tone together; the two cannot be told apart
    clothes      .94   as named; a beard or long hair at the lower edge darkens it
    mouth        .84   teeth showing against closed lips; bright lips are the errors
    facing       .83   where the head turns, as seen by the viewer; correlation .69 with a detector's nose offset
    forehead     .89   covered by a fringe or a hat (or in shadow) against bare

Tried and left out because the classes were not what the name says: long hair, hair warmth (.68), beard, glasses
(.64), lip colour (.73); light from the left or right is real (.91) but too bound to the head's turn (-.59).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from unif2ace.data.faces import SIZE
from unif2ace.data.words import WORDS

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_CHUNK = 512


@dataclass(frozen=True)
class Attribute:
    """One thing to say of a face.

    Attributes:
        name: key, as in tables.
        words: the word of each class, from the low end of the measure to the high one.
        measure: [N, 64, 64, 3] float32 in [0, 255] -> [N] float32.
    """

    name: str
    words: tuple[str, ...]
    measure: Callable[[np.ndarray], np.ndarray]

    @property
    def classes(self) -> int:
        return len(self.words)


def _pixels(faces: np.ndarray, *regions: tuple[int, int, int, int]) -> np.ndarray:
    """Pixels [N, P, 3] of the regions (first row, end row, first column, end column)."""
    parts = [faces[:, top:bottom, left:right].reshape(len(faces), -1, 3) for top, bottom, left, right in regions]
    return np.concatenate(parts, 1)


def _background(faces: np.ndarray) -> np.ndarray:
    return _pixels(faces, (2, 22, 0, 7), (2, 22, 57, 64))


def _cheeks(faces: np.ndarray) -> np.ndarray:
    return _pixels(faces, (35, 42, 18, 25), (35, 42, 39, 46))


def _cheek_light(faces: np.ndarray) -> np.ndarray:
    """[N], kept away from zero: other regions are measured against it."""
    return np.maximum((_cheeks(faces) @ _LUMA).mean(1), 1.0)


def _saturation(pixels: np.ndarray) -> np.ndarray:
    high = pixels.max(-1)
    return (high - pixels.min(-1)) / (high + 1)


def _background_brightness(faces: np.ndarray) -> np.ndarray:
    return (_background(faces) @ _LUMA).mean(1)


def _background_warmth(faces: np.ndarray) -> np.ndarray:
    """Red minus blue."""
    pixels = _background(faces)
    return (pixels[..., 0] - pixels[..., 2]).mean(1)


def _background_green(faces: np.ndarray) -> np.ndarray:
    """Green over the mean of red and blue."""
    pixels = _background(faces)
    return (pixels[..., 1] - (pixels[..., 0] + pixels[..., 2]) / 2).mean(1)


def _hair(faces: np.ndarray) -> np.ndarray:
    return np.median(_pixels(faces, (4, 11, 24, 40)) @ _LUMA, axis=1)


def _clothes(faces: np.ndarray) -> np.ndarray:
    return (_pixels(faces, (60, 64, 10, 54)) @ _LUMA).mean(1)


def _teeth(faces: np.ndarray) -> np.ndarray:
    """The brightest, least coloured fifth of the mouth, against the cheeks: teeth are white, lips are not."""
    mouth = _pixels(faces, (44, 50, 26, 38))
    light = (mouth @ _LUMA) / _cheek_light(faces)[:, None]
    colour = _saturation(mouth) - _saturation(_cheeks(faces)).mean(1, keepdims=True)
    return np.sort(light - colour, axis=1)[:, -14:].mean(1)


def _turn(faces: np.ndarray) -> np.ndarray:
    """Minus the column at which the skin is centred: a head that turns to the viewer's right shows its left side."""
    columns = slice(8, 56)
    region = faces[:, 28:52, columns]
    skin = np.median(_cheeks(faces), axis=1)[:, None, None]
    skin_light, light = (skin @ _LUMA) + 20, (region @ _LUMA) + 20
    hue = np.abs(region / light[..., None] - skin / skin_light[..., None]).sum(-1)
    is_skin = hue + 0.5 * np.abs(np.log(light / skin_light)) < 0.35
    offsets = np.arange(columns.start, columns.stop) - (SIZE - 1) / 2
    return -(is_skin * offsets).sum((1, 2)) / (is_skin.sum((1, 2)) + 50)


def _forehead(faces: np.ndarray) -> np.ndarray:
    return (_pixels(faces, (17, 21, 26, 38)) @ _LUMA).mean(1) / _cheek_light(faces)


_MEASURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "background": _background_brightness,
    "tint": _background_warmth,
    "greenery": _background_green,
    "hair": _hair,
    "lighting": _cheek_light,
    "clothes": _clothes,
    "mouth": _teeth,
    "facing": _turn,
    "forehead": _forehead,
}
ATTRIBUTES: tuple[Attribute, ...] = tuple(
    Attribute(name, each.classes, _MEASURES[name]) for name, each in WORDS.items()
)
NAMES: tuple[str, ...] = tuple(each.name for each in ATTRIBUTES)


def measure(images: np.ndarray) -> np.ndarray:
    """Every attribute of `images` [N, 64, 64, 3] uint8 RGB, as [N, A] float32."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != (SIZE, SIZE, 3):
        raise ValueError(f"images: expected uint8 [N, {SIZE}, {SIZE}, 3], got {images.dtype} {list(images.shape)}")
    values = np.empty((len(images), len(ATTRIBUTES)), np.float32)
    for start in range(0, len(images), _CHUNK):
        chunk = images[start : start + _CHUNK].astype(np.float32)
        for column, each in enumerate(ATTRIBUTES):
            values[start : start + _CHUNK, column] = each.measure(chunk)
    return values


def fit_thresholds(values: np.ndarray) -> np.ndarray:
    """Cut points at the quantiles of `values` [N, A]: [A, C - 1] float32 with C the most classes, padded with inf."""
    if values.ndim != 2 or values.shape[1] != len(ATTRIBUTES) or not len(values):
        raise ValueError(f"values: expected [N > 0, {len(ATTRIBUTES)}], got {list(values.shape)}")
    thresholds = np.full((len(ATTRIBUTES), max(each.classes for each in ATTRIBUTES) - 1), np.inf, np.float32)
    for row, each in enumerate(ATTRIBUTES):
        cuts = np.arange(1, each.classes) / each.classes
        thresholds[row, : each.classes - 1] = np.quantile(values[:, row], cuts)
    return thresholds


def classify(values: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
    """Classes [N, A] int64 of `values` [N, A]: how many of the attribute's thresholds a value is above."""
    return (values[:, :, None] > thresholds[None]).sum(-1)
