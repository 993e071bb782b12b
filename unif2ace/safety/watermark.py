"""An invisible watermark that says "a model painted this", and the test for it; numpy and Pillow alone.

A fixed pattern of signs is added to middle frequencies of the luminance in 8 x 8 blocks (spread spectrum: Cox et al.,
1997), on the grid that JPEG quantises; or its negative, if the picture leans to that. It repeats every 64 pixels, so
every tile of that size carries all of it and a larger picture carries it many times over. The test sums the tiles and
correlates with the pattern, scaled so that on a picture without the mark the sum is standard normal, whatever it shows:

    c[i] = clip(coefficient, -CLIP, CLIP) summed over tiles,   score = |sum_i sign[i] c[i]| / sqrt(sum_i c[i]^2)

Over a random pattern P(score > t) <= 2 exp(-t^2 / 2) for every picture (Hoeffding): below 4e-8 at `ALIGNED`. A picture
whose grid was lost by cropping is searched at all 64 x 64 shifts, against `SHIFTED`: below 1e-7 for all of them.

It marks; it does not protect: the pattern is public, so whoever wants it gone can take it out, and resizing or strong
blur loses it. No sign of it does not mean that a picture is a photograph.
"""

from __future__ import annotations

import io
from typing import NamedTuple

import numpy as np
from PIL import Image

KEY = 0xF2BA4  # of the pattern; of 300 tried, the one that portraits lean to least
PERIOD = 8  # blocks after which the pattern repeats
CLIP = 6.0  # luminance levels: an edge of the picture counts no more than this
ALIGNED, SHIFTED = 6.0, 7.1  # scores that only a marked picture reaches, on its own grid and at any of 4096 shifts
JPEG, MARGIN = 90, 3.0  # the mark outlives this quality, this far above the threshold
STRENGTHS = tuple(np.arange(2.0, 12.1, 0.5))  # luminance levels a coefficient, the weakest that suffices is taken
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)


def _transform() -> np.ndarray:
    """The orthonormal 8-point DCT, [frequency, sample]."""
    sample, frequency = np.arange(8), np.arange(8)[:, None]
    rows = np.cos((2 * sample + 1) * frequency * np.pi / 16) / 2
    rows[0] /= np.sqrt(2)
    return rows.astype(np.float32)


def _pattern() -> np.ndarray:
    """Signs [PERIOD, PERIOD, 8, 8]: blocks down and across, frequencies down and across; 0 where nothing is added."""
    order = np.add.outer(np.arange(8), np.arange(8))
    used = (order >= 3) & (order <= 6)  # below, the picture is strong; above, JPEG keeps little
    signs = np.random.RandomState(KEY).randint(0, 2, (PERIOD, PERIOD, 8, 8)) * 2 - 1  # a stream that stays as it is
    return (signs * used).astype(np.float32)


_DCT, _SIGNS = _transform(), _pattern()
_TILE = np.einsum("ka,ijkl,lb->iajb", _DCT, _SIGNS, _DCT).reshape(8 * PERIOD, 8 * PERIOD)  # in pixels


class Detection(NamedTuple):
    """found: whether the picture carries the mark; score: see the module's text; threshold: what it was held to."""

    found: bool
    score: float
    threshold: float


def mark(image: np.ndarray) -> np.ndarray:
    """`image` [H, W, 3] uint8 RGB with the watermark, strong enough to outlive JPEG at quality `JPEG`.

    A picture too small or too saturated to carry it comes back with the strongest; `detect` tells.
    """
    _check(image)
    height, width = (side // 8 * 8 for side in image.shape[:2])  # a rest of less than a block carries nothing
    repeats = -(-height // len(_TILE)), -(-width // len(_TILE))
    added = np.zeros(image.shape[:2] + (1,), np.float32)
    added[:height, :width, 0] = np.tile(_TILE, repeats)[:height, :width]
    if _correlation(image) < 0:
        added = -added
    marked = image
    for strength in STRENGTHS:
        marked = np.clip(np.rint(image + strength * added), 0, 255).astype(np.uint8)
        if abs(_correlation(_compressed(marked))) >= ALIGNED + MARGIN:
            break
    return marked


def detect(image: np.ndarray) -> Detection:
    """Whether `image` [H, W, 3] uint8 RGB carries the watermark, looked for on its own grid, then at every shift."""
    _check(image)
    score = abs(_correlation(image))
    if score >= ALIGNED or min(image.shape[:2]) < 16:
        return Detection(score >= ALIGNED, score, ALIGNED)
    score = max(
        float(abs(_shifted_correlations(image[down:, across:])).max()) for down in range(8) for across in range(8)
    )
    return Detection(score >= SHIFTED, score, SHIFTED)


def _check(image: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise ValueError(f"image: expected uint8 [H, W, 3], got {image.dtype} {list(image.shape)}")


def _compressed(image: np.ndarray) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="JPEG", quality=JPEG)
    return np.asarray(Image.open(file))


def _folded(image: np.ndarray) -> np.ndarray:
    """Clipped coefficients summed over tiles, [PERIOD, PERIOD, 8, 8], 0 where the pattern is."""
    luma = image @ _LUMA
    down, across = (side // 8 for side in luma.shape)
    blocks = luma[: 8 * down, : 8 * across].reshape(down, 8, across, 8)
    coefficients = np.einsum("ka,iajb,lb->ijkl", _DCT, blocks, _DCT, optimize=True)
    coefficients = np.clip(coefficients, -CLIP, CLIP) * (_SIGNS[0, 0] != 0)
    rest = [(0, -down % PERIOD), (0, -across % PERIOD), (0, 0), (0, 0)]
    tiles = np.pad(coefficients, rest).reshape(-(-down // PERIOD), PERIOD, -(-across // PERIOD), PERIOD, 8, 8)
    return tiles.sum((0, 2))


def _correlation(image: np.ndarray) -> float:
    folded = _folded(image)
    return float((folded * _SIGNS).sum() / max(np.sqrt((folded**2).sum()), 1e-6))


def _shifted_correlations(image: np.ndarray) -> np.ndarray:
    """The same at every shift of the pattern by whole blocks, [PERIOD, PERIOD]: a circular correlation."""
    folded = _folded(image)
    spectrum = np.fft.fft2(folded, axes=(0, 1)) * np.fft.fft2(_SIGNS, axes=(0, 1)).conj()
    return np.fft.ifft2(spectrum.sum((2, 3))).real / max(np.sqrt((folded**2).sum()), 1e-6)
