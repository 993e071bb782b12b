"""The experts in Triton: interpreted against float64, tile by tile, at far offsets; on a GPU end to end."""

from itertools import pairwise

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from unif2ace_kernels._triton import float32_precision  # noqa: E402
from unif2ace_kernels.moe import Routing, experts, experts_triton, reference, route  # noqa: E402
from unif2ace_kernels.moe.activation_torch import ACTIVATIONS, GATED  # noqa: E402
from unif2ace_kernels.moe.activation_triton import activate_with_slopes  # noqa: E402
from unif2ace_kernels.moe.configs import Launch  # noqa: E402
from unif2ace_kernels.moe.grouped_triton import (  # noqa: E402
    by_load,
    combine_kernel,
    outer_kernel,
    row_tile,
    rows_kernel,
    swizzle,
)

TINY = 1e-5
SMALL = Launch(16, 32, 16, 2, 1, 2)
NAMES = ("y", "x", "weight", "w_in", "b_in", "w_out", "b_out")


def small(*_sizes) -> Launch:
    return SMALL


def mixture(tokens, *, hidden=20, width=40, sizes=(2, 3), top_k=2, shared=1, activation="gelu_tanh", bias=True,
            logits=None, groups=None):  # fmt: skip
    """(x, routing, (w_in, b_in, w_out, b_out), grad_y) in float64, outputs of order 1."""
    rng = torch.Generator().manual_seed(0)
    double = {"dtype": torch.float64, "generator": rng}
    total, columns = sum(sizes) + shared * len(sizes), width * (2 if activation in GATED else 1)
    groups = torch.randint(len(sizes), (tokens,), generator=rng) if groups is None else groups
    logits = 2 * torch.randn(tokens, sum(sizes), **double) if logits is None else logits.double()
    routing = route(logits, groups, sizes, top_k, shared=shared)
    x, grad_y = (torch.randn(tokens, hidden, **double) for _ in range(2))
    w_in = torch.randn(total, hidden, columns, **double) / hidden**0.5
    w_out = torch.randn(total, width, hidden, **double) / width**0.5
    b_in, b_out = (torch.randn(total, size, **double) if bias else None for size in (columns, hidden))
    return x, routing, (w_in, b_in, w_out, b_out), grad_y


