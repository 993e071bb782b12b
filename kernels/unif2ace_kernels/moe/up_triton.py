"""The experts' first product and its reversal in Triton, the activation in their epilogues; and what b_out adds.

Rows, tiles and programs are those of grouped_triton.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .activation_triton import activate, activate_with_slopes
from .grouped_triton import halves, row_tile, rows_times, swizzle

BIAS_ROWS, BIAS_COLUMNS = 64, 128  # tile of bias_kernel: 64 float32 a thread at 4 warps, several blocks an SM


@triton.jit
def store_up(
    b_h,
    b_value,
    p_bias,
    p_h,
    p_a,
    left,
    first,
    ACTIVATION: tl.constexpr,
    PAIR: tl.constexpr,
    N: tl.constexpr,
    PIECE: tl.constexpr,
):
    """The epilogue of `up_kernel` for the columns from `first` of a tile with `left` rows; p_h, p_a: its first row.

    p_h is None where no backward follows.

    PIECE columns at a time, which bounds the registers that it needs.
    """
    if b_h.shape[1] > PIECE:
        b_h0, b_h1 = halves(b_h)
        b_value0, b_value1 = halves(b_value)
        middle = first + b_h0.shape[1]
        store_up(b_h0, b_value0, p_bias, p_h, p_a, left, first, ACTIVATION, PAIR, N, PIECE)
        store_up(b_h1, b_value1, p_bias, p_h, p_a, left, middle, ACTIVATION, PAIR, N, PIECE)
        return
    o_m = tl.arange(0, b_h.shape[0])
    o_n = first + tl.arange(0, b_h.shape[1])
    m_n = o_n < N
    if p_bias is not None:
        b_h += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        if PAIR:
            b_value += tl.load(p_bias + N + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    # [BLOCK_M, columns]
    m_tile = (o_m < left)[:, None] & m_n[None, :]
    if p_h is not None:
        o_h = o_m[:, None] * (2 * N if PAIR else N) + o_n[None, :]
        tl.store(p_h + o_h, b_h.to(p_h.dtype.element_ty), mask=m_tile)
        if PAIR:
            tl.store(p_h + N + o_h, b_value.to(p_h.dtype.element_ty), mask=m_tile)
    b_a = activate(b_h, b_value, ACTIVATION)
    tl.store(p_a + o_m[:, None] * N + o_n[None, :], b_a.to(p_a.dtype.element_ty), mask=m_tile)


@triton.jit
def up_kernel(
    p_x,
    p_order,
    p_offsets,
    p_weight,
    p_bias,
    p_h,
    p_a,
    stride_e,
    stride_k,
    stride_n,
    ACTIVATION: tl.constexpr,
    PAIR: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PIECE: tl.constexpr,
):
    """h[r] = x[order[r] // SLOTS] weight[e] + bias[e], a[r] = act(h[r]); N = F, K = D, h [R, N or 2 N], a [R, N]."""
    TILES_N: tl.constexpr = triton.cdiv(N, BLOCK_N)
    H: tl.constexpr = 2 * N if PAIR else N
    i_m, i_n = swizzle(tl.program_id(0), tl.num_programs(0) // TILES_N, TILES_N, GROUP)
    i_expert, row, end = row_tile(p_offsets, i_m, EXPERTS, BLOCK_M)
    if row >= end:
        return
    b_slot = tl.load(p_order + tl.minimum(row + tl.arange(0, BLOCK_M), end - 1))
    b_h, b_value = rows_times(
        p_x + (b_slot.to(tl.int32) // SLOTS).to(tl.int64) * K,
        p_weight + i_expert.to(tl.int64) * stride_e,
        stride_k,
        stride_n,
        i_n * BLOCK_N,
        PAIR,
        N,
        K,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    p_b = p_bias + i_expert.to(tl.int64) * H if p_bias is not None else None
    p_h_row = p_h + row.to(tl.int64) * H if p_h is not None else None
    p_a_row = p_a + row.to(tl.int64) * N
    store_up(b_h, b_value, p_b, p_h_row, p_a_row, end - row, i_n * BLOCK_N, ACTIVATION, PAIR, N, PIECE)


@triton.jit
def store_up_backward(
    b_grad_a,
    b_weight,
    p_h,
    p_grad_h,
    p_scaled_a,
    p_bias,
    left,
    first,
    ACTIVATION: tl.constexpr,
    PAIR: tl.constexpr,
    N: tl.constexpr,
    PIECE: tl.constexpr,
):
    """The epilogue of `up_backward_kernel`, as `store_up` is that of `up_kernel`; returns <grad_a, a> of each row."""
    if b_grad_a.shape[1] > PIECE:
        b_left, b_right = halves(b_grad_a)
        middle = first + b_left.shape[1]
        b_dot = store_up_backward(
            b_left, b_weight, p_h, p_grad_h, p_scaled_a, p_bias, left, first, ACTIVATION, PAIR, N, PIECE
        )
        return b_dot + store_up_backward(
            b_right, b_weight, p_h, p_grad_h, p_scaled_a, p_bias, left, middle, ACTIVATION, PAIR, N, PIECE
        )
    o_m = tl.arange(0, b_grad_a.shape[0])
    o_n = first + tl.arange(0, b_grad_a.shape[1])
    m_n = o_n < N
    # [BLOCK_M, columns]; rows from `left` on get weight * grad_a = 0, and grad_h with it, whatever grad_a is there
    m_row = (o_m < left)[:, None]
    m_tile = m_row & m_n[None, :]
    o_h = o_m[:, None] * (2 * N if PAIR else N) + o_n[None, :]
    b_h = tl.load(p_h + o_h, mask=m_tile, other=0.0).to(tl.float32)
    b_value = tl.load(p_h + N + o_h, mask=m_tile, other=0.0).to(tl.float32) if PAIR else b_h
    b_a, b_by_h, b_by_value = activate_with_slopes(b_h, b_value, ACTIVATION)
    b_scaled = (b_weight[:, None] * b_a).to(p_scaled_a.dtype.element_ty)
    tl.store(p_scaled_a + o_m[:, None] * N + o_n[None, :], b_scaled, mask=m_tile)
    b_dot = tl.sum(b_grad_a * b_a, 1)
    b_grad_a = tl.where(m_row, b_grad_a * b_weight[:, None], 0.0)
    b_grad_h = b_grad_a * b_by_h
    tl.store(p_grad_h + o_h, b_grad_h.to(p_grad_h.dtype.element_ty), mask=m_tile)
    if p_bias is not None:
        tl.store(p_bias + o_n, tl.sum(b_grad_h, 0), mask=m_n)
    if PAIR:
        b_grad_value = b_grad_a * b_by_value
        tl.store(p_grad_h + N + o_h, b_grad_value.to(p_grad_h.dtype.element_ty), mask=m_tile)
        if p_bias is not None:
            tl.store(p_bias + N + o_n, tl.sum(b_grad_value, 0), mask=m_n)
    return b_dot


@triton.jit
def up_backward_kernel(
    p_grad_y,
    p_h,
    p_weight,
    p_order,
    p_offsets,
    p_w_out,
    p_grad_h,
    p_scaled_a,
    p_grad_weight,
    p_grad_bias,
    stride_e,
    stride_k,
    stride_n,
    ACTIVATION: tl.constexpr,
    PAIR: tl.constexpr,
    PARTS: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PIECE: tl.constexpr,
):
    """From grad_a = grad_y[token] w_out[e]^T of a tile: grad_h, weight * a, and parts of two sums; N = F, K = D.

    grad_weight [T * S, PARTS] float32 gets <grad_a, a> over the tile's columns in part i_n of the row's slot;
    grad_bias [row tiles, H] float32, or None, the sum of grad_h over the tile's rows.
    """
    TILES_N: tl.constexpr = triton.cdiv(N, BLOCK_N)
    H: tl.constexpr = 2 * N if PAIR else N
    i_m, i_n = swizzle(tl.program_id(0), tl.num_programs(0) // TILES_N, TILES_N, GROUP)
    i_expert, row, end = row_tile(p_offsets, i_m, EXPERTS, BLOCK_M)
    if row >= end:
        return
    o_row = row + tl.arange(0, BLOCK_M)
    b_slot = tl.load(p_order + tl.minimum(o_row, end - 1))
    b_grad_a, _ = rows_times(
        p_grad_y + (b_slot.to(tl.int32) // SLOTS).to(tl.int64) * K,
        p_w_out + i_expert.to(tl.int64) * stride_e,
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
    b_weight = tl.load(p_weight + b_slot).to(tl.float32)
    p_bias = p_grad_bias + i_m.to(tl.int64) * H if p_grad_bias is not None else None
    p_h_row, p_grad_h_row = p_h + row.to(tl.int64) * H, p_grad_h + row.to(tl.int64) * H
    p_a_row = p_scaled_a + row.to(tl.int64) * N
    first = i_n * BLOCK_N
    b_dot = store_up_backward(
        b_grad_a, b_weight, p_h_row, p_grad_h_row, p_a_row, p_bias, end - row, first, ACTIVATION, PAIR, N, PIECE
    )
    tl.store(p_grad_weight + b_slot * PARTS + i_n, b_dot, mask=o_row < end)


@triton.jit
def bias_kernel(
    p_grad_y,
    p_weight,
    p_order,
    p_offsets,
    p_bias,
    p_grad_weight,
    p_grad_bias,
    FIRST_PART: tl.constexpr,
    PARTS: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """What b_out adds to the backward, in parts: <grad_y, b_out> of a row, and sum over rows of weight * grad_y.

    grad_weight, grad_bias [row tiles, N]: as in `up_backward_kernel`. Grid: columns slowest, so that the columns of
    grad_y that are read SLOTS times stay in L2.
    """
    tiles = tl.num_programs(0) // triton.cdiv(N, BLOCK_N)
    i_m, i_n = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    i_expert, row, end = row_tile(p_offsets, i_m, EXPERTS, BLOCK_M)
    if row >= end:
        return
    o_row = row + tl.arange(0, BLOCK_M)
    m_row = o_row < end
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    b_slot = tl.load(p_order + tl.minimum(o_row, end - 1))
    b_token = b_slot.to(tl.int32) // SLOTS
    # [BLOCK_M, BLOCK_N]
    p_tile = p_grad_y + b_token.to(tl.int64)[:, None] * N + o_n[None, :]
    b_grad_y = tl.load(p_tile, mask=m_row[:, None] & m_n[None, :], other=0.0).to(tl.float32)
    b_bias = tl.load(p_bias + i_expert.to(tl.int64) * N + o_n, mask=m_n, other=0.0).to(tl.float32)
    tl.store(p_grad_weight + b_slot * PARTS + FIRST_PART + i_n, tl.sum(b_grad_y * b_bias[None, :], 1), mask=m_row)
    b_weight = tl.load(p_weight + b_slot, mask=m_row, other=0.0).to(tl.float32)
    tl.store(p_grad_bias + i_m.to(tl.int64) * N + o_n, tl.sum(b_grad_y * b_weight[:, None], 0), mask=m_n)
