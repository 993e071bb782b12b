"""What the Triton head does row by row: listing the labelled rows, gathering them, and their softmax statistics.

Nothing here has a shape that depends on data: lists have room for every row, and their lengths stay on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .products_triton import ROW_PADDING, rows_of_chunk, with_padding
from .rows_torch import MAX_EXPONENT as MAX_EXPONENT_VALUE

MAX_EXPONENT = tl.constexpr(MAX_EXPONENT_VALUE)
LN2_HIGH = tl.constexpr(0.693359375)  # 10 bits: a product with an exponent in [-200, 200] is exact
LN2_LOW = tl.constexpr(-2.12194440e-4)


@triton.jit
def labelled_in(p_targets, p_group, o_row, rows, ignore_index, GROUP: tl.constexpr, HAS_GROUP: tl.constexpr):
    """Whether each row has a label and is of the group."""
    m_row = o_row < rows
    m_labelled = m_row & (tl.load(p_targets + o_row, mask=m_row, other=ignore_index) != ignore_index)
    if HAS_GROUP:
        m_labelled = m_labelled & (tl.load(p_group + o_row, mask=m_row, other=-1) == GROUP)
    return m_labelled


@triton.jit
def count_kernel(
    p_targets, p_group, p_block_counts, rows, blocks, ignore_index,
    GROUPS: tl.constexpr, HAS_GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """block_counts [GROUPS, blocks]: labelled rows of each group in each BLOCK rows; grid (blocks,)."""
    o_row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    for i_group in tl.static_range(GROUPS):
        m_labelled = labelled_in(p_targets, p_group, o_row, rows, ignore_index, i_group, HAS_GROUP)
        tl.store(p_block_counts + i_group * blocks + tl.program_id(0), tl.sum(m_labelled.to(tl.int32), 0))


@triton.jit
def list_kernel(
    p_targets, p_group, p_block_counts, p_rows, p_counts, p_loss, p_ce, p_lse, p_mass, p_hit, rows, blocks,
    ignore_index, GROUPS: tl.constexpr, HAS_GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """rows [GROUPS, T]: the labelled rows of each group in order; counts [GROUPS]; zeros in the rows of no group.

    grid (blocks,): a program lists its BLOCK rows behind those that the programs before it have.
    """
    i_block = tl.program_id(0)
    o_row = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_none = o_row < rows
    for i_group in tl.static_range(GROUPS):
        m_labelled = labelled_in(p_targets, p_group, o_row, rows, ignore_index, i_group, HAS_GROUP)
        # [BLOCK]
        b_before = tl.zeros((BLOCK,), tl.int32)
        for i_first in range(0, i_block, BLOCK):
            o_block = i_first + tl.arange(0, BLOCK)
            b_before += tl.load(p_block_counts + i_group * blocks + o_block, mask=o_block < i_block, other=0)
        before = tl.sum(b_before, 0)
        b_labelled = m_labelled.to(tl.int32)
        o_place = before + tl.cumsum(b_labelled, 0) - b_labelled
        tl.store(p_rows + i_group * rows + o_place, o_row.to(tl.int32), mask=m_labelled)
        if i_block == blocks - 1:
            tl.store(p_counts + i_group, before + tl.sum(b_labelled, 0))
        m_none = m_none & (m_labelled == 0)
    b_zero = tl.zeros((BLOCK,), tl.float32)
    tl.store(p_loss + o_row, b_zero, mask=m_none)
    tl.store(p_ce + o_row, b_zero, mask=m_none)
    tl.store(p_lse + o_row, b_zero, mask=m_none)
    tl.store(p_mass + o_row, b_zero, mask=m_none)
    tl.store(p_hit + o_row, b_zero.to(p_hit.dtype.element_ty), mask=m_none)


@triton.jit
def clear_kernel(
    p_targets, p_group, p_out, rows, features, ignore_index,
    GROUPS: tl.constexpr, HAS_GROUP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [T, D] = 0 in the rows of no group, grid (T,)."""
    i_row = tl.program_id(0).to(tl.int64)
    labelled = i_row < 0
    for i_group in tl.static_range(GROUPS):
        labelled = labelled | labelled_in(p_targets, p_group, i_row, rows, ignore_index, i_group, HAS_GROUP)
    if labelled == 0:
        for i_column in range(0, features, BLOCK):
            o_column = i_column + tl.arange(0, BLOCK)
            b_zero = tl.zeros((BLOCK,), p_out.dtype.element_ty)
            tl.store(p_out + i_row * features + o_column, b_zero, mask=o_column < features)


