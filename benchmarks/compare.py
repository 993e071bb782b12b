"""What got slower between two result files, beyond their own noise.

    python -m benchmarks.compare OLD.jsonl NEW.jsonl

Ours is compared with ours at the same case on the same device; slower means that the quartile ranges do not overlap
and that the median grew by more than a twentieth. The exit status is 1 if something did.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from .case import OURS
from .results import naming

MARGIN = 1.05
_KEY = ("op", "shape", "mode", "dtype", "device_name", "threads")


def load(path: Path) -> dict[tuple, dict]:
    """Ours of every case in a result file; a later line of the same case replaces an earlier one.

    Raises:
        ValueError: the file is damaged.
    """
    with naming(path):
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        return {
            tuple(record[key] for key in _KEY): record
            for record in records
            if record["contender"] == OURS and "median_ms" in record
        }


def slower(old: dict[tuple, dict], new: dict[tuple, dict]) -> list[str]:
    """A sentence for each case of both files that got slower."""
    found = []
    for key in old.keys() & new.keys():
        before, after = old[key], new[key]
        clear = after["quartiles_ms"][0] > before["quartiles_ms"][1]
        if clear and after["median_ms"] > MARGIN * before["median_ms"]:
            name = " ".join(map(str, key[:4]))
            found.append(f"{name}: {before['median_ms']:.3f} -> {after['median_ms']:.3f} ms")
    return sorted(found)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.compare", description=__doc__.splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args(arguments)
    old, new = load(options.old), load(options.new)
    found = slower(old, new)
    print(f"{len(old.keys() & new.keys())} cases in both, {len(found)} slower")
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
