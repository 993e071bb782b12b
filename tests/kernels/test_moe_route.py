"""route: choices, weights, statistics and losses against float64, the order of the slots, guards, and bad input."""

import pytest
import torch
from route_cases import CASES, RouteCase, ZerosMade, check

from unif2ace_kernels import _library
from unif2ace_kernels.moe import reference, route, route_torch

needs_ops = pytest.mark.skipif(
    _library.EXTENSION_MISSING is not None, reason=f"extension not built: {_library.EXTENSION_MISSING}"
)
native = torch.ops.unif2ace_native

OPTIONS = [
    {"scoring": scoring, "normalize": normalize, "group_sizes": sizes, "biased": biased}
    for scoring in ("softmax", "sigmoid")
    for normalize in (True, False)
    for sizes, biased in [((4, 4), False), ((3, 5), True)]
]


def make(tokens=30, group_sizes=(3, 5), biased=False, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    logits = torch.randn(tokens, sum(group_sizes), generator=rng, dtype=torch.float64).to(dtype)
    group_ids = torch.randint(len(group_sizes), (tokens,), generator=rng)
    bias = torch.randn(sum(group_sizes), generator=rng).double() if biased else None
    return logits, group_ids, bias


def objective(weight, balance_loss, z_loss):
    """A scalar that reads every differentiable output, so that its gradient checks all of them."""
    rng = torch.Generator().manual_seed(1)
    return (weight * torch.randn(weight.shape, generator=rng)).sum() + 2 * balance_loss + 3 * z_loss


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: "-".join(map(str, option.values())))
def test_values_and_gradients(option, dtype):
    option = dict(option)
    sizes = option.pop("group_sizes")
    logits, group_ids, bias = make(group_sizes=sizes, biased=option.pop("biased"), dtype=dtype)
    option |= {"balance_coef": (0.3, 0.7), "selection_bias": bias, "z_coef": 0.1}
    ours, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
    got, want = route(ours, group_ids, sizes, 2, **option), reference.route(exact, group_ids, sizes, 2, **option)
    assert torch.equal(got.expert, want["expert"])
    objective(got.weight, got.balance_loss, got.z_loss).backward()
    objective(want["weight"], want["balance_loss"], want["z_loss"]).backward()
    # Scores are computed in float32 whatever the logits are, so bfloat16 costs one rounding, of the gradient.
    tiny = 1e-12 if dtype == torch.float64 else 3e-6
    for name in ("weight", "frequency", "probability", "balance_loss", "z_loss"):
        assert getattr(got, name).dtype == torch.promote_types(dtype, torch.float32)
        assert getattr(got, name).requires_grad == (name != "frequency")
        assert (getattr(got, name) - want[name]).abs().max() <= tiny, name
    rounding = (exact.grad.to(dtype).double() - exact.grad).abs().max()
    assert (ours.grad - exact.grad).abs().max() <= 2 * rounding + tiny


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_gradcheck(scoring):
    logits, group_ids, _ = make(6)

    def outputs(logits):
        got = route(logits, group_ids, (3, 5), 2, shared=1, scoring=scoring, balance_coef=(0.5, 2.0), z_coef=0.1)
        return got.weight, got.probability, got.balance_loss, got.z_loss

    assert torch.autograd.gradcheck(outputs, logits.requires_grad_())


def test_order_offsets_counts():
    logits, group_ids, _ = make(40)
    routing = route(logits, group_ids, (3, 5), 2, shared=2)
    slots = routing.expert.flatten().tolist()
    assert routing.order.tolist() == sorted(range(len(slots)), key=slots.__getitem__)  # sorted() is stable
    assert routing.counts.tolist() == [slots.count(e) for e in range(8 + 4)]
    assert routing.offsets.tolist() == [sum(routing.counts[:e].tolist()) for e in range(13)]


def test_shared_experts_are_slots_of_weight_one_after_the_routed():
    logits, group_ids, _ = make(20)
    routing = route(logits, group_ids, (3, 5), 2, shared=2)
    assert torch.equal(routing.expert[:, 2:], 8 + 2 * group_ids[:, None] + torch.arange(2))
    assert (routing.weight[:, 2:] == 1).all()
    alone = route(logits, group_ids, (3, 5), 2)
    assert torch.equal(routing.expert[:, :2], alone.expert) and torch.equal(routing.frequency, alone.frequency)


def test_tokens_see_their_own_group_only():
    logits, group_ids, _ = make(40)
    routing = route(logits, group_ids, (3, 5), 3)
    assert torch.equal((routing.expert >= 3).all(1), group_ids == 1)
    assert torch.equal((routing.expert < 3).all(1), group_ids == 0)
    foreign = logits.clone()
    foreign[:, :3][group_ids == 1] = float("nan")
    assert torch.equal(route(foreign, group_ids, (3, 5), 3).weight, routing.weight)


