"""What is done already: results a line each, kept as they come, so that an evaluation that stops loses one batch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from unif2ace.errors import UserError
from unif2ace.files import read_json, replacing, write_json

Record = dict[str, Any]


class Records:
    """Records by key in a file of JSON lines.

    Only whole lines count: one that a kill cut off is taken away when the file is opened, and its work is done again.

    Raises:
        UserError: a line before the last is damaged, or the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: dict[str, Record] = {}
        try:
            content = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror or error}") from error
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                record = json.loads(line)
                self._records[record["key"]] = record
            except (ValueError, TypeError, KeyError, RecursionError) as error:
                raise UserError(f"{path} line {number} is damaged ({error!r}): delete the file to do it again") from error
        if len(whole) < len(content):
            with replacing(path) as partial:
                partial.write_bytes(whole)

    def __contains__(self, key: str) -> bool:
        return key in self._records

    def __getitem__(self, key: str) -> Record:
        return self._records[key]

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records.values())

    def __len__(self) -> int:
        return len(self._records)

    def add(self, records: Iterable[Record]) -> None:
        """Append records, on disk when this returns. Each has a ``key`` of its own.

        Raises:
            UserError: the file system refuses.
        """
        records = list(records)
        text = "".join(json.dumps(each) + "\n" for each in records)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write {self.path}: {error.strerror or error}; what is done stays, run again to go on"
            ) from error
        self._records |= {each["key"]: each for each in records}


def claim(folder: Path, settings: dict[str, Any]) -> None:
    """Hold `folder` for results of these settings alone.

    Raises:
        UserError: it holds results of others; the first setting that differs is named.
    """
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if path.exists():
        before = read_json(path)
        names = [*settings, *before]
        for name in dict.fromkeys(names):
            if settings.get(name) != before.get(name):
                raise UserError(
                    f"{folder} holds results with {name} {_short(before.get(name))}, not {_short(settings.get(name))}: "
                    "name another --out, or delete it"
                )
    else:
        write_json(path, settings)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
