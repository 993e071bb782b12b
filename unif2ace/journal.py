"""A file of named records that only grows: what was written before a process was killed is there afterwards."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unif2ace.errors import UserError


class Journal:
    """Records by key in a file of JSON lines, one write and one sync a record; safe to use from several threads.

    Only where each record stands is held in memory. A last line that was cut off (a power failure) is taken away; a
    line that is damaged is passed over, and its record is as if it had never been written. A key that is written
    again has its latest value. Only the owner may read the file.

    Args:
        path: made when the first record is written.

    Attributes:
        damaged: lines that were passed over.

    Raises:
        UserError: the file cannot be read or written, or another process writes to it.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.damaged = Path(path), 0
        self._places: dict[str, tuple[int, int]] = {}
        self._lock = threading.Lock()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}; choose another folder") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._file)
            raise UserError(f"{path} is being written by another process") from error
        self._end = self._scan()

    def _scan(self) -> int:
        start = 0
        with open(self.path, "rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    os.ftruncate(self._file, start)
                    return start
                try:
                    self._places[json.loads(line)["key"]] = (start, len(line))
                except (ValueError, LookupError, TypeError):
                    self.damaged += 1
                start += len(line)
        return start

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def __len__(self) -> int:
        return len(self._places)

    def get(self, key: str) -> Any:
        """The record of that key; None where there is none."""
        place = self._places.get(key)
        return None if place is None else json.loads(os.pread(self._file, place[1], place[0]))["value"]

    def put(self, key: str, value: Any) -> None:
        """Write a record; when this returns it is on the disk.

        Raises:
            UserError: the file system refuses; no part of the record stays.
        """
        line = json.dumps({"key": key, "value": value}, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        with self._lock:
            try:
                written = os.write(self._file, line)
                if written != len(line):
                    raise OSError(28, "No space left on device")
                os.fsync(self._file)
            except OSError as error:
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self._end)
                raise UserError(f"cannot write {self.path}: {error.strerror}; free space and run it again") from error
            self._places[key] = (self._end, len(line))
            self._end += len(line)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Every key with its record, in the order of their first writing."""
        for key in list(self._places):
            yield key, self.get(key)

    def close(self) -> None:
        """Let go of the file; another process may write to it."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
