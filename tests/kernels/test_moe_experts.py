"""experts: values and gradients against float64, edges, locality, repeatability, and what torch asks of an op."""

import pytest
import torch
from route_cases import Called, ZerosMade

from unif2ace_kernels._library import explain, runnable
from unif2ace_kernels.moe import experts, reference, route
from unif2ace_kernels.moe.activation_torch import ACTIVATIONS, GATED

TINY = 1e-6  # eight roundings of float32


def make(tokens, *, sizes=(3, 5), top_k=2, shared=1, activation="gelu_tanh", bias=True, logits=None, groups=None,
         hidden=12, width=7):  # fmt: skip
    """x, routing and parameters (w_in, b_in, w_out, b_out) of a small mixture in float64, outputs of order 1."""
    rng = torch.Generator().manual_seed(0)
    total = sum(sizes) + shared * len(sizes)
    double = {"dtype": torch.float64, "generator": rng}
    groups = torch.randint(len(sizes), (tokens,), generator=rng) if groups is None else groups
    logits = 2 * torch.randn(tokens, sum(sizes), **double) if logits is None else logits.double()
    routing = route(logits, groups, sizes, top_k, shared=shared)
    in_width = width * (2 if activation in GATED else 1)
    x = torch.randn(tokens, hidden, **double)
    w_in = torch.randn(total, hidden, in_width, **double) / hidden**0.5
    b_in = torch.randn(total, in_width, **double) if bias else None
    w_out = torch.randn(total, width, hidden, **double) / width**0.5
    b_out = torch.randn(total, hidden, **double) if bias else None
    return x, routing, (w_in, b_in, w_out, b_out)


def outcome(function, dtype, x, weight, parameters):
    """y and the gradients of weight, x and the parameters, as float64."""
    leaves = [None if each is None else each.detach().to(dtype).requires_grad_() for each in (x, *parameters)]
    weight = weight.detach().to(torch.promote_types(dtype, torch.float32), copy=True).requires_grad_()
    y = function(leaves[0], weight, *leaves[1:])
    grad_y = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y.backward(grad_y.to(dtype))
    inputs = [each for each in (weight, *leaves) if each is not None]
    # Without tokens the reference's graph does not reach the parameters: their gradient is zero.
    return [y.detach().double()] + [
        torch.zeros_like(each) if each.grad is None else each.grad.double() for each in inputs
    ]


def ours(routing, activation):
    return lambda x, weight, *parameters: experts(
        x, routing._replace(weight=weight), *parameters, activation=activation
    )


def truth(routing, activation):
    return lambda x, weight, *parameters: reference.experts(
        x, routing.expert, weight.to(x.dtype), *parameters, activation
    )


def by_implementation(name):
    """moe_experts by the CPU implementation of that name, whichever is installed."""
    forward, backward = (
        next(each.function for each in runnable(op, "cpu") if each.name == name)
        for op in ("moe_experts", "moe_experts_backward")
    )

    class Experts(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, order, offsets, w_in, b_in, w_out, b_out, activation):
            y, h = forward(x, weight, order, offsets, w_in, b_in, w_out, b_out, activation)
            ctx.save_for_backward(x, h, weight, order, offsets, w_in, w_out, b_out)
            ctx.options = b_in is not None, activation
            return y

        @staticmethod
        def backward(ctx, grad_y):
            grad_x, weight, w_in, b_in, w_out, b_out = backward(grad_y, *ctx.saved_tensors, *ctx.options)
            b_in, b_out = (None if each.shape[0] == 0 else each for each in (b_in, b_out))
            return grad_x, weight, None, None, w_in, b_in, w_out, b_out, None

    def of(routing, activation):
        def call(x, weight, *parameters):
            return Experts.apply(x, weight, routing.order, routing.offsets, *parameters, activation)

        return call

    return of


def assert_as_good(x, routing, parameters, activation="gelu_tanh", dtype=torch.float32, ours=ours):
    """err(ours) <= 2 err(same-dtype torch) + tiny of the largest, both against float64, for y and every gradient."""
    exact = outcome(truth(routing, activation), torch.float64, x, routing.weight, parameters)
    peer = outcome(truth(routing, activation), dtype, x, routing.weight, parameters)
    got = outcome(ours(routing, activation), dtype, x, routing.weight, parameters)
    assert len(got) == len(exact) > 4
    for index, (e, p, g) in enumerate(zip(exact, peer, got, strict=True)):
        assert g.shape == e.shape
        if e.numel():
            tiny = TINY * e.abs().max().clamp(min=1)  # torch's error of a few sums may be 0 by luck
            assert (g - e).abs().max() <= 2 * (p - e).abs().max() + tiny, f"output {index}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_values_and_gradients(activation, dtype):
    if activation == "relu":
        dtype = torch.float32  # a pre-activation rounded across 0 has another gradient, however good the code is
    assert_as_good(*make(50, activation=activation), activation, dtype)


