"""The re-mask in Triton: a program holds a sample's keys in registers and finds the cut bit by bit, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import _triton
from .._checks import expect
from .._philox import REMASK_STREAM
from .._triton import words_of_groups
from . import configs

Tensor = torch.Tensor
NONE = tl.constexpr(float("-inf"))
LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
STREAM = tl.constexpr(REMASK_STREAM)


@triton.jit
def ranked(confidence, temperature, seed, offset, row):
    """What draw_torch.remask ranks unknown positions by, to the bit: NaN lowest, +inf below a known position's."""
    value = tl.where(confidence == confidence, tl.minimum(confidence, LARGEST), NONE)
    word, _, _, _ = words_of_groups(seed, offset, row, (row * 0).to(tl.int32), STREAM)
    return tl.minimum(value + temperature * _triton.gumbel(word), LARGEST)


@triton.jit
def ascending(value):
    """uint32 keys that order as float32 values do, the two zeros alike."""
    bits = tl.where(value == 0, 0.0, value).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit(do_not_specialize_on_alignment=["p_count", "p_seed", "p_offset", "p_temperature"])
def remask_kernel(
    p_confidence, p_unknown, p_count, p_rows, p_seed, p_offset, p_temperature, p_mask, length,
    SHOWO: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p_confidence, p_unknown, p_rows, p_mask: [B, length]; p_count [B]; seed, offset, temperature [1]; grid (B,)."""
    i_first = tl.program_id(0).to(tl.int64) * length
    o_column = tl.arange(0, BLOCK)
    m_column = o_column < length
    # [BLOCK]
    b_unknown = tl.load(p_unknown + i_first + o_column, mask=m_column, other=0) != 0
    b_row = tl.load(p_rows + i_first + o_column, mask=m_column, other=0)
    b_value = tl.load(p_confidence + i_first + o_column, mask=m_column, other=0.0)
    b_value = ranked(b_value, tl.load(p_temperature), tl.load(p_seed), tl.load(p_offset), b_row)
    # Beyond the length nothing is unknown: those places rank with the known ones, above every key that is sought.
    b_key = ascending(tl.where(b_unknown, b_value, float("inf")))

    # cut: the key of rank `wanted`, counted from 1, among all positions.
    count = tl.load(p_count + tl.program_id(0))
    if SHOWO:
        wanted = (tl.minimum(tl.maximum(count, 0), length - 1) + 1).to(tl.int32)
    else:
        wanted = tl.minimum(tl.maximum(count, 0), tl.sum(b_unknown.to(tl.int32))).to(tl.int32)
    cut = tl.zeros([], tl.uint32)
    for i in range(32):
        trial = cut | (tl.full([], 0x80000000, tl.uint32) >> i)
        cut = tl.where(tl.sum((b_key < trial).to(tl.int32)) < wanted, trial, cut)

    b_mask = b_key < cut
    if not SHOWO:
        b_tied = (b_key == cut).to(tl.int32)
        left = wanted - tl.sum(b_mask.to(tl.int32))
        b_mask = b_mask | ((b_tied == 1) & (tl.cumsum(b_tied) <= left))
    tl.store(p_mask + i_first + o_column, (b_mask & b_unknown).to(tl.uint8), mask=m_column)


def remask(
    confidence: Tensor, unknown: Tensor, count: Tensor, rows: Tensor, seed: Tensor, offset: Tensor,
    temperature: Tensor, ties: str,
) -> Tensor:  # fmt: skip
    """The op `remask`; see ops.py. One launch."""
    samples, length = confidence.shape
    at_most = configs.LARGEST_ROW
    expect(length <= at_most, "confidence", f"at most {at_most} positions a sample on CUDA", f"{length}")
    mask = torch.empty_like(unknown, memory_format=torch.contiguous_format)
    if not mask.numel():
        return mask
    tile = configs.remask_tile(length)
    with torch.cuda.device_of(mask):
        remask_kernel[(samples,)](
            confidence.contiguous(), unknown.contiguous().view(torch.uint8), count.contiguous(), rows.contiguous(),
            seed, offset, temperature, mask.view(torch.uint8), length,
            SHOWO=ties == "showo", BLOCK=tile.block,
            num_warps=tile.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
    return mask
