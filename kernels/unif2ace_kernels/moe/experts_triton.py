"""The experts' feed-forward in Triton: launches of grouped_triton.py, and the two kernels with an activation in them.

R = T * S rows (slots sorted by expert), A experts, D hidden, F width, H = F or 2 F (gate | value). Products take
2 R D (H + F) FLOPs forward and twice that backward; the rest is memory:

    forward    up:    x[token] w_in + b_in -> h, a = act(h)         x by L2, w_in; writes R (H + F)
               down:  a w_out + b_out -> a row for each slot        R F, w_out; writes R D
               combine: y_t = sum_s weight_ts row_ts                R D; writes T D
    backward   up, reversed: grad_y[token] w_out^T = grad_a -> grad_h, weight a, <grad_a, a>    writes R (H + F)
               grad_w_out = (weight a)^T grad_y[token],  grad_w_in = x[token]^T grad_h
               grad_h w_in^T -> a row for each slot, combined       writes and reads R D, writes T D

Saved are x, h, the routing and the parameters. Sums are float32, and each has one order: the same bits on every run.
Nothing is read on the host: the calls can be captured as a CUDA graph.

Whether these products or torch.nn.functional.grouped_mm run is decided by measuring `moe.layer` on a GPU, in
benchmarks/cases/moe.py, where "sort + grouped_mm" has its gathers, biases and sums counted in. `_rows_times_weight`
(grouped_mm(rows, weight, offs) and an index_copy) and `_outer` (grouped_mm(rows^T, rows, offs)) are the places where
it would go. Weights are loaded through pointers, not TMA descriptors: they may have any strides, and sm_80 and sm_89
have no TMA.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._checks import expect
from .._triton import float32_precision
from .activation_torch import GATED
from .activation_triton import activate, activate_with_slopes
from .configs import OUTER, ROWS, UP, UP_BACKWARD, UP_BACKWARD_GATED, UP_GATED, Launch, choose
from .experts_torch import is_flipped
from .grouped_triton import (
    combine_kernel,
    halves,
    outer_kernel,
    row_tile,
    rows_kernel,
    rows_times,
    sum_tiles_kernel,
    swizzle,
)

Choose = Callable[[str, Tensor, int, int, int, int], Launch]

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
    p_h_row, p_a_row = p_h + row.to(tl.int64) * H, p_a + row.to(tl.int64) * N
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


def _row_tiles(rows: int, experts: int, block_m: int) -> int:
    """Programs that cover the row tiles of all experts, see grouped_triton.py."""
    return rows // block_m + experts


def _matrices(weight: Tensor) -> Tensor:
    """An expert's matrix within 32-bit offsets; any strides but such as a view of a huge tensor may have."""
    near = all(max(size, 128) * stride < 2**31 for size, stride in zip(weight.shape[1:], weight.stride()[1:]))
    return weight if near else weight.contiguous()


def _rows_times_weight(
    rows: Tensor, order: Tensor, offsets: Tensor, weight: Tensor, bias: Tensor | None, choose: Choose
) -> Tensor:
    """[R, N] by slot: rows [R, K] by expert times weight [A, K, N], plus bias [A, N]."""
    experts, k, n = weight.shape
    out = rows.new_empty(len(rows), n)
    if out.numel():
        launch = choose(ROWS, rows, len(rows), experts, n, k)
        grid = (_row_tiles(len(rows), experts, launch.BLOCK_M) * triton.cdiv(n, launch.BLOCK_N),)
        rows_kernel[grid](rows, order, offsets, weight, bias, out, *weight.stride(), experts, n, k,
                          float32_precision(), **launch._asdict())  # fmt: skip
    return out


def _outer(
    a: Tensor, b: Tensor, gather_a: bool, order: Tensor, offsets: Tensor, slots: int, like: Tensor, choose: Choose
) -> Tensor:
    """[A, M, N], shape and layout of `like`: a^T b over each expert's rows; a, or else b, has a row for each token."""
    if is_flipped(like):
        return _outer(b, a, not gather_a, order, offsets, slots, like.transpose(1, 2), choose).transpose(1, 2)
    (experts, m, n), rows = like.shape, len(order)
    out = like.new_empty(like.shape)
    if out.numel():
        launch = choose(OUTER, a, rows, experts, n, m)
        grid = (experts * triton.cdiv(m, launch.BLOCK_M) * triton.cdiv(n, launch.BLOCK_N),)
        outer_kernel[grid](a, b, order, offsets, out, gather_a, slots, experts, m, n,
                           float32_precision(), **launch._asdict())  # fmt: skip
    return out


def _sum_tiles(tiles: Tensor, tile: int, offsets: Tensor, like: Tensor) -> Tensor:
    """[A, N] of like's dtype from `tiles` [row tiles of `tile` rows, N] float32."""
    experts, n = len(offsets) - 1, tiles.shape[1]
    out = like.new_empty(experts, n)
    if out.numel():
        sum_tiles_kernel[experts, triton.cdiv(n, 64)](tiles, offsets, out, experts, n, tile, 32, 64)
    return out


