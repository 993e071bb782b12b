"""Paint faces: masked discrete diffusion over the image codes, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from unif2ace.checkpoint import Checkpoint
from unif2ace.model.image_tokenizer import to_uint8
from unif2ace.model.sequences import t2i_batch, t2i_prompts
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
    """

    steps: int = 16
    guidance: float = 2.5
    temperature: float = 1.0
    choice_temperature: float = 1.0
    top_p: float = 0.9
    seed: int = 0


@torch.no_grad()
def paint_codes(
    model: UniF2ace,
    captions: Sequence[Sequence[int]],
    end: int,
    settings: PaintSettings,
    on_step: Callable[[sampling.Step], None] | None = None,
) -> torch.Tensor:
    """Image codes for each caption.

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
    prompts = t2i_prompts(captions, end, config).to(device)
    empty = t2i_prompts([[]] * rows, end, config).to(device)

    def hidden(ids: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        both = [prompts] if settings.guidance == 0 else [prompts, empty]
        batch = t2i_batch(torch.cat(both), ids.repeat(len(both), 1), config)
        states = model.image_hidden(model(batch), batch).chunk(len(both))
        return states[0], states[1] if len(both) == 2 else None

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
