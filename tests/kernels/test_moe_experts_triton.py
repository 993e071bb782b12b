"""The experts in Triton, interpreted end to end against float64."""

import pytest
import torch

pytest.importorskip("triton", reason="needs Triton")

from experts_cases import EDGES, NAMES, cast, check, in_triton, mixture, small  # noqa: E402

from unif2ace_kernels._triton import float32_precision  # noqa: E402
from unif2ace_kernels.moe import experts_triton  # noqa: E402
from unif2ace_kernels.moe.activation_torch import ACTIVATIONS  # noqa: E402
from unif2ace_kernels.moe.configs import Launch  # noqa: E402

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


def test_sums_over_many_steps_are_rounded_once(triton_interpreter):
    """Positive numbers, whose sum outgrows a step of it: rounded to 16 bits at each step it would stay behind."""
    rows, features = 512, 16
    offsets = torch.tensor([0, rows])
    order, by_load = torch.arange(rows), torch.zeros(1, dtype=torch.int32)
    a, b = (torch.rand(rows, features).half() + 0.5 for _ in range(2))
    like = torch.empty(1, features, features, dtype=torch.float16)
    outer = experts_triton._outer(a, b, True, order, offsets, by_load, 1, like, small)
    assert_rounded_once(outer[0], a.double().t() @ b.double())
    weight = b[None]
    product = experts_triton._rows_times_weight(
        a.t().contiguous(), order[:16], offsets.clamp(max=16), weight, None, small
    )
    assert_rounded_once(product, a.double().t() @ b.double())


def assert_rounded_once(got, exact):
    """By half a unit in the last place, and as much again for the float32 sum."""
    assert got.dtype == torch.float16 and ((got.double() - exact).abs() <= 2**-11 * exact + 2**-18 * exact).all()


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


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_without_a_backward_h_is_not_kept(triton_interpreter, activation):
    x, routing, parameters, _ = cast(torch.float32, *mixture(20, activation=activation))
    given = x, routing.weight, routing.order, routing.offsets, *parameters, activation
    y, h = experts_triton.forward(*given, False, choose=small)
    assert h.shape == (0, parameters[0].shape[2])
    assert torch.equal(y, experts_triton.forward(*given, choose=small)[0])


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
    # Its own offsets fit in 32 bits, the step to the next 128 rows, which a tile takes, does not.
    step = torch.empty_strided((1, 6, 8), (0, 2**24, 1), device="meta")
    assert experts_triton._matrices(step).is_contiguous()


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
