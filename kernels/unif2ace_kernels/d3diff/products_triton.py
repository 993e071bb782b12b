"""The three matrix products of the fused head in Triton: logits, gradient of the hidden states, gradient of the weight.

A chunk holds the next R labelled rows of a group. Where it begins is known on the host, how many rows it really has
only on the device (`p_count`), so programs read the count and take tiles below it alone: rows that are not there cost
a load. Of a chunk, x [R, D] are the gathered hidden states; z [R, C] the logits, and then their gradient in place; w
[C, D] the columns of the head that the group's softmax runs over. Rows of x and z from the count up to the next
multiple of ROW_PADDING are zero, so that the product that sums over rows needs no mask.

x, z and w are descriptors where DESCRIPTORS is set (copied by the tensor memory accelerator), else pointers.
"""

from __future__ import annotations

import triton
import triton.language as tl

ROW_PADDING = tl.constexpr(128)
LINE = tl.constexpr(64)  # a row of z has room for whole lines of so many columns


@triton.jit
def with_padding(columns):
    """The columns that a row of z has room for: a mask that ends there leaves 16-byte accesses whole.

    With one that ends at any column each number is an access of its own. Logits in the padding are -inf.
    """
    return tl.cdiv(columns, LINE) * LINE


@triton.jit
def rows_of_chunk(p_count, first_row, rows):
    """How many of the chunk's `rows` are labelled."""
    return tl.maximum(tl.minimum(tl.load(p_count) - first_row, rows), 0)