@triton.jit
def padded(count):
    """Rows of a chunk that are read: at least one block of them, so that a sum over no row is one over zeros."""
    return tl.cdiv(tl.maximum(count, 1), ROW_PADDING) * ROW_PADDING


@triton.jit
def gather_kernel(
    p_hidden, p_targets, p_rows, p_x, p_target, p_count, first_row, rows, columns, features, start, hidden_stride,
    x_stride, BLOCK: tl.constexpr,
):  # fmt: skip
    """x [R, D] of a chunk, grid (R,): the hidden states of its rows in the products' dtype, zeros in the padding.

    target int32 [R]: the row's target counted from column `start`, -1 where it is not among the group's columns.
    """
    i_row = tl.program_id(0)
    count = rows_of_chunk(p_count, first_row, rows)
    if i_row < padded(count):
        i_hidden = tl.load(p_rows + first_row + i_row, mask=i_row < count, other=0).to(tl.int64)
        target = tl.load(p_targets + i_hidden) - start
        tl.store(p_target + i_row, tl.where((target >= 0) & (target < columns), target, -1).to(tl.int32))
        for i_column in range(0, features, BLOCK):
            o_column = i_column + tl.arange(0, BLOCK)
            m_column = o_column < features
            p_source = p_hidden + i_hidden * hidden_stride + o_column
            b_x = tl.load(p_source, mask=m_column & (i_row < count), other=0.0)
            tl.store(p_x + i_row.to(tl.int64) * x_stride + o_column, b_x.to(p_x.dtype.element_ty), mask=m_column)


@triton.jit
def exp_of(u):
    """e^u of a number below MAX_EXPONENT, to an ulp or two whatever its size."""
    exponent = tl.floor(u * 1.4426950408889634 + 0.5)
    return tl.exp((u - exponent * LN2_HIGH) - exponent * LN2_LOW) * tl.exp2(exponent)


@triton.jit
def penalty_and_slope(lse, shift):
    """e^u - 1 - u and its derivative e^u - 1 at u = lse + shift, the tangent of e^u taken beyond MAX_EXPONENT."""
    u = lse + shift
    low = tl.minimum(u, MAX_EXPONENT)
    power = exp_of(tl.maximum(low, -100.0))
    # Near 0 the difference cancels: the first terms of its series instead, to 2**-33.
    series = low * low * (1 / 2 + low * (1 / 6 + low * (1 / 24 + low * (1 / 120 + low * (1 / 720 + low * (
        1 / 5040 + low * (1 / 40320 + low * (1 / 362880 + low / 3628800))))))))  # fmt: skip
    near = tl.abs(low) < 0.5
    penalty = tl.where(near, series, power - 1.0 - low)
    slope = tl.where(near, low + series, power - 1.0)
    return penalty + tl.where(u > low, slope * (u - low), 0.0), slope


@triton.jit
def weights_at(
    i_row, p_ce_weight, p_penalty_weight, p_shift, p_mass_weight,
    HAS_PENALTY: tl.constexpr, HAS_SHIFT: tl.constexpr, HAS_MASS: tl.constexpr,
):  # fmt: skip
    """(a, b, shift, c) of a row; 0 where there is no such term."""
    a = tl.load(p_ce_weight + i_row).to(tl.float32)
    b, shift, c = 0.0, 0.0, 0.0
    if HAS_PENALTY:
        b = tl.load(p_penalty_weight + i_row).to(tl.float32)
    if HAS_SHIFT:
        shift = tl.load(p_shift + i_row).to(tl.float32)
    if HAS_MASS:
        c = tl.load(p_mass_weight + i_row).to(tl.float32)
    return a, b, shift, c


