"""What every set of samples answers, and how bytes are read out of its files."""

from __future__ import annotations

import functools
import os
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from unif2ace.data.samples import Sample, SampleError


class Source(ABC):
    """Samples by index.

    Attributes:
        path: what was opened.
        fingerprint: of the records (not of image files, which they only name).
        damaged: (where, reason) of damage that was met while opening, of records that have no index.
    """

    path: Path
    fingerprint: str
    damaged: list[tuple[str, str]]

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __getitem__(self, index: int) -> Sample:
        """Raises SampleError where the sample cannot be read."""

    def read(self, index: int, features: bool = True) -> Sample:
        """The sample; without its features where they are not wanted and lie apart."""
        return self[index]

    def serving(self, task: str) -> np.ndarray | None:
        """Indices of the samples that have the words for `task`; None: all, as far as is known without reading."""
        return None


class _File:
    """A file open for reading for as long as it is kept."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


@functools.lru_cache(maxsize=128)
def _opened(path: Path) -> _File:
    return _File(path)


def read_at(path: Path, offset: int, size: int) -> bytes:
    """Bytes of a file. Reading moves no pointer, so processes that share the open file do not disturb each other.

    Raises:
        SampleError: the file cannot be read, or ends before.
    """
    where = f"{path} at byte {offset}"
    try:
        file, parts, missing = _opened(path), [], size
        early = offset + size - os.fstat(file.descriptor).st_size
        if early > 0:  # before memory is set aside for what only an index claims
            raise SampleError(where, f"the file ends {early} bytes early")
        while missing:
            part = os.pread(file.descriptor, missing, offset + size - missing)
            if not part:
                raise SampleError(where, f"the file ends {missing} bytes early")
            parts.append(part)
            missing -= len(part)
    except OSError as error:
        raise SampleError(where, error.strerror or str(error)) from error
    return parts[0] if len(parts) == 1 else b"".join(parts)
