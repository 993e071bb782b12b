"""A result file as a Markdown table.

python -m benchmarks.table benchmarks/results/cpu/demo.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from .case import OURS


def table(lines: Iterable[str]) -> str:
    """One row a case: our median, then every contender's time over ours (below 1: ours is slower), best first.

    Contenders that did not run are named with their status.
    """
    cases: dict[tuple[str, ...], list[dict]] = {}
    for line in lines:
        record = json.loads(line)
        if "shape" in record:
            cases.setdefault(tuple(record[key] for key in ("op", "shape", "dtype", "mode")), []).append(record)
    rows = ["| op | shape | dtype | mode | ours, ms | the others' time over ours |", "|---|---|---|---|---|---|"]
    for case, records in cases.items():
        ours = next(record for record in records if record["contender"] == OURS)
        ran = [each for each in records if each is not ours and each["status"] == "ok"]
        ran.sort(key=lambda each: each["times_ours"])
        others = [f"{each['contender']} {each['times_ours']:.2f}" for each in ran]
        others += [f"{each['contender']}: {each['status']}" for each in records if each["status"] != "ok"]
        time = f"{ours['median_ms']:.2f}" if ours["status"] == "ok" else ours["status"]
        rows.append(f"| {' | '.join(case)} | {time} | {'; '.join(others)} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(Path(sys.argv[1]).read_text().splitlines()))
