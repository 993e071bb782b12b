"""Paint faces, or parts of them: masked discrete diffusion over the image codes, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from unif2ace.checkpoint import Checkpoint
from unif2ace.generation.masks import blended, touched
from unif2ace.model.image_tokenizer import to_images, to_uint8
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.prefix import TextPrefix
from unif2ace.model.sequences import t2i_prompts
from unif2ace_kernels import sampling


@dataclass(frozen=True)
class PaintSettings:
    """How to sample.

    Attributes:
        steps: denoising steps.
        guidance: w of (1 + w) conditional - w unconditional.
        temperature: of the token draw.
        choice_temperature: of the noise on the confidence that decides which tokens stay, annealed to 0.
        top_p: nucleus of the token draw, 1 for all codes.
        seed: one seed and prompt order, one set of images.
        cuda_graph: replay one captured step, on a CUDA device.
    """

    steps: int = 16
    guidance: float = 2.5
    temperature: float = 1.0
    choice_temperature: float = 1.0
    top_p: float = 0.9
    seed: int = 0
    cuda_graph: bool = False


@torch.no_grad()
def paint_codes(
    model: UniF2aceForConditionalGeneration,
    captions: Sequence[Sequence[int]],
    end: int,
    settings: PaintSettings,
    on_step: Callable[[sampling.Step], None] | None = None,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """Image codes for each caption.

    Captions are read once (`model.prefix` says what is exact about that), both branches run in one call.

    Args:
        captions: token ids of each prompt.
        end: the text tokenizer's end token.
        on_step: called after every step.
        known: [B, N] codes that stay as they are, -1 where one is to be painted; all of them when None.

    Returns:
        [B, N] codes in [0, codes).
    """
    config = model.config
    vocabulary, rows = config.vocabulary, len(captions)
    device = model.head.weight.device
    branches = 1 if settings.guidance == 0 else 2
    prompts = t2i_prompts([*captions, *[[]] * rows * (branches - 1)], end, config)
    different, which = torch.unique(prompts, dim=0, return_inverse=True)
    read = TextPrefix(model, different)
    prefix = read.at(which)
    narrows = config.sequence_moe is None  # then the last layer needs masked rows alone, as many as the schedule says

    start = torch.full((rows, config.image_tokens), vocabulary.mask, device=device)
    blank = known is None or not bool((known >= 0).any())
    if known is not None:
        start = torch.where(known.to(device) >= 0, known.to(device) + vocabulary.code_range[0], start)

    def hidden(ids: torch.Tensor, step: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor | None]:
        if blank and isinstance(step, int) and step == 0:  # all masks: captions that are equal have equal states
            states = read.image_hidden(ids[:1])[which.to(device)]
        elif isinstance(step, int) and narrows:
            most = sampler.most_masked(step, ids.shape[1])
            index = (ids != vocabulary.mask).int().argsort(stable=True)[:, :most].repeat(branches, 1)
            few = prefix.image_hidden(ids, index)
            index = index[:, :, None].expand_as(few)
            states = few.new_zeros(len(index), ids.shape[1], few.shape[-1]).scatter_(1, index, few)
        else:
            states = prefix.image_hidden(ids)
        cond, *uncond = states.chunk(branches)
        return cond, uncond[0] if uncond else None

    sampler = sampling.MaskedDiffusionSampler(
        hidden,
        steps=settings.steps,
        mask_id=vocabulary.mask,
        head=(model.head.weight, model.head.bias),
        code_range=vocabulary.code_range,
        guidance=settings.guidance,
        temperature=settings.temperature,
        remask_temperature=settings.choice_temperature,
        top_p=settings.top_p,
        cuda_graph=settings.cuda_graph,
    )
    return sampler(start, seed=settings.seed, callback=on_step) - vocabulary.code_range[0]


class Preview(NamedTuple):
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
            on_step(preview._replace(images=shown(preview.images)))

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