@triton.jit
def row_loss(ce, lse, mass, a, b, shift, c, HAS_PENALTY: tl.constexpr, HAS_MASS: tl.constexpr):
    """a CE + b (e^u - 1 - u) + c P; a row of weight 0 is 0 even where its terms are not finite."""
    loss = tl.where(a == 0, 0.0, a * ce)
    if HAS_PENALTY:
        penalty, _ = penalty_and_slope(lse, shift)
        loss += tl.where(b == 0, 0.0, b * penalty)
    if HAS_MASS:
        loss += tl.where(c == 0, 0.0, c * mass)
    return loss


@triton.jit
def slopes(lse, mass, a, b, shift, c, HAS_PENALTY: tl.constexpr, HAS_MASS: tl.constexpr):
    """What p is multiplied by in the gradient of a logit, among the codes and elsewhere; 0 in a row with a = 0."""
    inside = a
    if HAS_PENALTY:
        _, slope = penalty_and_slope(lse, shift)
        inside += tl.where(a == 0, 0.0, b * slope)
    outside = inside
    if HAS_MASS:
        pull = tl.where(a == 0, 0.0, c)
        inside += pull * (1 - mass)
        outside -= pull * mass
    return inside, outside


@triton.jit
def exponentials(p_z, p_top, i_column, columns, origin, SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr):
    """e^(z - origin) of a row from column i_column, [SEGMENTS, SEGMENT], and its columns; 0 beyond the last."""
    o_segment = i_column // SEGMENT + tl.arange(0, SEGMENTS)
    o_column = o_segment[:, None] * SEGMENT + tl.arange(0, SEGMENT)[None, :]
    # [SEGMENTS, SEGMENT]
    b_z = tl.load(p_z + o_column, mask=o_column < with_padding(columns), other=float("-inf")).to(tl.float32)
    b_top = tl.load(p_top + o_segment, mask=o_segment * SEGMENT < columns, other=0.0)
    b_top = tl.where(b_top == float("-inf"), 0.0, b_top)
    return tl.exp(b_z + (b_top - origin)[:, None]), o_column


@triton.jit
def store_gradient(p_z, b_e, o_column, columns, target, a, inside, outside, code_start, code_end):
    b_slope = tl.where((o_column >= code_start) & (o_column < code_end), inside, outside)
    # A row of weight 0 is 0, also where e^z is not finite.
    b_g = tl.where(a == 0, 0.0, b_e * b_slope - tl.where(o_column == target, a, 0.0))
    tl.store(p_z + o_column, b_g.to(p_z.dtype.element_ty), mask=o_column < with_padding(columns))


