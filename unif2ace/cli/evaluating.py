"""`unif2ace evaluate` and `unif2ace ablate`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from unif2ace.errors import UserError


def add_evaluate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a run or of a checkpoint")
    parser.add_argument("--suite", choices=["quick", "paper"], default="quick", help="(default: quick)")
    parser.add_argument("--data", help="set of faces with captions and questions (default: the run's faces.npz)")
    parser.add_argument("--out", type=Path, default=Path("evaluation"), help="folder of results (default: evaluation)")
    parser.add_argument("--config", type=Path, help="YAML file; every key of it can be given as --a.b=c")
    parser.set_defaults(run=_evaluate, takes_overrides=True)


def add_ablate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("demo", type=Path, help="folder of a demo run: its faces and tokenizers are taken")
    parser.add_argument("--out", type=Path, required=True, help="folder of the study; one that is there goes on")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (default: 3)")
    parser.add_argument("--steps", type=int, default=110, help="of training, each run (default: 110)")
    parser.add_argument("--only", default="", help="variants whose name begins so")
    parser.set_defaults(run=_ablate)


# Imports wait until a command runs, so that --help and a mistyped option answer at once.


def _evaluate(parsed: argparse.Namespace) -> None:
    from unif2ace.evaluation import page, suite
    from unif2ace.evaluation.config import SuiteConfig
    from unif2ace.files import write_json
    from unif2ace.settings import parse, read_settings

    values = read_settings(parsed.config, parsed.overrides)
    if parsed.data is not None:
        values["data"] = {**(values.get("data") or {}), "path": parsed.data}
    config = parse(SuiteConfig, values, "")
    names = [suite.name_of(each) for each in parsed.runs]
    if len(set(names)) < len(names):
        names = [f"{number}-{name}" for number, name in enumerate(names, 1)]
    folders = [parsed.out / name for name in names]
    results = []
    for run, name, folder in zip(parsed.runs, names, folders):
        results.append({**suite.evaluate(run, parsed.suite, config, folder), "run": name})
        print(suite.told(results[-1]))
    write_json(parsed.out / "results.json", {"runs": results, "ablations": page.tables.ablations(results)})
    page.write(results, folders, parsed.out / "report.html")
    print(f"report: {parsed.out / 'report.html'}")


def _ablate(parsed: argparse.Namespace) -> None:
    from unif2ace.evaluation import ablation, study
    from unif2ace.files import replacing

    if parsed.seeds < 1 or parsed.steps < 1:
        raise UserError(f"--seeds, --steps: expected at least 1, got {parsed.seeds} and {parsed.steps}")
    study_settings = replace(ablation.Study(), steps=parsed.steps)
    material = ablation.Material.load(parsed.demo)
    runs = ablation.study_runs(material, range(parsed.seeds), study_settings, parsed.out, parsed.only)
    if not parsed.only:
        found = study.summaries(runs)
        with replacing(parsed.out / "ablations.md") as partial:
            partial.write_text(study.page(found, ablation.about(study_settings)), encoding="utf-8")
        print(f"{study.answers(found)}\n{study.in_words(found)}\ntables: {parsed.out / 'ablations.md'}")
