"""What to paint anew: a mask of pixels, from a picture or a box, brought to the image tokenizer's grid and blended."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from unif2ace.errors import UserError

Mask = np.ndarray  # bool, True where the picture is painted anew
FEATHER = 1 / 16  # of the side: width of the blend, inside what is painted anew


def box_mask(box: Sequence[int], height: int, width: int) -> Mask:
    """Mask [height, width] of the rectangle left, top, right, bottom in pixels, cut to the picture.

    Raises:
        UserError: nothing of it is in the picture.
    """
    left, top, right, bottom = box
    mask = np.zeros((height, width), bool)
    mask[max(0, top) : max(0, bottom), max(0, left) : max(0, right)] = True
    if not mask.any():
        raise UserError(
            f"--box {left},{top},{right},{bottom}: nothing of it is in the picture of {width} x {height} pixels; "
            "give left,top,right,bottom"
        )
    return mask


def image_mask(picture: np.ndarray, height: int, width: int) -> Mask:
    """Mask [height, width] of a picture [H, W, 3] of equal size: what is bright is painted anew.

    Raises:
        UserError: the sizes differ, or nothing of it is bright.
    """
    if picture.shape[:2] != (height, width):
        raise UserError(
            f"--mask: expected the picture's size, {width} x {height} pixels, "
            f"got {picture.shape[1]} x {picture.shape[0]}"
        )
    mask = picture.mean(axis=2) >= 128
    if not mask.any():
        raise UserError("--mask: nothing in it is white; white is painted anew, black is kept")
    return mask


def touched(mask: Mask, grid: int) -> np.ndarray:
    """Image tokens [grid * grid] bool, rows first, of which `mask` [side, side] touches at least one pixel."""
    patch = mask.shape[0] // grid
    return mask.reshape(grid, patch, grid, patch).any(axis=(1, 3)).reshape(-1)


def blended(kept: np.ndarray, painted: np.ndarray, mask: Mask) -> np.ndarray:
    """`painted` inside the mask, `kept` outside to the bit; within the mask's border the one goes over into the other.

    Args:
        kept, painted: [side, side, 3] uint8.
        mask: [side, side].
    """
    import cv2  # where a picture is blended alone: what paints whole faces needs no OpenCV

    width = max(1, round(FEATHER * mask.shape[0]))
    # the picture's own edge is no border: what lies beyond it is as the pixels beside it
    room = cv2.copyMakeBorder(mask.astype(np.uint8), width, width, width, width, cv2.BORDER_REPLICATE)
    if room.all():
        return painted.copy()
    inside = cv2.distanceTransform(room, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[width:-width, width:-width]
    share = np.clip(inside / (width + 1), 0, 1)[:, :, None]
    return np.rint(kept + share * (painted.astype(np.float32) - kept)).astype(np.uint8)
