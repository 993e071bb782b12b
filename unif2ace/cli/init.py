"""`unif2ace init`: a fresh checkpoint to train from."""

from __future__ import annotations

import argparse
from pathlib import Path

from unif2ace.settings import parse, read_settings
from unif2ace.training.fresh import CHECKPOINT, initialise
from unif2ace.training.fresh_config import InitConfig


def run(parsed: argparse.Namespace) -> None:
    """Make the checkpoint, or what of it is not there yet, and say what it is."""
    config = parse(InitConfig, read_settings(parsed.config, parsed.overrides), "")
    report = initialise(config)
    words, pictures, over = report["words"], report["pictures"], report["passed_over"]
    print(f"text tokenizer: {words['tokens']} tokens")
    if words["captions"]:
        print(
            f"captions: {words['median']} tokens in the middle, {words['longest']} the longest; "
            f"{100 * words['too_long']:.1f} % are longer than the {words['room']} that model.text_slots leaves"
        )
    print(
        f"image tokenizer: {pictures['image_tokens']} of {pictures['codes']} codes for {pictures['side']} x "
        f"{pictures['side']} pixels; {pictures['psnr_db']:.1f} dB on {pictures['held_out']} pictures held out"
    )
    print(f"passed over: {over['corrupt']} that could not be read, {over['unusable']} of no use")
    print(f"written: {Path(config.out) / CHECKPOINT}, {report['parameters']:,} parameters of a model of random weights")
