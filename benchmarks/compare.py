"""What got slower between two sets of results of one device, beyond their own noise.

    python -m benchmarks.compare OLD NEW [--margin 1.05]

OLD and NEW are result files or folders of them. Ours is compared with ours, case by case. A case is slower, or faster,
where three things agree: the quartile ranges do not overlap; the median moved by more than the margin; and it moved so
beside the other contenders of the case, which tell what the machine did meanwhile (where both runs had the same torch).
The quartiles of a run know nothing of the noise between two. The other contenders do, whose code did not change: where
there are enough of them, the margin is at least what 99 in 100 of them moved beside the rest of their case.
On a GPU more memory and more launches are told as well: they have no noise. The exit status is 1 if something got worse
or a case is gone or broken, and 2 if there is nothing to compare: no results, damaged ones, different devices.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .case import OURS
from .results import is_case, naming

MARGIN = 1.05
ENOUGH = 50  # contenders that did not change: of fewer, the largest movements say little
_CASE = ("op", "shape", "dtype", "mode")
_DEVICE = ("device_name", "threads")
Cases = dict[tuple[str, ...], dict[str, dict]]  # case -> contender -> record


def load(path: Path) -> Cases:
    """Every case of a file or of a folder's files; a later line replaces an earlier one of the same contender.

    Raises:
        ValueError: a file is damaged.
    """
    found: Cases = {}
    for file in sorted(path.glob("*.jsonl")) if path.is_dir() else [path]:
        with naming(file):
            for line in file.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                if is_case(record):
                    found.setdefault(tuple(record[key] for key in _CASE), {})[record["contender"]] = record
    return {case: contenders for case, contenders in found.items() if OURS in contenders}


def devices(cases: Cases) -> set[tuple]:
    return {tuple(contenders[OURS][key] for key in _DEVICE) for contenders in cases.values()}


@dataclass(frozen=True)
class Changes:
    """Sentences of what changed, a list a kind; `gone`: cases that the new results lack or that broke in them."""

    slower: list[str] = field(default_factory=list)
    faster: list[str] = field(default_factory=list)
    larger: list[str] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    new: list[str] = field(default_factory=list)

    @property
    def worse(self) -> bool:
        return bool(self.slower or self.larger or self.gone)


def unchanged(before: dict[str, dict], after: dict[str, dict]) -> dict[str, float]:
    """The case's other contenders, with the same torch in both runs: time after over time before."""
    if before[OURS]["versions"]["torch"] != after[OURS]["versions"]["torch"]:
        return {}
    return {
        name: after[name]["median_ms"] / before[name]["median_ms"]
        for name in before.keys() & after.keys()
        if not name.startswith(OURS) and "median_ms" in before[name] and "median_ms" in after[name]
    }


def drift(before: dict[str, dict], after: dict[str, dict]) -> float | None:
    """How much slower the machine was, by the median over the case's other contenders; None where nothing tells."""
    ratios = unchanged(before, after).values()
    return statistics.median(ratios) if ratios else None


def noise(old: Cases, new: Cases) -> float | None:
    """What 99 in 100 of the unchanged contenders moved at most, beside the others of their case; None: too few tell."""
    moves = []
    for case in old.keys() & new.keys():
        ratios = unchanged(old[case], new[case])
        for name, ratio in ratios.items():
            if rest := [each for other, each in ratios.items() if other != name]:
                moves.append(math.exp(abs(math.log(ratio / statistics.median(rest)))))
    return sorted(moves)[int(0.99 * len(moves))] if len(moves) >= ENOUGH else None


def moved(before: dict[str, dict], after: dict[str, dict], margin: float) -> int:
    """1 if ours got slower beyond noise, -1 if faster, else 0."""
    old, new = before[OURS], after[OURS]
    ratio = new["median_ms"] / old["median_ms"]
    beside = ratio / (drift(before, after) or 1.0)
    if new["quartiles_ms"][0] > old["quartiles_ms"][1] and min(ratio, beside) > margin:
        return 1
    return -1 if new["quartiles_ms"][1] < old["quartiles_ms"][0] and max(ratio, beside) < 1 / margin else 0


def compare(old: Cases, new: Cases, margin: float = MARGIN) -> Changes:
    """What changed for ours, from `old` to `new`."""
    changes = Changes()
    for case in sorted(old.keys() | new.keys()):
        name = " ".join(case)
        if "median_ms" not in old.get(case, {}).get(OURS, {}):
            changes.new.extend([name] if case in new else [])
            continue
        if "median_ms" not in new.get(case, {}).get(OURS, {}):
            why = new[case][OURS].get("status", "not timed") if case in new else "missing"
            changes.gone.append(f"{name}: {why}")
            continue
        before, after = old[case][OURS], new[case][OURS]
        times = f"{name}: {before['median_ms']:.3f} -> {after['median_ms']:.3f} ms"
        {1: changes.slower, -1: changes.faster, 0: []}[moved(old[case], new[case], margin)].append(times)
        if after.get("device") == "cuda":
            for key, unit in (
                ("peak_bytes", "bytes at most"),
                ("saved_bytes", "bytes saved"),
                ("launches", "launches"),
            ):
                if key in before and key in after and after[key] > margin * before[key]:
                    changes.larger.append(f"{name}: {before[key]:,} -> {after[key]:,} {unit}")
    return changes


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--margin", type=float, default=MARGIN, help="a smaller change is none (%(default)s)")
    options = parser.parse_args(arguments)
    try:
        old, new = load(options.old), load(options.new)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    if not old or not new:
        parser.error(f"no results of ours in {options.new if old else options.old}")
    if devices(old) != devices(new):
        parser.error(f"results of different devices: {sorted(devices(old))} and {sorted(devices(new))}")
    between = noise(old, new)
    found = compare(old, new, max(options.margin, between or 0.0))
    known = "is not known" if between is None else f"hides changes under x{between:.2f}"
    print(f"{len(old.keys() & new.keys())} cases in both; the noise between the runs {known}")
    for kind in ("slower", "faster", "larger", "gone", "new"):
        each = getattr(found, kind)
        print(f"{len(each)} {kind}" + "".join(f"\n  {line}" for line in each))
    return 1 if found.worse else 0


if __name__ == "__main__":
    sys.exit(main())
