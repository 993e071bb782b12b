"""Paint faces, or parts of them: masked discrete diffusion over the image codes, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from unif2ace.checkpoint import Checkpoint
from unif2ace.generation.masks import blended, touched
from unif2ace.model.image_tokenizer import to_images, to_uint8
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.painting import PaintSettings, paint_prompts
from unif2ace.model.sequences import t2i_prompts
from unif2ace_kernels import sampling


def paint_codes(
    model: UniF2aceForConditionalGeneration,
    captions: Sequence[Sequence[int]],
    end: int,
    settings: PaintSettings,
    on_step: Callable[[sampling.Step], None] | None = None,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """Image codes [B, N] for each caption.

    Args:
        captions: token ids of each prompt.
        end: the text tokenizer's end token.
        settings, on_step, known: as in `paint_prompts`.
    """
    return paint_prompts(model, t2i_prompts(captions, end, model.config), settings, on_step, known)


@dataclass(frozen=True)
class Preview:
    """A step's pictures.

    Attributes:
        index: 0, 1, ... of `steps`.
        images: [B, side, side, 3] uint8: the whole prediction, greyed where it is still to be drawn again.
    """

    index: int
    steps: int
    images: np.ndarray


OnPreview = Callable[[Preview], None]


def paint(
    checkpoint: Checkpoint, prompts: Sequence[str], settings: PaintSettings, on_step: OnPreview | None = None
) -> np.ndarray:
    """Faces [B, side, side, 3] uint8 from texts.

    Args:
        on_step: called after every step with what is there of the pictures.

    Raises:
        UserError: a prompt is empty or too long.
    """
    return _pictures(checkpoint, _codes(checkpoint, prompts, settings, on_step))


def repaint(
    checkpoint: Checkpoint,
    images: np.ndarray,
    masks: np.ndarray,
    prompts: Sequence[str],
    settings: PaintSettings,
    on_step: OnPreview | None = None,
) -> np.ndarray:
    """Paint parts of pictures anew (in-painting).

    Every image token that the mask touches is painted, from all that the others hold; they keep their codes. In the
    result the pixels outside the mask are those of `images` to the bit, and the painting fades in within its border.
    With a mask of everything the result is `paint`'s.

    Args:
        images: [B, side, side, 3] uint8, faces framed as the training faces are.
        masks: [B, side, side] bool, True where to paint.
        prompts, settings, on_step: as in `paint`.

    Raises:
        UserError: a prompt is empty or too long.
    """
    config, device = checkpoint.model.config, checkpoint.model.head.weight.device
    codes, *_ = checkpoint.image_tokenizer.encode(to_images(torch.from_numpy(images)).to(device))
    grid = int(config.image_tokens**0.5)
    anew = torch.from_numpy(np.stack([touched(mask, grid) for mask in masks])).to(device)

    def shown(painted: np.ndarray) -> np.ndarray:
        return np.stack([blended(*each) for each in zip(images, painted, masks)])

    def show(preview: Preview) -> None:
        if on_step is not None:
            on_step(replace(preview, images=shown(preview.images)))

    codes = _codes(checkpoint, prompts, settings, show if on_step else None, codes.masked_fill(anew, -1))
    return shown(_pictures(checkpoint, codes))


def _codes(
    checkpoint: Checkpoint,
    prompts: Sequence[str],
    settings: PaintSettings,
    on_step: OnPreview | None,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    text, vocabulary = checkpoint.text_tokenizer, checkpoint.model.config.vocabulary

    def show(step: sampling.Step) -> None:
        if on_step is not None:
            images = _pictures(checkpoint, step.sample - vocabulary.code_range[0])
            grid = int(step.ids.shape[1] ** 0.5)
            patch = images.shape[1] // grid
            undecided = (step.ids == vocabulary.mask).view(-1, grid, grid).cpu().numpy()
            undecided = undecided.repeat(patch, axis=1).repeat(patch, axis=2)[..., None]
            on_step(Preview(step.index, step.steps, np.where(undecided, images // 4 + 96, images).astype(np.uint8)))

    ids = [text.encode(prompt) for prompt in prompts]
    return paint_codes(checkpoint.model, ids, text.end, settings, show if on_step else None, known)


def _pictures(checkpoint: Checkpoint, codes: torch.Tensor) -> np.ndarray:
    return to_uint8(checkpoint.image_tokenizer.decode(codes)).cpu().numpy()
