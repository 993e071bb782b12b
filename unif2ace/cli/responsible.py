"""`unif2ace watermark`, `unif2ace card` and `unif2ace demo-app`."""

from __future__ import annotations

import argparse
from pathlib import Path

from unif2ace.cli import options
from unif2ace.errors import UserError


def add_watermark(watermark: argparse.ArgumentParser) -> None:
    watermark.add_argument("image", type=Path, nargs="+", metavar="FILE", help="picture to look at")
    watermark.set_defaults(run=_watermark)


def add_card(card: argparse.ArgumentParser) -> None:
    card.add_argument("checkpoint", type=Path, metavar="FOLDER", help="checkpoint to describe")
    card.add_argument("--results", type=Path, metavar="FILE", help="results.json of its run (default: beside it)")
    card.add_argument(
        "--license", default="other", help="of the weights, as Hugging Face names it (default: %(default)s)"
    )
    card.add_argument("--force", action="store_true", help="replace a README.md that was written by hand")
    card.set_defaults(run=_card)


def add_demo_app(app: argparse.ArgumentParser) -> None:
    app.add_argument("--host", default="127.0.0.1", help="where to listen (default: %(default)s, this machine alone)")
    app.add_argument("--port", type=int, default=7860, help="default: %(default)s")
    options.add_responsible(app)
    options.add_checkpoint(app)
    app.set_defaults(run=_demo_app)


def _watermark(parsed: argparse.Namespace) -> None:
    from unif2ace.data.identity import read_image
    from unif2ace.safety.watermark import detect

    pictures = [read_image(path) for path in parsed.image]
    for path, picture in zip(parsed.image, pictures):
        found, score, threshold = detect(picture)
        told = "carries the watermark of unif2ace" if found else "no watermark found"
        print(f"{path}: {told} (score {score:.1f}, of {threshold:.1f} that it takes)")


def _card(parsed: argparse.Namespace) -> None:
    from unif2ace.safety import card

    print(card.write(parsed.checkpoint, parsed.results, parsed.license, parsed.force))


def _demo_app(parsed: argparse.Namespace) -> None:
    from unif2ace.app.server import Server
    from unif2ace.checkpoint import Checkpoint

    if not 1 <= parsed.port < 65536:
        raise UserError(f"--port: expected 1 to 65535, got {parsed.port}")
    check = options.checker(parsed)
    server = Server(Checkpoint.load(parsed.checkpoint), parsed.host, parsed.port, check, not parsed.no_watermark)
    print(f"{server.url} (Ctrl-C stops it)", flush=True)
    try:
        server.wait()
    finally:
        server.close()
