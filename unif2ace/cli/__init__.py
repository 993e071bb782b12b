"""The `unif2ace` command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from unif2ace.cli.importing import add_import
from unif2ace.errors import UserError

CHECKPOINT = Path("runs/demo/checkpoint")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 0 when it worked, 1 with one line on stderr when the user can mend it, 130 on Ctrl-C."""
    parser = _parser()
    parsed, parsed.overrides = parser.parse_known_args(arguments)
    if parsed.overrides and not getattr(parsed, "takes_overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(parsed.overrides)}")
    try:
        parsed.run(parsed)
    except UserError as error:
        print(f"unif2ace: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "unif2ace":
            raise
        print(f"unif2ace: {error.name} is not installed: pip install 'unif2ace[demo]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nunif2ace: stopped; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="unif2ace", description="Describe faces, answer questions, paint from text.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="make faces, train on them, paint, answer, report; minutes on two cores")
    demo.add_argument("--small", action="store_true", help="the same path in about a minute, too short to learn much")
    demo.add_argument("--out", type=Path, help="folder of the run (default: runs/demo or runs/demo-small)")
    demo.set_defaults(run=_demo)

    generate = commands.add_parser("generate", help="paint faces from a prompt")
    generate.add_argument("--prompt", required=True, help="what the face should be like")
    generate.add_argument("--out", type=Path, default=Path("face.png"), help="PNG to write (default: %(default)s)")
    generate.add_argument("--count", type=int, default=4, help="how many, side by side (default: %(default)s)")
    generate.add_argument("--steps", type=int, help="denoising steps (default: the demo's)")
    generate.add_argument("--guidance", type=float, help="strength of the prompt (default: the demo's)")
    generate.add_argument("--seed", type=int, default=0, help="one seed, one picture (default: %(default)s)")
    generate.set_defaults(run=_generate)

    ask = commands.add_parser("ask", help="ask about a face in a photograph")
    ask.add_argument("--image", required=True, type=Path, help="an image file with a face in it")
    ask.add_argument("--question", required=True)
    ask.set_defaults(run=_ask)

    add_import(commands.add_parser("import", help="bring in other projects' weights: Show-o, Phi-1.5, MAGVIT-v2"))

    precompute = commands.add_parser("precompute", help="pictures and words to shards that training reads fast")
    precompute.add_argument("config", type=Path, nargs="?", help="YAML file; every key of it can be given as --a.b=c")
    precompute.set_defaults(run=_precompute, takes_overrides=True)

    info = commands.add_parser("info", help="parameters by part, in all and used by a token")
    info.add_argument("checkpoint", help="folder of a checkpoint or of an import; or base, the 1.8B shape")
    info.set_defaults(run=_info)

    for each in (generate, ask):
        each.add_argument("--checkpoint", type=Path, default=CHECKPOINT, help="folder (default: %(default)s)")
    return parser


# Imports wait until a command runs, so that --help and a mistyped option answer at once.


def _demo(parsed: argparse.Namespace) -> None:
    from unif2ace.demo import FULL, SMALL, run

    settings, folder = (SMALL, "runs/demo-small") if parsed.small else (FULL, "runs/demo")
    run(settings, parsed.out or Path(folder))


def _generate(parsed: argparse.Namespace) -> None:
    from unif2ace.cli.commands import generate

    generate(parsed)


def _ask(parsed: argparse.Namespace) -> None:
    from unif2ace.cli.commands import ask

    ask(parsed)


def _precompute(parsed: argparse.Namespace) -> None:
    from unif2ace.cli.precompute import run

    run(parsed)


def _info(parsed: argparse.Namespace) -> None:
    from unif2ace.cli.info import info

    info(parsed)