@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_without_bias(activation):
    assert_as_good(*make(50, activation=activation, bias=False), activation)


@pytest.mark.parametrize("activation", [each for each in ACTIVATIONS if each not in GATED])
def test_activations_and_slopes_keep_their_digits_far_out(activation):
    """One expert of width 1 whose weights are 1, so that y and the gradient of x are the activation and its slope."""
    x = torch.linspace(-14, 14, 4001)[:, None]
    routing = route(torch.zeros(len(x), 1), torch.zeros(len(x)).long(), [1], 1)
    ones = torch.ones(1, 1, 1)

    def curves(function, dtype):
        leaf = x.to(dtype).requires_grad_()
        y = function(leaf, routing.weight.to(dtype), ones.to(dtype), None, ones.to(dtype), None)
        return y.detach().double(), torch.autograd.grad(y.sum(), leaf)[0].double()

    for got, exact in zip(
        curves(ours(routing, activation), torch.float32),
        curves(truth(routing, activation), torch.float64),
        strict=True,
    ):
        torch.testing.assert_close(got, exact, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("activation", [each for each in ACTIVATIONS if each not in GATED])
def test_slopes_beyond_all_curves(activation):
    """Where a cube of x is as large as the smallest normal number is small, the slope is still 0 or 1."""
    x = torch.tensor([[-1e13], [1e13]], requires_grad=True)
    routing, ones = route(torch.zeros(2, 1), torch.zeros(2).long(), [1], 1), torch.ones(1, 1, 1)
    ours(routing, activation)(x, routing.weight, ones, None, ones, None).sum().backward()
    assert x.grad.tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_few_tokens(tokens):
    assert_as_good(*make(tokens))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_mixed_groups_and_a_group_without_tokens(share):
    assert_as_good(*make(40, groups=(torch.arange(40) < 40 * share).long()))


def test_all_experts_chosen():
    assert_as_good(*make(20, sizes=(3, 3), top_k=3))


def test_every_token_on_one_expert():
    logits = torch.zeros(64, 6)
    logits[:, 4] = 9
    x, routing, parameters = make(64, sizes=(6,), top_k=1, shared=0, logits=logits, groups=torch.zeros(64).long())
    assert routing.counts.tolist() == [0, 0, 0, 0, 64, 0]
    assert_as_good(x, routing, parameters)


def test_zipf_load():
    logits = -torch.arange(1.0, 12).log() * 2 + torch.rand(120, 11, generator=torch.Generator().manual_seed(0))
    x, routing, parameters = make(120, sizes=(11,), logits=logits, groups=torch.zeros(120).long())
    assert routing.counts[:11].max() > 10 * routing.counts[:11].float().median()
    assert_as_good(x, routing, parameters)
    assert_as_good(x, routing, parameters, dtype=torch.bfloat16)


def test_empty_experts_get_zero_gradients():
    x, routing, parameters = make(30, groups=torch.zeros(30).long())
    leaves = [each.clone().requires_grad_() for each in parameters]
    torch.use_deterministic_algorithms(True)  # torch.empty is then full of NaN, so that what nobody writes shows
    try:
        experts(x, routing, *leaves, activation="gelu").sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    empty = routing.counts == 0
    assert empty.any() and not empty.all()
    for each in leaves:
        assert (each.grad[empty] == 0).all() and (each.grad[~empty] != 0).any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation):
    x, routing, parameters = make(5, sizes=(2, 2), activation=activation)
    inputs = [each.detach().requires_grad_() for each in (x, routing.weight, *parameters)]
    assert torch.autograd.gradcheck(ours(routing, activation), inputs)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_values_stay_with_their_token(bad, dtype):
    x, routing, parameters = make(50)
    parameters = [each.to(dtype).requires_grad_() for each in parameters]
    x = x.to(dtype)
    clean = experts(x, routing, *parameters, activation="gelu_tanh")
    x[17] = bad
    x.requires_grad_()
    y = experts(x, routing, *parameters, activation="gelu_tanh")
    y.sum().backward()
    others = torch.arange(50) != 17
    assert not y[17].isfinite().all()
    assert torch.equal(y[others], clean[others])
    assert x.grad[others].isfinite().all()
    untouched = torch.ones(len(routing.counts), dtype=torch.bool)
    untouched[routing.expert[17]] = False
    assert all(each.grad[untouched].isfinite().all() for each in parameters)


