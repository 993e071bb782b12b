"""Gumbel noise in Triton: a program makes one tile of one row."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import _triton
from .._triton import interleave, words_of_groups

BLOCK = 1024  # columns a program: 8 a thread at 4 warps, two 16-byte stores each


@triton.jit
def gumbel_kernel(p_seed, p_offset, p_out, columns, stream, BLOCK: tl.constexpr):
    """p_seed, p_offset: int64 [1]; p_out: float32 [rows, columns]; grid (rows * cdiv(columns, BLOCK),)."""
    blocks = tl.cdiv(columns, BLOCK)
    i_row, i_block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    o_group = i_block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    w0, w1, w2, w3 = words_of_groups(tl.load(p_seed), tl.load(p_offset), i_row, o_group, stream)
    # [BLOCK]
    b_gumbel = _triton.gumbel(interleave(w0, w1, w2, w3))
    o_column = i_block * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + i_row * columns + o_column, b_gumbel, mask=o_column < columns)


def gumbel(seed: torch.Tensor, offset: torch.Tensor, rows: int, columns: int, stream: int) -> torch.Tensor:
    """float32 [rows, columns] on the device of `seed`; see `unif2ace_kernels.random.gumbel`."""
    out = seed.new_empty((rows, columns), dtype=torch.float32)
    if out.numel():
        grid = (rows * triton.cdiv(columns, BLOCK),)  # the other axes end at 65,535
        with torch.cuda.device_of(out):
            gumbel_kernel[grid](seed, offset, out, columns, stream, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False)
    return out
