"""Head and draw in one in Triton: guidance folded into the hidden state, masked rows only, no logits in memory.

Two launches. `fold_kernel` lists the unknown rows and writes their folded hidden states one after the other.
`head_kernel` multiplies a tile of them with a tile of the head's code rows, and where others would store the logits it
runs the Gumbel-max race and leaves a few numbers a row; the last tile to finish of a row tile puts these together.
A filter needs a row's logits at once: then the tiles are stored and draw_triton.draw_kernel is a third launch.

A row's result does not depend on where it stands: every element of the product sums over the hidden dimension in one
order (no split, one tile size for a head), its noise is of its global row and code, and the parts of a row are put
together in the order of the columns. The ticket that finds the last tile is an atomic counter, but who draws it
changes nothing: all parts are then there, and they are read back in order.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .._triton import float32_precision, interleave, words_of_groups
from . import configs, draw_triton
from .arguments import Draw
from .draw_triton import NONE, SLACK, STREAM, exponential, race_bound, token_gumbel

Tensor = torch.Tensor
FIELDS = 5  # floats that a tile leaves of a row: peak, total, the winner's logit, extra, second; and the winner's code


@triton.jit(do_not_specialize=["rows", "tickets"])
def fold_kernel(
    p_cond, p_uncond, p_ids, p_unknown, p_folded, p_list, p_count, p_ticket, p_out_ids, p_out_confidence,
    rows, hidden, tickets, stride_cond, stride_uncond, up, down,
    GUIDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p_cond, p_uncond [rows, hidden]; p_folded: the unknown ones of them; p_list [rows]: their indices.

    Grid cdiv(rows, ROWS). p_count [1]: how many; p_ticket [tickets]: zeros for head_kernel. Known rows are done here.
    """
    i_first = tl.program_id(0) * ROWS
    b_before = tl.zeros([BLOCK * ROWS], tl.int32)
    for start in range(0, i_first, BLOCK * ROWS):
        o_flag = start + tl.arange(0, BLOCK * ROWS)
        b_before += tl.load(p_unknown + o_flag, mask=o_flag < i_first, other=0).to(tl.int32)
    # [ROWS]
    o_row = i_first + tl.arange(0, ROWS)
    m_row = o_row < rows
    b_unknown = tl.load(p_unknown + o_row, mask=m_row, other=0).to(tl.int32)
    b_slot = tl.sum(b_before) + tl.cumsum(b_unknown) - 1
    m_unknown = b_unknown != 0
    tl.store(p_list + b_slot, o_row, mask=m_unknown)
    m_known = m_row & (b_unknown == 0)
    tl.store(p_out_ids + o_row, tl.load(p_ids + o_row, mask=m_known), mask=m_known)
    tl.store(p_out_confidence + o_row, float("inf"), mask=m_known)
    if i_first + ROWS >= rows:
        tl.store(p_count, tl.sum(b_before) + tl.sum(b_unknown))
    if tl.program_id(0) < tickets:
        tl.store(p_ticket + tl.program_id(0), 0)

    o_source = o_row.to(tl.int64)[:, None]
    o_target = b_slot.to(tl.int64)[:, None] * hidden
    for start in range(0, hidden, BLOCK):
        o_hidden = start + tl.arange(0, BLOCK)[None, :]
        m_tile = m_unknown[:, None] & (o_hidden < hidden)
        # [ROWS, BLOCK]
        b_hidden = tl.load(p_cond + o_source * stride_cond + o_hidden, mask=m_tile, other=0.0).to(tl.float32)
        if GUIDED:
            b_uncond = tl.load(p_uncond + o_source * stride_uncond + o_hidden, mask=m_tile, other=0.0)
            b_hidden = up * b_hidden - down * b_uncond.to(tl.float32)
        tl.store(p_folded + o_target + o_hidden, b_hidden.to(p_folded.dtype.element_ty), mask=m_tile)


