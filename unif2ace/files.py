"""Files that are whole or not there: write beside, then rename."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from unif2ace.errors import UserError
from unif2ace.parsing import reading

LOCK = ".lock"  # in a folder that one process at a time writes to


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; on success it becomes `path`, on any error it is removed.

    Raises:
        UserError: `path` names no file, or the file system refuses (full disk, no permission); the old file at
            `path` is untouched.
    """
    path = Path(path)
    if not path.name:
        raise UserError(f"cannot write {path}: it names a folder, give the name of a file")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; free space or choose another folder"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # never made, or its folder is not one
            partial.unlink()


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Make a folder, where there is none, and hold it; a process that dies lets go of it.

    Raises:
        UserError: another process holds it, or it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / LOCK).open("w")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error
    with lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's would live on in processes that were forked
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # else the file system knows no locks
                raise UserError(f"{folder} is held by another process that writes to it") from error
        yield


def write_json(path: Path, value: object) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file that this project wrote.

    Raises:
        UserError: it is missing, damaged or cannot be read.
    """
    with reading(path, "JSON", "delete it and run again"):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    total = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            total.update(chunk)
    return total.hexdigest()


def digest(*parts: bytes | ModuleType) -> str:
    """Short name of bytes, and of modules by their source: what a cached result hangs on, so that none goes stale."""
    total = hashlib.sha256()
    for part in parts:
        content = Path(part.__file__ or "").read_bytes() if isinstance(part, ModuleType) else part
        total.update(len(content).to_bytes(8, "little") + content)
    return total.hexdigest()[:16]
