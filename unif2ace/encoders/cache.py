"""Features kept on disk beside the data, each computed once, however many runs and processes ask."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from unif2ace.encoders.base import Encoder, FaceCountError
from unif2ace.errors import UserError

_SUM = 32  # bytes of the SHA-256 that an entry begins with
_KINDS = {torch.float32: np.float32, torch.float16: np.float16}


class FeatureCache:
    """A folder of features, one file a picture: `folder/<encoder>-<fingerprint>-<dtype>/<2 digits>/<62 digits>`.

    A file is named by the SHA-256 of the picture's pixels and holds the features' bytes behind their own SHA-256. It
    appears whole or not at all, so that any number of processes may share the folder; two that compute the same
    picture write the same file. Only the owner may read the files: identity vectors tell who a person is.

    Args:
        folder: made when the first entry is written.
        dtype: float32, or float16 for half the space; features come back as they were kept, the first time too.
    """

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        if dtype not in _KINDS:
            raise ValueError(f"dtype: expected one of {list(_KINDS)}, got {dtype}")
        self.folder, self.dtype = Path(folder), dtype

    def __call__(
        self, encoder: Encoder, images: Sequence[np.ndarray], step: Callable[[int], object] = lambda count: None
    ) -> torch.Tensor:
        """`encoder(images)`, of which only what is not kept yet is computed, in the encoder's batches.

        An entry that is damaged is computed again, with a warning that names it.

        Raises:
            UserError: a picture is not what the encoder takes (what was computed before it is kept), or the file
                system refuses.
        """
        sizes = [encoder.channels] if encoder.tokens is None else [encoder.tokens, encoder.channels]
        features = torch.empty(len(images), *sizes)
        rows: dict[Path, list[int]] = {}
        for row, image in enumerate(images):
            rows.setdefault(self.path(encoder, image), []).append(row)
        missing = []
        for path, where in rows.items():
            kept = self._read(path, sizes)
            if kept is None:
                missing.append(path)
            else:
                features[where] = kept
                step(len(where))
        for start in range(0, len(missing), encoder.batch):
            part = missing[start : start + encoder.batch]
            try:
                computed = encoder([images[rows[path][0]] for path in part])
            except FaceCountError as error:
                raise FaceCountError(rows[part[error.index]][0], error.count) from error
            for path, value in zip(part, computed.cpu().to(self.dtype)):
                _write(path, value.contiguous().numpy().tobytes())
                features[rows[path]] = value.float()
                step(len(rows[path]))
        return features.to(encoder.device)

    def path(self, encoder: Encoder, image: np.ndarray) -> Path:
        """Where a picture's features are, or would be."""
        content = np.ascontiguousarray(image)
        total = hashlib.sha256(f"{content.dtype} {content.shape} ".encode())
        total.update(content.data)
        key = total.hexdigest()
        kind = f"{encoder.name}-{encoder.fingerprint}-{str(self.dtype).rpartition('.')[2]}"
        return self.folder / kind / key[:2] / key[2:]

    def _read(self, path: Path, sizes: Sequence[int]) -> torch.Tensor | None:
        """What an entry holds; None where there is none, or a damaged one."""
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}; mend its rights or delete it") from error
        payload = content[_SUM:]
        values = np.dtype(_KINDS[self.dtype])
        if hashlib.sha256(payload).digest() != content[:_SUM] or len(payload) != np.prod(sizes) * values.itemsize:
            warnings.warn(f"{path} is damaged: computed again", RuntimeWarning, stacklevel=3)
            return None
        return torch.from_numpy(np.frombuffer(payload, values).reshape(sizes).astype(np.float32))

    def __repr__(self) -> str:
        return f"FeatureCache({str(self.folder)!r}, {self.dtype})"


def _write(path: Path, payload: bytes) -> None:
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".")  # for its owner alone, as mkstemp has it
        with os.fdopen(handle, "wb") as file:
            file.write(hashlib.sha256(payload).digest() + payload)
        os.replace(partial, path)
        partial = None
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial)