def _combine(rows: Tensor, weight: Tensor | None, slots: int) -> Tensor:
    """[T, N]: the (weighted) sum of each token's rows [T * slots, N]."""
    out = rows.new_empty(len(rows) // slots, rows.shape[1])
    if out.numel():
        block = min(triton.next_power_of_2(out.shape[1]), 1024)  # 8 elements a thread, 16 bytes of bfloat16
        grid = len(out), triton.cdiv(out.shape[1], block)
        combine_kernel[grid](rows, weight, out, weight is not None, slots, out.shape[1], block)
    return out


def forward(
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    offsets: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    choose: Choose = choose,
) -> tuple[Tensor, Tensor]:
    """See `ops.experts`; returns y [T, D] and the pre-activations h [R, F or 2F] in the order of the rows."""
    rows, slots, (experts, width, hidden) = len(order), weight.shape[1], w_out.shape
    expect(rows < 2**31, "x", "fewer than 2**31 rows, tokens times slots", rows)
    x, weight, order, offsets = (each.contiguous() for each in (x, weight, order, offsets))
    b_in, b_out = (None if bias is None else bias.contiguous() for bias in (b_in, b_out))
    w_in, w_out = _matrices(w_in), _matrices(w_out)
    h, a = x.new_empty(rows, w_in.shape[2]), x.new_empty(rows, width)
    with torch.cuda.device_of(x):
        if a.numel():
            gated = activation in GATED
            launch = choose(UP_GATED if gated else UP, x, rows, experts, width, hidden)
            grid = (_row_tiles(rows, experts, launch.BLOCK_M) * triton.cdiv(width, launch.BLOCK_N),)
            up_kernel[grid](x, order, offsets, w_in, b_in, h, a, *w_in.stride(), activation, gated, slots, experts,
                            width, hidden, float32_precision(), PIECE=launch.piece, **launch._asdict())  # fmt: skip
        by_slot = _rows_times_weight(a, order, offsets, w_out, b_out, choose)
        return _combine(by_slot, weight, slots), h


def backward(
    grad_y: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    order: Tensor,
    offsets: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    has_b_in: bool,
    activation: str,
    choose: Choose = choose,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, w_in, b_in, w_out, b_out; zero for the parameters of an expert without rows.

    As in experts_torch.py: the experts' outputs are not kept, a weight's gradient is <grad_y, a w_out + b_out>.
    """
    rows, slots, (experts, width, hidden) = len(order), weight.shape[1], w_out.shape
    grad_y, x, h, weight, order, offsets = (
        each.contiguous() for each in (grad_y, x, h, weight, order, offsets)
    )  # fmt: skip
    w_in, w_out_t = _matrices(w_in), _matrices(w_out).transpose(1, 2)
    grad_h, scaled_a = torch.empty_like(h), x.new_empty(rows, width)
    gated = activation in GATED
    launch = choose(UP_BACKWARD_GATED if gated else UP_BACKWARD, x, rows, experts, width, hidden)
    tiles, parts = _row_tiles(rows, experts, launch.BLOCK_M), triton.cdiv(width, launch.BLOCK_N)
    bias_parts = 0 if b_out is None else triton.cdiv(hidden, BIAS_COLUMNS)
    grad_weight = x.new_empty(rows, parts + bias_parts, dtype=torch.float32)
    in_tiles = x.new_empty(tiles if has_b_in else 0, h.shape[1], dtype=torch.float32)
    out_tiles = x.new_empty(0 if b_out is None else _row_tiles(rows, experts, BIAS_ROWS), hidden, dtype=torch.float32)
    with torch.cuda.device_of(x):
        if scaled_a.numel():
            up_backward_kernel[(tiles * parts,)](
                grad_y, h, weight, order, offsets, w_out_t, grad_h, scaled_a, grad_weight,
                in_tiles if has_b_in else None, *w_out_t.stride(), activation, gated,
                parts + bias_parts, slots, experts, width, hidden, float32_precision(), PIECE=launch.piece,
                **launch._asdict(),
            )  # fmt: skip
        if b_out is not None and rows:
            bias_kernel[(len(out_tiles) * bias_parts,)](
                grad_y, weight, order, offsets, b_out.contiguous(), grad_weight, out_tiles,
                parts, parts + bias_parts, slots, experts, hidden, BIAS_ROWS, BIAS_COLUMNS, num_warps=4,
            )  # fmt: skip
        grad_w_out = _outer(scaled_a, grad_y, False, order, offsets, slots, w_out, choose)
        grad_w_in = _outer(x, grad_h, True, order, offsets, slots, w_in, choose)
        by_slot = _rows_times_weight(grad_h, order, offsets, w_in.transpose(1, 2), None, choose)
        none = x.new_empty(0, 0)
        return (
            _combine(by_slot, None, slots),
            grad_weight.sum(1).view(weight.shape).to(weight.dtype),
            grad_w_in,
            _sum_tiles(in_tiles, launch.BLOCK_M, offsets, w_in) if has_b_in else none.new_empty(0, h.shape[1]),
            grad_w_out,
            none.new_empty(0, hidden) if b_out is None else _sum_tiles(out_tiles, BIAS_ROWS, offsets, w_out),
        )
