"""The pieces of the experts' Triton kernels: activations, tiles, programs, and offsets past 32 bits."""

from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from experts_cases import cast, in_triton, mixture  # noqa: E402

from unif2ace_kernels.moe import experts_triton, reference, up_triton  # noqa: E402
from unif2ace_kernels.moe.activation_torch import ACTIVATIONS, GATED  # noqa: E402
from unif2ace_kernels.moe.activation_triton import activate_with_slopes  # noqa: E402
from unif2ace_kernels.moe.configs import Launch  # noqa: E402
from unif2ace_kernels.moe.grouped_triton import (  # noqa: E402
    by_load_kernel,
    combine_kernel,
    outer_kernel,
    row_tile,
    rows_kernel,
    swizzle,
)


@triton.jit
def activations_kernel(p_h, p_a, p_slope, ACTIVATION: tl.constexpr, N: tl.constexpr):
    o = tl.arange(0, N)
    b_h = tl.load(p_h + o)
    b_a, b_slope, _ = activate_with_slopes(b_h, b_h, ACTIVATION)
    tl.store(p_a + o, b_a)
    tl.store(p_slope + o, b_slope)


@pytest.mark.parametrize("activation", [each for each in ACTIVATIONS if each not in GATED])
def test_activations_keep_their_digits_far_out_and_nan(triton_interpreter, activation):
    h = torch.cat([torch.linspace(-12, 12, 62), torch.tensor([0.0, float("nan")])])
    a, slope = torch.empty(64), torch.empty(64)
    activations_kernel[(1,)](h, a, slope, activation, 64)
    exact = h.double().requires_grad_()
    want = reference.ACTIVATIONS[activation](exact)
    want.sum().backward()
    assert a[-1].isnan() and (activation == "relu" or slope[-1].isnan())
    torch.testing.assert_close(a[:-1].double(), want[:-1].detach(), rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(slope[:-1].double(), exact.grad[:-1], rtol=1e-6, atol=2e-6)


# ------------------------------------------------------------------------------------------------- tiles and programs


@triton.jit
def list_tiles_kernel(p_offsets, p_out, EXPERTS: tl.constexpr, BLOCK_M: tl.constexpr):
    i = tl.program_id(0)
    i_expert, row, end = row_tile(p_offsets, i, EXPERTS, BLOCK_M)
    tl.store(p_out + i * 3 + 0, i_expert)
    tl.store(p_out + i * 3 + 1, row)
    tl.store(p_out + i * 3 + 2, end)


@triton.jit
def list_places_kernel(p_out, TILES_N: tl.constexpr, GROUP: tl.constexpr):
    i_m, i_n = swizzle(tl.program_id(0), tl.num_programs(0) // TILES_N, TILES_N, GROUP)
    tl.store(p_out + tl.program_id(0), i_m * TILES_N + i_n)


@pytest.mark.parametrize("counts", [[0], [5], [4, 4], [5, 0, 6], [0, 0, 9, 0, 1, 8, 0], [1] * 13, [3, 8, 5, 0, 0]])
def test_every_row_is_in_one_tile_of_its_expert(triton_interpreter, counts):
    offsets = torch.tensor([0, *counts]).cumsum(0)
    experts_total, rows, block = len(counts), sum(counts), 4
    programs = rows // block + experts_total
    found = torch.full((programs, 3), -7)
    list_tiles_kernel[(programs,)](offsets, found, experts_total, block)
    covered = []
    for expert, row, end in found.tolist():
        if row < end:
            assert end == offsets[expert + 1] and row >= offsets[expert] and (row - offsets[expert]) % block == 0
            covered += [(expert, r) for r in range(row, min(row + block, end))]
    assert covered == [(e, r) for e, (a, b) in enumerate(pairwise(offsets.tolist())) for r in range(a, b)]


@pytest.mark.parametrize("counts", [[0], [5], [4, 4], [0, 0, 9, 0, 1, 8, 0], [1] * 13, [3, 2**29, 0, 2**30, 7]])
def test_experts_by_load_have_the_most_rows_first_and_then_the_lower_number(triton_interpreter, counts):
    ranked = torch.full((len(counts) + 1,), -1, dtype=torch.int32)
    by_load_kernel[(len(counts),)](torch.tensor([0, *counts]).cumsum(0), ranked, len(counts))
    assert ranked.tolist() == [*sorted(range(len(counts)), key=lambda e: (-counts[e], e)), -1]


@pytest.mark.parametrize("tiles", [(1, 1), (5, 3), (8, 1), (7, 4)])
@pytest.mark.parametrize("group", [1, 2, 8])
def test_swizzled_programs_visit_every_tile_once(triton_interpreter, tiles, group):
    places = torch.full((tiles[0] * tiles[1],), -1)
    list_places_kernel[(len(places),)](places, tiles[1], group)
    assert places.sort().values.tolist() == list(range(len(places)))


# -------------------------------------------------------------------------------------------------------- far offsets


@pytest.fixture
def last_programs(triton_interpreter, monkeypatch):
    """`last_programs(kernel, total, count)(...)` runs the last `count` of `total` programs of a one-axis grid."""
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    set_dim, set_index, shift = builder.set_grid_dim, builder.set_grid_idx, [0, 0]
    monkeypatch.setattr(builder, "set_grid_dim", lambda x, *rest: set_dim(shift[1] or x, *rest))
    monkeypatch.setattr(builder, "set_grid_idx", lambda x, *rest: set_index(x + shift[0], *rest))

    def launcher(kernel, total, count):
        def launch(*args, **options):
            shift[:] = [total - count, total]
            kernel[(count,)](*args, **options)
            shift[:] = [0, 0]

        return launch

    return launcher


def test_experts_beyond_32_bits(triton_interpreter, tmp_path):
    """An expert whose matrix begins past 2**31 elements, in files with holes."""
    x, routing, (w_in, _, w_out, _), grad_y = cast(
        torch.float16, *mixture(6, sizes=(3,), top_k=2, shared=0, bias=False)
    )
    stride = 2**30 + 64

    def far(name, weight):
        (tmp_path / name).touch()
        memory = torch.from_file(str(tmp_path / name), shared=True, size=3 * stride, dtype=weight.dtype)
        return memory.as_strided(weight.shape, (stride, *weight.stride()[1:])).copy_(weight)

    near = in_triton("relu", x, routing, (w_in, None, w_out, None), grad_y)
    distant = in_triton("relu", x, routing, (far("w_in", w_in), None, far("w_out", w_out), None), grad_y)
    assert routing.counts[2] > 0
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(near, distant, strict=True))


def test_gradients_of_experts_beyond_32_bits(last_programs, tmp_path):
    (tmp_path / "out").touch()
    m = n = 2**15
    out = torch.from_file(str(tmp_path / "out"), shared=True, size=3 * m * n, dtype=torch.float16).view(3, m, n)
    a, b = (torch.randn(4, size).half() for size in (m, n))
    order, offsets, experts = torch.arange(4), torch.tensor([0, 0, 0, 4]), torch.tensor([0, 1, 2], dtype=torch.int32)
    launch = Launch(16, 16, 16, 1, 1, 2)
    last_programs(outer_kernel, 3 * (m // 16) * (n // 16), 1)(
        a, b, order, offsets, experts, out, True, 1, m, n, "ieee", **launch._asdict()
    )
    exact = a[:, -16:].float().t() @ b[:, -16:].float()
    torch.testing.assert_close(out[2, -16:, -16:].float(), exact, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_offsets_beyond_32_bits(last_programs, tmp_path):
    """Rows, slots and tokens whose place in memory is past 2**31 elements, in files with holes."""

    def far(name, *shape, dtype=torch.float16):
        (tmp_path / name).touch()
        elements = shape[0] * shape[1]
        return torch.from_file(str(tmp_path / name), shared=True, size=elements, dtype=dtype).view(shape)

    def close(actual, expected):
        torch.testing.assert_close(actual.float(), expected.float(), rtol=1e-2, atol=1e-2)

    tokens, slots, hidden, width, left = 2**20 + 8, 2, 2048, 1024, 5
    rows, launch, rng = tokens * slots, Launch(16, 1024, 128, 1, 4, 2), torch.Generator().manual_seed(0)
    order, offsets = torch.arange(rows), torch.tensor([0, rows - left, rows])  # expert 1 has the last 5 rows
    own, token = slice(rows - left, rows), order[-left:] // slots
    x, grad_y = far("x", tokens, hidden), far("grad_y", tokens, hidden)
    h, a, by_slot, grad_h, scaled = (far(name, rows, width) for name in ("h", "a", "by_slot", "grad_h", "scaled"))
    assert x.numel() > 2**31 and h.numel() > 2**31
    for each in (x, grad_y):
        each[-3:] = torch.randn(3, hidden, generator=rng).half()
    w_in = (torch.randn(2, hidden, width, generator=rng) / hidden**0.5).half()
    w_out = (torch.randn(2, width, width, generator=rng) / width**0.5).half()
    weight = torch.ones(tokens, slots)
    tiles = experts_triton._row_tiles(rows, 2, launch.BLOCK_M)
    sizes, options = (slots, 2, width, hidden, "ieee"), launch._asdict()

    up = last_programs(up_triton.up_kernel, tiles, 2)  # the last tile is a gap
    up(x, order, offsets, w_in, None, h, a, *w_in.stride(), "relu", False, *sizes, PIECE=1024, **options)
    close(h[own], x[token] @ w_in[1])
    close(a[own], h[own].relu())

    down = last_programs(rows_kernel, tiles, 2)
    down(a, order, offsets, w_out, None, by_slot, *w_out.stride(), 2, width, width, "ieee", **options)
    close(by_slot[own], a[own] @ w_out[1])
    y = far("y", tokens, width)
    last_programs(combine_kernel, tokens, 1)(by_slot, weight, y, True, slots, width, width)
    close(y[-1], by_slot[-2:].float().sum(0))

    grad_weight = torch.zeros(rows, 1 + hidden // 128)
    back, strides = last_programs(up_triton.up_backward_kernel, tiles, 2), w_in.stride()
    back(grad_y, h, weight, order, offsets, w_in, grad_h, scaled, grad_weight, None, *strides, "relu",
         False, grad_weight.shape[1], *sizes, PIECE=1024, **options)  # fmt: skip
    grad_a = grad_y[token].float() @ w_in[1].float()
    close(grad_h[own], grad_a * (h[own] > 0))
    close(scaled[own], a[own])
    close(grad_weight[own, 0], (grad_a * a[own]).sum(1))

    grad_bias = far("grad_bias", experts_triton._row_tiles(rows, 2, 64), hidden, dtype=torch.float32)
    bias, programs = torch.randn(2, hidden, generator=rng).half(), len(grad_bias) * (hidden // 128)
    last_programs(up_triton.bias_kernel, programs, 1)(
        grad_y, weight, order, offsets, bias, grad_weight, grad_bias, 1, grad_weight.shape[1], slots, 2, hidden, 64, 128
    )
    close(grad_weight[own, -1], (grad_y[token, -128:].float() * bias[1, -128:]).sum(1))
    close(grad_bias[-1, -128:], grad_y[token, -128:].float().sum(0))

    out = torch.zeros(2, hidden, width).half()
    by_load = experts_triton._by_load(offsets)  # expert 1 has fewer rows: it comes last
    outer = last_programs(outer_kernel, 2 * (hidden // 16), hidden // 16)
    outer(x, grad_h, order, offsets, by_load, out, True, slots, hidden, width, "ieee", **options)
    close(out[1], x[token].float().t() @ grad_h[own].float())
    assert (out[0] == 0).all()