@triton.jit
def tile_of(i_tile, tiles_m, tiles_n, GROUP: tl.constexpr):
    """(i_m, i_n): GROUP rows of tiles at a time, down each column of them, so that neighbours share both operands."""
    per_group = GROUP * tiles_n
    first_m = (i_tile // per_group) * GROUP
    height = tl.minimum(tiles_m - first_m, GROUP)
    in_group = i_tile % per_group
    return first_m + in_group % height, in_group // height


@triton.jit
def load_tile(
    source, i_row, i_column, rows, columns, stride, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    MASK_R: tl.constexpr, MASK_C: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """source [rows, columns] from (i_row, i_column), [BLOCK_R, BLOCK_C]; what is outside is 0."""
    if DESCRIPTORS:
        b_tile = source.load([i_row, i_column])
    else:
        o_row, o_column = i_row + tl.arange(0, BLOCK_R), i_column + tl.arange(0, BLOCK_C)
        # [BLOCK_R, BLOCK_C]
        p_tile = source + o_row.to(tl.int64)[:, None] * stride + o_column[None, :]
        if MASK_R and MASK_C:
            b_tile = tl.load(p_tile, mask=(o_row < rows)[:, None] & (o_column < columns)[None, :], other=0.0)
        elif MASK_R:
            b_tile = tl.load(p_tile, mask=(o_row < rows)[:, None], other=0.0)
        elif MASK_C:
            b_tile = tl.load(p_tile, mask=(o_column < columns)[None, :], other=0.0)
        else:
            b_tile = tl.load(p_tile)
    return b_tile


@triton.jit
def quarter(b_tile, PART: tl.constexpr):
    """Columns PART * N / 4 .. (PART + 1) * N / 4 of b_tile [M, N], [M, N / 4].

    Tiles are stored a quarter at a time: the layout in which a tile is written differs from that of the products, and
    a whole one in both would not fit the registers.
    """
    M: tl.constexpr = b_tile.shape[0]
    N: tl.constexpr = b_tile.shape[1]
    b_left, b_right = tl.split(tl.permute(tl.reshape(b_tile, (M, 2, N // 2)), (0, 2, 1)))
    b_half = b_left if PART < 2 else b_right
    b_left, b_right = tl.split(tl.permute(tl.reshape(b_half, (M, 2, N // 4)), (0, 2, 1)))
    return b_left if PART % 2 == 0 else b_right


@triton.jit
def logits_kernel(
    x, w, p_bias, p_target, p_z, p_top, p_at_target, p_count, first_row, rows, columns, features,
    x_stride, w_stride, z_stride, top_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    MASK_K: tl.constexpr, HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """z = x w^T + bias - top, with top [R, tiles of columns] the largest logit of the row in each BLOCK_N columns.

    at_target [R]: the logit of the row's target, a column in p_target int32 [R]; both float32, as they were summed.
    Logits kept in 16 bits lose 2**-9 of their size, which for a logit of 10 is 2% of its probability. Counted from
    the tile's largest, the logits that carry probability are small, and what they lose is too.
    """
    count = rows_of_chunk(p_count, first_row, rows)
    tiles_m, tiles_n = tl.cdiv(count, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    for i_tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        i_m, i_n = tile_of(i_tile, tiles_m, tiles_n, GROUP)
        # [BLOCK_M, BLOCK_N]
        b_z = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i_k in tl.range(0, features, BLOCK_K):
            b_x = load_tile(x, i_m * BLOCK_M, i_k, count, features, x_stride, BLOCK_M, BLOCK_K,
                            False, MASK_K, DESCRIPTORS)  # fmt: skip
            b_w = load_tile(w, i_n * BLOCK_N, i_k, columns, features, w_stride, BLOCK_N, BLOCK_K,
                            True, MASK_K, DESCRIPTORS)  # fmt: skip
            b_z = tl.dot(b_x, tl.trans(b_w), b_z, input_precision=PRECISION)
        o_row = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        o_column = tl.arange(0, BLOCK_N)
        m_row, m_column = o_row < count, o_column < columns - i_n * BLOCK_N
        if HAS_BIAS:
            b_z += tl.load(p_bias + i_n * BLOCK_N + o_column, mask=m_column, other=0.0).to(tl.float32)[None, :]
        # [BLOCK_M]
        b_target = tl.load(p_target + o_row, mask=m_row, other=-1) - i_n * BLOCK_N
        b_at_target = tl.sum(tl.where(o_column[None, :] == b_target[:, None], b_z, 0.0), 1)
        tl.store(p_at_target + o_row, b_at_target, mask=m_row & (b_target >= 0) & (b_target < BLOCK_N))
        b_z = tl.where(m_column[None, :], b_z, float("-inf"))
        b_top = tl.max(b_z, 1)
        tl.store(p_top + o_row.to(tl.int64) * top_stride + i_n, b_top, mask=m_row)
        b_z -= tl.where(b_top == float("-inf"), 0.0, b_top)[:, None]
        for part in tl.static_range(4):
            o_part = i_n * BLOCK_N + part * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            p_tile = p_z + o_row.to(tl.int64)[:, None] * z_stride + o_part[None, :]
            m_tile = m_row[:, None] & (o_part < with_padding(columns))[None, :]
            tl.store(p_tile, quarter(b_z, part).to(p_z.dtype.element_ty), mask=m_tile)


@triton.jit
def hidden_gradient_kernel(
    g, w, p_rows, p_out, p_count, first_row, rows, columns, features, g_stride, w_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    MASK_K: tl.constexpr, MASK_N: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    FLATTEN: tl.constexpr,
):  # fmt: skip
    """out[rows[first_row + i]] = (g w)[i] for the chunk's rows i; out [T, D], g [R, C] the gradient of the logits."""
    count = rows_of_chunk(p_count, first_row, rows)
    tiles_m, tiles_n = tl.cdiv(count, BLOCK_M), tl.cdiv(features, BLOCK_N)
    for i_tile in tl.range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0), flatten=FLATTEN):
        i_m, i_n = tile_of(i_tile, tiles_m, tiles_n, GROUP)
        # [BLOCK_M, BLOCK_N]
        b_out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i_k in tl.range(0, columns, BLOCK_K):
            b_g = load_tile(g, i_m * BLOCK_M, i_k, count, columns, g_stride, BLOCK_M, BLOCK_K,
                            False, MASK_K, DESCRIPTORS)  # fmt: skip
            b_w = load_tile(w, i_k, i_n * BLOCK_N, columns, features, w_stride, BLOCK_K, BLOCK_N,
                            MASK_K, MASK_N, DESCRIPTORS)  # fmt: skip
            b_out = tl.dot(b_g, b_w, b_out, input_precision=PRECISION)
        o_row = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
        m_row = o_row < count
        i_row = tl.load(p_rows + first_row + o_row, mask=m_row, other=0).to(tl.int64)
        for part in tl.static_range(4):
            o_part = i_n * BLOCK_N + part * (BLOCK_N // 4) + tl.arange(0, BLOCK_N // 4)
            p_tile = p_out + i_row[:, None] * features + o_part[None, :]
            m_tile = m_row[:, None] & (o_part < features)[None, :]
            tl.store(p_tile, quarter(b_out, part).to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit
def add_tile(p_out, p_carry, b_tile, i_row, i_column, rows, columns, ACCUMULATE: tl.constexpr, CARRY: tl.constexpr):
    """out [rows, columns] (+)= b_tile from (i_row, i_column)."""
    o_row, o_column = i_row + tl.arange(0, b_tile.shape[0]), i_column + tl.arange(0, b_tile.shape[1])
    o_tile = o_row.to(tl.int64)[:, None] * columns + o_column[None, :]
    m_tile = (o_row < rows)[:, None] & (o_column < columns)[None, :]
    if ACCUMULATE:
        b_tile += tl.load(p_out + o_tile, mask=m_tile, other=0.0).to(tl.float32)
        if CARRY:
            b_tile += tl.load(p_carry + o_tile, mask=m_tile, other=0.0).to(tl.float32)
    b_rounded = b_tile.to(p_out.dtype.element_ty)
    tl.store(p_out + o_tile, b_rounded, mask=m_tile)
    if CARRY:
        tl.store(p_carry + o_tile, (b_tile - b_rounded.to(tl.float32)).to(p_out.dtype.element_ty), mask=m_tile)


@triton.jit
def weight_gradient_kernel(
    g, x, p_out, p_carry, p_count, first_row, rows, columns, features, g_stride, x_stride,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
    MASK_M: tl.constexpr, MASK_N: tl.constexpr, ACCUMULATE: tl.constexpr, CARRY: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """out (+)= g^T x, out [C, D]; g [R, C] the gradient of the logits, x [R, D].

    Over several chunks (ACCUMULATE), the sum is out + carry where out has 16 bits (CARRY): out is the sum rounded,
    carry [C, D] what the rounding left, so that the sum keeps twice the bits in no more memory than float32 would
    take. A single chunk writes out and reads nothing, even if it has no row.
    """
    count = rows_of_chunk(p_count, first_row, rows)
    tiles_m, tiles_n = tl.cdiv(columns, BLOCK_M), tl.cdiv(features, BLOCK_N)
    tiles = tiles_m * tiles_n
    if ACCUMULATE:
        tiles = tl.where(count == 0, 0, tiles)
    for i_tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        i_m, i_n = tile_of(i_tile, tiles_m, tiles_n, GROUP)
        # [BLOCK_M, BLOCK_N]
        b_out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i_k in tl.range(0, tl.maximum(count, 1), BLOCK_K):  # without a row, over zeros
            b_g = load_tile(g, i_k, i_m * BLOCK_M, count, columns, g_stride, BLOCK_K, BLOCK_M,
                            False, MASK_M, DESCRIPTORS)  # fmt: skip
            b_x = load_tile(x, i_k, i_n * BLOCK_N, count, features, x_stride, BLOCK_K, BLOCK_N,
                            False, MASK_N, DESCRIPTORS)  # fmt: skip
            b_out = tl.dot(tl.trans(b_g), b_x, b_out, input_precision=PRECISION)
        for part in tl.static_range(4):
            b_part, i_column = quarter(b_out, part), i_n * BLOCK_N + part * (BLOCK_N // 4)
            add_tile(p_out, p_carry, b_part, i_m * BLOCK_M, i_column, columns, features, ACCUMULATE, CARRY)
