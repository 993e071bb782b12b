"""Grouped products in Triton: rows sorted by expert times an expert's matrix, rows^T times rows, sums of rows.

Rows r are the slots of the tokens sorted by expert, slot = order[r], token = slot // SLOTS; expert e has the rows
offsets[e] : offsets[e + 1]. Nothing is read on the host and nothing is added atomically: a program finds its expert
from `offsets`, and every sum has one order, so equal inputs give equal bits.

Row tiles. Expert e's tiles have the numbers from offsets[e] // BLOCK_M + e on. That leaves a gap where an expert has
fewer tiles than numbers, never too few numbers, and needs no scan; rows // BLOCK_M + experts programs are enough:

    BLOCK_M 4   offsets    [0, 5, 5, 11]     expert 0: rows 0-4, tiles 0 1; 1: none; 2: rows 5-10, tiles 3 4
                first tile [0, 2, 3]         tile 2 is empty; 11 // 4 + 3 = 5 tiles

Numbers of rows, slots and tokens are 32-bit, every offset into memory is 64-bit.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_tile(p_offsets, i_tile, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, first row, end of the expert's rows) of a row tile; no rows where first >= end."""
    BLOCK_E: tl.constexpr = triton.next_power_of_2(EXPERTS)
    o_expert = tl.arange(0, BLOCK_E)
    m_expert = o_expert < EXPERTS
    # [BLOCK_E]
    b_first = tl.load(p_offsets + o_expert, mask=m_expert, other=0).to(tl.int32) // BLOCK_M + o_expert
    i_expert = tl.sum(((b_first <= i_tile) & m_expert).to(tl.int32), 0) - 1
    start = tl.load(p_offsets + i_expert).to(tl.int32)
    end = tl.load(p_offsets + i_expert + 1).to(tl.int32)
    return i_expert, start + (i_tile - (start // BLOCK_M + i_expert)) * BLOCK_M, end


@triton.jit
def by_load_kernel(p_offsets, p_experts, EXPERTS: tl.constexpr):
    """experts int32 [EXPERTS]: those with the most rows first, of equals the lower number; grid (EXPERTS,).

    In this order `outer_kernel` takes them: programs that start last should be the short ones, or all wait for them.
    Ranking there, in each of its programs, costs time and registers that grow with EXPERTS.
    """
    BLOCK_E: tl.constexpr = triton.next_power_of_2(EXPERTS)
    i_expert, o_expert = tl.program_id(0), tl.arange(0, BLOCK_E)
    m_expert = o_expert < EXPERTS
    # [BLOCK_E], -1 where there is no expert: after them all
    b_start = tl.load(p_offsets + o_expert, mask=m_expert, other=0)
    b_count = tl.load(p_offsets + o_expert + 1, mask=m_expert, other=-1) - b_start
    count = tl.load(p_offsets + i_expert + 1) - tl.load(p_offsets + i_expert)
    m_before = (b_count > count) | ((b_count == count) & (o_expert < i_expert))
    tl.store(p_experts + tl.sum(m_before.to(tl.int32), 0), i_expert)


@triton.jit
def swizzle(i_program, tiles_m, TILES_N: tl.constexpr, GROUP: tl.constexpr):
    """(row tile, column tile): GROUP row tiles go through all columns together, which finds both operands in L2."""
    first = i_program // (GROUP * TILES_N) * GROUP
    size = min(tiles_m - first, GROUP)
    inside = i_program % (GROUP * TILES_N)
    return first + inside % size, inside // size


@triton.jit
def below(o, limit, ALL: tl.constexpr):
    """o < limit, or a constant that the compiler drops from a load where ALL are."""
    return tl.full(o.shape, True, tl.int1) if ALL else o < limit


@triton.jit
def halves(b_tile):
    """The left and the right half of a tile's columns: an epilogue in two parts needs half the registers."""
    b_pair = tl.reshape(b_tile, [b_tile.shape[0], 2, b_tile.shape[1] // 2])
    return tl.split(tl.permute(b_pair, (0, 2, 1)))


@triton.jit
def rows_times(
    p_row,
    p_weight,
    stride_k,
    stride_n,
    first,
    PAIR: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """float32 [BLOCK_M, BLOCK_N]: rows of K at p_row [BLOCK_M] times the matrix at p_weight, columns from `first` on.

    With PAIR also the rows times the columns from N + first on; otherwise the second result is the first.
    """
    o_n = first + tl.arange(0, BLOCK_N)
    m_n = below(o_n, N, N % BLOCK_N == 0)
    o_k = tl.arange(0, BLOCK_K)
    # [BLOCK_M, BLOCK_K]
    p_a = p_row[:, None] + o_k[None, :]
    # [BLOCK_K, BLOCK_N]
    p_b = p_weight + (o_k.to(tl.int64)[:, None] * stride_k + o_n.to(tl.int64)[None, :] * stride_n)
    to_value = N * stride_n
    b_out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_value = b_out
    for k in range(0, K, BLOCK_K):
        m_k = below(o_k, K - k, K % BLOCK_K == 0)
        b_a = tl.load(p_a, mask=tl.broadcast_to(m_k[None, :], [BLOCK_M, BLOCK_K]), other=0.0)
        m_b = m_k[:, None] & m_n[None, :]
        b_out = tl.dot(b_a, tl.load(p_b, mask=m_b, other=0.0), b_out, input_precision=PRECISION)
        if PAIR:
            b_value = tl.dot(b_a, tl.load(p_b + to_value, mask=m_b, other=0.0), b_value, input_precision=PRECISION)
        p_a += BLOCK_K
        p_b += BLOCK_K * stride_k
    return b_out, b_value if PAIR else b_out


@triton.jit
def rows_kernel(
    p_a,
    p_order,
    p_offsets,
    p_weight,
    p_bias,
    p_out,
    stride_e,
    stride_k,
    stride_n,
    EXPERTS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[order[r]] = a[r] weight[e] + bias[e]: rows [R, K] by expert -> [R, N] by slot; bias [EXPERTS, N] or None."""
    TILES_N: tl.constexpr = triton.cdiv(N, BLOCK_N)
    i_m, i_n = swizzle(tl.program_id(0), tl.num_programs(0) // TILES_N, TILES_N, GROUP)
    i_expert, row, end = row_tile(p_offsets, i_m, EXPERTS, BLOCK_M)
    if row >= end:
        return
    o_row = row + tl.arange(0, BLOCK_M)
    # Rows past the expert's last one repeat it: no mask in the loop, and nothing of them is stored.
    o_safe = tl.minimum(o_row, end - 1)
    b_out, _ = rows_times(
        p_a + o_safe.to(tl.int64) * K,
        p_weight + i_expert.to(tl.int64) * stride_e,
        stride_k,
        stride_n,
        i_n * BLOCK_N,
        False,
        N,
        K,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    if p_bias is not None:
        b_out += tl.load(p_bias + i_expert.to(tl.int64) * N + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    b_slot = tl.load(p_order + o_safe)
    # [BLOCK_M, BLOCK_N]
    p_tile = p_out + b_slot[:, None] * N + o_n[None, :]
    tl.store(p_tile, b_out.to(p_out.dtype.element_ty), mask=(o_row < end)[:, None] & m_n[None, :])


@triton.jit
def outer_kernel(
    p_a,
    p_b,
    p_order,
    p_offsets,
    p_experts,
    p_out,
    GATHER_A: tl.constexpr,
    SLOTS: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out[e] = sum over rows r of e of a^T b [EXPERTS, M, N], zero for an expert without rows.

    One of a [., M] and b [., N] has a row for each token and is gathered (a if GATHER_A), the other for each r; experts
    as of `by_load_kernel`.
    """
    TILES_M: tl.constexpr = triton.cdiv(M, BLOCK_M)
    TILES_N: tl.constexpr = triton.cdiv(N, BLOCK_N)
    i_expert = tl.load(p_experts + tl.program_id(0) // (TILES_M * TILES_N))
    i_m, i_n = swizzle(tl.program_id(0) % (TILES_M * TILES_N), TILES_M, TILES_N, GROUP)
    start = tl.load(p_offsets + i_expert).to(tl.int32)
    end = tl.load(p_offsets + i_expert + 1).to(tl.int32)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = below(o_m, M, M % BLOCK_M == 0), below(o_n, N, N % BLOCK_N == 0)
    b_out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, end - start, BLOCK_K):
        o_row = start + k + tl.arange(0, BLOCK_K)
        m_row = o_row < end
        b_token = tl.load(p_order + o_row, mask=m_row, other=0).to(tl.int32) // SLOTS
        o_a, o_b = (b_token, o_row) if GATHER_A else (o_row, b_token)
        # [BLOCK_K, BLOCK_M], [BLOCK_K, BLOCK_N]
        p_a_tile = p_a + o_a.to(tl.int64)[:, None] * M + o_m[None, :]
        p_b_tile = p_b + o_b.to(tl.int64)[:, None] * N + o_n[None, :]
        b_a = tl.load(p_a_tile, mask=m_row[:, None] & m_m[None, :], other=0.0)
        b_b = tl.load(p_b_tile, mask=m_row[:, None] & m_n[None, :], other=0.0)
        b_out = tl.dot(tl.trans(b_a), b_b, b_out, input_precision=PRECISION)
    # [BLOCK_M, BLOCK_N]
    p_tile = p_out + i_expert.to(tl.int64) * (M * N) + o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_tile, b_out.to(p_out.dtype.element_ty), mask=(o_m < M)[:, None] & (o_n < N)[None, :])


@triton.jit
def sum_tiles_kernel(
    p_tiles,
    p_offsets,
    p_out,
    EXPERTS: tl.constexpr,
    N: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[e] = sum of tiles[i] over the row tiles i (of TILE rows) of expert e; grid (EXPERTS, cdiv(N, BLOCK_N))."""
    i_expert = tl.program_id(0)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(p_offsets + i_expert).to(tl.int32)
    end = tl.load(p_offsets + i_expert + 1).to(tl.int32)
    first, tiles = start // TILE + i_expert, (end - start + TILE - 1) // TILE
    b_sum = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
    for i in range(0, tiles, BLOCK_T):
        o_tile = i + tl.arange(0, BLOCK_T)
        # [BLOCK_T, BLOCK_N]
        p_tile = p_tiles + (first + o_tile).to(tl.int64)[:, None] * N + o_n[None, :]
        b_sum += tl.load(p_tile, mask=(o_tile < tiles)[:, None] & (o_n < N)[None, :], other=0.0)
    p_row = p_out + i_expert.to(tl.int64) * N + o_n
    tl.store(p_row, tl.sum(b_sum, 0).to(p_out.dtype.element_ty), mask=o_n < N)


@triton.jit
def combine_kernel(
    p_rows, p_weight, p_out, WEIGHTED: tl.constexpr, SLOTS: tl.constexpr, N: tl.constexpr, BLOCK_N: tl.constexpr
):
    """out[t] = sum over s of (weight[t, s]) rows[t, s], s from 0 on, rounded once; grid (T, cdiv(N, BLOCK_N))."""
    i_token = tl.program_id(0).to(tl.int64)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    b_sum = tl.zeros([BLOCK_N], tl.float32)
    for s in tl.static_range(SLOTS):
        b_row = tl.load(p_rows + (i_token * SLOTS + s) * N + o_n, mask=o_n < N, other=0.0).to(tl.float32)
        b_sum += b_row * tl.load(p_weight + i_token * SLOTS + s).to(tl.float32) if WEIGHTED else b_row
    tl.store(p_out + i_token * N + o_n, b_sum.to(p_out.dtype.element_ty), mask=o_n < N)
