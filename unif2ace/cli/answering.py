"""`unif2ace ask`, `unif2ace caption` and `unif2ace chat`: what the model says of a face."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from unif2ace.cli import options
from unif2ace.errors import UserError


def add_ask(ask: argparse.ArgumentParser) -> None:
    options.add_pictures(ask, many=True)
    ask.add_argument(
        "--question", required=True, action="append", metavar="TEXT", help="what to ask of each picture; may come again"
    )
    _add_answering(ask, 16)
    ask.set_defaults(run=_ask)


def add_caption(caption: argparse.ArgumentParser) -> None:
    options.add_pictures(caption, many=True)
    caption.add_argument(
        "--prompt", metavar="TEXT", help="how to ask for a caption (default: as the checkpoint was trained to be asked)"
    )
    _add_answering(caption, 64)
    caption.set_defaults(run=_caption)


def add_chat(chat: argparse.ArgumentParser) -> None:
    options.add_pictures(chat, many=False)
    _add_answering(chat, 64)
    chat.set_defaults(run=_chat)


def _add_answering(command: argparse.ArgumentParser, tokens: int) -> None:
    command.add_argument("--max-tokens", type=int, default=tokens, help="longest answer (default: %(default)s)")
    options.add_safety(command)
    options.add_checkpoint(command)


def _ask(parsed: argparse.Namespace) -> None:
    _answers(parsed, [(image, question) for image in parsed.image for question in parsed.question])


def _caption(parsed: argparse.Namespace) -> None:
    from unif2ace.data.captions import CAPTION_PROMPTS

    reader = _reader(parsed)
    trained = reader.checkpoint.processor.prompts.get("caption")
    if trained is None and parsed.prompt is None:
        print(
            f"unif2ace: this checkpoint was not trained to write captions, only to answer questions; what follows is "
            f"what it makes of {CAPTION_PROMPTS[0]!r}",
            file=sys.stderr,
        )
    prompt = parsed.prompt or trained or CAPTION_PROMPTS[0]
    _answers(parsed, [(image, prompt) for image in parsed.image], reader, shown=False)


def _answers(parsed: argparse.Namespace, asked: list[tuple[Path, str]], reader=None, shown: bool = True) -> None:
    """One line an answer; where there are several, after the file (and the question) and tabs."""
    import numpy as np
    import torch

    from unif2ace.safety import checker

    reader = reader or _reader(parsed)
    side = reader.checkpoint.image_tokenizer.config.side
    faces = {image: options.face(image, side, parsed).face for image in dict.fromkeys(parsed.image)}
    check = options.checker(parsed)
    checker.allow(check, [question for _, question in asked], [faces[image] for image, _ in asked])
    read = reader.read(np.stack(list(faces.values())))
    rows = torch.tensor([list(faces).index(image) for image, _ in asked])
    answers = reader.answer(read.at(rows), [question for _, question in asked], parsed.max_tokens)
    for (image, question), answer in zip(asked, answers):
        print("\t".join([*([str(image)] + [question] * shown) * (len(asked) > 1), answer]))


def _chat(parsed: argparse.Namespace) -> None:
    """A line in, a line out, until the end of the input; at a terminal with a prompt."""
    from unif2ace.safety import checker

    reader, check = _reader(parsed), options.checker(parsed)
    side = reader.checkpoint.image_tokenizer.config.side

    def look(path: Path):
        face = options.face(path, side, parsed).face
        return face, reader.read(face[None])

    picture, face = look(parsed.image)
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        print(f"Looking at {parsed.image}. Ask a question a line; /image FILE for another face, /exit to stop.")
    history: list[int] = []
    refused = 0
    while True:
        if at_terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        question = line.strip()
        if not line or question in ("/exit", "/quit"):
            break
        if not question:
            continue
        try:
            if question.startswith("/image "):
                picture, face = look(Path(question.removeprefix("/image ").strip()))
                history = []
                continue
            checker.allow(check, [question], [picture])
            answer, history = reader.converse(face, history, question, parsed.max_tokens)
            print(answer, flush=True)
        except UserError as error:
            refused += 1
            print(f"unif2ace: {error}", file=sys.stderr, flush=True)
    if refused and not at_terminal:
        raise UserError(f"{refused} of the lines could not be answered")


def _reader(parsed: argparse.Namespace):
    if not 1 <= parsed.max_tokens <= 1024:
        raise UserError(f"--max-tokens: expected 1 to 1024, got {parsed.max_tokens}")
    from unif2ace.checkpoint import Checkpoint
    from unif2ace.generation.reading import FaceReader

    return FaceReader(Checkpoint.load(parsed.checkpoint))
