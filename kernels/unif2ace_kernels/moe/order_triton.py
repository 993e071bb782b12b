"""Slots sorted by expert in Triton, from their numbers in each block of tokens: what routing and arranging end with.

scan     a program runs over the blocks of one expert: slots in the blocks before each, and in all
order    a program places its block's slots of BA experts; one more finishes offsets, and f, P and the losses
"""

from __future__ import annotations

import triton
import triton.language as tl

SCAN_BLOCK = 2048


@triton.jit
def scan_kernel(p_count, p_partial, p_counts, p_sums, blocks, A: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr):
    """Row program_id(0) of p_count [A, blocks] becomes its running sum from 0, in place, and its total counts [A];
    the rows of p_partial [E + 1, blocks], unless it is None, are summed to p_sums [E + 1]."""
    i_row = tl.program_id(0).to(tl.int64)
    if i_row < A:
        before = tl.zeros([], tl.int32)
        for start in range(0, blocks, BLOCK):
            o_block = start + tl.arange(0, BLOCK)
            p_row = p_count + i_row * blocks + o_block
            # [BLOCK]
            b_count = tl.load(p_row, mask=o_block < blocks, other=0)
            tl.store(p_row, before + tl.cumsum(b_count, 0) - b_count, mask=o_block < blocks)
            before += tl.sum(b_count, 0)
        tl.store(p_counts + i_row, before.to(tl.int64))
    if p_partial is not None:
        if i_row <= E:
            b_sum = tl.zeros([BLOCK], tl.float32)
            for start in range(0, blocks, BLOCK):
                o_block = start + tl.arange(0, BLOCK)
                b_sum += tl.load(p_partial + i_row * blocks + o_block, mask=o_block < blocks, other=0.0)
            tl.store(p_sums + i_row, tl.sum(b_sum, 0))


@triton.jit
def finish(
    b_counts, p_sums, p_frequency, p_probability, p_balance, p_z, coefs, z_scale, BOUNDS: tl.constexpr,
    K: tl.constexpr, A: tl.constexpr, BA: tl.constexpr,
):  # fmt: skip
    """f, P and the losses from counts [BA] (0 beyond the A of them) and the sums of the scores."""
    G: tl.constexpr = len(BOUNDS) - 1
    E: tl.constexpr = BOUNDS[G]
    o_a = tl.arange(0, BA)
    b_tokens, b_size, b_coef = tl.full([BA], 1, tl.int64), tl.zeros([BA], tl.float32), tl.zeros([BA], tl.float32)
    for g in tl.static_range(G):
        m_g = (o_a >= BOUNDS[g]) & (o_a < BOUNDS[g + 1])
        # A token has K slots in its group; 1 where there is no token, so that statistics are 0 and not 0 / 0.
        b_tokens = tl.where(m_g, tl.maximum(tl.sum(tl.where(m_g, b_counts, 0), 0) // K, 1), b_tokens)
        b_size = tl.where(m_g, BOUNDS[g + 1] - BOUNDS[g], b_size)
        b_coef = tl.where(m_g, coefs[g], b_coef)
    m_e = o_a < E
    b_frequency = b_counts.to(tl.float32) * b_size / (K * b_tokens).to(tl.float32)
    b_probability = tl.load(p_sums + o_a, mask=m_e, other=0.0) / b_tokens.to(tl.float32)
    tl.store(p_frequency + o_a, b_frequency, mask=m_e)
    tl.store(p_probability + o_a, b_probability, mask=m_e)
    tl.store(p_balance, tl.sum(tl.where(m_e, b_coef * b_frequency * b_probability, 0.0), 0))
    tl.store(p_z, tl.load(p_sums + E) * z_scale)


@triton.jit
def order_kernel(
    p_expert, p_before, p_counts, p_sums, p_order, p_offsets, p_frequency, p_probability, p_balance, p_z, coefs,
    z_scale, tokens, blocks, BOUNDS: tl.constexpr, K: tl.constexpr, S: tl.constexpr, A: tl.constexpr, BT: tl.constexpr,
    BA: tl.constexpr, BALL: tl.constexpr,
):  # fmt: skip
    """p_before [A, blocks]: an expert's slots in the blocks before; grid (blocks + 1, cdiv(A, BA)); BALL > A.

    Without p_sums there are no statistics to finish.

    A slot's place is offsets[e] + its expert's slots in the blocks before + those of the block's tokens before its own:
    a token has an expert once.
    """
    i_block, i_start = tl.program_id(0).to(tl.int64), tl.program_id(1) * BA
    # [BALL]
    o_all = tl.arange(0, BALL)
    b_counts = tl.load(p_counts + o_all, mask=o_all < A, other=0)
    if i_block == blocks:
        if i_start == 0:
            tl.store(p_offsets + o_all, tl.cumsum(b_counts, 0) - b_counts, mask=o_all <= A)
            if p_sums is not None:
                finish(
                    b_counts, p_sums, p_frequency, p_probability, p_balance, p_z, coefs, z_scale, BOUNDS, K, A, BALL
                )  # fmt: skip
    else:
        o_t = i_block * BT + tl.arange(0, BT)
        o_a = i_start + tl.arange(0, BA)
        # [BA]
        b_own = tl.load(p_counts + o_a, mask=o_a < A, other=0)
        b_before = tl.load(p_before + o_a.to(tl.int64) * blocks + i_block, mask=o_a < A, other=0)
        b_start = tl.sum(tl.where(o_all < i_start, b_counts, 0), 0) + tl.cumsum(b_own, 0) - b_own + b_before
        b_slot = tl.full([BT, BA], -1, tl.int32)
        for s in tl.static_range(S):
            # [BT]
            b_expert = tl.load(p_expert + o_t * S + s, mask=o_t < tokens, other=-1)
            b_slot = tl.where(b_expert[:, None] == o_a[None, :], s, b_slot)
        # [BT, BA]
        b_taken = (b_slot >= 0).to(tl.int32)
        b_place = b_start[None, :] + tl.cumsum(b_taken, 0) - b_taken
        b_number = (tl.arange(0, BT) * S)[:, None] + b_slot
        tl.store(p_order + b_place, b_number + i_block * (BT * S), mask=b_slot >= 0)


def order_tiles(tile: dict[str, int], experts: int) -> dict[str, int]:
    """What a program of `order_kernel` takes, of the tokens of `tile`: BA experts; not yet measured on a GPU."""
    return {
        "BT": tile["BT"],
        "BA": min(triton.next_power_of_2(experts), max(16, 1024 // tile["BT"])),
        "BALL": triton.next_power_of_2(experts + 1),
        "num_warps": 4,
    }
