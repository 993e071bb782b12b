"""The CPU benchmarks, in order of importance, in one command that ends in time; what `make bench` runs.

    python -m benchmarks.cpu [--out benchmarks/results/cpu] [--budget SECONDS] [--suites moe,scaling] [--dry-run]

A suite is a selection of cases (see run.py) in a process of its own, within its own slice of the time that is left: it
begins no case that would not end in it. Its results replace those of before in a file of its own. stages.json says what
each did, stages.log has all output.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .environment import ROOT, commit
from .stages import Stage, run_stages, summary

OUT = ROOT / "benchmarks" / "results" / "cpu"


@dataclass(frozen=True)
class Suite:
    """A part of the CPU's results.

    Attributes:
        name: of its file; title: its heading where the results are shown.
        options: of run.py; limit: seconds that it may take, with room for a slow machine.
    """

    name: str
    title: str
    options: tuple[str, ...]
    limit: float


BUDGET = 870.0  # seconds: whoever comes last is cut
MARGIN_S = 15.0  # of a suite's limit: to start in, and to write the ceilings after the last case
SUITES = [
    Suite("moe_grid", "Token-level mixtures over a grid, forward and backward",
          ("--op", "moe.layer", "--shape", "cpu-grid", "--seconds", "0", "--rounds", "4", "--no-compile"), 260),
    Suite("d3diff_paper", "The loss at Show-o's head, 8 images of 256 tokens",
          ("--shape", "paper-8x256", "--seconds", "0", "--rounds", "3", "--no-compile"), 200),
    Suite("sampling_paper", "A sampling step outside the backbone at Show-o's head",
          ("--op", "sampling.step", "--shape", "paper-1x256", "--seconds", "0", "--rounds", "5", "--no-compile"), 80),
    Suite("generation", "Whole generation against Show-o's loop on the same weights",
          ("--op", "sampling.generate", "--shape", "small", "--seconds", "0", "--rounds", "3", "--no-compile"), 100),
    Suite("transformers", "transformers' experts module as its models call it, a quarter of OLMoE",
          ("--op", "transformers.experts", "--shape", "quarter", "--seconds", "0", "--rounds", "3"), 130),
    Suite("scaling", "Cost along one axis at a time",
          ("--shape", "scaling", "--seconds", "0", "--rounds", "5", "--no-compile"), 120),
    Suite("model", "The 1.8B shape: a block, a whole forward",
          ("--op", "model", "--shape", "base", "--seconds", "0", "--rounds", "3", "--no-compile"), 180),
    Suite("data", "Rows for a training step", ("--op", "data", "--seconds", "0"), 60),
    Suite("demo", "The demo's shapes", ("--shape", "demo", "--seconds", "0.1"), 270),
]  # fmt: skip


def plan(out: Path, *, dry_run: bool = False) -> list[Stage]:
    """A stage a suite; a dry run lists its cases."""
    return [
        Stage(
            suite.name,
            [sys.executable, "-m", "benchmarks.run", *suite.options,
             *(["--list"] if dry_run
               else ["--limit", f"{suite.limit - MARGIN_S:g}", "--json", str(out / f"{suite.name}.jsonl")])],
            600.0 if dry_run else suite.limit,  # listing is quick, but for the imports on a busy machine
        )
        for suite in SUITES
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT, help="folder for the results")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for everything together")
    parser.add_argument("--suites", default="", help="comma-separated beginnings of the suites' names; all if empty")
    parser.add_argument("--dry-run", action="store_true", help="list every suite's cases and run none")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.budget - 5
    out = options.out.resolve()
    wanted = tuple(each.strip() for each in options.suites.split(","))
    chosen = [stage for stage in plan(out, dry_run=options.dry_run) if stage.name.startswith(wanted)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "stages.log").unlink(missing_ok=True)
    if not options.dry_run:
        for stage in chosen:
            (out / f"{stage.name}.jsonl").unlink(missing_ok=True)
    report = run_stages(chosen, out, deadline, {**commit(), "budget_s": options.budget}, name="stages.json")
    words, status = summary(report)
    print(f"{words}; results in {out}")
    return status


if __name__ == "__main__":
    sys.exit(main())