def test_uniform_scores_cost_the_coefficient():
    routing = route(torch.zeros(12, 8), torch.arange(12) % 2, (4, 4), 2, balance_coef=(0.01, 0.02))
    assert routing.balance_loss.item() == pytest.approx(0.03)


def test_one_expert_for_all_costs_its_groups_size():
    logits = torch.zeros(10, 4)
    logits[:, 2] = 50
    routing = route(logits, torch.zeros(10).long(), (4,), 1, balance_coef=1.0)
    assert routing.frequency.tolist() == [0, 0, 4, 0]
    assert routing.balance_loss.item() == pytest.approx(4)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_a_group_without_tokens(scoring):
    logits = torch.randn(6, 8, requires_grad=True)
    routing = route(logits, torch.ones(6).long(), (3, 5), 2, scoring=scoring, balance_coef=1.0, z_coef=0.1)
    (routing.balance_loss + routing.z_loss + routing.weight[:, 0].sum()).backward()
    assert (routing.frequency[:3] == 0).all() and (routing.probability[:3] == 0).all()
    assert routing.balance_loss.isfinite() and logits.grad.isfinite().all()
    assert (logits.grad[:, :3] == 0).all() and (logits.grad[:, 3:] != 0).any()


@pytest.mark.parametrize("tokens", [0, 1, 7])
def test_few_tokens(tokens):
    logits = torch.randn(tokens, 8, requires_grad=True)
    routing = route(logits, torch.zeros(tokens).long(), (4, 4), 2, shared=1, balance_coef=1.0, z_coef=0.1)
    (routing.balance_loss + routing.z_loss).backward()
    assert routing.expert.shape == (tokens, 3) and routing.counts.sum() == 3 * tokens
    assert routing.balance_loss.isfinite() and logits.grad.isfinite().all()


def test_bias_selects_and_does_not_weigh():
    logits, group_ids = torch.tensor([[3.0, 2.0, 0.0, -1.0]]), torch.zeros(1).long()
    bias = torch.tensor([0.0, 0, 0, 9], requires_grad=True)
    routing = route(logits, group_ids, (4,), 2, scoring="sigmoid", normalize=False, selection_bias=bias)
    assert routing.expert.tolist() == [[3, 0]] and not routing.weight.requires_grad
    torch.testing.assert_close(routing.weight, torch.tensor([[-1.0, 3.0]]).sigmoid())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_logits_stay_with_their_token(bad):
    logits, group_ids, _ = make(30, dtype=torch.float32)
    clean = route(logits, group_ids, (3, 5), 2)
    logits[11] = bad
    routing = route(logits, group_ids, (3, 5), 2)
    others = torch.arange(30) != 11
    assert torch.equal(routing.weight[others], clean.weight[others]) and not routing.weight[11].isfinite().any()
    low = 3 * group_ids[11]
    assert (routing.expert[11] >= low).all() and (routing.expert[11] < low + 3 + 2 * group_ids[11]).all()


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0, 1e4], [-1e4, -1e4, -1e4, -1e4]], requires_grad=True)
    for scoring in ("softmax", "sigmoid"):
        routing = route(logits, torch.zeros(2).long(), (4,), 2, scoring=scoring, balance_coef=1.0)
        (gradient,) = torch.autograd.grad(routing.weight[:, 0].sum() + routing.balance_loss, logits)
        assert routing.weight.isfinite().all() and gradient.isfinite().all()


