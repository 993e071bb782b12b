"""log.jsonl, what a run writes down: a JSON object a line, appended whole, readable whatever stopped the writer.

{"step": 17, "loss": ...} is a step; {"event": "checkpoint", "step": 100, ...} is anything else.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unif2ace.files import replacing

# Events that the steps themselves bring: steps that are done again bring them again. Others tell what befell the run.
OF_STEPS = frozenset({"stage", "skipped", "corrupt"})


def read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a log, in order; what is no record (a line cut short by the end of its writer) is passed over.

    Raises:
        OSError: there is no such file, or it cannot be read.
    """
    for _, record in _lines(path):
        if record is not None:
            yield record


def take_up(path: Path, start_step: int) -> int:
    """Make a log fit to go on at `start_step`: leave out what steps from there on wrote, and lines that are no record.

    Returns:
        How many lines were left out. The file is written anew only where that is needed, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    dropped, whole = 0, True
    for line, record in _lines(path):
        dropped += not _stays(record, start_step)
        whole = line.endswith(b"\n")
    if dropped or not whole:
        with replacing(path) as partial, open(partial, "wb") as file:
            file.writelines(line.rstrip() + b"\n" for line, record in _lines(path) if _stays(record, start_step))
            file.flush()
            os.fsync(file.fileno())
    return dropped


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    with open(path, "rb") as file:
        for line in file:
            record = None
            with contextlib.suppress(ValueError, RecursionError):  # cut short, or zeros where a disk lost power
                record = json.loads(line)
            yield line, record if isinstance(record, dict) else None


def _stays(record: dict[str, Any] | None, start_step: int) -> bool:
    if record is None:
        return False
    if "event" in record and record["event"] not in OF_STEPS:
        return True
    step = record.get("step")
    return isinstance(step, int) and step < start_step


class Journal:
    """Appends records to a log. A disk that refuses stops nobody: lines wait in memory until it takes them again.

    Attributes:
        failures: writes that failed so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.failures = 0
        self._waiting: list[bytes] = []
        self._refused: dict[str, Any] | None = None  # what to record about an outage once it is over
        self._file = open(path, "ab", buffering=0)
        self._end = os.fstat(self._file.fileno()).st_size

    def append(self, record: dict[str, Any]) -> None:
        """Write a record down, at once where that is possible."""
        self._waiting.append(_line(record))
        try:
            self._write(b"".join(self._waiting))
        except OSError as error:
            self.failures += 1
            if self._refused is None:
                tell(f"cannot write {self.path} ({error.strerror}): training goes on, the log waits in memory")
                self._refused = {"event": "log_waited", "step": record.get("step"), "error": error.strerror}
            return
        waited, self._waiting = len(self._waiting), []
        if self._refused is not None:
            tell(f"{self.path} is written again, with {waited} lines that waited")
            event, self._refused = self._refused, None
            self.append({**event, "lines": waited, "failures": self.failures})

    def _write(self, data: bytes) -> None:
        if self._refused is not None:  # a full disk may have taken a part of a line, a network's handle may be stale
            self._file.close()
            self._file = open(self.path, "ab", buffering=0)
            self._file.truncate(min(self._end, os.fstat(self._file.fileno()).st_size))
        written = 0
        while written < len(data):
            written += self._file.write(data[written:])
        self._end = os.fstat(self._file.fileno()).st_size

    def sync(self) -> None:
        """Bring the log from the system's memory to the disk; nothing that ends a process alone needs this."""
        with contextlib.suppress(OSError, ValueError):  # the next write meets the same disk and tells
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._waiting:
            tell(f"{self.path}: {len(self._waiting)} lines could not be written and are lost")
        self.sync()
        self._file.close()


def _line(record: dict[str, Any]) -> bytes:
    strange: dict[str, str] = {}
    plain = _plain(record, "", strange)
    return json.dumps({**plain, "not_finite": strange} if strange else plain, allow_nan=False).encode() + b"\n"


def _plain(value: Any, where: str, strange: dict[str, str]) -> Any:
    """`value` with None for what JSON has no number for; what it was is put into `strange`."""
    if isinstance(value, dict):
        return {key: _plain(each, f"{where}.{key}" if where else str(key), strange) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each, f"{where}.{index}", strange) for index, each in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        strange[where] = str(value)
        return None
    return value


def tell(message: str) -> None:
    """A line on stderr, which may itself be a file on a full disk."""
    with contextlib.suppress(OSError):
        print(f"unif2ace: {message}", file=sys.stderr, flush=True)
