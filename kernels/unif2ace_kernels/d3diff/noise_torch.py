"""The forward process of training: some tokens of each row become the mask token, counter-based."""

from __future__ import annotations

import torch

from .._philox import NOISE_STREAM, random_words, uniform


def noise_torch(
    tokens: torch.Tensor,
    mask_prob: torch.Tensor,
    mask_id: int,
    exact_count: bool,
    seed: int,
    offset: int,
    first_row: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Torch implementation of `unif2ace::d3diff_noise`; tokens [B, N], mask_prob [B] -> (noised, mask) [B, N]."""
    length = tokens.shape[1]
    rows = torch.arange(first_row, first_row + tokens.shape[0], device=tokens.device)
    words = random_words(seed, offset, rows, length, NOISE_STREAM)
    if exact_count and length > 0:
        # In float32 at least: 16 bits would round N m to a multiple of 4 at N = 1024, and float16 ends at 65,504.
        wide = mask_prob.to(torch.promote_types(mask_prob.dtype, torch.float32))
        count = torch.round(length * wide).to(torch.int64).clamp(1, length)
        # The column in the low bits makes the keys of a row distinct, so that exactly `count` pass the threshold.
        keys = (words << 31) | torch.arange(length, device=tokens.device)
        threshold = keys.sort(-1).values.gather(-1, count[:, None] - 1)
        mask = keys <= threshold
    else:
        mask = uniform(words) < mask_prob[:, None]
    return torch.where(mask, mask_id, tokens.contiguous()), mask
