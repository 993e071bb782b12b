"""Faces brought to where their eyes, nose and mouth corners are expected: similarity transforms of five landmarks."""

from __future__ import annotations

import cv2
import numpy as np

# Eyes (viewer's left, right), nose tip, mouth corners, (x, y), in ArcFace's 112 x 112 input; SFace's too
ARCFACE = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])
SIDE = 112


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rotation, uniform scale and shift [2, 3] that best maps points [P, 2] to points [P, 2] (Umeyama, 1991)."""
    source_mean, target_mean = source.mean(0), target.mean(0)
    centred = source - source_mean
    left, stretch, right = np.linalg.svd((target - target_mean).T @ centred)
    mirror = np.diag([1.0, np.sign(np.linalg.det(left @ right))])
    linear = left @ mirror @ right * ((stretch * np.diag(mirror)).sum() / (centred**2).sum())
    return np.column_stack([linear, target_mean - linear @ source_mean])


def warp(image: np.ndarray, matrix: np.ndarray, side: int) -> np.ndarray:
    """[side, side, 3] of an image under `matrix` [2, 3]: cubic, its edge repeated outside."""
    return cv2.warpAffine(image, matrix, (side, side), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