def test_bitwise_repeatable():
    x, routing, parameters = make(200, sizes=(4, 4))
    runs = [outcome(ours(routing, "gelu_tanh"), torch.float32, x, routing.weight, parameters) for _ in range(3)]
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))


def test_strided_inputs():
    x, routing, parameters = make(30)
    strided = [each.transpose(0, -1).contiguous().transpose(0, -1) for each in (x, *parameters)]
    assert not any(each.is_contiguous() for each in strided)
    y = experts(strided[0], routing, *strided[1:], activation="gelu_tanh")
    torch.testing.assert_close(y, experts(x, routing, *parameters, activation="gelu_tanh"))
    got = outcome(ours(routing, "gelu_tanh"), torch.float64, strided[0], routing.weight, strided[1:])
    want = outcome(ours(routing, "gelu_tanh"), torch.float64, x, routing.weight, parameters)
    torch.testing.assert_close(got, want)


def test_saves_x_h_and_routing_only():
    x, routing, parameters = make(40)
    leaves = [each.clone().requires_grad_() for each in (x, *parameters)]
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t):
        experts(leaves[0], routing, *leaves[1:], activation="gelu_tanh")
    rows, width = len(routing.order), parameters[2].shape[1]
    weights = sum(each.numel() for each in (parameters[0], parameters[2], parameters[3]))
    assert sum(sizes) == x.numel() + rows * width + 2 * rows + len(routing.offsets) + weights


@pytest.mark.filterwarnings("error:An output with one or more elements was resized")  # too little room for h
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
@pytest.mark.parametrize("name", ["c++", "torch"])
def test_without_a_backward_h_is_not_kept(name, activation):
    """Rows of two experts, more than one block of them, in a dtype whose rows are padded."""
    forward = {each.name: each.function for each in runnable("moe_experts", "cpu")}.get(name)
    if forward is None:
        pytest.skip("extension not built")
    x, routing, parameters = make(90, sizes=(2,), shared=0, activation=activation, width=300)
    x, *parameters = (each.bfloat16() for each in (x, *parameters))
    given = x, routing.weight.float(), routing.order, routing.offsets, *parameters, activation
    y, h = forward(*given, False)
    assert h.shape == (0, parameters[0].shape[2])
    for rest in ([True], []):
        kept_y, h = forward(*given, *rest)
        assert torch.equal(kept_y, y) and h.shape == (len(routing.order), parameters[0].shape[2])


def test_h_is_kept_where_something_asks_for_gradients():
    x, routing, parameters = make(20)
    routing = routing._replace(weight=routing.weight.detach())
    with Called("unif2ace::moe_experts") as called:
        experts(x, routing, *parameters, activation="gelu_tanh")
        for leaf in (x, routing.weight, *parameters):
            leaf.requires_grad_()
            experts(x, routing, *parameters, activation="gelu_tanh").sum().backward()
            with torch.no_grad():
                experts(x, routing, *parameters, activation="gelu_tanh")
            leaf.requires_grad_(False)
    assert [len(h) for _, h in called.results] == [0, *[60, 0] * 6]


def test_a_backward_without_h_is_refused():
    x, routing, parameters = make(20)
    given = x.requires_grad_(), routing.weight.detach(), routing.order, routing.offsets, *parameters, "gelu_tanh"
    y, _ = torch.ops.unif2ace.moe_experts(*given, False)
    with pytest.raises(RuntimeError, match="keep_h=True where a backward follows"):
        y.sum().backward()


def test_backward_is_handed_no_zeros_for_what_nothing_reads():
    """h, the second output of the op, has no gradient; zeros in its place would be as large as h."""
    x, routing, parameters = make(20)
    y = experts(x.requires_grad_(), routing, *parameters, activation="gelu_tanh")
    with ZerosMade() as made:
        y.backward(torch.ones_like(y))
        assert made.sizes == []
        torch.zeros(3)
    assert made.sizes == [3]  # it does see them


def test_no_gradient_gives_none():
    class Passed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.sum()

        @staticmethod
        def backward(ctx, grad):
            return None

    x, routing, parameters = make(5)
    Passed.apply(experts(x.requires_grad_(), routing, *parameters, activation="gelu_tanh")).backward()
    assert x.grad is None


