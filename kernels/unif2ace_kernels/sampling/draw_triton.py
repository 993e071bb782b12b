"""The draw from logits in Triton: guidance, filters, Gumbel-max and the confidence of the winner, one program a row.

The score of a code is, to the bit, that of draw_torch.py: ((z - max z) * (1 / temperature)) + G. Making the Gumbel
number of every code that exactly is most of the arithmetic, and all but one or two are made in vain. So the codes race
by a cheap upper bound first: exp(score) = exp(scaled) / E with the exponential number E >= u + u**2 / 2 + u**3 / 3.
The exact score is made for the code that leads by the bound, then for the next, until none that is left can win.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from .. import _triton
from .._philox import TOKEN_STREAM
from .._triton import interleave, words_of_groups
from . import configs
from .arguments import Draw

Tensor = torch.Tensor
NONE = tl.constexpr(float("-inf"))
STREAM = tl.constexpr(TOKEN_STREAM)
LOG2E = tl.constexpr(1.4426950408889634)
BANNED = tl.constexpr(0x7F800000)  # the bits of the distance of a code that has no probability
# A key keeps 10 bits of the mantissa (8192 columns a tile); scores up to 23 in float32, exponentials and the bound
# are off by less than 1e-4 together.
SLACK = tl.constexpr(1 - 2e-3)


@triton.jit
def race_bound(word):
    """At least 1 / E (1 - 1e-6) of the exponential number E of uint32 words, and close to it where E is small."""
    u = ((word >> 9) | _triton.ONE_BITS).to(tl.float32, bitcast=True) - 1.0  # rounded down
    u = tl.maximum(u, 2.0**-33)
    root = tl.rsqrt(tl.fma(tl.fma(u, 1 / 3, 0.5), u, 1.0) * u)
    return root * root


@triton.jit
def exponential(x):
    """e**x for x <= 0, one instruction after the product; 0 for denormal results."""
    return tl.exp2(x * LOG2E)


@triton.jit
def token_gumbel(seed, offset, row, code):
    """The Gumbel numbers of (row, code), each alone; int tensors or scalars of one shape."""
    w0, w1, w2, w3 = words_of_groups(seed, offset, row, code >> 2, STREAM)
    lane = code & 3
    return _triton.gumbel(tl.where(lane < 2, tl.where(lane == 0, w0, w1), tl.where(lane == 2, w2, w3)))


@triton.jit
def guided(p_cond, p_uncond, o_code, m_code, up, down, GUIDED: tl.constexpr):
    """(1 + w) cond - w uncond; -inf in either branch or outside the mask is -inf."""
    z = tl.load(p_cond + o_code, mask=m_code, other=NONE).to(tl.float32)
    if GUIDED:
        uncond = tl.load(p_uncond + o_code, mask=m_code, other=NONE).to(tl.float32)
        banned = (z == NONE) | (uncond == NONE)
        z = tl.where(banned, NONE, up * z - down * uncond)
    return z


@triton.jit
def row_tile(b_held, p_cond, p_uncond, start, codes, up, down, GUIDED: tl.constexpr, SINGLE: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    """The guided logits of a tile: those in registers where a tile is the row, else read (again)."""
    if SINGLE:
        return b_held
    o_code = start + tl.arange(0, BLOCK)
    return guided(p_cond, p_uncond, o_code, o_code < codes, up, down, GUIDED)


@triton.jit
def distance(scaled):
    """How far below the peak, as an int32 that orders alike: the bits of -scaled >= 0."""
    return tl.abs(scaled).to(tl.int32, bitcast=True)


# Scalars on the device may be elements of a table, at any address; that is no reason to compile again.
@triton.jit(do_not_specialize=["first_code", "codes", "top_k"], do_not_specialize_on_alignment=["p_seed", "p_offset"])
def draw_kernel(
    p_cond, p_uncond, p_ids, p_unknown, p_rows, p_seed, p_offset, p_out_ids, p_out_confidence,
    stride_cond, stride_uncond, first_code, codes, up, down, inverse, top_k, top_p,
    GUIDED: tl.constexpr, GREEDY: tl.constexpr, TOP_K: tl.constexpr, TOP_P: tl.constexpr, CONFIDENCE: tl.constexpr,
    SINGLE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """p_cond, p_uncond: the code columns of [R, ...]; all else [R], seed and offset [1]; grid (R,).

    up, down: 1 + w and w; inverse: 1 / temperature; SINGLE: codes <= BLOCK.
    """
    i_row = tl.program_id(0).to(tl.int64)
    i_id = tl.load(p_ids + i_row)
    if tl.load(p_unknown + i_row) == 0:
        tl.store(p_out_ids + i_row, i_id)
        tl.store(p_out_confidence + i_row, float("inf"))
        return
    p_cond += i_row * stride_cond
    p_uncond += i_row * stride_uncond
    o_block = tl.arange(0, BLOCK)

    # [BLOCK]
    b_held = guided(p_cond, p_uncond, o_block, o_block < codes, up, down, GUIDED)
    b_largest = b_held
    if not SINGLE:
        for start in range(BLOCK, codes, BLOCK):
            b_z = row_tile(b_held, p_cond, p_uncond, start, codes, up, down, GUIDED, SINGLE, BLOCK)
            b_largest = tl.maximum(b_largest, b_z)
    peak = tl.max(b_largest)
    b_total = tl.zeros([BLOCK], tl.float32)
    b_extra = tl.zeros([BLOCK], tl.float32)
    b_second = tl.full([BLOCK], NONE, tl.float32)
    for start in range(0, BLOCK if SINGLE else codes, BLOCK):
        b_shifted = row_tile(b_held, p_cond, p_uncond, start, codes, up, down, GUIDED, SINGLE, BLOCK) - peak
        b_weight = exponential(b_shifted)
        b_total += b_weight
        if CONFIDENCE == "neg_entropy":
            b_extra += tl.where(b_weight > 0, b_weight * b_shifted, 0.0)
        if CONFIDENCE == "margin":
            b_extra += (b_shifted == 0).to(tl.float32)
            b_second = tl.maximum(b_second, tl.where(b_shifted < 0, b_shifted, NONE))
    total = tl.sum(b_total)
    # A NaN, or a peak that is not finite (inf - inf), ends up in the sum, whatever the maximum made of it.
    if total != total:
        tl.store(p_out_ids + i_row, i_id)
        tl.store(p_out_confidence + i_row, NONE)
        return

    limit = BANNED - 1  # codes farther from the peak are out
    if TOP_K:
        # The smallest distance that top_k codes do not pass; a step that meets the count itself ends the search.
        low = top_k * 0
        high = low + BANNED
        while low < high:
            middle = low + (high - low) // 2
            b_count = tl.zeros([BLOCK], tl.int32)
            for start in range(0, BLOCK if SINGLE else codes, BLOCK):
                b_z = row_tile(b_held, p_cond, p_uncond, start, codes, up, down, GUIDED, SINGLE, BLOCK)
                b_count += (distance((b_z - peak) * inverse) <= middle).to(tl.int32)
            count = tl.sum(b_count)
            low = tl.where(count < top_k, middle + 1, tl.where(count == top_k, middle, low))
            high = tl.where(count < top_k, high, middle)
        limit = tl.minimum(low, limit)
    if TOP_P:
        b_mass = tl.zeros([BLOCK], tl.float64)
        for start in range(0, BLOCK if SINGLE else codes, BLOCK):
            b_z = row_tile(b_held, p_cond, p_uncond, start, codes, up, down, GUIDED, SINGLE, BLOCK)
            b_scaled = (b_z - peak) * inverse
            b_mass += tl.where(distance(b_scaled) <= limit, exponential(b_scaled), 0.0).to(tl.float64)
        nucleus = tl.sum(b_mass) * top_p

    seed = tl.load(p_seed)
    offset = tl.load(p_offset)
    row = tl.load(p_rows + i_row)
    code = codes
    drawn = peak
    is_racing = True
    while is_racing:
        best = peak * 0 + NONE
        for start in range(0, BLOCK if SINGLE else codes, BLOCK):
            b_scaled = row_tile(b_held, p_cond, p_uncond, start, codes, up, down, GUIDED, SINGLE, BLOCK) - peak
            if GREEDY:
                first = tl.min(tl.where(b_scaled == 0, start + o_block, codes))
                code = tl.minimum(code, first)
            else:
                b_scaled *= inverse
                o_group = start // 4 + tl.arange(0, BLOCK // 4)
                w0, w1, w2, w3 = words_of_groups(seed, offset, row, o_group, STREAM)
                b_race = exponential(b_scaled) * interleave(
                    race_bound(w0), race_bound(w1), race_bound(w2), race_bound(w3)
                )
                if TOP_K or TOP_P:
                    b_race = tl.where(distance(b_scaled) <= limit, b_race, 0.0)
                # A key is a bound, rounded down to make room for the column; positive floats order as their bits.
                b_key = (b_race.to(tl.int32, bitcast=True) & -BLOCK) | o_block
                lead = tl.max(b_key)
                bound = (lead & -BLOCK).to(tl.float32, bitcast=True)
                while (bound > 0) & (bound >= tl.exp(best) * SLACK):
                    runner = start + (lead & (BLOCK - 1))
                    z = guided(p_cond, p_uncond, runner, runner < codes, up, down, GUIDED)
                    score = (z - peak) * inverse + token_gumbel(seed, offset, row, runner)
                    is_better = (score > best) | ((score == best) & (runner < code))
                    best = tl.where(is_better, score, best)
                    drawn = tl.where(is_better, z, drawn)
                    code = tl.where(is_better, runner, code)
                    b_key = tl.where(b_key == lead, 0, b_key)
                    lead = tl.max(b_key)
                    bound = (lead & -BLOCK).to(tl.float32, bitcast=True)
        is_racing = False
        if TOP_P:
            # The nucleus is closed upwards: a winner outside takes all that is no likelier out of the race.
            winner = distance((drawn - peak) * inverse)
            b_mass = tl.zeros([BLOCK], tl.float64)
            for start in range(0, BLOCK if SINGLE else codes, BLOCK):
                b_z = row_tile(b_held, p_cond, p_uncond, start, codes, up, down, GUIDED, SINGLE, BLOCK)
                b_scaled = (b_z - peak) * inverse
                b_mass += tl.where(distance(b_scaled) < winner, exponential(b_scaled), 0.0).to(tl.float64)
            is_racing = tl.sum(b_mass) >= nucleus
            limit = tl.where(is_racing, winner - 1, limit)

    if CONFIDENCE == "log_prob":
        confidence = (drawn - peak) - tl.log(total)
    elif CONFIDENCE == "neg_entropy":
        confidence = tl.sum(b_extra) / total - tl.log(total)
    else:
        second = tl.where(tl.sum(b_extra) > 1, 0.0, tl.max(b_second))
        confidence = (1 - tl.exp(second)) / total
    tl.store(p_out_ids + i_row, (first_code + code).to(tl.int64))
    tl.store(p_out_confidence + i_row, confidence)


def draw_columns(cond: Tensor, uncond: Tensor | None, asked: Draw) -> tuple[Tensor, Tensor]:
    """(ids, confidence) from logits that are the code columns already, [R, codes]; one launch."""
    ids, codes = asked.ids, asked.codes
    out_ids = torch.empty_like(ids)
    out_confidence = torch.empty_like(ids, dtype=torch.float32)
    if not ids.numel():
        return out_ids, out_confidence
    filters = asked.filters
    tile = configs.draw_tile(codes, any(filters))
    cond = configs.contiguous_rows(cond)
    other = cond if uncond is None else configs.contiguous_rows(uncond)
    with torch.cuda.device_of(out_ids):
        draw_kernel[(len(ids),)](
            cond, other, ids, asked.unknown.view(torch.uint8), asked.rows, asked.seed, asked.offset, out_ids,
            out_confidence, cond.stride(0), other.stride(0), asked.first_code, codes,
            float(1 + asked.guidance), float(asked.guidance), asked.inverse, asked.top_k, float(asked.top_p),
            GUIDED=uncond is not None, GREEDY=asked.is_greedy, TOP_K=filters[0], TOP_P=filters[1],
            CONFIDENCE=asked.confidence, SINGLE=codes <= tile.block, BLOCK=tile.block,
            num_warps=tile.num_warps, maxnreg=tile.max_registers, enable_fp_fusion=False,
        )  # fmt: skip
    return out_ids, out_confidence


def sample_logits(cond: Tensor, uncond: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The op `sample_logits`; see ops.py, and `Draw` for the other arguments.

    One launch. Known rows leave at once, so `compact` changes nothing here.
    """
    asked = Draw(*arguments)
    other = asked.guided_by(uncond)
    return draw_columns(cond[:, asked.window], None if other is None else other[:, asked.window], asked)
