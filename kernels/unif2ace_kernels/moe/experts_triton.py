"""The experts' feed-forward in Triton: the launches of up_triton.py and grouped_triton.py.

R = T * S rows (slots sorted by expert), A experts, D hidden, F width, H = F or 2 F (gate | value). Products take
2 R D (H + F) FLOPs forward and twice that backward; the rest is memory:

    forward    up:    x[token] w_in + b_in -> h, a = act(h)         x by L2, w_in; writes R (H + F)
               down:  a w_out + b_out -> a row for each slot        R F, w_out; writes R D
               combine: y_t = sum_s weight_ts row_ts                R D; writes T D
    backward   up, reversed: grad_y[token] w_out^T = grad_a -> grad_h, weight a, <grad_a, a>    writes R (H + F)
               grad_w_out = (weight a)^T grad_y[token],  grad_w_in = x[token]^T grad_h
               grad_h w_in^T -> a row for each slot, combined       writes and reads R D, writes T D

Saved are x, h, the routing and the parameters; where no backward follows up writes R F alone. Sums are float32, and
each has one order: the same bits on every run. Nothing is read on the host: the calls can be captured as a CUDA graph.

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
from torch import Tensor

from .._checks import expect
from .._triton import float32_precision
from .activation_torch import GATED
from .configs import OUTER, ROWS, UP, UP_BACKWARD, UP_BACKWARD_GATED, UP_GATED, Launch, choose
from .experts_torch import is_flipped
from .grouped_triton import by_load_kernel, combine_kernel, outer_kernel, rows_kernel, sum_tiles_kernel
from .up_triton import BIAS_COLUMNS, BIAS_ROWS, bias_kernel, up_backward_kernel, up_kernel

Choose = Callable[[str, Tensor, int, int, int, int], Launch]


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


def _by_load(offsets: Tensor) -> Tensor:
    """The experts int32 [A], those with the most rows first."""
    out = offsets.new_empty(len(offsets) - 1, dtype=torch.int32)
    if out.numel():
        by_load_kernel[(len(out),)](offsets, out, len(out), num_warps=1)
    return out


def _outer(
    a: Tensor, b: Tensor, gather_a: bool, order: Tensor, offsets: Tensor, by_load: Tensor, slots: int, like: Tensor,
    choose: Choose,
) -> Tensor:  # fmt: skip
    """[A, M, N], shape and layout of `like`: a^T b over each expert's rows; a, or else b, has a row for each token."""
    if is_flipped(like):
        flipped = like.transpose(1, 2)
        return _outer(b, a, not gather_a, order, offsets, by_load, slots, flipped, choose).transpose(1, 2)
    (experts, m, n), rows = like.shape, len(order)
    out = like.new_empty(like.shape)
    if out.numel():
        launch = choose(OUTER, a, rows, experts, n, m)
        grid = (experts * triton.cdiv(m, launch.BLOCK_M) * triton.cdiv(n, launch.BLOCK_N),)
        outer_kernel[grid](a, b, order, offsets, by_load, out, gather_a, slots, m, n,
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
    keep_h: bool = True,
    choose: Choose = choose,
) -> tuple[Tensor, Tensor]:
    """See `functions.experts`; returns y [T, D] and the pre-activations h [R, F or 2F] in the order of the rows.

    Without `keep_h` h is that of no row.
    """
    rows, slots, (experts, width, hidden) = len(order), weight.shape[1], w_out.shape
    expect(rows < 2**31, "x", "fewer than 2**31 rows, tokens times slots", rows)
    x, weight, order, offsets = (each.contiguous() for each in (x, weight, order, offsets))
    b_in, b_out = (None if bias is None else bias.contiguous() for bias in (b_in, b_out))
    w_in, w_out = _matrices(w_in), _matrices(w_out)
    h, a = x.new_empty(rows if keep_h else 0, w_in.shape[2]), x.new_empty(rows, width)
    with torch.cuda.device_of(x):
        if a.numel():
            gated = activation in GATED
            launch = choose(UP_GATED if gated else UP, x, rows, experts, width, hidden)
            grid = (_row_tiles(rows, experts, launch.BLOCK_M) * triton.cdiv(width, launch.BLOCK_N),)
            up_kernel[grid](x, order, offsets, w_in, b_in, h if keep_h else None, a, *w_in.stride(), activation, gated,
                            slots, experts, width, hidden, float32_precision(), PIECE=launch.piece,
                            **launch._asdict())  # fmt: skip
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
        by_load = _by_load(offsets)
        grad_w_out = _outer(scaled_a, grad_y, False, order, offsets, by_load, slots, w_out, choose)
        grad_w_in = _outer(x, grad_h, True, order, offsets, by_load, slots, w_in, choose)
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
