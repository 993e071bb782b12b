"""Triton implementation of the forward process: a program masks one row, with the bits of the torch implementation."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .._philox import NOISE_STREAM
from .._triton import interleave, words_of_groups
from . import configs
from .noise_torch import noise_torch


@triton.jit
def count_of(length, mask_prob):
    """round(length * mask_prob), half to even, of the product in float32, or in float64 for float64; at least 1."""
    if mask_prob.dtype == tl.float64:
        x = length.to(tl.float64) * mask_prob
    else:
        x = length.to(tl.float32) * mask_prob.to(tl.float32)
    count = tl.floor(x).to(tl.int32)
    rest = x - tl.floor(x)  # fused with the product above it would be of the exact one, and no half a half
    up = (rest > 0.5) | ((rest == 0.5) & (count % 2 == 1))
    return tl.minimum(tl.maximum(count + up.to(tl.int32), 1), length)


@triton.jit
def kth_smallest(b_word, m_column, k):
    """The k-th smallest (from 1) of the uint32 words at m_column: its bits from the highest, a count each."""
    value, bit = tl.full((), 0, tl.uint32), tl.full((), 1 << 31, tl.uint32)
    for _ in range(32):
        candidate = value | bit
        below = tl.sum((m_column & (b_word < candidate)).to(tl.int32), 0)
        value = tl.where(below < k, candidate, value)
        bit = bit >> 1
    return value


@triton.jit(do_not_specialize=["length", "mask_id", "seed", "offset", "first_row"])
def noise_kernel(
    p_tokens, p_mask_prob, p_noised, p_mask, length, mask_id, seed, offset, first_row, stream,
    EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """tokens, noised int64 [B, N], mask uint8 [B, N], mask_prob [B]; grid (B,), BLOCK >= N."""
    i_row = tl.program_id(0).to(tl.int64)
    o_column = tl.arange(0, BLOCK)
    m_column = o_column < length
    word_row = first_row.to(tl.int64) + i_row
    w0, w1, w2, w3 = words_of_groups(seed.to(tl.int64), offset.to(tl.int64), word_row, tl.arange(0, BLOCK // 4), stream)
    # [BLOCK]
    b_word = interleave(w0, w1, w2, w3)
    mask_prob = tl.load(p_mask_prob + i_row)
    if EXACT:
        count = count_of(length, mask_prob)
        last = kth_smallest(b_word, m_column, count)
        m_below, m_last = m_column & (b_word < last), m_column & (b_word == last)
        # Equal words: the columns that come first.
        room = count - tl.sum(m_below.to(tl.int32), 0)
        m_noise = m_below | (m_last & (tl.cumsum(m_last.to(tl.int32), 0) <= room))
    else:
        m_noise = (b_word.to(tl.float64) + 0.5) * 2.0**-32 < mask_prob.to(tl.float64)
    o_token = i_row * length + o_column
    b_token = tl.load(p_tokens + o_token, mask=m_column)
    tl.store(p_noised + o_token, tl.where(m_noise, mask_id, b_token), mask=m_column)
    tl.store(p_mask + o_token, m_noise.to(tl.uint8), mask=m_column)


def noise_triton(
    tokens: torch.Tensor,
    mask_prob: torch.Tensor,
    mask_id: int,
    exact_count: bool,
    seed: int,
    offset: int,
    first_row: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Triton implementation of `unif2ace::d3diff_noise`; tokens [B, N], mask_prob [B] -> (noised, mask) [B, N].

    A row of more than `configs.NOISE_LENGTH` tokens does not fit the registers of a program and is torch's to do.
    """
    batch, length = tokens.shape
    if length > configs.NOISE_LENGTH:
        return noise_torch(tokens, mask_prob, mask_id, exact_count, seed, offset, first_row)
    noised = torch.empty((batch, length), dtype=tokens.dtype, device=tokens.device)
    mask = torch.empty((batch, length), dtype=torch.bool, device=tokens.device)
    if noised.numel():
        block = max(4, triton.next_power_of_2(length))
        with torch.cuda.device_of(tokens):
            noise_kernel[(batch,)](
                tokens.contiguous(), mask_prob.contiguous(), noised, mask.view(torch.uint8), length, mask_id, seed,
                offset, first_row, NOISE_STREAM, EXACT=exact_count, BLOCK=block,
                num_warps=configs.noise_warps(block), enable_fp_fusion=False,
            )  # fmt: skip
    return noised, mask
