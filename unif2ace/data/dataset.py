"""The demo's faces with everything known of them, built once and kept in a cache file."""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from unif2ace.data import attributes, identity
from unif2ace.data import faces as generator
from unif2ace.data.faces import PSI, SIZE, generate_faces
from unif2ace.encoders import alignment, base, sface
from unif2ace.encoders import faces as face_encoders
from unif2ace.errors import UserError
from unif2ace.files import digest, replacing
from unif2ace.parsing import read_arrays, reading

VERSION = 1
HELD_OUT = 300


@dataclass(frozen=True)
class FaceSet:
    """Faces and what was measured of them.

    Attributes:
        images: [N, 64, 64, 3] uint8 RGB.
        classes: [N, A] int64 attribute classes, A and their words as in `attributes.ATTRIBUTES`.
        thresholds: [A, 2] float32, fitted on the training faces alone.
        identity: [N, 128] float32 unit vectors.
        held_out: the last `held_out` faces are never trained on.
        settings: what the set was made with.
    """

    images: np.ndarray
    classes: np.ndarray
    thresholds: np.ndarray
    identity: np.ndarray = field(repr=False)  # who a person is: never said
    held_out: int
    settings: dict

    def __len__(self) -> int:
        return len(self.images)

    @property
    def train(self) -> np.ndarray:
        """Indices of the training faces."""
        return np.arange(len(self) - self.held_out)

    @property
    def test(self) -> np.ndarray:
        """Indices of the held-out faces."""
        return np.arange(len(self) - self.held_out, len(self))

    def classify(self, images: np.ndarray) -> np.ndarray:
        """Attribute classes [M, A] of other faces [M, 64, 64, 3] uint8, by this set's thresholds."""
        return attributes.classify(attributes.measure(images), self.thresholds)

    def save(self, path: Path) -> None:
        """Write the set, whole or not at all.

        Raises:
            UserError: the file system refuses; an older file at `path` is untouched.
        """
        with replacing(path) as partial, partial.open("wb") as file:
            np.savez(
                file,
                images=self.images,
                classes=self.classes.astype(np.int8),
                thresholds=self.thresholds,
                identity=self.identity.astype(np.float16),
                settings=np.array(json.dumps(self.settings)),
            )

    @classmethod
    def load(cls, path: Path) -> FaceSet:
        """Read a set.

        Raises:
            UserError: the file is missing, cannot be read, or is damaged.
        """
        held = read_arrays(path, "set of faces")
        wanted = {each.name for each in dataclasses.fields(cls)} - {"held_out"}
        with reading(path, "set of faces", "delete it and run again"):
            settings = json.loads(str(held.get("settings")))
        if wanted - held.keys() or not isinstance(settings, dict) or "held_out" not in settings:
            raise UserError(f"{path} is damaged or no set of faces (it lacks a part): delete it and run again")
        vectors = held["identity"].astype(np.float32)
        return cls(
            images=held["images"],
            classes=held["classes"].astype(np.int64),
            thresholds=held["thresholds"],
            identity=vectors / np.linalg.norm(vectors, axis=-1, keepdims=True),
            held_out=settings["held_out"],
            settings=settings,
        )


def build_faces(
    count: int,
    seed: int,
    cache_dir: Path,
    *,
    held_out: int = HELD_OUT,
    psi: float = PSI,
    threads: int = 2,
    progress: bool = True,
) -> FaceSet:
    """Take the set from `cache_dir` if it was made with these settings, else make it: faces, attributes, identities.

    A damaged cache file is made anew, with a line that says so. Ctrl-C leaves the cache as it was.

    Args:
        count: faces in all, the `held_out` last of them kept from training.

    Raises:
        UserError: a package is missing, or the cache cannot be read or written.
    """
    if not 0 < held_out < count:
        raise ValueError(f"held_out: expected between 1 and count - 1 = {count - 1}, got {held_out}")
    settings = {
        "version": VERSION, "count": count, "seed": seed, "psi": psi, "held_out": held_out, "size": SIZE,
        "attributes": {each.name: list(each.words) for each in attributes.ATTRIBUTES},
        "source": digest(attributes, generator, identity, alignment, base, face_encoders, sface),
    }  # fmt: skip
    path = Path(cache_dir) / "faces.npz"
    cached = _cached(path, settings)
    if cached is not None:
        return cached

    _check_writable(path.parent)
    started = time.perf_counter()
    images = generate_faces(count, seed, psi, threads, progress)
    generated = time.perf_counter()
    values = attributes.measure(images)
    thresholds = attributes.fit_thresholds(values[: count - held_out])
    measured = time.perf_counter()
    encoder = identity.face_encoder()
    with tqdm(total=count, desc="identity", unit="face", disable=not progress) as bar:
        vectors = encoder(images, bar.update).numpy()
    embedded = time.perf_counter()
    faces = FaceSet(images, attributes.classify(values, thresholds), thresholds, vectors, held_out, settings)
    faces.save(path)
    if progress:
        print(
            f"{count} faces: generated in {generated - started:.0f} s, attributes {measured - generated:.1f} s, "
            f"identity {embedded - measured:.0f} s -> {path}"
        )
    return FaceSet.load(path)


def _cached(path: Path, settings: dict) -> FaceSet | None:
    """The set at `path` if it is whole and made with `settings`."""
    if not path.exists():
        return None
    try:
        faces = FaceSet.load(path)
    except UserError as error:
        if isinstance(error.__cause__, OSError):
            raise
        print(f"{path} is damaged; making it again")
        return None
    if faces.settings != settings:
        print(f"{path} was made with other settings; making it again")
        return None
    return faces


def _check_writable(folder: Path) -> None:
    """Report a folder that cannot be written now, not after a minute's work."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error
