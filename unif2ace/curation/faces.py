"""Pictures to faces worth describing: one face, large, sharp and lit enough, and none twice.

Duplicates are found by identity vectors. These tell who a person is: they are kept in files that only the owner may
read while the stage runs, so that it can go on where it was, and removed when it is done. Nothing else ever has them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from unif2ace.curation.config import FacesConfig, ImagesConfig
from unif2ace.data.dataset import FaceSet, build_faces
from unif2ace.data.faces import SIZE
from unif2ace.data.identity import FRAME, clear_faces, crop_face, face_encoder
from unif2ace.errors import UserError
from unif2ace.files import digest, read_json, replacing, write_json
from unif2ace.parsing import read_arrays, reading
from unif2ace.pictures import decode

ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_CHUNK = 128
_BLOCK = 1024
_SIDE = 112  # at which a face's sharpness is measured
_EYES = float(FRAME[1, 0] - FRAME[0, 0])  # distance in a frame of side 1


@dataclass(frozen=True)
class Face:
    """Attributes:
    id: digest of the picture's file: no name.
    file: below the folder of the pictures.
    landmarks: [5][2], of its face; x, y in pixels.
    reason: why it is let go; "" where it is kept.
    measures: of its quality.
    """

    id: str
    file: str
    landmarks: list[list[float]] = field(default_factory=list)
    reason: str = ""
    measures: dict[str, float] | None = None


def picture_folder(config: ImagesConfig, out: Path, work: Path) -> tuple[Path, FaceSet | None]:
    """The folder of the pictures; of synthetic faces they are written into `out` first.

    Args:
        work: folder for what is made with them and is no part of the set: their identity vectors.

    Raises:
        UserError: there is no such folder or file, or faces cannot be made.
    """
    if config.path is not None:
        if not Path(config.path).is_dir():
            raise UserError(f"images.path: {config.path} is no folder")
        return Path(config.path), None
    if config.faces is not None:
        faces = FaceSet.load(Path(config.faces))
    else:
        count = max(config.synthetic, 20)
        faces = build_faces(count, config.seed, work / "synthetic", held_out=max(1, count // 10))
    folder = out / "images"
    for index in range(min(len(faces), config.synthetic or len(faces), config.limit or len(faces))):
        path = folder / f"{index:06d}.png"
        if not path.exists():
            with replacing(path) as partial:
                partial.write_bytes(cv2.imencode(".png", faces.images[index][..., ::-1])[1].tobytes())
    return folder, faces


def picture_files(folder: Path, limit: int) -> list[str]:
    """Names of the picture files below `folder`, sorted, at most `limit` of them."""
    found = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    if not found:
        raise UserError(f"{folder}: no picture files ({', '.join(ENDINGS)}) are in it")
    return found[:limit] if limit else found


def framed(folder: Path, face: Face, side: int) -> np.ndarray:
    """The face of a picture in the training frame, [side, side, 3] uint8 RGB."""
    image = decode((folder / face.file).read_bytes())
    return crop_face(image, np.array(face.landmarks), side)


def check_faces(folder: Path, files: Sequence[str], config: FacesConfig, work: Path) -> list[Face]:
    """Every picture with what was found, in the order of `files`; those without a reason are kept.

    Args:
        work: folder of the stage's own files: it goes on where it was.
    """
    name = digest(json.dumps([asdict(config), list(files), str(folder.resolve())]).encode())
    done = work / f"faces-{name}.json"
    if done.exists():
        return [Face(**each) for each in read_json(done)]
    faces: list[Face] = []
    vectors: list[np.ndarray] = []
    with tqdm(total=len(files), desc="faces", unit="picture") as bar:
        for start in range(0, len(files), _CHUNK):
            found, rows = _chunk(folder, files[start : start + _CHUNK], config, work, f"{name}-{start:08d}")
            faces += found
            vectors.append(rows)
            bar.update(len(found))
    faces = _without_duplicates(faces, np.concatenate(vectors), config.same)
    write_json(done, [asdict(each) for each in faces])
    for path in work.glob(f"{name}-*"):
        path.unlink()
    return faces


def _chunk(
    folder: Path, files: Sequence[str], config: FacesConfig, work: Path, name: str
) -> tuple[list[Face], np.ndarray]:
    """Faces of some pictures, and the vectors of those that are kept."""
    path = work / f"{name}.npz"
    if path.exists():
        kept = read_arrays(path, "part of the work")
        with reading(path, "part of the work", "delete it and run again"):
            told = json.loads(str(kept["faces"]))
        return [Face(**each) for each in told], kept["vectors"]
    found = [_examine(folder, file, config) for file in files]
    crops = [crop for _, crop in found if crop is not None]
    vectors = face_encoder()(crops).numpy() if crops else np.zeros((0, 128), np.float32)
    faces = [face for face, _ in found]
    with replacing(path) as partial:
        partial.touch(mode=0o600)
        with partial.open("wb") as file_:
            np.savez(file_, faces=np.array(json.dumps([asdict(each) for each in faces])), vectors=vectors)
    return faces, vectors


def _examine(folder: Path, file: str, config: FacesConfig) -> tuple[Face, np.ndarray | None]:
    """One picture, and its face in the frame if it is kept."""
    try:
        content = (folder / file).read_bytes()
        image = decode(content)
    except OSError as error:
        return Face("", file, reason=f"cannot be read: {error.strerror}"), None
    except ValueError as error:
        return Face("", file, reason=f"no picture: it {error}"), None
    name = hashlib.sha256(content).hexdigest()[:16]
    landmarks = clear_faces(image)
    if not len(landmarks):
        return Face(name, file, reason="no face"), None
    if len(landmarks) > 1 and not config.bystanders:
        return Face(name, file, reason="several faces"), None
    told = [[round(float(each), 2) for each in point] for point in landmarks[0]]
    measures = quality(crop_face(image, landmarks[0], _SIDE))
    measures["side"] = round(float(np.hypot(*(landmarks[0][1] - landmarks[0][0]))) / _EYES, 1)
    reason = _fault(measures, config)
    face = Face(name, file, told, reason, measures)
    return face, None if reason else crop_face(image, landmarks[0], SIZE)


def quality(face: np.ndarray) -> dict[str, float]:
    """Sharpness and light of a face [H, W, 3] uint8 RGB that fills its picture."""
    light = cv2.cvtColor(face, cv2.COLOR_RGB2GRAY)
    return {
        "blur": round(float(cv2.Laplacian(light, cv2.CV_64F).var()), 2),
        "light": round(float(light.mean()), 1),
        "clipped": round(float(((light <= 2) | (light >= 253)).mean()), 3),
    }


def _fault(measures: dict[str, float], config: FacesConfig) -> str:
    for wrong, reason in (
        (measures["side"] < config.side, "face too small"),
        (measures["blur"] < config.blur, "blurred"),
        (measures["light"] < config.dark, "too dark"),
        (measures["light"] > config.bright, "too bright"),
        (measures["clipped"] > config.clipped, "clipped"),
    ):
        if wrong:
            return reason
    return ""


def _without_duplicates(faces: list[Face], vectors: np.ndarray, same: float) -> list[Face]:
    """Of pictures whose vectors are within `same` of an earlier kept one's, or whose files are equal, the first."""
    good = [face for face in faces if not face.reason]
    twins = repeated(vectors, same) if same < 1 else np.zeros(len(good), bool)
    seen: set[str] = set()
    fallen = set()
    for face, twin in zip(good, twins):
        if twin or face.id in seen:
            fallen.add(face.file)
        seen.add(face.id)
    return [replace(face, reason="duplicate") if face.file in fallen else face for face in faces]


def repeated(vectors: np.ndarray, same: float) -> np.ndarray:
    """Which of the unit vectors [N, C] have a cosine of `same` or more with an earlier one that is kept: [N] bool."""
    twin = np.zeros(len(vectors), bool)
    kept = np.empty_like(vectors)
    count = 0
    for start in range(0, len(vectors), _BLOCK):  # products of matrices: a vector at a time is bound by memory
        block = vectors[start : start + _BLOCK]
        earlier = (kept[:count] @ block.T >= same).any(0)
        within = np.tril(block @ block.T >= same, -1)
        for row in range(len(block)):
            twin[start + row] = earlier[row] or bool((within[row, :row] & ~twin[start : start + row]).any())
        fresh = block[~twin[start : start + len(block)]]
        kept[count : count + len(fresh)] = fresh
        count += len(fresh)
    return twin