def test_bitwise_repeatable_and_strided():
    logits, group_ids, _ = make(50, dtype=torch.float32)
    strided = logits.t().contiguous().t()
    runs = [route(each, group_ids, (3, 5), 2, balance_coef=1.0) for each in (logits, logits, strided)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@needs_ops
def test_cpp(case):
    check(case, native.moe_route.default, native.moe_route_backward.default)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_torch(case):
    check(case, route_torch.forward, route_torch.backward)


@needs_ops
@pytest.mark.parametrize("name", ["sigmoid, biased", "softmax, biased", "many groups", "raw weights"])
def test_cpp_in_float64(name):
    case = next(case for case in CASES if case.name == name)
    logits, *rest = case.arguments()
    arguments = logits.double(), *rest
    ours, plain = native.moe_route(*arguments), route_torch.forward(*arguments)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    gradients = [torch.randn_like(each) for each in (plain[0], plain[6], plain[7], plain[8])]
    given = *gradients, *arguments[:2], plain[1], plain[2], *arguments[2:4], *arguments[5:8], case.z_coef
    torch.testing.assert_close(native.moe_route_backward(*given), route_torch.backward(*given), rtol=1e-12, atol=1e-12)


@needs_ops
def test_cpp_gives_the_same_bits_on_any_number_of_threads():
    arguments = RouteCase("threads", tokens=1000, sizes=(7, 9)).arguments()
    runs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs.append(native.moe_route(*arguments))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@needs_ops
def test_cpp_refuses_what_would_lead_out_of_bounds():
    logits, ids, *rest = RouteCase("bad ids").arguments()
    with pytest.raises(RuntimeError, match=r"group_ids: expected values in \[0, 2\)"):
        native.moe_route(logits, ids + 1, *rest)
    routing = native.moe_route(logits, ids, *rest)
    given = torch.ones(60, 3), None, None, None, logits, ids
    options = [3, 5], 2, [0.1, 0.1], True, "softmax", 0.0
    with pytest.raises(RuntimeError, match="expert: expected those of the token's group"):
        native.moe_route_backward(*given, routing[1] + 5, routing[2], *options)
    with pytest.raises(RuntimeError, match="counts: expected contiguous int64"):
        native.moe_route_backward(*given, routing[1], routing[2][1:], *options)


def test_backward_is_handed_no_zeros_for_what_nothing_reads():
    logits, group_ids, _ = make(20)
    weight = route(logits.requires_grad_(), group_ids, (3, 5), 2, balance_coef=0.1, z_coef=0.1).weight
    with ZerosMade() as made:
        weight.backward(weight.detach())
    assert made.sizes == [] and (logits.grad != 0).any()


def test_second_derivatives_are_refused():
    logits, ids, _ = make(12)
    (gradient,) = torch.autograd.grad(
        route(logits.requires_grad_(), ids, (3, 5), 2).weight[:, 0].sum(), logits, create_graph=True
    )
    with pytest.raises(RuntimeError, match="moe_route_backward cannot be differentiated"):
        gradient.sum().backward()


def test_explain_says_what_runs():
    explanation = _library.explain("moe_route", torch.empty(1))
    assert explanation.implementation == ("c++" if _library.EXTENSION_MISSING is None else "torch")
    assert _library.explain("moe_route_backward", torch.empty(1)).implementation == explanation.implementation


def test_opcheck():
    logits, group_ids, bias = make(12, biased=True, dtype=torch.float32)
    arguments = logits.requires_grad_(), group_ids, [3, 5], 2, 1, [0.1, 0.2], True, "softmax", bias.float(), 0.1
    torch.library.opcheck(torch.ops.unif2ace.moe_route.default, arguments)
    routing = route(logits.detach(), group_ids, (3, 5), 2, shared=1)
    gradients = torch.randn(12, 3), torch.randn(8), torch.tensor(1.0), torch.tensor(1.0)
    state = logits.detach(), group_ids, routing.expert, routing.counts
    options = [3, 5], 2, [0.1, 0.2], True, "softmax", 0.1
    torch.library.opcheck(torch.ops.unif2ace.moe_route_backward.default, (*gradients, *state, *options))


@pytest.mark.parametrize(
    ("name", "arguments", "options"),
    [
        ("logits", (torch.zeros(4, 7), torch.zeros(4).long(), (3, 5), 2), {}),
        ("logits", (torch.zeros(4, 8).long(), torch.zeros(4).long(), (3, 5), 2), {}),
        ("group_ids", (torch.zeros(4, 8), torch.zeros(5).long(), (3, 5), 2), {}),
        ("group_ids", (torch.zeros(4, 8), torch.zeros(4), (3, 5), 2), {}),
        ("group_ids", (torch.zeros(4, 8), torch.full((4,), 2), (3, 5), 2), {}),
        ("group_ids", (torch.zeros(4, 8), torch.full((4,), -1), (3, 5), 2), {}),
        ("group_sizes", (torch.zeros(4, 3), torch.zeros(4).long(), (3, 0), 2), {}),
        ("top_k", (torch.zeros(4, 8), torch.zeros(4).long(), (3, 5), 4), {}),
        ("top_k", (torch.zeros(4, 8), torch.zeros(4).long(), (3, 5), 0), {}),
        ("shared", (torch.zeros(4, 8), torch.zeros(4).long(), (3, 5), 2), {"shared": -1}),
        ("balance_coef", (torch.zeros(4, 8), torch.zeros(4).long(), (3, 5), 2), {"balance_coef": (1.0,)}),
        ("scoring", (torch.zeros(4, 8), torch.zeros(4).long(), (3, 5), 2), {"scoring": "tanh"}),
        ("selection_bias", (torch.zeros(4, 8), torch.zeros(4).long(), (3, 5), 2), {"selection_bias": torch.zeros(3)}),
    ],
)
def test_bad_input_is_named(name, arguments, options):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        route(*arguments, **options)
