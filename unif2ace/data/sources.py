"""Sets of samples as they lie on disk, each readable at any index: LLaVA JSON and JSONL, parquet, `datasets` folders.

A source opens its files when it is read, never before, and holds no handle of its own: it can be given to other
processes as it is. Shards are in `shards`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from unif2ace.data.base import Source, read_at
from unif2ace.data.config import TASKS, FieldMap, SetConfig
from unif2ace.data.samples import Sample, SampleError, check_fields, look_up, record_of, record_serves, sample_of
from unif2ace.data.shards import ShardSource
from unif2ace.errors import UserError
from unif2ace.files import digest
from unif2ace.parsing import parsing, reading

_MOST_ROWS = 2**40  # of a group of a parquet file


def open_source(config: SetConfig, where: str) -> Source:
    """The set that `config` describes; `where` is its key in the config, for messages.

    Raises:
        UserError: it is not there, not of its kind, or has other fields.
    """
    path = Path(config.path)
    if not path.exists():
        raise UserError(f"{where}.path: {path} is not there")
    kind = _kind(path) if config.kind == "auto" else config.kind
    images = Path(config.images) if config.images else path.parent
    if kind == "llava":
        return JsonSource(path, images, config.fields, where)
    if kind == "parquet":
        return ParquetSource(path, images, config.fields, where)
    if kind == "datasets":
        return DatasetsSource(path, images, config.fields, where)
    if kind == "shards":
        return ShardSource(path, config.fields, where)
    raise UserError(f"{where}.kind: cannot tell what {path} is; name one of llava, parquet, datasets, shards")


def _kind(path: Path) -> str | None:
    if path.suffix in (".json", ".jsonl"):
        return "llava"
    if path.suffix in (".parquet", ".tar"):
        return {".parquet": "parquet", ".tar": "shards"}[path.suffix]
    if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
        return "datasets"
    for pattern, kind in (("*.tar", "shards"), ("job.json", "shards"), ("*.parquet", "parquet")):
        if next(path.glob(pattern), None):
            return kind
    return None


class JsonSource(Source):
    """A JSON list or JSON lines of records; records of one image are one sample with all that is said of it.

    What is kept in memory is where each record lies.
    """

    def __init__(self, path: Path, images: Path, fields: FieldMap, where: str = "data") -> None:
        self.path, self.images, self.fields, self.damaged = path, images, fields, []
        try:
            content = path.read_bytes()
        except OSError as error:
            raise UserError(f"{where}.path: cannot read {path}: {error.strerror}") from error
        self.fingerprint = hashlib.sha256(content).hexdigest()[:16]
        groups: dict[str, int] = {}
        spans: list[tuple[int, int]] = []
        serves: list[list[bool]] = []
        owners, first = [], True
        for start, stop, record in _records(path, content):
            if not isinstance(record, dict):
                image, flags = None, dict.fromkeys(TASKS, True)  # who reads it is told what is wrong
            else:
                if first:
                    check_fields(record, fields, f"{where}: {path}")
                    first = False
                image, flags = look_up(record, fields.image), record_serves(record, fields)
            name = image if isinstance(image, str) else f"\n{len(spans)}"
            owner = groups.setdefault(name, len(groups))
            if owner == len(serves):
                serves.append([flags[task] for task in TASKS])
            else:
                serves[owner] = [a or flags[task] for a, task in zip(serves[owner], TASKS)]
            spans.append((start, stop))
            owners.append(owner)
        if not spans:
            raise UserError(f"{where}.path: {path} holds no records")
        by_owner = np.argsort(owners, kind="stable")
        self._spans = np.array(spans, np.int64)[by_owner]
        self._first = np.concatenate([[0], np.cumsum(np.bincount(owners))])
        self._serves = np.array(serves, bool)

    def __len__(self) -> int:
        return len(self._serves)

    def __getitem__(self, index: int) -> Sample:
        parts = []
        for start, stop in self._spans[self._first[index] : self._first[index + 1]].tolist():
            where = f"{self.path} at byte {start}"
            record = record_of(read_at(self.path, start, stop - start), where)
            parts.append(sample_of(record, self.fields, where, f"{self.path.name}:{start}", self.images))
        first = parts[0]
        return Sample(
            key=first.key,
            where=first.where,
            image=first.image,
            captions=tuple(each for part in parts for each in part.captions),
            conversations=tuple(each for part in parts for each in part.conversations),
            text=first.text,
        )

    def serving(self, task: str) -> np.ndarray | None:
        return np.flatnonzero(self._serves[:, TASKS.index(task)])


def _records(path: Path, content: bytes) -> Iterator[tuple[int, int, Any]]:
    """(first byte, one past the last, value) of each record; the value of a line that is no JSON is None."""
    if path.suffix == ".jsonl":
        start = 0
        for line in content.splitlines(keepends=True):
            if line.strip():
                value = None
                with contextlib.suppress(SampleError):  # who reads it is told
                    value = record_of(line, "")
                yield start, start + len(line), value
            start += len(line)
        return
    # One character a byte, so that places in the text are places in the file; JSON's own marks are all ASCII.
    text, decoder = content.decode("latin-1"), json.JSONDecoder()
    place = _skip(text, 3 if content.startswith(b"\xef\xbb\xbf") else 0)
    if text[place : place + 1] != "[":
        raise UserError(f"{path}: expected a list of records; one record a line is called .jsonl")
    place = _skip(text, place + 1)
    while text[place : place + 1] != "]":
        with parsing(lambda why, place=place: UserError(f"{path} is damaged at byte {place} ({why})")):  # type: ignore[misc]
            _, stop = decoder.raw_decode(text, place)
            value = json.loads(content[place:stop])
        yield place, stop, value
        place = _skip(text, stop)
        if text[place : place + 1] == ",":
            place = _skip(text, place + 1)
        elif text[place : place + 1] != "]":
            raise UserError(f"{path} is damaged at byte {place}: expected a comma or the end of the list")


def _skip(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


class ParquetSource(Source):
    """Parquet files. A whole row group is read for a record and the last two are kept, so read them in order: training
    in random order wants `unif2ace precompute` first."""

    def __init__(self, path: Path, images: Path, fields: FieldMap, where: str = "data") -> None:
        try:
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise UserError("parquet files need pyarrow: pip install 'unif2ace[data]'") from error
        self.path, self.images, self.fields, self.damaged = path, images, fields, []
        self._files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
        groups: list[tuple[int, int]] = []
        firsts, footers = [0], []
        for number, file in enumerate(self._files):
            with reading(f"{where}.path: {file}", "parquet"):
                footer = parquet.read_metadata(file).to_dict()
                footers.append(f"{file.name} {file.stat().st_size} {footer}".encode())
            for group, each in enumerate(footer["row_groups"]):
                if not 0 <= each["num_rows"] < _MOST_ROWS:
                    raise UserError(f"{where}.path: {file} is damaged ({each['num_rows']} rows in a group)")
                groups.append((number, group))
                firsts.append(firsts[-1] + each["num_rows"])
        self._groups, self._firsts, self.fingerprint = groups, np.array(firsts), digest(*footers)
        if not firsts[-1]:
            raise UserError(f"{where}.path: {path} holds no records")
        try:
            first = self._record(0)
        except SampleError as error:
            raise UserError(f"{where}.path: {error}") from error
        check_fields(first, fields, f"{where}: {path}")

    def __len__(self) -> int:
        return int(self._firsts[-1])

    def __getitem__(self, index: int) -> Sample:
        number = self._group_of(index)
        where = f"{self._files[self._groups[number][0]]} record {index}"
        return sample_of(self._record(index), self.fields, where, f"{self.path.name}:{index}", self.images)

    def _group_of(self, index: int) -> int:
        return int(np.searchsorted(self._firsts, index, side="right")) - 1

    def _record(self, index: int) -> dict[str, Any]:
        number = self._group_of(index)
        file, group = self._groups[number]
        table = _row_group(self._files[file], group)
        with parsing(lambda why: SampleError(f"{self._files[file]} row group {group}", why)):
            return table.slice(index - int(self._firsts[number]), 1).to_pylist()[0]


@functools.lru_cache(maxsize=2)
def _row_group(file: Path, group: int) -> Any:
    import pyarrow.parquet as parquet

    with parsing(lambda why: SampleError(f"{file} row group {group}", why)), parquet.ParquetFile(file) as opened:
        return opened.read_row_group(group)


class DatasetsSource(Source):
    """A folder that `datasets.Dataset.save_to_disk` wrote: memory-mapped, so any order is a good one."""

    def __init__(self, path: Path, images: Path, fields: FieldMap, where: str = "data") -> None:
        try:
            import datasets
        except ImportError as error:
            raise UserError("this folder needs the package datasets: pip install 'unif2ace[data]'") from error
        self.path, self.images, self.fields, self.damaged = path, images, fields, []
        with parsing(lambda why: UserError(f"{where}.path: datasets cannot read {path} ({why})")):
            rows = datasets.load_from_disk(str(path))
        if isinstance(rows, datasets.DatasetDict):
            splits = ", ".join(str(path / name) for name in rows)
            raise UserError(f"{where}.path: {path} holds several sets; name one: {splits}")
        if not len(rows):
            raise UserError(f"{where}.path: {path} holds no records")
        for name, feature in rows.features.items():
            if isinstance(feature, datasets.Image):  # the file as it is, not a decoded picture
                rows = rows.cast_column(name, datasets.Image(decode=False))
        self._rows, self.fingerprint = rows, digest(str(rows._fingerprint).encode(), str(len(rows)).encode())
        try:
            check_fields(self._record(0), fields, f"{where}: {path}")
        except SampleError as error:
            raise UserError(f"{where}.path: {error}") from error

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        where = f"{self.path} record {index}"
        return sample_of(self._record(index), self.fields, where, f"{self.path.name}:{index}", self.images)

    def _record(self, index: int) -> dict[str, Any]:
        with parsing(lambda why: SampleError(f"{self.path} record {index}", why)):
            return self._rows[index]
