"""The order of slots whose experts were chosen elsewhere, in Triton: three launches, no atomics, no wait for the host.

count        a program counts the slots of BA experts among BT slots
scan, order  order_triton.py, a slot being a token of one slot: a token may have an expert twice
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import order_triton
from .order_triton import order_kernel, scan_kernel


@triton.jit
def count_kernel(
    p_expert, p_clamped, p_count, slots, blocks, A: tl.constexpr, BT: tl.constexpr, BA: tl.constexpr
):  # fmt: skip
    """p_count int32 [A, blocks], p_clamped int32 [slots]; grid (blocks, cdiv(A, BA))."""
    i_block, o_a = tl.program_id(0).to(tl.int64), tl.program_id(1) * BA + tl.arange(0, BA)
    # [BT]
    o_slot = i_block * BT + tl.arange(0, BT)
    m_slot = o_slot < slots
    b_expert = tl.load(p_expert + o_slot, mask=m_slot, other=0)
    b_expert = tl.minimum(tl.maximum(b_expert, 0), A - 1).to(tl.int32)
    if tl.program_id(1) == 0:
        tl.store(p_clamped + o_slot, b_expert, mask=m_slot)
    # [BT, BA]
    b_taken = (b_expert[:, None] == o_a[None, :]) & m_slot[:, None]
    tl.store(p_count + o_a.to(tl.int64) * blocks + i_block, tl.sum(b_taken.to(tl.int32), 0), mask=o_a < A)


def tiles(experts: int) -> dict[str, int]:
    """Slots BT and experts BA of a program; not yet measured on a GPU.

    8 numbers a thread fit in registers. Blocks are long, so that the scan's rows are short.
    """
    return {"BT": 64, "BA": min(triton.next_power_of_2(experts), 16), "num_warps": 4}


def forward(expert: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """See `arrange_torch.forward`."""
    slots, tile = expert.numel(), tiles(experts)
    blocks, parts = triton.cdiv(slots, tile["BT"]), triton.cdiv(experts, tile["BA"])
    expert = expert.contiguous()
    counts, offsets, order = expert.new_empty(experts), expert.new_empty(experts + 1), expert.new_empty(slots)
    clamped = expert.new_empty(slots, dtype=torch.int32)
    count = expert.new_empty(experts, blocks, dtype=torch.int32)
    with torch.cuda.device_of(expert):
        if slots:
            count_kernel[blocks, parts](expert, clamped, count, slots, blocks, A=experts, **tile)
        scan_kernel[(experts,)](
            count, None, counts, None, blocks, A=experts, E=0, BLOCK=order_triton.SCAN_BLOCK, num_warps=8
        )
        order_kernel[blocks + 1, parts](
            clamped, count, counts, None, order, offsets, None, None, None, None, (0.0,), 0.0, slots, blocks,
            BOUNDS=(0, experts), K=1, S=1, A=experts, BALL=triton.next_power_of_2(experts + 1), **tile,
        )  # fmt: skip
    return counts, offsets, order
