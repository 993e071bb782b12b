"""A study of `unif2ace ablate` as a committed result: its runs to a file of records, and the page made of the file.

python -m benchmarks.ablation STUDY          # the folder that `unif2ace ablate` wrote; --commit where it was made
python -m benchmarks.ablation --check        # whether the page says what the file says
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from unif2ace.evaluation import study
from unif2ace.files import read_json

from .results import origin, publish

RECORDS = Path("benchmarks") / "results" / "ablation" / "tiny.jsonl"
PAGE = Path("docs") / "results" / "ablation.md"
COMMAND = "unif2ace ablate runs/demo --out STUDY"
_LEFT = ("fingerprint",)  # of a run, and the codes that were painted


def records(folder: Path, commit: str | None) -> list[dict[str, Any]]:
    """The runs of a study with what they were made on."""
    about = origin(commit) | {"command": COMMAND}
    found = []
    for path in sorted(folder.glob("*.json")):
        run = read_json(path)
        measures = {name: value for name, value in run["measures"].items() if name != "codes"}
        run = {name: value for name, value in run.items() if name not in _LEFT}
        found.append({"op": "ablation", **run, "measures": measures, **about})
    return found


def page(runs: list[dict[str, Any]]) -> str:
    """The page of the committed records."""
    settings, first = runs[0]["study"], runs[0]
    rows = settings["recipe"]
    found = study.summaries(runs)
    seeds = [len(each.seeds) for each in found]
    about = (
        f"The paper's ablations at the demo's `tiny` scale: {settings['steps']} training steps of {rows['t2i']} t2i "
        f"and {rows['mmu']} mmu rows on the demo's synthetic faces, {settings['faces']} held-out faces asked, "
        f"{settings['prompts']} held-out captions painted, "
        + (f"{min(seeds)} to {max(seeds)}" if max(seeds) > min(seeds) else f"{max(seeds)}")
        + f" seeds a variant. `{first['command']}` on {first['device_name']}, one thread, "
        f"torch {first['versions']['torch']}, commit {str(first['commit'])[:10]}; records: "
        f"[tiny.jsonl](../../{RECORDS}). Runs of one seed see the same faces, texts and masks in the same order. These "
        "are few steps of a small model: they show how fast each "
        "variant learns, not where it ends, and say little of the 1.8B shape.\n\n"
        f"{study.answers(found)}\n\n"
        "Every variant against the full model (D3Diff with alpha 0.01, both levels of experts, top-2):\n\n"
        + study.in_words(found)
    )
    return study.page(found, about)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ablation", description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path, nargs="?", help="folder of a study; without one the page is made anew")
    parser.add_argument("--commit", help="that the runs were made at, where it is another than this")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where the page is stale")
    options = parser.parse_args(arguments)
    new = options.study is not None and not options.check
    return publish(RECORDS, PAGE, page, records(options.study, options.commit) if new else None, options.check)


if __name__ == "__main__":
    sys.exit(main())
