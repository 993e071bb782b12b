"""`unif2ace report`: how a training run went, as one page."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_report(parser: argparse.ArgumentParser) -> None:
    """Fill the parser of `unif2ace report`."""
    parser.add_argument("run_folder", metavar="RUN", type=Path, help="folder of the run; it may still be running")
    parser.set_defaults(run=_report)


def _report(parsed: argparse.Namespace) -> None:
    from unif2ace.training.report import write  # draws: imported where that is wanted

    print(write(parsed.run_folder))
