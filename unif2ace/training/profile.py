"""The profile of a step: a trace that Perfetto opens, and how much of what was exchanged went on behind computing."""

from __future__ import annotations

import contextlib
import gzip
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unif2ace.errors import UserError
from unif2ace.files import replacing
from unif2ace.parsing import reading

Spans = list[tuple[float, float]]  # seconds, in order, apart from one another


def path_of(run: Path, step: int, rank: int) -> Path:
    """Where a rank's trace of a step is."""
    return run / "profile" / f"step-{step:08d}-rank-{rank}.json.gz"


@contextlib.contextmanager
def profiled(path: Path) -> Iterator[None]:
    """Write what happens within to `path`, as Chrome's trace events; a disk that refuses it is told on stderr."""
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profile:
        yield
    try:
        with replacing(path) as partial, tempfile.TemporaryDirectory(dir=path.parent) as folder:
            plain = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(plain))
            with gzip.open(partial, "wb", compresslevel=3) as packed:
                packed.write(plain.read_bytes())
    except UserError as error:
        print(f"{error}; the training goes on without this profile", file=sys.stderr)


@dataclass(frozen=True)
class Timeline:
    """A rank's step.

    Attributes:
        computing: when operations ran: kernels on a GPU; on a CPU, those of torch and ours.
        exchanging: when collectives were under way, from being asked for to the last byte: waiting for other ranks too.
    """

    computing: Spans
    exchanging: Spans

    @classmethod
    def read(cls, path: Path) -> Timeline:
        """Of a trace that `profiled` wrote.

        Raises:
            UserError: it is none.
        """
        with reading(path, "trace of a step", "write it again"), gzip.open(path, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
        timed = [each for each in events if each.get("ph") == "X" and each.get("cat") in _KINDS]
        kernels = [each for each in timed if each["cat"] == "kernel"]
        sent = [each for each in kernels or timed if each["name"].startswith(("gloo:", "nccl"))]
        computed = [each for each in kernels or timed if _computes(each)]
        begin = min((each["ts"] for each in timed), default=0.0)
        return cls(*(
            union(((each["ts"] - begin) / 1e6, (each["ts"] - begin + each["dur"]) / 1e6) for each in kind)
            for kind in (computed, sent)
        ))  # fmt: skip

    @property
    def hidden(self) -> float:
        """The share of the time exchanging that computing goes on in; 1.0 where nothing is exchanged."""
        whole = length(self.exchanging)
        both = whole + length(self.computing) - length(union([*self.exchanging, *self.computing]))
        return both / whole if whole else 1.0


_KINDS = ("kernel", "cpu_op", "user_annotation")


def _computes(event: dict[str, Any]) -> bool:
    """Not what only waits within it, as an operation of autograd may."""
    if event["cat"] == "kernel":
        return not event["name"].startswith("nccl")
    return event["cat"] == "cpu_op" and event["name"].startswith(("aten::", "unif2ace"))


def length(spans: Spans) -> float:
    """Seconds in all."""
    return sum(end - start for start, end in spans)


def union(spans: Iterable[tuple[float, float]]) -> Spans:
    """When any of them was under way."""
    found: Spans = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found
