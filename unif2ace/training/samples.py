"""What a model in training paints and says, with the weights as they are; the training goes on as if nothing had been.

samples/step-00000100/paintings.png    one painting beside the other, in the order of the prompts
                      faces.png        the faces that are asked about
                      samples.json     {"step", "prompts", "answers": [{"image", "question", "answer"}]}, the last
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import distributed as dist
from torch.distributed.fsdp import FSDPModule

from unif2ace.configs import MMU
from unif2ace.errors import UserError
from unif2ace.files import replacing, write_json
from unif2ace.generation.text import MAX_QUESTION, answer
from unif2ace.model.image_tokenizer import to_uint8
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.painting import PaintSettings, paint_prompts
from unif2ace.model.sequences import Batch, RowSizes, t2i_prompts
from unif2ace.model.text_tokenizer import TextTokenizer
from unif2ace.training.journal import tell

if TYPE_CHECKING:
    from unif2ace.generation.reading import Faces

PAINTINGS, FACES, WORDS = "paintings.png", "faces.png", "samples.json"


def folder_of(run: Path, step: int) -> Path:
    """Where the samples after `step` steps go."""
    return Path(run) / "samples" / f"step-{step:08d}"


def faces_of(batch: Batch, config: RowSizes, count: int) -> Faces:
    """The faces of a training batch's first `count` mmu rows, to ask about; fewer where it has fewer."""
    from unif2ace.generation.reading import Faces  # with OpenCV, which training on shards has no need of

    rows = ((batch.task == MMU) & (batch.image_start >= 0)).nonzero()[:count, 0].cpu()
    ids, start = batch.input_ids.cpu()[rows], batch.image_start.cpu()[rows]
    codes = ids.gather(1, start[:, None] + torch.arange(config.image_tokens))
    return Faces(codes - config.vocabulary.code_range[0], batch.identity.cpu()[rows], batch.semantic.cpu()[rows])


def check(prompts: Sequence[str], questions: Sequence[str], text: TextTokenizer, config: RowSizes, where: str) -> None:
    """Whether the model reads them: told before a training begins, not when its first samples are due.

    Raises:
        UserError: one is too long; the key is named.
    """
    for index, prompt in enumerate(prompts):
        try:
            t2i_prompts([text.encode(prompt)], text.end, config)
        except UserError as error:
            raise UserError(f"{where}.prompts[{index}]: {error}") from error
    for index, question in enumerate(questions):
        length = len(text.encode(question))
        if length > MAX_QUESTION:
            raise UserError(
                f"{where}.questions[{index}]: it has {length} tokens, at most {MAX_QUESTION} are read: shorten it"
            )


def write_samples(
    model: UniF2aceForConditionalGeneration,
    text: TextTokenizer,
    folder: Path,
    step: int,
    prompts: Sequence[str],
    questions: Sequence[str] = (),
    faces: Faces | None = None,
    settings: PaintSettings | None = None,
    max_tokens: int = 24,
    write: bool = True,
) -> bool:
    """Paint the prompts and ask every question about every face.

    Every rank of a distributed run calls this with the same arguments between two steps, but for `write`: what is
    sharded is gathered, and all compute the same. One seed, so that paintings of different steps can be compared.

    Args:
        model: in whatever mode and however sharded. Modes and the state of random numbers are put back, exactly.
        folder: see `folder_of`.
        step: steps done.
        faces: see `faces_of`; none: nothing is asked. They are shown as the image tokenizer has them.
        settings: of the painting.
        max_tokens: longest answer.
        write: whether this rank writes: rank 0.

    Returns:
        Whether the files are there; a disk that refuses them is told on stderr and stops nothing.
    """
    asked = [(face, question) for face in range(0 if faces is None else len(faces.codes)) for question in questions]
    painted = said = None
    with _as_it_is(model):
        if prompts:
            rows = t2i_prompts([text.encode(prompt) for prompt in prompts], text.end, model.config)
            painted = _pictures(model, paint_prompts(model, rows, settings or PaintSettings()))
        if faces is not None and asked:
            of = faces.at(torch.tensor([face for face, _ in asked]))
            ids = [text.encode(question) for _, question in asked]
            together = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
            said = answer(model, of.codes, ids, of.identity, of.semantic, text.end, max_tokens, synced_gpus=together)
            shown = _pictures(model, faces.codes)
    if not write:
        return True
    words = {
        "step": step,
        "prompts": list(prompts),
        "answers": [
            {"image": face, "question": question, "answer": text.decode(ids)}
            for (face, question), ids in zip(asked, said or ())
        ],
    }
    try:
        for name, pictures in ((PAINTINGS, painted), (FACES, shown if said else None)):
            if pictures is not None:
                with replacing(folder / name) as partial:
                    Image.fromarray(np.concatenate(list(pictures), axis=1)).save(partial, format="PNG")
        write_json(folder / WORDS, words)
    except UserError as error:
        tell(f"{error}; training goes on")
        return False
    return True


@contextlib.contextmanager
def _as_it_is(model: UniF2aceForConditionalGeneration) -> Iterator[None]:
    """Evaluation mode, whole weights, numbers drawn that nobody misses; afterwards all is as it was."""
    device = model.head.weight.device
    modes = [(module, module.training) for module in model.modules()]
    sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
        try:
            model.eval()
            for each in sharded:
                each.unshard()
            yield
        finally:
            for each in sharded:
                each.reshard()
            for module, training in modes:
                module.training = training


def _pictures(model: UniF2aceForConditionalGeneration, codes: torch.Tensor) -> np.ndarray | None:
    """[B, side, side, 3] uint8 of codes [B, N]; None where the model has no image tokenizer to make them with."""
    if model.image_tokenizer is None:
        return None
    return to_uint8(model.image_tokenizer.decode(codes.to(model.head.weight.device))).cpu().numpy()