@triton.jit
def row_terms_kernel(
    p_z, p_top, p_target, p_at_target, p_rows, p_ce_weight, p_penalty_weight, p_shift, p_mass_weight, p_loss, p_ce,
    p_lse, p_mass, p_hit, p_count, first_row, rows, columns, code_start, code_end, z_stride, top_stride,
    SEGMENTS: tl.constexpr, SEGMENT: tl.constexpr, TOPS: tl.constexpr, HAS_PENALTY: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_MASS: tl.constexpr, GRADIENT: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Statistics of a chunk's rows, and the gradient of their logits in place of z; grid (R,), a program a row.

    z, top, at_target: as `logits_kernel` leaves them. AT_ONCE: a row has SEGMENTS * SEGMENT columns at most and is
    read once.
    """
    BLOCK: tl.constexpr = SEGMENTS * SEGMENT
    i_chunk = tl.program_id(0)
    count = rows_of_chunk(p_count, first_row, rows)
    p_z += i_chunk.to(tl.int64) * z_stride
    p_top += i_chunk.to(tl.int64) * top_stride
    if i_chunk < count:
        i_row = tl.load(p_rows + first_row + i_chunk).to(tl.int64)
        target = tl.load(p_target + i_chunk)
        # A target outside its range was in no tile: its logit is nowhere, and the row's loss is NaN.
        at_target = tl.where(target < 0, float("nan"), tl.load(p_at_target + i_chunk))
        a, b, shift, c = weights_at(
            i_row, p_ce_weight, p_penalty_weight, p_shift, p_mass_weight, HAS_PENALTY, HAS_SHIFT, HAS_MASS
        )
        o_top = tl.arange(0, TOPS)
        top = tl.max(tl.load(p_top + o_top, mask=o_top * SEGMENT < columns, other=float("-inf")), 0)
        origin = tl.where(top == float("-inf"), 0.0, top)  # of a row of -inf the sum is then 0, and lse -inf
        b_e, o_column = exponentials(p_z, p_top, 0, columns, origin, SEGMENTS, SEGMENT)
        b_sum = b_e
        b_mass = tl.where((o_column >= code_start) & (o_column < code_end), b_e, 0.0)
        if not AT_ONCE:
            for i_column in range(BLOCK, columns, BLOCK):
                b_next, o_column = exponentials(p_z, p_top, i_column, columns, origin, SEGMENTS, SEGMENT)
                b_sum += b_next
                b_mass += tl.where((o_column >= code_start) & (o_column < code_end), b_next, 0.0)
        total = tl.sum(tl.sum(b_sum, 1), 0)
        mass = 0.0
        if HAS_MASS:
            mass = tl.sum(tl.sum(b_mass, 1), 0) / total
        log_sum = tl.log(total)
        ce, lse = (top - at_target) + log_sum, top + log_sum
        tl.store(p_loss + i_row, row_loss(ce, lse, mass, a, b, shift, c, HAS_PENALTY, HAS_MASS))
        tl.store(p_ce + i_row, ce)
        tl.store(p_lse + i_row, lse)
        tl.store(p_mass + i_row, mass)
        tl.store(p_hit + i_row, (at_target >= top).to(p_hit.dtype.element_ty))
        if GRADIENT:
            inside, outside = slopes(lse, mass, a, b, shift, c, HAS_PENALTY, HAS_MASS)
            inside /= total
            outside /= total
            tl.debug_barrier()  # several warps hold a row narrower than the program: all read before one writes
            if AT_ONCE:
                store_gradient(p_z, b_e, o_column, columns, target, a, inside, outside, code_start, code_end)
            else:
                for i_column in range(0, columns, BLOCK):
                    b_e, o_column = exponentials(p_z, p_top, i_column, columns, origin, SEGMENTS, SEGMENT)
                    store_gradient(p_z, b_e, o_column, columns, target, a, inside, outside, code_start, code_end)
    elif GRADIENT:
        if i_chunk < padded(count):
            for i_column in range(0, columns, BLOCK):
                o_column = i_column + tl.arange(0, BLOCK)
                m_column = o_column < with_padding(columns)
                tl.store(p_z + o_column, tl.zeros((BLOCK,), p_z.dtype.element_ty), mask=m_column)


@triton.jit
def bias_gradient_kernel(
    p_g, p_out, p_count, first_row, rows, columns, g_stride, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """out [C] float32 += sum of g [R, C] over the chunk's rows, in their order; grid (cdiv(C, BLOCK_C),)."""
    count = rows_of_chunk(p_count, first_row, rows)
    o_column = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_column = o_column < columns
    # [BLOCK_R, BLOCK_C]
    b_sum = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for i_row in range(0, count, BLOCK_R):
        o_row = i_row + tl.arange(0, BLOCK_R)
        p_tile = p_g + o_row.to(tl.int64)[:, None] * g_stride + o_column[None, :]
        m_tile = (o_row < count)[:, None] & (o_column < with_padding(columns))[None, :]
        b_sum += tl.load(p_tile, mask=m_tile, other=0.0).to(tl.float32)
    b_out = tl.load(p_out + o_column, mask=m_column, other=0.0) + tl.sum(b_sum, 0)
    tl.store(p_out + o_column, b_out, mask=m_column)
