"""Result files as data: a device's records, case by case, and what can be read off them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .case import OURS
from .environment import ROOT, describe

RESULTS = ROOT / "benchmarks" / "results"
Record = dict[str, Any]
_CASE = ("op", "shape", "dtype", "mode")
# Records of other kinds: what a device can, and those of planned.py, profiles.py, dispatch.py, training.py and others.
_NO_CASES = ("ceilings", "plan", "profile", "dispatch", "training", "ablation", "attributes", "dataset")


def write_records(path: Path, records: Iterable[Record]) -> None:
    """A file of `records`, a line of JSON each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")


def read_records(path: Path) -> list[Record]:
    """What `write_records` wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def origin(commit: str | None) -> Record:
    """Where a command of one thread ran, as its records tell: here, and at `commit` if that is another than this."""
    here = {**describe("cpu"), "threads": 1}
    return here if commit is None else here | {"commit": commit, "dirty": False}


def publish(
    records: Path, page: Path, words: Callable[[list[Record]], str], made: Iterable[Record] | None, check: bool
) -> int:
    """Write `made`, if anything was, to the file `records`, and what `words` makes of that file to `page`.

    Both paths are below ROOT. With `check` nothing is written: 1 where the page is stale.
    """
    if made is not None:
        write_records(ROOT / records, made)
    text = words(read_records(ROOT / records))
    if check:
        return int((ROOT / page).read_text(encoding="utf-8") != text)
    (ROOT / page).write_text(text, encoding="utf-8")
    print(page)
    return 0


@dataclass(frozen=True)
class Result:
    """What was measured of one case: ours and the contenders that ran, and those that did not."""

    records: Sequence[Record]

    @property
    def ours(self) -> Record:
        return next(each for each in self.records if each["contender"] == OURS)

    @property
    def measured(self) -> bool:
        return "median_ms" in self.ours

    @property
    def others(self) -> list[Record]:
        """All that were timed beside ours, the fastest first."""
        ran = [each for each in self.records if each is not self.ours and "median_ms" in each]
        return sorted(ran, key=lambda each: each["times_ours"])

    @property
    def peers(self) -> list[Record]:
        """Those that others would run and that give the same: no yardsticks, and nothing of ours."""
        return [each for each in self.others if each["compared"] and not each["contender"].startswith(OURS)]

    @property
    def absent(self) -> list[Record]:
        return [each for each in self.records if "median_ms" not in each]

    @property
    def ratio(self) -> float | None:
        """The best peer's time over ours: below 1, ours is slower."""
        return self.peers[0]["times_ours"] if self.peers else None

    @property
    def axis(self) -> str:
        return self.ours.get("axis", "")

    @property
    def is_sweep(self) -> bool:
        """A launch choice tried in place of ours is not a result about ours."""
        return " " in self.ours["op"]

    def __getitem__(self, key: str) -> Any:
        return self.ours[key]


@dataclass(frozen=True)
class Device:
    """A folder of result files.

    Attributes:
        name: of the folder; files: of each, its results in order; others: files with records of another kind.
        ceilings: the records of what the device can do at best, one a file.
        digest: of the files' contents.
    """

    name: str
    files: dict[str, list[Result]]
    ceilings: list[Record]
    digest: str
    head: Record = field(default_factory=dict)
    others: dict[str, list[Record]] = field(default_factory=dict)

    @property
    def results(self) -> list[Result]:
        """All measured results but those of series; a case in two files counts once, as the later file has it."""
        found = {}
        for results in self.files.values():
            for result in results:
                if result.measured and not result.axis and not result.is_sweep:
                    found[tuple(result[key] for key in _CASE)] = result
        return list(found.values())

    @property
    def series(self) -> dict[tuple[str, str], list[Result]]:
        """(op, axis) -> the results along it, in order."""
        found: dict[tuple[str, str], list[Result]] = {}
        for results in self.files.values():
            for result in results:
                if result.measured and result.axis:
                    found.setdefault((result["op"], result.axis), []).append(result)
        return {key: sorted(each, key=lambda one: one["at"]) for key, each in found.items()}

    def ceiling(self, name: str) -> float:
        """The best rate that any file of the device saw; "copy", or a dtype's name for matrix products."""
        if name == "copy":
            return max((each["copy_bytes_per_s"] for each in self.ceilings), default=math.nan)
        return max((each["matmul_flops_per_s"][name] for each in self.ceilings), default=math.nan)


def in_a_line(reason: str) -> str:
    """A reason's first line; of a traceback the last one, which says what was raised."""
    lines = reason.strip().splitlines()
    return lines[-1 if lines[0].startswith("Traceback") else 0]


def is_case(record: Record) -> bool:
    """Whether a line is of a case (see run.py)."""
    return record["op"] not in _NO_CASES


def results_of(lines: Iterable[str]) -> tuple[list[Result], list[Record]]:
    """A file's results, and its other records. A case that was measured twice counts as it was the last time."""
    cases: dict[tuple, dict[str, Record]] = {}
    rest = []
    for line in lines:
        record = json.loads(line)
        if is_case(record):
            cases.setdefault(tuple(record[key] for key in _CASE), {})[record["contender"]] = record
        else:
            rest.append(record)
    return [Result(list(each.values())) for each in cases.values() if OURS in each], rest


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """What a damaged result file leads to, as a ValueError that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error!r}") from error


def load(folder: Path) -> Device:
    """The result files (*.jsonl) of one device.

    Raises:
        ValueError: names the file that is damaged.
    """
    files, others, ceilings, digest, head = {}, {}, [], hashlib.sha256(), {}
    for path in sorted(folder.glob("*.jsonl")):
        with naming(path):
            text = path.read_text(encoding="utf-8")
            digest.update(text.encode())
            results, rest = results_of(text.splitlines())
            ceilings += [each for each in rest if each["op"] == "ceilings"]
        if results:
            files[path.stem] = results
            head = head or results[0].ours
        elif rest:
            others[path.stem] = rest
    return Device(folder.name, files, ceilings, digest.hexdigest()[:16], head, others)


def devices(folder: Path = RESULTS) -> list[Device]:
    """Every device with results, in the order of names."""
    found = [load(each) for each in sorted(folder.iterdir()) if each.is_dir()]
    return [each for each in found if each.results or each.series]


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(map(math.log, values)))


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The p of cost ~ size^p that fits best, by least squares in logarithms."""
    x, y = [math.log(each) for each in sizes], [math.log(each) for each in costs]
    return statistics.linear_regression(x, y).slope