@triton.jit
def tile_race(b_z, b_peak, b_row, p_seed, p_offset, first, codes, inverse, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """(code [ROWS], its logit) that wins the Gumbel-max race of a tile [ROWS, COLUMNS]; see draw_triton.py."""
    seed = tl.load(p_seed)
    offset = tl.load(p_offset)
    o_group = (first // 4 + tl.arange(0, COLUMNS // 4))[None, :]
    w0, w1, w2, w3 = words_of_groups(seed, offset, b_row[:, None], o_group, STREAM)
    # [ROWS, COLUMNS]
    b_race = interleave(race_bound(w0), race_bound(w1), race_bound(w2), race_bound(w3))
    b_race *= exponential((b_z - b_peak[:, None]) * inverse)
    b_key = (b_race.to(tl.int32, bitcast=True) & -COLUMNS) | tl.arange(0, COLUMNS)[None, :]
    b_lead = tl.max(b_key, 1)
    b_bound = (b_lead & -COLUMNS).to(tl.float32, bitcast=True)
    b_best = tl.full([ROWS], NONE, tl.float32)
    b_logit = tl.full([ROWS], NONE, tl.float32)
    b_code = tl.zeros([ROWS], tl.int32) + codes
    b_racing = b_bound > 0
    while tl.max(b_racing.to(tl.int32)) > 0:
        b_runner = first + (b_lead & (COLUMNS - 1))
        m_runner = b_key == b_lead[:, None]
        b_next = tl.max(tl.where(m_runner, b_z, NONE), 1)
        b_score = (b_next - b_peak) * inverse + token_gumbel(seed, offset, b_row, b_runner)
        m_better = b_racing & ((b_score > b_best) | ((b_score == b_best) & (b_runner < b_code)))
        b_best = tl.where(m_better, b_score, b_best)
        b_logit = tl.where(m_better, b_next, b_logit)
        b_code = tl.where(m_better, b_runner, b_code)
        b_key = tl.where(m_runner, 0, b_key)
        b_lead = tl.max(b_key, 1)
        b_bound = (b_lead & -COLUMNS).to(tl.float32, bitcast=True)
        b_racing = b_racing & (b_bound > 0) & (b_bound >= tl.exp(b_best) * SLACK)
    return b_code, b_logit


@triton.jit
def put_together(
    p_parts, p_codes, p_seed, p_offset, b_row, o_slot, tiles, slots, codes, inverse,
    GREEDY: tl.constexpr, CONFIDENCE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """(code [ROWS], confidence) of rows whose tiles are all there; code -1 where no code is possible."""
    b_peak = tl.full([ROWS], NONE, tl.float32)
    b_second = tl.full([ROWS], NONE, tl.float32)
    b_total = tl.zeros([ROWS], tl.float32)
    b_extra = tl.zeros([ROWS], tl.float32)
    field = tiles * slots
    for i in range(tiles):
        p_tile = p_parts + i * slots + o_slot
        # .cg: other programs wrote these, and only the second-level cache is shared
        b_other = tl.load(p_tile, cache_modifier=".cg")
        b_amount = tl.load(p_tile + field, cache_modifier=".cg")
        b_new = tl.maximum(b_peak, b_other)
        b_safe = tl.where(b_new == NONE, 0.0, b_new)
        b_scale = tl.exp(b_peak - b_safe)
        b_other_scale = tl.exp(b_other - b_safe)
        if CONFIDENCE == "neg_entropy":
            b_other_extra = tl.load(p_tile + 3 * field, cache_modifier=".cg")
            b_fall = tl.where(b_scale > 0, b_peak - b_safe, 0.0)
            b_other_fall = tl.where(b_other_scale > 0, b_other - b_safe, 0.0)
            b_extra = (b_extra + b_fall * b_total) * b_scale
            b_extra += (b_other_extra + b_other_fall * b_amount) * b_other_scale
        if CONFIDENCE == "margin":
            b_other_second = tl.load(p_tile + 4 * field, cache_modifier=".cg")
            b_second = tl.maximum(tl.maximum(b_second, b_other_second), tl.minimum(b_peak, b_other))
        b_total = b_total * b_scale + b_amount * b_other_scale
        b_peak = b_new

    seed = tl.load(p_seed)
    offset = tl.load(p_offset)
    b_best = tl.full([ROWS], NONE, tl.float32)
    b_logit = tl.full([ROWS], NONE, tl.float32)
    b_code = tl.zeros([ROWS], tl.int32) - 1
    for i in range(tiles):
        o_tile = i * slots + o_slot
        b_next = tl.load(p_parts + 2 * field + o_tile, cache_modifier=".cg")
        b_runner = tl.load(p_codes + o_tile, cache_modifier=".cg")
        b_score = (b_next - b_peak) * inverse
        if not GREEDY:
            b_score += token_gumbel(seed, offset, b_row, b_runner)
        m_better = b_score > b_best
        b_best = tl.where(m_better, b_score, b_best)
        b_logit = tl.where(m_better, b_next, b_logit)
        b_code = tl.where(m_better, b_runner, b_code)

    m_possible = (b_total > 0) & (b_total < float("inf"))
    if CONFIDENCE == "log_prob":
        b_confidence = (b_logit - b_peak) - tl.log(b_total)
    elif CONFIDENCE == "neg_entropy":
        b_confidence = b_extra / b_total - tl.log(b_total)
    else:
        b_confidence = (1 - tl.exp(b_second - b_peak)) / b_total
    return tl.where(m_possible, b_code, -1), tl.where(m_possible, b_confidence, NONE)


@triton.jit(
    do_not_specialize=["row_tiles", "codes", "first_code"], do_not_specialize_on_alignment=["p_seed", "p_offset"]
)
def head_kernel(
    p_folded, p_weight, p_bias, p_list, p_count, p_ticket, p_parts, p_codes, p_logits,
    p_ids, p_rows, p_seed, p_offset, p_out_ids, p_out_confidence,
    row_tiles, codes, hidden, stride_weight, first_code, inverse,
    BIAS: tl.constexpr, GREEDY: tl.constexpr, CONFIDENCE: tl.constexpr, STORE: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, HIDDEN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """p_folded [count, hidden] of fold_kernel; p_weight, p_bias: the head's code rows; grid row_tiles * column tiles.

    p_parts [FIELDS, column tiles, slots] and p_codes [column tiles, slots] between the tiles; p_logits [R, codes] with
    STORE; outputs [R]. EVEN: HIDDEN divides hidden. GROUP row tiles share the weights that the cache holds.
    """
    tiles = tl.cdiv(codes, COLUMNS)
    i_group = tl.program_id(0) // (GROUP * tiles)
    group_rows = tl.minimum(row_tiles - i_group * GROUP, GROUP)
    i_in_group = tl.program_id(0) - i_group * GROUP * tiles
    i_row_tile = i_group * GROUP + i_in_group % group_rows
    i_tile = i_in_group // group_rows
    count = tl.load(p_count)
    if i_row_tile * ROWS >= count:
        return

    o_slot = i_row_tile * ROWS + tl.arange(0, ROWS)
    m_slot = o_slot < count
    first = i_tile * COLUMNS
    o_code = first + tl.arange(0, COLUMNS)
    m_code = o_code < codes
    o_hidden = tl.arange(0, HIDDEN)
    p_a = p_folded + o_slot.to(tl.int64)[:, None] * hidden + o_hidden[None, :]
    p_b = p_weight + o_code.to(tl.int64)[None, :] * stride_weight + o_hidden[:, None]
    # [ROWS, COLUMNS]
    b_z = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, hidden, HIDDEN):
        if EVEN:
            b_a = tl.load(p_a, mask=m_slot[:, None], other=0.0)
            b_b = tl.load(p_b, mask=m_code[None, :], other=0.0)
        else:
            m_hidden = start + o_hidden < hidden
            b_a = tl.load(p_a, mask=m_slot[:, None] & m_hidden[None, :], other=0.0)
            b_b = tl.load(p_b, mask=m_hidden[:, None] & m_code[None, :], other=0.0)
        b_z = tl.dot(b_a, b_b, b_z, input_precision=PRECISION)
        p_a += HIDDEN
        p_b += HIDDEN
    if BIAS:
        b_bias = tl.load(p_bias + o_code, mask=m_code, other=0.0).to(p_weight.dtype.element_ty).to(tl.float32)
        b_z += b_bias[None, :]
    i_row = tl.load(p_list + o_slot, mask=m_slot, other=0).to(tl.int64)
    if STORE:
        m_tile = m_slot[:, None] & m_code[None, :]
        tl.store(p_logits + i_row[:, None] * codes + o_code[None, :], b_z, mask=m_tile)
        return
    b_z = tl.where(m_code[None, :], b_z, NONE)
    b_row = tl.load(p_rows + i_row, mask=m_slot, other=0)

    b_peak = tl.max(b_z, 1)
    b_safe = tl.where(b_peak == NONE, 0.0, b_peak)
    b_weight = exponential(b_z - b_safe[:, None])
    slots = row_tiles.to(tl.int64) * ROWS
    field = tiles * slots
    p_tile = p_parts + i_tile * slots + o_slot
    tl.store(p_tile, b_peak)
    tl.store(p_tile + field, tl.sum(b_weight, 1))
    if CONFIDENCE == "neg_entropy":
        b_terms = tl.where(b_weight > 0, b_weight * (b_z - b_safe[:, None]), 0.0)
        tl.store(p_tile + 3 * field, tl.sum(b_terms, 1))
    if CONFIDENCE == "margin":
        m_peak = b_z == b_peak[:, None]
        b_below = tl.max(tl.where(m_peak, NONE, b_z), 1)
        tl.store(p_tile + 4 * field, tl.where(tl.sum(m_peak.to(tl.int32), 1) > 1, b_peak, b_below))
    if GREEDY:
        b_code = tl.min(tl.where(b_z == b_peak[:, None], o_code[None, :], codes), 1)
        b_logit = b_peak
    else:
        b_code, b_logit = tile_race(b_z, b_safe, b_row, p_seed, p_offset, first, codes, inverse, ROWS, COLUMNS)
    tl.store(p_tile + 2 * field, b_logit)
    tl.store(p_codes + i_tile * slots + o_slot, b_code)

    tl.debug_barrier()  # every thread's parts are written before the ticket is drawn
    if tl.atomic_add(p_ticket + i_row_tile, 1, sem="acq_rel", scope="gpu") == tiles - 1:
        b_code, b_confidence = put_together(
            p_parts, p_codes, p_seed, p_offset, b_row, o_slot, tiles, slots, codes, inverse, GREEDY, CONFIDENCE, ROWS
        )
        b_id = tl.load(p_ids + i_row, mask=m_slot)
        tl.store(p_out_ids + i_row, tl.where(b_code < 0, b_id, first_code + b_code), mask=m_slot)
        tl.store(p_out_confidence + i_row, b_confidence, mask=m_slot)


def sample_hidden(
    h_cond: Tensor, h_uncond: Tensor | None, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> tuple[Tensor, Tensor]:
    """The op `sample_hidden`; see ops.py, and `Draw` for the other arguments. Two launches, with a filter three.

    Known rows are always left out, on the device, so `compact` changes nothing here. Logits are float32: the product's
    own sums, which torch rounds to the weight's dtype.
    """
    asked = Draw(*arguments)
    ids, codes = asked.ids, asked.codes
    out_ids = torch.empty_like(ids)
    out_confidence = torch.empty_like(ids, dtype=torch.float32)
    count, hidden = h_cond.shape
    if not count:
        return out_ids, out_confidence
    is_filtered = any(asked.filters)
    other = asked.guided_by(h_uncond)
    tile = configs.head_tile(weight.dtype, is_filtered)
    row_tiles, tiles = triton.cdiv(count, tile.rows), triton.cdiv(codes, tile.columns)
    weight = configs.contiguous_rows(weight[asked.window])
    bias = weight if bias is None else bias[asked.window]
    branches = [configs.contiguous_rows(each) for each in (h_cond, h_cond if other is None else other)]
    folded = weight.new_empty(count, hidden)
    slots = row_tiles * tile.rows
    sizes = (count, 1, row_tiles, tiles * slots)
    found, total, ticket, winners = (torch.empty(n, dtype=torch.int32, device=ids.device) for n in sizes)
    floats = FIELDS * tiles * slots
    parts = torch.empty(count * codes if is_filtered else floats, dtype=torch.float32, device=ids.device)
    with torch.cuda.device_of(out_ids):
        fold_kernel[(triton.cdiv(count, configs.FOLD.rows),)](
            *branches, ids, asked.unknown.view(torch.uint8), folded, found, total, ticket, out_ids, out_confidence,
            count, hidden, row_tiles, branches[0].stride(0), branches[1].stride(0),
            float(1 + asked.guidance), float(asked.guidance),
            GUIDED=other is not None, ROWS=configs.FOLD.rows, BLOCK=configs.FOLD.hidden,
            num_warps=configs.FOLD.num_warps, enable_fp_fusion=False,
        )  # fmt: skip
        head_kernel[(row_tiles * tiles,)](
            folded, weight, bias, found, total, ticket, parts, winners, parts, ids, asked.rows, asked.seed,
            asked.offset, out_ids, out_confidence, row_tiles, codes, hidden, weight.stride(0), asked.first_code,
            asked.inverse,
            BIAS=bias is not weight, GREEDY=asked.is_greedy, CONFIDENCE=asked.confidence, STORE=is_filtered,
            EVEN=hidden % tile.hidden == 0, PRECISION=float32_precision(), ROWS=tile.rows, COLUMNS=tile.columns,
            HIDDEN=tile.hidden, GROUP=8, num_warps=tile.num_warps, num_stages=tile.num_stages, enable_fp_fusion=False,
        )  # fmt: skip
    if is_filtered:
        return draw_triton.draw_columns(parts.view(count, codes), None, asked)
    return out_ids, out_confidence
