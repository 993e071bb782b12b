"""Options that several commands share, and what they come to. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from unif2ace.errors import UserError

if TYPE_CHECKING:
    from unif2ace.data.framing import Framed
    from unif2ace.generation.image import PaintSettings
    from unif2ace.safety.checker import SafetyChecker

CHECKPOINT = Path("runs/demo/checkpoint")


def add_checkpoint(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--checkpoint", type=Path, default=CHECKPOINT, metavar="FOLDER", help="trained model (default: %(default)s)"
    )


def add_painting(command: argparse.ArgumentParser) -> None:
    """How to sample, and where the painting goes."""
    command.add_argument(
        "--out", type=Path, default=Path("face.png"), metavar="FILE",
        help="PNG or JPEG to write (default: %(default)s); with {n} or {prompt} in its name one file a face",
    )  # fmt: skip
    command.add_argument("--force", action="store_true", help="replace files that are there already")
    command.add_argument("--steps", type=int, help="denoising steps (default: 16)")
    command.add_argument("--guidance", type=float, help="how closely to follow the prompt, 0 to 100 (default: 2.5)")
    command.add_argument("--seed", type=int, default=0, help="one seed, one picture (default: %(default)s)")
    add_responsible(command)


def add_responsible(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--no-watermark", action="store_true", help="leave out the invisible mark that says a model painted it"
    )
    add_safety(command)


def add_safety(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--safety", metavar="MODULE:FUNCTION", help="a function of yours that may refuse prompts and pictures"
    )


def add_pictures(command: argparse.ArgumentParser, many: bool) -> None:
    command.add_argument(
        "--image", required=True, type=Path, metavar="FILE", nargs="+" if many else None,
        help="picture with one face in it" + (", or several pictures" if many else ""),
    )  # fmt: skip
    command.add_argument(
        "--no-crop", action="store_true", help="do not look for the face: take the middle square of the picture"
    )


def settings(parsed: argparse.Namespace) -> PaintSettings:
    """`add_painting`'s options.

    Raises:
        UserError: one is out of range.
    """
    if parsed.steps is not None and not 1 <= parsed.steps <= 1000:
        raise UserError(f"--steps: expected 1 to 1000, got {parsed.steps}")
    if parsed.guidance is not None and not 0 <= parsed.guidance <= 100:
        raise UserError(f"--guidance: expected 0 to 100, got {parsed.guidance}")
    if not 0 <= parsed.seed < 2**63:
        raise UserError(f"--seed: expected 0 to 2**63 - 1, got {parsed.seed}")
    from unif2ace.generation.image import PaintSettings

    given = {name: getattr(parsed, name) for name in ("steps", "guidance", "seed")}
    return PaintSettings(**{name: value for name, value in given.items() if value is not None})


def checker(parsed: argparse.Namespace) -> SafetyChecker | None:
    """`--safety`'s function.

    Raises:
        UserError: there is none of that name.
    """
    if parsed.safety is None:
        return None
    from unif2ace.safety.checker import load_checker

    return load_checker(parsed.safety)


def face(path: Path, side: int, parsed: argparse.Namespace) -> Framed:
    """The one face of `--image`.

    Raises:
        UserError: see `framed`.
    """
    from unif2ace.data.framing import framed

    return framed(path, side, crop=not parsed.no_crop)
