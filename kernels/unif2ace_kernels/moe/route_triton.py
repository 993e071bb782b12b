"""Routing in Triton: three launches forward, one backward; no atomics, no host synchronisation, one order of sums.

    choose       a program routes BT tokens: expert, weight; its slots of each expert, its sums of the scores
    scan, order  the slots sorted by expert, f, P and the losses (order_triton.py)
    backward     a program makes BT rows of the logits' gradient, from the logits

A token reads its group's columns alone, as a row of BN, padded with -inf where its group is smaller than the largest.
What the first launch leaves to the next is transposed, [experts, blocks], so that a scan reads along memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import order_triton
from .order_triton import order_kernel, order_tiles, scan_kernel

TINY = tl.constexpr(1e-20)  # as in route_torch
LOWEST = tl.constexpr(-(2**63))


@triton.jit
def of_group(i_group, values):
    """values[i_group], for an int tensor or scalar of any shape; values is a tuple."""
    picked = i_group * 0 + values[0]
    for g in tl.static_range(1, len(values)):
        picked = tl.where(i_group == g, values[g], picked)
    return picked


@triton.jit
def load_rows(
    p_logits, p_group, tokens, stride_t, stride_e, stride_g, BOUNDS: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr
):
    """(token [BT], group [BT], its first column [BT], own columns [BT, BN], logits [BT, BN]) of a program.

    Group ids are clamped, so that no id leads out of bounds; rows beyond the last token have the group -1 and the
    columns of group 0.
    """
    o_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    m_t = o_t < tokens
    # [BT]
    b_group = tl.load(p_group + o_t * stride_g, mask=m_t, other=0).to(tl.int64)
    b_group = tl.minimum(tl.maximum(b_group, 0), len(BOUNDS) - 2).to(tl.int32)
    b_first = of_group(b_group, BOUNDS)
    b_size = of_group(b_group + 1, BOUNDS) - b_first
    o_n = tl.arange(0, BN)
    m_own = m_t[:, None] & (o_n[None, :] < b_size[:, None])
    # [BT, BN]
    o_column = (b_first[:, None] + o_n[None, :]).to(tl.int64)
    b_x = tl.load(p_logits + o_t[:, None] * stride_t + o_column * stride_e, mask=m_own, other=-float("inf"))
    return o_t, tl.where(m_t, b_group, -1), b_first, m_own, b_x.to(tl.float32)


@triton.jit
def softmax(b_x):
    """Softmax of the rows, and their logsumexp [BT]."""
    b_max = tl.max(b_x, 1)
    b_exp = tl.exp(b_x - b_max[:, None])
    b_sum = tl.sum(b_exp, 1)
    return b_exp / b_sum[:, None], b_max + tl.log(b_sum)


@triton.jit
def sigmoid(b_x):
    return 1.0 / (1.0 + tl.exp(-b_x))


@triton.jit
def order_keys(b_by, m_own, BN: tl.constexpr):
    """int64 [BT, BN] that sort as `b_by` does: NaN first, then the larger, then the lower column; padding last."""
    b_bits = tl.where(b_by == 0, 0.0, b_by).to(tl.int32, bitcast=True)
    b_bits = tl.where(b_bits < 0, b_bits ^ 0x7FFFFFFF, b_bits)
    b_bits = tl.where(b_by == b_by, b_bits, 0x7FFFFFFF)
    b_key = b_bits.to(tl.int64) * BN + (BN - 1 - tl.arange(0, BN))[None, :]
    return tl.where(m_own, b_key, LOWEST)


@triton.jit
def choose_kernel(
    p_logits, p_group, p_bias, p_weight, p_expert, p_count, p_partial, tokens, blocks, stride_t, stride_e, stride_g,
    stride_b, BOUNDS: tl.constexpr, K: tl.constexpr, SHARED: tl.constexpr, NORMALIZE: tl.constexpr,
    SOFTMAX: tl.constexpr, Z: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """p_weight, p_expert [T, S]; p_count int32 [A, blocks]; p_partial [E + 1, blocks]: scores' sums, then z squared.

    Without a bias the K largest logits are chosen, as the scores rise with them: so a choice hangs on no exponential.
    """
    G: tl.constexpr = len(BOUNDS) - 1
    E: tl.constexpr = BOUNDS[G]
    i_block = tl.program_id(0).to(tl.int64)
    o_t, b_group, b_first, m_own, b_x = load_rows(
        p_logits, p_group, tokens, stride_t, stride_e, stride_g, BOUNDS, BT, BN
    )
    m_t, o_n = o_t < tokens, tl.arange(0, BN)
    # [BT, BN]
    o_column = b_first[:, None] + o_n[None, :]
    if SOFTMAX or Z:
        b_softmax, b_lse = softmax(b_x)
    b_score = b_softmax if SOFTMAX else tl.where(m_own, sigmoid(b_x), 0.0)
    b_by = b_x
    if p_bias is not None:
        b_by = b_score + tl.load(p_bias + o_column * stride_b, mask=m_own, other=0.0).to(tl.float32)

    b_key = order_keys(b_by, m_own, BN)
    b_slot = tl.full([BT, BN], -1, tl.int32)
    for k in tl.static_range(K):
        b_best = BN - 1 - (tl.max(b_key, 1) & (BN - 1)).to(tl.int32)
        m_best = o_n[None, :] == b_best[:, None]
        b_slot = tl.where(m_best, k, b_slot)
        b_key = tl.where(m_best, LOWEST, b_key)
    m_chosen = (b_slot >= 0) & m_own
    b_weight = b_score
    if NORMALIZE:
        b_weight = b_score / (tl.sum(tl.where(m_chosen, b_score, 0.0), 1) + TINY)[:, None]
    # Within a block slots are numbered in int32, which halves their registers.
    o_row, o_first_slot = tl.arange(0, BT) * (K + SHARED), i_block * (BT * (K + SHARED))
    o_slot = o_row[:, None] + b_slot
    tl.store(p_weight + o_first_slot + o_slot, b_weight, mask=m_chosen)
    tl.store(p_expert + o_first_slot + o_slot, o_column.to(tl.int64), mask=m_chosen)
    for s in tl.static_range(SHARED):
        o_shared = o_first_slot + o_row + K + s
        tl.store(p_weight + o_shared, tl.full([BT], 1.0, tl.float32), mask=m_t)
        tl.store(p_expert + o_shared, (E + SHARED * b_group + s).to(tl.int64), mask=m_t)

    b_share = b_score if SOFTMAX else b_score / (tl.sum(b_score, 1) + TINY)[:, None]
    for g in range(0, G):
        m_row = b_group == g
        i_first = of_group(g, BOUNDS)
        # [BN]
        m_n = o_n < of_group(g + 1, BOUNDS) - i_first
        o_cell = (i_first + o_n).to(tl.int64) * blocks + i_block
        tl.store(p_count + o_cell, tl.sum((m_row[:, None] & m_chosen).to(tl.int32), 0), mask=m_n)
        tl.store(p_partial + o_cell, tl.sum(tl.where(m_row[:, None], b_share, 0.0), 0), mask=m_n)
        for s in tl.static_range(SHARED):
            o_cell = (tl.full([], E + s, tl.int64) + SHARED * g) * blocks + i_block
            tl.store(p_count + o_cell, tl.sum(m_row.to(tl.int32), 0))
    b_square = tl.where(m_t, b_lse * b_lse, 0.0) if Z else tl.zeros([BT], tl.float32)
    tl.store(p_partial + tl.full([], E, tl.int64) * blocks + i_block, tl.sum(b_square, 0))


@triton.jit
def backward_kernel(
    p_grad_weight, p_grad_probability, p_grad_balance, p_grad_z, p_logits, p_group, p_expert, p_counts, p_grad, coefs,
    z_scale, tokens, stride_wt, stride_ws, stride_p, stride_t, stride_e, stride_g, BOUNDS: tl.constexpr,
    K: tl.constexpr, S: tl.constexpr, NORMALIZE: tl.constexpr, SOFTMAX: tl.constexpr, BT: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """p_grad [T, E]. Gradients that are None are zero. f and T_g come from the counts, the scores from the logits."""
    G: tl.constexpr = len(BOUNDS) - 1
    E: tl.constexpr = BOUNDS[G]
    o_t, b_group, b_first, m_own, b_x = load_rows(
        p_logits, p_group, tokens, stride_t, stride_e, stride_g, BOUNDS, BT, BN
    )
    m_t, o_n = o_t < tokens, tl.arange(0, BN)
    # [BT, BN]
    o_column = b_first[:, None] + o_n[None, :]
    if SOFTMAX or p_grad_z is not None:
        b_softmax, b_lse = softmax(b_x)
    b_score = b_softmax if SOFTMAX else tl.where(m_own, sigmoid(b_x), 0.0)

    b_grad = tl.zeros([BT, BN], tl.float32)  # of the scores
    if p_grad_balance is not None or p_grad_probability is not None:
        b_counts = tl.load(p_counts + o_column, mask=m_own, other=0)
        b_tokens = tl.maximum(tl.sum(b_counts, 1) // K, 1).to(tl.float32)
        if p_grad_balance is not None:
            b_size = (of_group(b_group + 1, BOUNDS) - b_first).to(tl.float32)
            b_scale = tl.load(p_grad_balance) * of_group(b_group.to(tl.float32), coefs) * b_size / (K * b_tokens)
            b_grad += b_scale[:, None] * b_counts.to(tl.float32)
        if p_grad_probability is not None:
            b_grad += tl.load(p_grad_probability + o_column * stride_p, mask=m_own, other=0.0)
        b_grad /= b_tokens[:, None]
        if not SOFTMAX:  # P is the mean of scores / their sum
            b_total = tl.sum(b_score, 1) + TINY
            b_grad = (b_grad - (tl.sum(b_grad * b_score, 1) / b_total)[:, None]) / b_total[:, None]
    if p_grad_weight is not None:
        b_chosen = tl.zeros([BT, BN], tl.int32)
        b_picked = tl.zeros([BT, BN], tl.float32)
        for k in tl.static_range(K):
            # [BT]
            b_expert = tl.load(p_expert + o_t * S + k, mask=m_t, other=-1).to(tl.int32)
            b_value = tl.load(p_grad_weight + o_t * stride_wt + k * stride_ws, mask=m_t, other=0.0)
            m_k = o_column == b_expert[:, None]
            b_picked = tl.where(m_k, b_value[:, None], b_picked)
            b_chosen = tl.where(m_k, 1, b_chosen)
        if NORMALIZE:
            b_kept = tl.where(b_chosen != 0, b_score, 0.0)
            b_total = tl.sum(b_kept, 1) + TINY
            b_mean = tl.sum(b_picked * b_kept, 1) / b_total
            b_picked = tl.where(b_chosen != 0, (b_picked - b_mean[:, None]) / b_total[:, None], 0.0)
        b_grad += b_picked

    if SOFTMAX:
        b_grad = b_score * (b_grad - tl.sum(b_grad * b_score, 1)[:, None])
    else:
        b_grad = b_grad * b_score * (1.0 - b_score)
    if p_grad_z is not None:
        b_grad += (tl.load(p_grad_z) * z_scale * 2.0 * b_lse)[:, None] * b_softmax
    p_row = p_grad + o_t[:, None] * E
    tl.store(p_row + o_column, b_grad.to(p_grad.dtype.element_ty), mask=m_own)
    if G > 1:
        b_last = of_group(tl.maximum(b_group, 0) + 1, BOUNDS)
        for start in range(0, E, BN):
            o_other = start + o_n[None, :]
            m_other = (o_other < b_first[:, None]) | ((o_other >= b_last[:, None]) & (o_other < E))
            tl.store(p_row + o_other, tl.zeros([BT, BN], p_grad.dtype.element_ty), mask=m_t[:, None] & m_other)


def tiles(tokens: int, widest: int) -> dict[str, int]:
    """Tokens BT and columns BN of a program, and its warps; not yet measured on a GPU.

    8 numbers a thread (more beyond 512 columns) fit in registers with the int64 keys. A long batch takes larger
    blocks, so that the scan's rows stay short; two choices, so that other batch sizes compile nothing anew.
    """
    numbers, width = 1024 if tokens <= 1 << 16 else 2048, triton.next_power_of_2(widest)
    tokens_a_block = max(4, min(numbers // 16, numbers // width))
    warps = min(16, max(4, tokens_a_block * width // 256))
    return {"BT": tokens_a_block, "BN": width, "num_warps": warps}


def forward(
    logits: Tensor,
    group_ids: Tensor,
    group_sizes: Sequence[int],
    top_k: int,
    shared: int,
    balance_coef: Sequence[float],
    normalize: bool,
    scoring: str,
    selection_bias: Tensor | None,
    z_coef: float,
) -> tuple[Tensor, ...]:
    """See `functions.route`; returns its fields in order."""
    tokens, bounds = len(logits), tuple(accumulate(group_sizes, initial=0))
    routed, slots, experts = bounds[-1], top_k + shared, bounds[-1] + shared * len(group_sizes)
    tile = tiles(tokens, max(group_sizes))
    blocks = triton.cdiv(tokens, tile["BT"])

    def floats(*shape: int) -> Tensor:
        return logits.new_empty(shape, dtype=torch.float32)

    def ints(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return logits.new_empty(shape, dtype=dtype)

    weight, frequency, probability, balance, z = (
        floats(tokens, slots),
        floats(routed),
        floats(routed),
        floats(),
        floats(),
    )
    expert, counts, offsets, order = ints(tokens, slots), ints(experts), ints(experts + 1), ints(tokens * slots)
    count, partial, sums = ints(experts, blocks, dtype=torch.int32), floats(routed + 1, blocks), floats(routed + 1)
    with torch.cuda.device_of(logits):
        if tokens:
            choose_kernel[(blocks,)](
                logits, group_ids, selection_bias, weight, expert, count, partial, tokens, blocks, *logits.stride(),
                group_ids.stride(0), 0 if selection_bias is None else selection_bias.stride(0), BOUNDS=bounds, K=top_k,
                SHARED=shared, NORMALIZE=normalize, SOFTMAX=scoring == "softmax", Z=z_coef != 0, **tile,
            )  # fmt: skip
        scan_kernel[(max(experts, routed + 1),)](
            count, partial, counts, sums, blocks, A=experts, E=routed, BLOCK=order_triton.SCAN_BLOCK, num_warps=8
        )
        tile = order_tiles(tile, experts)
        order_kernel[(blocks + 1, triton.cdiv(experts, tile["BA"]))](
            expert, count, counts, sums, order, offsets, frequency, probability, balance, z, tuple(balance_coef),
            z_coef / max(tokens, 1), tokens, blocks, BOUNDS=bounds, K=top_k, S=slots, A=experts, **tile,
        )  # fmt: skip
    return weight, expert, counts, offsets, order, frequency, probability, balance, z


def backward(
    grad_weight: Tensor | None,
    grad_probability: Tensor | None,
    grad_balance_loss: Tensor | None,
    grad_z_loss: Tensor | None,
    logits: Tensor,
    group_ids: Tensor,
    expert: Tensor,
    counts: Tensor,
    group_sizes: Sequence[int],
    top_k: int,
    balance_coef: Sequence[float],
    normalize: bool,
    scoring: str,
    z_coef: float,
) -> Tensor:
    """Gradient of the logits [T, E]; see `route_torch.backward`."""
    tokens, bounds = len(logits), tuple(accumulate(group_sizes, initial=0))
    grad = torch.empty_like(logits, memory_format=torch.contiguous_format)
    tile = tiles(tokens, max(group_sizes))
    if tokens:
        with torch.cuda.device_of(logits):
            backward_kernel[(triton.cdiv(tokens, tile["BT"]),)](
                grad_weight, grad_probability, grad_balance_loss, grad_z_loss if z_coef else None, logits, group_ids,
                expert, counts, grad, tuple(balance_coef), z_coef / tokens, tokens,
                *((0, 0) if grad_weight is None else grad_weight.stride()),
                0 if grad_probability is None else grad_probability.stride(0), *logits.stride(), group_ids.stride(0),
                BOUNDS=bounds, K=top_k, S=expert.shape[1], NORMALIZE=normalize, SOFTMAX=scoring == "softmax", **tile,
            )  # fmt: skip
    return grad
