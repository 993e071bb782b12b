"""`unif2ace train-attributes`: a classifier of face attributes from pictures and a labels file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

from unif2ace.attributes import report
from unif2ace.attributes.train import TrainConfig, train_attributes
from unif2ace.settings import parse, read_settings


def run(parsed: argparse.Namespace) -> None:
    """Train, test, write the head and its page, and show the table."""
    config = parse(TrainConfig, read_settings(parsed.config, parsed.overrides), "")
    with tqdm(desc="features", unit="face", disable=not sys.stderr.isatty()) as bar:
        found = train_attributes(config, bar.update, lambda line: print(line, file=sys.stderr))
    report.write(Path(config.out), found)
    print("\n".join(report.lines(found)))
    print(f"{config.out}: the head, {report.PAGE} and report.json")
