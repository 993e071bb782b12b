"""`unif2ace ablate`: options of the verbs that score models."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path


def add_ablate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("demo", type=Path, help="folder of a demo run: its faces and tokenizers are taken")
    parser.add_argument("--out", type=Path, required=True, help="folder of the study; one that is there goes on")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (default: 3)")
    parser.add_argument("--steps", type=int, default=110, help="of training, each run (default: 110)")
    parser.add_argument("--only", default="", help="variants whose name begins so")
    parser.set_defaults(run=_ablate)


# Imports wait until a command runs, so that --help and a mistyped option answer at once.


def _ablate(parsed: argparse.Namespace) -> None:
    from unif2ace.evaluation import ablation

    if parsed.seeds < 1 or parsed.steps < 1:
        raise SystemExit("unif2ace ablate: --seeds and --steps: expected at least 1")
    study = replace(ablation.Study(), steps=parsed.steps)
    material = ablation.Material.load(parsed.demo)
    ablation.study_runs(material, range(parsed.seeds), study, parsed.out, parsed.only)
