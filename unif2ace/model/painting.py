"""Masked discrete diffusion over the image codes of a model, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from unif2ace.model.prefix import TextPrefix
from unif2ace_kernels import sampling

if TYPE_CHECKING:  # the model builds on this module
    from unif2ace.model.modeling import UniF2aceForConditionalGeneration


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
def paint_prompts(
    model: UniF2aceForConditionalGeneration,
    prompts: torch.Tensor,
    settings: PaintSettings,
    on_step: Callable[[sampling.Step], None] | None = None,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """Image codes for each prompt.

    Prompts are read once (`prefix` says what is exact about that), both branches run in one call.

    Args:
        prompts: [B, text_slots] token ids of `t2i_prompts`.
        on_step: called after every step.
        known: [B, N] codes that stay as they are, -1 where one is to be painted; all of them when None.

    Returns:
        [B, N] codes in [0, codes).
    """
    config = model.config
    vocabulary, rows = config.vocabulary, len(prompts)
    device = model.head.weight.device
    branches = 1 if settings.guidance == 0 else 2
    if branches == 2:
        empty = torch.full_like(prompts, vocabulary.pad)
        empty[:, -3], empty[:, -2:] = vocabulary.t2i, prompts[:, -1:]  # every prompt ends with the end token
        prompts = torch.cat([prompts, empty])
    different, which = torch.unique(prompts, dim=0, return_inverse=True)
    read = TextPrefix(model, different)
    prefix = read.at(which)
    which = which.to(device)
    narrows = config.sequence_moe is None  # then the last layer needs masked rows alone, as many as the schedule says

    start = torch.full((rows, config.image_tokens), vocabulary.mask, device=device)
    blank = known is None or not bool((known >= 0).any())
    if known is not None:
        start = torch.where(known.to(device) >= 0, known.to(device) + vocabulary.code_range[0], start)

    def hidden(ids: torch.Tensor, step: torch.Tensor | int) -> tuple[torch.Tensor, torch.Tensor | None]:
        if blank and isinstance(step, int) and step == 0:  # all masks: captions that are equal have equal states
            states = read.image_hidden(ids[:1])[which]
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