def cast(dtype, x, routing, parameters, grad_y):
    """The mixture in a dtype, the routing's weight in float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    to = [None if each is None else each.to(dtype) for each in (x, *parameters, grad_y)]
    return to[0], routing._replace(weight=routing.weight.detach().to(wide)), tuple(to[1:5]), to[5]


def by_autograd(function, x, routing, parameters, grad_y):
    """y and the gradients in the order of NAMES, through `function(x, routing, *parameters)`; zeros where unused."""
    leaves = [None if e is None else e.detach().clone().requires_grad_() for e in (x, routing.weight, *parameters)]
    y = function(leaves[0], routing._replace(weight=leaves[1]), *leaves[2:])
    y.backward(grad_y)
    grads = [None if e is None else torch.zeros_like(e) if e.grad is None else e.grad for e in leaves]
    return [y.detach(), *grads]


def in_torch(activation):
    return lambda x, routing, *parameters: reference.experts(
        x, routing.expert, routing.weight.to(x.dtype), *parameters, activation
    )


def in_triton(activation, x, routing, parameters, grad_y, choose=small):
    w_in, b_in, w_out, b_out = parameters
    where = routing.weight, routing.order, routing.offsets
    y, h = experts_triton.forward(x, *where, *parameters, activation, choose)
    grads = experts_triton.backward(
        grad_y, x, h, *where, w_in, w_out, b_out, b_in is not None, activation, choose
    )  # fmt: skip
    assert (grads[3].shape[0] == 0) == (b_in is None) and (grads[5].shape[0] == 0) == (b_out is None)
    return [y, *(None if bias is None else g for g, bias in zip(grads, (x, x, w_in, b_in, w_out, b_out), strict=True))]


def assert_as_good(got, peer, exact):
    """err(ours) <= 2 err(torch in the same dtype) + tiny, both against float64."""
    for name, g, p, e in zip(NAMES, got, peer, exact, strict=True):
        assert (g is None) == (e is None), name
        if e is not None:
            assert g.shape == e.shape and g.dtype == p.dtype, name
        if e is not None and e.numel():
            assert (g.double() - e).abs().max() <= 2 * (p.double() - e).abs().max() + TINY, name


def check(activation, dtype, *problem, choose=small):
    exact = by_autograd(in_torch(activation), *problem)
    low = cast(dtype, *problem)
    got = in_triton(activation, *low, choose=choose)
    assert_as_good(got, by_autograd(in_torch(activation), *low), exact)


# ------------------------------------------------------------------------------------------- interpreted, end to end


# A pre-activation rounded across relu's 0 has another gradient, however good the code is: relu in float32 only.
HALF = [each for each in ACTIVATIONS if each != "relu"]


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [
        *((each, torch.float32) for each in ACTIVATIONS),
        *(pytest.param(each, torch.float16, marks=[] if each == "geglu" else [pytest.mark.slow]) for each in HALF),
    ],
    ids=str,
)
def test_values_and_gradients(triton_interpreter, activation, dtype):
    check(activation, dtype, *mixture(18, activation=activation))


EDGES = {
    "no token": {"tokens": 0},
    "one token": {"tokens": 1},
    "seven tokens": {"tokens": 7},
    "every expert chosen": {"tokens": 9, "sizes": (3, 3), "top_k": 3},
    "one expert, one slot": {"tokens": 20, "sizes": (1,), "top_k": 1, "shared": 0},
    "one slot": {"tokens": 30, "sizes": (5,), "top_k": 1, "shared": 0},
    "a group without tokens": {"tokens": 20, "groups": torch.zeros(20).long()},
    "no bias": {"tokens": 20, "bias": False},
    "blocks divide all sizes": {"tokens": 32, "hidden": 32, "width": 64},
    "odd sizes": {"tokens": 20, "hidden": 7, "width": 3, "sizes": (2, 3)},
    "many experts": {"tokens": 12, "sizes": (13, 20), "shared": 0, "hidden": 8, "width": 8},
    "all on one expert": {"tokens": 50, "sizes": (6,), "top_k": 1, "shared": 0,
                          "logits": torch.eye(6)[4].expand(50, 6), "hidden": 8, "width": 8},
    "Zipf": {"tokens": 60, "sizes": (11,), "shared": 0, "hidden": 8, "width": 8,
             "logits": torch.rand(60, 11, generator=torch.Generator().manual_seed(0)) - 2 * torch.arange(1, 12).log()},
}  # fmt: skip


@pytest.mark.parametrize("name", EDGES)
def test_edges(triton_interpreter, name):
    problem = mixture(**{"activation": "swiglu", **EDGES[name]})
    check("swiglu", torch.float32, *problem)
    if name == "all on one expert":
        assert problem[1].counts.tolist() == [0, 0, 0, 0, 50, 0]


def test_experts_without_rows_get_zero_gradients(triton_interpreter):
    problem = mixture(20, groups=torch.zeros(20).long())
    _, _, _, *grads = in_triton("gelu", *cast(torch.float32, *problem))
    empty = problem[1].counts == 0
    assert empty.any() and not empty.all()
    assert all((grad[empty] == 0).all() and (grad[~empty] != 0).any() for grad in grads)


@pytest.mark.parametrize("launch", [Launch(32, 64, 32, 1, 1, 2), Launch(16, 16, 16, 8, 4, 1)], ids=str)
def test_other_tiles_have_the_same_result(triton_interpreter, launch):
    """Epilogues in four pieces and whole; one row tile and eight visited together; a step larger than the rows."""
    problem = mixture(14, width=70, sizes=(3,), shared=0, activation="geglu")
    check("geglu", torch.float32, *problem, choose=lambda *_: launch)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_values_stay_with_their_token_and_its_experts(triton_interpreter, bad):
    problem = cast(torch.float32, *mixture(20, sizes=(6,), shared=0, width=20))
    clean = in_triton("gelu_tanh", *problem)
    x, routing, parameters, grad_y = problem
    x, others = x.clone(), torch.arange(20) != 17
    x[17, 3] = bad
    y, grad_x, grad_weight, *grads = in_triton("gelu_tanh", x, routing, parameters, grad_y)
    assert not y[17].isfinite().all() and not grad_weight[17].isfinite().all()
    assert torch.equal(y[others], clean[0][others])
    assert torch.equal(grad_x[others], clean[1][others]) and torch.equal(grad_weight[others], clean[2][others])
    untouched = torch.ones(len(routing.counts), dtype=torch.bool)
    untouched[routing.expert[17]] = False
    for grad, before in zip(grads, clean[3:], strict=True):
        assert torch.equal(grad[untouched], before[untouched])
    grad_y = grad_y.clone()
    grad_y[17, 3] = bad
    _, grad_x, _, *grads = in_triton("gelu_tanh", problem[0], routing, parameters, grad_y)
    assert torch.equal(grad_x[others], clean[1][others])
    for grad, before in zip(grads, clean[3:], strict=True):
        assert torch.equal(grad[untouched], before[untouched]) and not grad.isfinite().all()


def test_repeatable_and_indifferent_to_strides(triton_interpreter):
    x, routing, parameters, grad_y = cast(torch.float32, *mixture(12, sizes=(3,), width=20))
    first = in_triton("silu", x, routing, parameters, grad_y)
    again = in_triton("silu", x, routing, parameters, grad_y)
    far = [each.transpose(0, -1).contiguous().transpose(0, -1) for each in (x, *parameters, grad_y)]
    weight = routing.weight.t().contiguous().t()
    strided = in_triton("silu", far[0], routing._replace(weight=weight), tuple(far[1:5]), far[5])
    for name, a, b, c in zip(NAMES, first, again, strided, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c), name


def test_weights_with_strides_are_not_copied_unless_far():
    weight = torch.empty(2, 8, 6).transpose(1, 2)
    assert experts_triton._matrices(weight) is weight
    far = torch.empty_strided((2, 6, 8), (0, 2**30, 1), device="meta")
    assert experts_triton._matrices(far).is_contiguous()


def test_float32_products_are_exact_unless_torch_may_round():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        assert float32_precision() == ("tf32" if before == "tf32" else "ieee")
        matmul.fp32_precision = "tf32"
        assert float32_precision() == "tf32"
    finally:
        matmul.fp32_precision = before


def test_too_many_rows_are_refused():
    order = torch.empty(1, dtype=torch.int64).expand(2**31)
    weight = torch.empty(1).expand(2**30, 2)
    with pytest.raises(ValueError, match=r"^x: expected fewer than 2\*\*31 rows, tokens times slots, got 2147483648"):
        w = torch.empty(1, 2, 2)
        experts_triton.forward(torch.empty(1, 2).expand(2**30, 2), weight, order, order[:2], w, None, w, None, "relu")


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
    i_heavy, start, stop = by_load(p_offsets, i % EXPERTS, EXPERTS)
    tl.store(p_out + i * 6 + 0, i_expert)
    tl.store(p_out + i * 6 + 1, row)
    tl.store(p_out + i * 6 + 2, end)
    tl.store(p_out + i * 6 + 3, i_heavy)
    tl.store(p_out + i * 6 + 4, start)
    tl.store(p_out + i * 6 + 5, stop)


@triton.jit
def list_places_kernel(p_out, TILES_N: tl.constexpr, GROUP: tl.constexpr):
    i_m, i_n = swizzle(tl.program_id(0), tl.num_programs(0) // TILES_N, TILES_N, GROUP)
    tl.store(p_out + tl.program_id(0), i_m * TILES_N + i_n)


@pytest.mark.parametrize("counts", [[0], [5], [4, 4], [5, 0, 6], [0, 0, 9, 0, 1, 8, 0], [1] * 13, [3, 8, 5, 0, 0]])
def test_every_row_is_in_one_tile_of_its_expert(triton_interpreter, counts):
    offsets = torch.tensor([0, *counts]).cumsum(0)
    experts_total, rows, block = len(counts), sum(counts), 4
    programs = rows // block + experts_total
    found = torch.full((programs, 6), -7)
    list_tiles_kernel[(programs,)](offsets, found, experts_total, block)
    covered = []
    for expert, row, end, *_ in found.tolist():
        if row < end:
            assert end == offsets[expert + 1] and row >= offsets[expert] and (row - offsets[expert]) % block == 0
            covered += [(expert, r) for r in range(row, min(row + block, end))]
    assert covered == [(e, r) for e, (a, b) in enumerate(pairwise(offsets.tolist())) for r in range(a, b)]
    ranked = found[:experts_total, 3].tolist()
    assert ranked == sorted(range(experts_total), key=lambda e: (-counts[e], e))
    assert torch.equal(found[:experts_total, 4:], torch.stack([offsets[:-1], offsets[1:]], 1)[ranked])


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

    up = last_programs(experts_triton.up_kernel, tiles, 2)  # the last tile is a gap
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
    back, strides = last_programs(experts_triton.up_backward_kernel, tiles, 2), w_in.stride()
    back(grad_y, h, weight, order, offsets, w_in, grad_h, scaled, grad_weight, None, *strides, "relu",
         False, grad_weight.shape[1], *sizes, PIECE=1024, **options)  # fmt: skip
    grad_a = grad_y[token].float() @ w_in[1].float()
    close(grad_h[own], grad_a * (h[own] > 0))
    close(scaled[own], a[own])
    close(grad_weight[own, 0], (grad_a * a[own]).sum(1))

    grad_bias = far("grad_bias", experts_triton._row_tiles(rows, 2, 64), hidden, dtype=torch.float32)
    bias, programs = torch.randn(2, hidden, generator=rng).half(), len(grad_bias) * (hidden // 128)
    last_programs(experts_triton.bias_kernel, programs, 1)(
        grad_y, weight, order, offsets, bias, grad_weight, grad_bias, 1, grad_weight.shape[1], slots, 2, hidden, 64, 128
    )
    close(grad_weight[own, -1], (grad_y[token, -128:].float() * bias[1, -128:]).sum(1))
    close(grad_bias[-1, -128:], grad_y[token, -128:].float().sum(0))

    out = torch.zeros(2, hidden, width).half()
    outer = last_programs(outer_kernel, 2 * (hidden // 16), hidden // 16)  # expert 1 has fewer rows: it comes last
    outer(x, grad_h, order, offsets, out, True, slots, 2, hidden, width, "ieee", **options)
    close(out[1], x[token].float().t() @ grad_h[own].float())
    assert (out[0] == 0).all()


# ----------------------------------------------------------------------------------------------------------- on a GPU

needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


def gpu_problem(device, dtype, tokens=300, hidden=192, width=136, **options):
    x, routing, parameters, grad_y = cast(dtype, *mixture(tokens, hidden=hidden, width=width, **options))
    move = [None if each is None else each.to(device) for each in (x, *parameters, grad_y)]
    return move[0], Routing(*(each.detach().to(device) for each in routing)), tuple(move[1:5]), move[5]


def through_the_op(activation):
    return lambda x, routing, *parameters: experts(x, routing, *parameters, activation=activation)


def check_on(device, dtype, activation, **options):
    """The op on a device against float64, with the loop in the same dtype as the peer."""
    problem = mixture(300, hidden=192, width=136, activation=activation, **options)
    exact = by_autograd(in_torch(activation), *problem)
    low = gpu_problem(device, dtype, activation=activation, **options)
    peer = by_autograd(in_torch(activation), *cast(dtype, *problem))
    got = by_autograd(through_the_op(activation), *low)
    assert_as_good([None if each is None else each.cpu() for each in got], peer, exact)


class TestGpu:
    pytestmark = needs_cuda

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_values_and_gradients(self, activation, dtype):
        check_on("cuda", torch.float32 if activation == "relu" else dtype, activation)

    @pytest.mark.parametrize("options", [{"bias": False}, {"sizes": (33,), "top_k": 4, "shared": 0}], ids=str)
    def test_options(self, options):
        check_on("cuda", torch.bfloat16, "gelu_tanh", **options)

    @pytest.mark.parametrize("name", EDGES)
    def test_edges(self, name):
        problem = mixture(**{"activation": "swiglu", **EDGES[name]})
        exact, low = by_autograd(in_torch("swiglu"), *problem), cast(torch.float32, *problem)
        x, routing, parameters, grad_y = low
        moved = [None if each is None else each.cuda() for each in (x, *parameters, grad_y)]
        on_gpu = moved[0], Routing(*(each.cuda() for each in routing)), moved[1:5], moved[5]
        got = by_autograd(through_the_op("swiglu"), *on_gpu)
        got = [None if each is None else each.cpu() for each in got]
        assert_as_good(got, by_autograd(in_torch("swiglu"), *low), exact)

    def test_same_bits_on_every_run_and_under_compilation(self):
        problem = gpu_problem("cuda", torch.bfloat16, tokens=3000)
        first = by_autograd(through_the_op("gelu_tanh"), *problem)
        runs = [by_autograd(through_the_op("gelu_tanh"), *problem) for _ in range(3)]
        runs.append(by_autograd(torch.compile(through_the_op("gelu_tanh"), fullgraph=True), *problem))
        for run in runs:
            for name, a, b in zip(NAMES, first, run, strict=True):
                assert torch.equal(a, b), name

    def test_captured_with_its_backward(self):
        """A graph replayed with other tokens and another routing in its inputs gives what eager calls give."""
        x, routing, parameters, grad_y = gpu_problem("cuda", torch.bfloat16)
        leaves = [each.detach().clone().requires_grad_() for each in (x, routing.weight, *parameters)]

        def run():
            y = experts(leaves[0], routing._replace(weight=leaves[1]), *leaves[2:], activation="gelu_tanh")
            return y, *torch.autograd.grad(y, leaves, grad_y)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = run()
        logits = torch.zeros(300, 5)
        logits[:, 1] = logits[:, 4] = 5
        _, other, _, _ = gpu_problem("cuda", torch.bfloat16, logits=logits)
        with torch.no_grad():
            leaves[0].mul_(-1.5)
            leaves[1].copy_(other.weight)
            routing.order.copy_(other.order)
            routing.offsets.copy_(other.offsets)
        graph.replay()
        for name, a, b in zip(NAMES, outputs, run(), strict=True):
            assert torch.equal(a, b), name

    def test_nothing_waits_for_the_device(self):
        problem = gpu_problem("cuda", torch.bfloat16)
        by_autograd(through_the_op("gelu_tanh"), *problem)
        torch.cuda.set_sync_debug_mode("error")
        try:
            by_autograd(through_the_op("gelu_tanh"), *problem)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_the_gpu_checks_pass_where_they_can_run_here():
    """The body of the GPU tests on the CPU's implementation, so that it is the kernels that a GPU run tests."""
    check_on("cpu", torch.bfloat16, "swiglu", bias=False)
