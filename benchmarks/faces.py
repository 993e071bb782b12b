"""A set that was built and heads that were trained as committed results: their own reports to a file, and its page.

unif2ace build-dataset --synthetic 200
unif2ace train-attributes --labels.path=runs/demo/faces.npz --features=tokens:runs/demo/checkpoint --out=runs/attributes
unif2ace train-attributes --labels.path=runs/demo/faces.npz --features=sface --framed=true --out=runs/attributes-sface
python -m benchmarks.faces runs/synthetic-set runs/attributes runs/attributes-sface   # --commit where they were made
python -m benchmarks.faces --check          # whether the page says what the file says
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unif2ace.files import read_json

from .results import origin, publish
from .tables import table

RECORDS = Path("benchmarks") / "results" / "faces" / "synthetic.jsonl"
PAGE = Path("docs") / "results" / "faces.md"
BUILD = "unif2ace build-dataset --synthetic 200"
PAPER = {"attributes": 17.7, "tokens": 120}  # a caption, in UniF2aceD-1M
_LEFT = ("losses", "config", "bins")  # long, or of the machine


def head_command(config: dict[str, Any]) -> str:
    labels, features, out = config["labels"]["path"], config["features"], config["out"]
    framed = " --framed=true" if config["framed"] else ""
    return f"unif2ace train-attributes --labels.path={labels} --features={features}{framed} --out={out}"


def records(built: Path, heads: Sequence[Path], commit: str | None) -> list[dict[str, Any]]:
    """The reports of a set and of heads, with what they were made on."""
    about = origin(commit)
    found = [{"op": "dataset", **read_json(built / "report.json"), **about, "command": BUILD}]
    for folder in heads:
        report = read_json(folder / "report.json")
        config = report["config"]
        kept = {name: value for name, value in report.items() if name not in _LEFT}
        kept["categories"] = {
            name: {key: value for key, value in each.items() if key not in _LEFT}
            for name, each in report["categories"].items()
        }
        found.append(
            {"op": "attributes", "features": config["features"], **kept, **about, "command": head_command(config)}
        )
    return found


def page(lines: Sequence[dict[str, Any]]) -> str:
    """The page of the committed records."""
    (built,) = [each for each in lines if each["op"] == "dataset"]
    heads = [each for each in lines if each["op"] == "attributes"]
    made = (
        f"{built['device_name']}, one thread, torch {built['versions']['torch']}, commit {str(built['commit'])[:10]}; "
        f"records: [synthetic.jsonl](../../{RECORDS}); made by `python -m benchmarks.faces`."
    )
    return "\n\n".join([
        "# A set of synthetic faces, and what can be read of them", made,
        "## The set", f"`{built['command']}`", *_set(built),
        "## Heads on the demo's faces", *(f"`{each['command']}`" for each in heads), *_heads(heads),
    ]) + "\n"  # fmt: skip


def _set(built: dict[str, Any]) -> list[str]:
    told, asked = built["statistics"], built["endpoints"]["captioner"]
    dropped = [f"{number} {stage} ({why})" for stage, why, number in built["dropped"]]
    means = {
        "attributes a caption": (told["attributes_per_caption"], f"{PAPER['attributes']}"),
        "tokens a caption": (told["tokens_per_caption"], f"{PAPER['tokens']}"),
        "questions a face": (told["pairs_per_face"], ""),
    }
    rows = [[name, f"{statistics.fmean(each):.1f}", f"{min(each)} to {max(each)}", paper]
            for name, (each, paper) in means.items()]  # fmt: skip
    shares = {name: [each / sum(values.values()) for each in values.values()]
              for name, values in told["balance"].items()}  # fmt: skip
    uneven = max(shares, key=lambda name: max(shares[name]) * len(shares[name]))
    return [
        table(["stage", "in", "out"], [[name, str(before), str(after)] for name, before, after in built["stages"]]),
        f"{built['pairs']} questions with answers. The model, {built['captioner']}, sees no pictures: it is told what "
        f"was measured, and what it writes is held against that. {asked['requests']:,} replies of "
        f"{asked['tokens_out']:,} tokens for {asked['answered'] + asked['quarantined']} requests, of which "
        f"{asked['quarantined']} ended in quarantine. Fell out: {'; '.join(dropped)}.",
        table(["", "mean", "least to most", "the paper's set"], rows),
        f"{told['different_captions']:.0%} of the captions are different, {told['different_questions']:.0%} of the "
        f"questions: what a model of 135 M parameters can do. Of {len(shares)} attributes, {uneven} is the least even: "
        f"{', '.join(f'{value} {number}' for value, number in told['balance'][uneven].items())}.",
    ]


def _heads(heads: Sequence[dict[str, Any]]) -> list[str]:
    first, *others = heads
    head = ["category", "majority", f"`{first['features']}`", "calibration error", "answered", "right of these",
            *(f"`{each['features']}`" for each in others)]  # fmt: skip
    rows = []
    for name, each in first["categories"].items():
        right = each["accuracy_answered"]
        rows.append([
            name, f"{each['majority']:.3f}", f"{each['accuracy']:.3f}", f"{each['calibration_error']:.3f}",
            f"{each['answered']:.0%}", "" if right is None else f"{right:.3f}",
            *(f"{other['categories'][name]['accuracy']:.3f}" for other in others),
        ])  # fmt: skip
    words = (
        f"{first['faces']['train']} faces to train, {first['faces']['validate']} to stop and calibrate, "
        f"{first['faces']['test']} to test; labels are measurements of their pixels. Accuracy by features:"
    )
    return [words, table(head, rows)]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faces", description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*", help="of a set, then of heads; none: the page is made anew")
    parser.add_argument("--commit", help="that they were made at, where it is another than this")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where the page is stale")
    options = parser.parse_args(arguments)
    made = None
    if options.folders and not options.check:
        built, *heads = options.folders
        made = records(built, heads, options.commit)
    return publish(RECORDS, PAGE, page, made, options.check)


if __name__ == "__main__":
    sys.exit(main())
