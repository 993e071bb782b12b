"""`unif2ace generate` and `unif2ace inpaint`: faces from text, and parts of one anew."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unif2ace.cli import options
from unif2ace.errors import UserError

if TYPE_CHECKING:
    import numpy as np

LARGEST_COUNT = 64


def add_generate(generate: argparse.ArgumentParser) -> None:
    generate.add_argument(
        "--prompt", required=True, action="append", metavar="TEXT",
        help="what the face should be like; again for another row of faces",
    )  # fmt: skip
    generate.add_argument("--count", type=int, default=4, help="faces a prompt, side by side (default: %(default)s)")
    options.add_painting(generate)
    options.add_checkpoint(generate)
    generate.set_defaults(run=_generate)


def add_inpaint(inpaint: argparse.ArgumentParser) -> None:
    options.add_pictures(inpaint, many=False)
    inpaint.add_argument("--prompt", required=True, metavar="TEXT", help="what the face should be like")
    where = inpaint.add_mutually_exclusive_group(required=True)
    where.add_argument("--mask", type=Path, metavar="FILE", help="picture of the same size: white is painted anew")
    where.add_argument("--box", metavar="L,T,R,B", help="rectangle to paint anew: left,top,right,bottom in pixels")
    inpaint.add_argument("--count", type=int, default=1, help="how many, side by side (default: %(default)s)")
    options.add_painting(inpaint)
    options.add_checkpoint(inpaint)
    inpaint.set_defaults(run=_inpaint)


def _generate(parsed: argparse.Namespace) -> None:
    _check_count(parsed.count * len(parsed.prompt), parsed)
    targets = _targets(parsed.out, parsed.prompt, parsed.count, parsed.force)
    settings = options.settings(parsed)
    from unif2ace.checkpoint import Checkpoint
    from unif2ace.generation.image import paint
    from unif2ace.safety import checker, saving

    check = options.checker(parsed)
    checker.allow(check, parsed.prompt)
    checkpoint = Checkpoint.load(parsed.checkpoint)
    prompts = [prompt for prompt in parsed.prompt for _ in range(parsed.count)]
    _save(paint(checkpoint, prompts, settings), prompts, targets, parsed, check, saving.PAINTED)


def _inpaint(parsed: argparse.Namespace) -> None:
    _check_count(parsed.count, parsed)
    box = None if parsed.box is None else _box(parsed.box)
    targets = _targets(parsed.out, [parsed.prompt], parsed.count, parsed.force)
    settings = options.settings(parsed)
    import numpy as np

    from unif2ace.checkpoint import Checkpoint
    from unif2ace.data.framing import bring_mask
    from unif2ace.data.identity import read_image
    from unif2ace.generation.image import repaint
    from unif2ace.generation.masks import box_mask, image_mask
    from unif2ace.safety import checker, saving

    check = options.checker(parsed)
    checkpoint = Checkpoint.load(parsed.checkpoint)
    frame = options.face(parsed.image, checkpoint.image_tokenizer.config.side, parsed)
    mask = box_mask(box, *frame.size) if box is not None else image_mask(read_image(parsed.mask), *frame.size)
    checker.allow(check, [parsed.prompt], [frame.face])
    prompts = [parsed.prompt] * parsed.count
    faces, masks = (np.stack([each] * parsed.count) for each in (frame.face, bring_mask(frame, mask)))
    images = repaint(checkpoint, faces, masks, prompts, settings)
    _save(images, prompts, targets, parsed, check, saving.REPAINTED)


def _check_count(count: int, parsed: argparse.Namespace) -> None:
    if parsed.count < 1 or count > LARGEST_COUNT:
        raise UserError(f"--count: expected 1 to {LARGEST_COUNT} faces in all, got {count}")


def _box(text: str) -> list[int]:
    try:
        left, top, right, bottom = (int(each) for each in text.split(","))
    except ValueError:
        raise UserError(f"--box: expected left,top,right,bottom in pixels, got {text!r}") from None
    return [left, top, right, bottom]


def _targets(out: Path, prompts: Sequence[str], count: int, force: bool) -> list[Path]:
    """Files to write: one for all, or, where the name has a {n} or {prompt}, one a face.

    Raises:
        UserError: a name that means nothing, or a file that is there already.
    """
    from unif2ace.safety.saving import can_write

    fields = set(re.findall(r"{(.*?)}", str(out)))
    if fields - {"n", "prompt"}:
        raise UserError(f"--out: expected {{n}} or {{prompt}} in the name, got {{{min(fields - {'n', 'prompt'})}}}")
    targets = [out]
    if fields:
        words = [re.sub(r"\W+", "-", prompt.lower()).strip("-")[:60] or "face" for prompt in prompts]
        names = [(str(1 + number), words[number // count]) for number in range(len(prompts) * count)]
        targets = [Path(str(out).replace("{n}", n).replace("{prompt}", word)) for n, word in names]
        if len(set(targets)) < len(targets):
            raise UserError(f"--out: {out} gives several faces one name, put {{n}} in it")
    for target in targets:
        can_write(target, force)
    return targets


def _save(
    images: np.ndarray, prompts: Sequence[str], targets: Sequence[Path], parsed: argparse.Namespace, check, kind: str
) -> None:
    from unif2ace.pictures import sheet
    from unif2ace.safety import checker, saving

    images, reasons = checker.blank(check, prompts, images)
    for number, reason in enumerate(reasons):
        if reason is not None:
            print(f"unif2ace: face {number + 1} is blanked by the safety checker: {reason}", file=sys.stderr)
    if len(targets) == 1:
        said = list(dict.fromkeys(prompts))
        pictures = [(sheet(images, parsed.count), " / ".join(said))]
        told = f"{len(images)} face{'s' * (len(images) > 1)} from {', '.join(map(repr, said))}"
    else:
        pictures, told = list(zip(images, prompts)), ""
    weak = []
    for target, (picture, prompt) in zip(targets, pictures):
        text = {"Prompt": prompt, "Seed": str(parsed.seed)}
        holds = saving.save(target, picture, text, not parsed.no_watermark, kind, parsed.force)
        weak += [] if holds or parsed.no_watermark else [str(target)]
        print(f"{target}: {told or repr(prompt)}")
    if parsed.no_watermark:
        print("unif2ace: no watermark: say yourself that a model painted this", file=sys.stderr)
    if weak:
        print(f"unif2ace: too small to carry a watermark that lasts: {', '.join(weak)}", file=sys.stderr)
