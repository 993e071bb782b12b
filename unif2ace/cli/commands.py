"""`unif2ace generate` and `unif2ace ask`."""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np
from PIL import Image

from unif2ace.checkpoint import Checkpoint
from unif2ace.data.identity import face_encoder, face_from_file
from unif2ace.errors import UserError
from unif2ace.files import replacing
from unif2ace.generation.image import PaintSettings, paint
from unif2ace.generation.text import answer_faces

LARGEST_COUNT = 64


def generate(parsed: argparse.Namespace) -> None:
    """Paint `--count` faces from one prompt, side by side, into one PNG."""
    if not 1 <= parsed.count <= LARGEST_COUNT:
        raise UserError(f"--count: expected 1 to {LARGEST_COUNT}, got {parsed.count}")
    if parsed.steps is not None and parsed.steps < 1:
        raise UserError(f"--steps: expected at least 1, got {parsed.steps}")
    if parsed.guidance is not None and not 0 <= parsed.guidance <= 100:
        raise UserError(f"--guidance: expected 0 to 100, got {parsed.guidance}")
    if not 0 <= parsed.seed < 2**63:
        raise UserError(f"--seed: expected 0 to 2**63 - 1, got {parsed.seed}")
    checkpoint = Checkpoint.load(parsed.checkpoint)
    given = {name: getattr(parsed, name) for name in ("steps", "guidance", "seed")}
    settings = dataclasses.replace(PaintSettings(), **{k: v for k, v in given.items() if v is not None})
    images = paint(checkpoint, [parsed.prompt] * parsed.count, settings)
    with replacing(parsed.out) as partial:
        Image.fromarray(np.concatenate(list(images), axis=1)).save(partial, format="PNG")
    print(f"{parsed.out}: {parsed.count} faces from {parsed.prompt!r}")


def ask(parsed: argparse.Namespace) -> None:
    """Answer one question about the face in an image file."""
    checkpoint = Checkpoint.load(parsed.checkpoint)
    side = checkpoint.image_tokenizer.config.side
    face = face_from_file(parsed.image, side)
    print(answer_faces(checkpoint, face[None], face_encoder()(face[None]), [parsed.question])[0])