def test_autocast_computes_in_bfloat16():
    x, routing, parameters = make(40)
    x, *parameters = (each.float() for each in (x, *parameters))
    with torch.autocast("cpu", torch.bfloat16):
        y = experts(x, routing, *parameters, activation="gelu_tanh")
    low = [each.bfloat16() for each in (x, *parameters)]
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, experts(low[0], routing, *low[1:], activation="gelu_tanh"))


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(bias):
    x, routing, parameters = make(20, bias=bias)
    leaves = [None if each is None else each.requires_grad_() for each in parameters]
    weight = routing.weight.detach().requires_grad_()
    arguments = x.requires_grad_(), weight, routing.order, routing.offsets, *leaves, "gelu_tanh"
    torch.library.opcheck(torch.ops.unif2ace.moe_experts.default, arguments)
    without = [each.detach() if isinstance(each, torch.Tensor) else each for each in arguments]
    torch.library.opcheck(torch.ops.unif2ace.moe_experts.default, (*without, False))
    backward = torch.randn_like(x), x, x.new_zeros(60, 7), weight, routing.order, routing.offsets
    backward = [each.detach() for each in (*backward, leaves[0], leaves[2])] + [leaves[3], bias, "gelu_tanh"]
    torch.library.opcheck(
        torch.ops.unif2ace.moe_experts_backward.default,
        [each.detach() if isinstance(each, torch.Tensor) else each for each in backward],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", ["c++", "torch"])
def test_every_implementation(name, activation, dtype):
    """Also the one that is not installed; rows wider than a tile and more than a block of them."""
    if name not in [each.name for each in runnable("moe_experts", "cpu")]:
        pytest.skip("extension not built")
    dtype = torch.float32 if activation == "relu" and dtype.itemsize == 2 else dtype  # as in test_values_and_gradients
    bias = activation != "geglu"
    made = make(90, sizes=(2,), shared=0, activation=activation, bias=bias, hidden=270, width=300)
    assert_as_good(*made, activation, dtype, by_implementation(name))


@pytest.mark.parametrize("skew", [0.0, 3.0])
def test_threads_share_the_experts(skew):
    """More threads than one: experts side by side, the longest together; nothing but rounding changes."""
    logits = torch.randn(300, 11, generator=torch.Generator().manual_seed(0)) - skew * torch.arange(1.0, 12).log()
    x, routing, parameters = make(300, sizes=(11,), logits=logits, groups=torch.zeros(300).long(), shared=0)
    alone = outcome(ours(routing, "gelu_tanh"), torch.float32, x, routing.weight, parameters)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        runs = [outcome(ours(routing, "gelu_tanh"), torch.float32, x, routing.weight, parameters) for _ in range(4)]
        torch.testing.assert_close(runs[0], alone, atol=1e-5, rtol=1e-5)
        assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))


def test_compiles_whole():
    x, routing, parameters = make(20)
    function = ours(routing, "gelu_tanh")
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    want = outcome(function, torch.float64, x, routing.weight, parameters)
    torch.testing.assert_close(outcome(compiled, torch.float64, x, routing.weight, parameters), want)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda x, w_in, b_in, w_out, b_out: (x[0], w_in, b_in, w_out, b_out)),
        ("routing.weight", lambda x, w_in, b_in, w_out, b_out: (x[1:], w_in, b_in, w_out, b_out)),
        ("w_in", lambda x, w_in, b_in, w_out, b_out: (x, w_in[1:], b_in, w_out, b_out)),
        ("w_in", lambda x, w_in, b_in, w_out, b_out: (x, w_in.float(), b_in, w_out, b_out)),
        ("b_in", lambda x, w_in, b_in, w_out, b_out: (x, w_in, b_in[:, 1:], w_out, b_out)),
        ("w_out", lambda x, w_in, b_in, w_out, b_out: (x, w_in, b_in, w_out[:, :, 1:], b_out)),
        ("b_out", lambda x, w_in, b_in, w_out, b_out: (x, w_in, b_in, w_out, b_out[1:])),
    ],
)
def test_bad_input_is_named(name, change):
    x, routing, parameters = make(10)
    x, *parameters = change(x, *parameters)
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        experts(x, routing, *parameters, activation="gelu_tanh")


def test_unknown_activation():
    x, routing, parameters = make(10)
    with pytest.raises(ValueError, match="^activation: expected one of 'gelu_tanh'.* got 'tanh'"):
        experts(x, routing, *parameters, activation="tanh")


def test_explain():
    assert explain("moe_experts").implementation in ("c++", "torch")
    assert explain("moe_experts_backward").implementation == explain("moe_experts").implementation


def test_second_derivative_is_refused():
    x, routing, parameters = make(10)
    leaves = [each.requires_grad_() for each in (x, *parameters)]
    y = experts(leaves[0], routing, *leaves[1:], activation="gelu_tanh")
    (grad_x,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="moe_experts_backward cannot be differentiated"):
        grad_x.sum().backward()
