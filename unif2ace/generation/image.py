"""Paint faces: masked discrete diffusion over the image codes, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from unif2ace.checkpoint import Checkpoint
from unif2ace.model.image_tokenizer import to_uint8
from unif2ace.model.prefix import TextPrefix
from unif2ace.model.sequences import t2i_prompts
from unif2ace.model.transformer import UniF2ace
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
    model: UniF2ace,
    captions: Sequence[Sequence[int]],
    end: int,
    settings: PaintSettings,
    on_step: Callable[[sampling.Step], None] | None = None,
) -> torch.Tensor:
    """Image codes for each caption.

    Captions are read once (`model.prefix` says what is exact about that), both branches run in one call.

    Args:
        captions: token ids of each prompt.
        end: the text tokenizer's end token.
        on_step: called after every step.

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

    def hidden(ids: torch.Tensor, step: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor | None]:
        if isinstance(step, int) and step == 0:  # every image is all masks: captions that are equal have equal states
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
    start = torch.full((rows, config.image_tokens), vocabulary.mask, device=device)
    return sampler(start, seed=settings.seed, callback=on_step) - vocabulary.code_range[0]


def paint(checkpoint: Checkpoint, prompts: Sequence[str], settings: PaintSettings) -> np.ndarray:
    """Faces [B, side, side, 3] uint8 from texts.

    Raises:
        UserError: a prompt is empty or too long.
    """
    text = checkpoint.text_tokenizer
    ids = [text.encode(prompt) for prompt in prompts]
    codes = paint_codes(checkpoint.model, ids, text.end, settings)
    return to_uint8(checkpoint.image_tokenizer.decode(codes)).numpy()
