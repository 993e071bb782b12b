"""moe.route, experts, mix and GroupedMoE on any shape, layout and value, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from values import any_values, assert_as_good, dtypes, generator, laid_out, layouts, ordinary, seeds, values

from unif2ace_kernels import moe
from unif2ace_kernels.moe import reference
from unif2ace_kernels.moe.activation_torch import ACTIVATIONS, GATED

pytestmark = pytest.mark.usefixtures("implementation")
FEW_TOKENS = st.sampled_from([0, 1, 2, 3, 5, 9, 17, 33])
GROUP_SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=4)


@st.composite
def routings(draw):
    """Keyword arguments of `moe.route` beside logits and group ids, and (tokens, group ids)."""
    sizes = draw(GROUP_SIZES)
    tokens, rng = draw(FEW_TOKENS), generator(draw(seeds))
    ids = torch.randint(draw(st.integers(1, len(sizes))), (tokens,), generator=rng)
    ids = ids.to(draw(st.sampled_from([torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8])))
    options = {
        "group_sizes": sizes,
        "top_k": draw(st.integers(1, min(sizes))),
        "shared": draw(st.integers(0, 2)),
        "balance_coef": draw(st.sampled_from([0.0, 0.3, [0.1 * (g + 1) for g in range(len(sizes))]])),
        "normalize": draw(st.booleans()),
        "scoring": draw(st.sampled_from(["softmax", "sigmoid"])),
        "z_coef": draw(st.sampled_from([0.0, 0.1])),
    }
    return laid_out(ids, draw(st.sampled_from(["contiguous", "every second", "offset"]))), options


def expect_consistent(routing: moe.Routing, ids: torch.Tensor, options: dict) -> None:
    """What holds whatever the logits are: K distinct experts of the token's own group, counted and in order."""
    sizes, k, shared = options["group_sizes"], options["top_k"], options["shared"]
    routed, first = sum(sizes), torch.tensor([0, *sizes]).cumsum(0)
    ids = ids.long()
    chosen = routing.expert[:, :k]
    assert (chosen >= first[ids][:, None]).all() and (chosen < first[ids + 1][:, None]).all()
    assert all(len(set(row)) == k for row in chosen.tolist())
    always = routed + shared * ids[:, None] + torch.arange(shared)
    assert torch.equal(routing.expert[:, k:], always) and (routing.weight[:, k:] == 1).all()
    flat = routing.expert.flatten()
    assert torch.equal(routing.counts, flat.bincount(minlength=routed + shared * len(sizes)))
    assert torch.equal(routing.offsets, torch.tensor([0, *routing.counts.cumsum(0).tolist()]))
    assert torch.equal(routing.order, flat.sort(stable=True).indices)


def by_reference(logits, ids, options, cotangents, dtype):
    """The reference's outputs and the gradient of the logits, computed in `dtype`."""
    leaf = logits.detach().to(dtype).requires_grad_()
    given = {key: value for key, value in options.items() if key not in ("group_sizes", "top_k", "shared")}
    coef = given.pop("balance_coef")
    coef = [coef] * len(options["group_sizes"]) if isinstance(coef, float) else coef
    out = reference.route(leaf, ids.long(), options["group_sizes"], options["top_k"], balance_coef=coef, **given)
    weight, balance, z = (each.to(dtype) for each in cotangents)
    total = (out["weight"] * weight).sum() + out["balance_loss"] * balance + out["z_loss"] * z
    gradient = torch.autograd.grad(total, leaf, allow_unused=True)[0] if total.requires_grad else None
    return out, torch.zeros_like(leaf) if gradient is None else gradient


def separated(logits: torch.Tensor, ids: torch.Tensor, options: dict, bias: torch.Tensor) -> bool:
    """No two of a token's biased scores are so near that their rounding could order them."""
    first = 0
    for g, size in enumerate(options["group_sizes"]):
        own = logits[ids == g, first : first + size].double()
        score = own.softmax(-1) if options["scoring"] == "softmax" else own.sigmoid()
        by = (score + bias.double()[first : first + size]).sort(-1).values
        if (by.diff(dim=-1) < 1e-5).any():
            return False
        first += size
    return True


@given(routings(), dtypes, layouts, ordinary, st.booleans(), seeds)
def test_route_is_the_reference(routing_case, dtype, layout, kind, biased, seed):
    ids, options = routing_case
    rng = generator(seed)
    logits = values(rng, (len(ids), sum(options["group_sizes"])), kind)
    if (
        options["scoring"] == "sigmoid" or biased
    ):  # the op guards quotients of scores near 1e-20, the reference does not
        logits = logits.clamp(-10, 10)
    logits = laid_out(logits.to(dtype), layout)
    bias = torch.randn(sum(options["group_sizes"]), generator=rng) if biased else None
    if biased:
        assume(separated(logits, ids, options, bias))
    leaf = logits.detach().requires_grad_()
    routing = moe.route(leaf, ids, **options, selection_bias=bias)
    expect_consistent(routing, ids, options)
    cotangents = torch.randn(len(ids), options["top_k"], generator=rng), torch.tensor(2.0), torch.tensor(3.0)
    k = options["top_k"]
    total = (routing.weight[:, :k] * cotangents[0]).sum() + 2 * routing.balance_loss + 3 * routing.z_loss
    (gradient,) = torch.autograd.grad(total, leaf)
    wide = torch.promote_types(dtype, torch.float32)
    biases = {"selection_bias": None if bias is None else bias.double()}
    exact, exact_gradient = by_reference(logits, ids, options | biases, cotangents, torch.float64)
    biases = {"selection_bias": None if bias is None else bias.to(wide)}
    peer, peer_gradient = by_reference(logits, ids, options | biases, cotangents, wide)
    assert torch.equal(routing.expert[:, :k], exact["expert"])
    assert_as_good(routing.weight[:, :k], peer["weight"], exact["weight"], "weight", dtype=wide)
    for name in ("frequency", "probability", "balance_loss", "z_loss"):
        assert_as_good(getattr(routing, name), peer[name], exact[name], name, dtype=wide)
    assert gradient.dtype == dtype
    assert_as_good(gradient, peer_gradient.to(dtype), exact_gradient, "gradient", dtype=dtype)


@given(routings(), dtypes, any_values, any_values, seeds)
def test_route_survives_any_logits(routing_case, dtype, kind, bias_kind, seed):
    ids, options = routing_case
    rng, columns = generator(seed), sum(options["group_sizes"])
    leaf = values(rng, (len(ids), columns), kind).to(dtype).requires_grad_()
    bias = None if bias_kind == "normal" else values(rng, (columns,), bias_kind).float()
    routing = moe.route(leaf, ids, **options, selection_bias=bias)
    expect_consistent(routing, ids, options)
    (routing.weight.sum() + routing.balance_loss + routing.z_loss).backward()
    clean = leaf.detach().isfinite().all(1)
    if kind not in ("huge",) and not options["z_coef"] and options["balance_coef"] == 0.0:
        # Of weights alone, bad values stay in their own rows.
        assert routing.weight[clean].isfinite().all() and leaf.grad[clean].isfinite().all()


@st.composite
def mixtures(draw):
    """(x, routing, parameters, activation, grad_y) in float64."""
    ids, options = draw(routings())
    rng, activation = generator(draw(seeds)), draw(st.sampled_from(sorted(ACTIVATIONS)))
    hidden, width = draw(st.integers(0, 9)), draw(st.integers(0, 9))
    columns = width * (2 if activation in GATED else 1)
    kind = draw(ordinary)
    routing = moe.route(values(rng, (len(ids), sum(options["group_sizes"])), kind), ids, **options)
    total = len(routing.counts)
    x, grad_y = values(rng, (len(ids), hidden), kind), values(rng, (len(ids), hidden))
    w_in, w_out = values(rng, (total, hidden, columns)), values(rng, (total, width, hidden))
    w_in, w_out = w_in / max(1, hidden) ** 0.5, w_out / max(1, width) ** 0.5
    b_in = values(rng, (total, columns)) if draw(st.booleans()) else None
    b_out = values(rng, (total, hidden)) if draw(st.booleans()) else None
    return x, routing, (w_in, b_in, w_out, b_out), activation, grad_y


def outcome(function, dtype, x, routing, parameters, grad_y, where=None):
    """y and every gradient, computed in `dtype`; `where` lays the inputs out in memory."""
    where = where or (lambda each: each)
    leaves = [None if e is None else where(e.to(dtype)).detach().requires_grad_() for e in (x, *parameters)]
    wide = torch.promote_types(dtype, torch.float32)
    weight = where(routing.weight.detach().to(wide)).detach().requires_grad_()
    y = function(leaves[0], routing._replace(weight=weight), *leaves[1:])
    inputs = [each for each in (weight, *leaves) if each is not None]
    if not y.requires_grad:
        return y, *(torch.zeros_like(each) for each in inputs)
    got = torch.autograd.grad(y, inputs, where(grad_y.to(dtype)), allow_unused=True)
    return y, *(torch.zeros_like(each) if g is None else g for g, each in zip(got, inputs, strict=True))


@given(mixtures(), dtypes, st.sampled_from(["contiguous", "transposed", "every second", "offset"]))
def test_experts_are_the_reference(mixture, dtype, layout):
    x, routing, parameters, activation, grad_y = mixture
    # The reference is given what the op is given: values that are rounded already.
    problem = x.to(dtype), routing, [None if e is None else e.to(dtype) for e in parameters], grad_y.to(dtype)
    assume(activation != "relu" or dtype == torch.float64)  # one rounding across 0 is another gradient

    def ours(x, routing, *parameters):
        return moe.experts(x, routing, *parameters, activation=activation)

    def written_out(x, routing, *parameters):
        return reference.experts(x, routing.expert, routing.weight.to(x.dtype), *parameters, activation)

    got = outcome(ours, dtype, *problem, where=lambda each: laid_out(each, layout))
    peer, exact = outcome(written_out, dtype, *problem), outcome(written_out, torch.float64, *problem)
    for index, (g, p, e) in enumerate(zip(got, peer, exact, strict=True)):
        assert g.dtype == p.dtype
        # Sums over tokens; but a gate's gradient, output 1, is one over columns, whose terms may cancel.
        size = grad_y.abs().sum(1).max().item() if index == 1 and len(x) else len(x)
        assert_as_good(g, p, e, f"output {index}", dtype=dtype, size=max(1, size))


@given(mixtures(), any_values, seeds)
def test_bad_values_in_experts_stay_with_their_token(mixture, kind, seed):
    x, routing, parameters, activation, _ = mixture
    assume(len(x) > 1)
    x, parameters = x.float(), [None if each is None else each.float() for each in parameters]
    routing = routing._replace(weight=routing.weight.detach().float())
    clean = moe.experts(x, routing, *parameters, activation=activation)
    bad = x.clone()
    bad[0] = values(generator(seed), (1, x.shape[1]), kind)[0]
    assert torch.equal(moe.experts(bad, routing, *parameters, activation=activation)[1:], clean[1:])


SIZES = st.integers(0, 5)


@given(SIZES, SIZES, st.sampled_from([0, 1, 2, 7, 16, 33]), st.integers(0, 3), dtypes, layouts, ordinary, seeds)
def test_mix_is_the_reference(batch, length, hidden, injections, dtype, layout, kind, seed):
    rng = generator(seed)
    coef_dtype = torch.promote_types(dtype, torch.float32)
    x, injected = values(rng, (batch, length, hidden), kind), values(rng, (batch, injections, length, hidden), kind)
    coef, grad = values(rng, (batch, 1 + injections)), values(rng, (batch, length, hidden))

    def run(function, to, where=lambda each: each):
        leaves = [where(x.to(dtype)), where(coef.to(coef_dtype)), where(injected.to(dtype))]
        leaves = [each.to(to or each.dtype).detach().requires_grad_() for each in leaves]
        y = function(*leaves)
        return y, *torch.autograd.grad(y, leaves, where(grad.to(dtype)).to(y.dtype))

    layout = "contiguous" if layout == "expanded" else layout
    got = run(moe.mix, None, lambda each: laid_out(each, layout))
    exact = run(reference.mix, torch.float64)
    peer = [each.to(own.dtype) for each, own in zip(run(reference.mix, coef_dtype), got, strict=True)]
    for index, (g, p, e) in enumerate(zip(got, peer, exact, strict=True)):
        assert_as_good(g, p, e, f"output {index}", dtype=dtype)


@given(
    st.integers(1, 3), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2), st.sampled_from(sorted(ACTIVATIONS)),
    st.booleans(), st.sampled_from(["softmax", "sigmoid"]), st.sampled_from([(0,), (1,), (5,), (2, 3), (2, 0), ()]),
    seeds,
)  # fmt: skip
def test_grouped_moe_is_the_reference(groups, experts, top_k, shared, activation, bias, scoring, shape, seed):
    torch.manual_seed(seed)
    top_k = min(top_k, experts)
    layer = moe.GroupedMoE(
        6, 4, experts, groups=groups, top_k=top_k, shared_width=4 * shared, activation=activation, bias=bias,
        scoring=scoring, dtype=torch.float64,
    )  # fmt: skip
    torch.nn.init.normal_(layer.router_weight)
    for each in (layer.experts_b_in, layer.experts_b_out):
        if each is not None:
            torch.nn.init.normal_(each)
    x, ids = torch.randn(*shape, 6, dtype=torch.float64), torch.randint(groups, shape)
    y, routing = layer(x, ids)
    flat, flat_ids = x.reshape(-1, 6), ids.reshape(-1)
    biases = {"selection_bias": layer.selection_bias.double()} if scoring == "sigmoid" else {}
    truth = reference.route(
        flat @ layer.router_weight.t(), flat_ids, [experts] * groups, top_k, balance_coef=[0.01] * groups,
        scoring=scoring, **biases,
    )  # fmt: skip
    expert = torch.cat([truth["expert"], experts * groups + shared * flat_ids[:, None] + torch.arange(shared)], 1)
    weight = torch.cat([truth["weight"], torch.ones(len(flat), shared, dtype=torch.float64)], 1)
    want = reference.experts(
        flat, expert, weight, layer.experts_w_in, layer.experts_b_in, layer.experts_w_out, layer.experts_b_out,
        activation,
    )  # fmt: skip
    assert y.shape == x.shape and torch.equal(routing.expert, expert)
    torch.testing.assert_close(y.reshape(-1, 6), want, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(routing.balance_loss, truth["balance_loss"], rtol=1e-9, atol=1e-11)


@given(st.sampled_from(["logits", "group_ids", "group_sizes", "top_k", "shared", "balance_coef", "scoring",
                        "selection_bias"]), st.data())  # fmt: skip
def test_route_names_what_is_wrong(argument, data):
    """One argument of a right call is made wrong; the error names it, or an argument that it must agree with."""
    good = {"logits": torch.randn(4, 5), "group_ids": torch.tensor([0, 1, 1, 0]), "group_sizes": (2, 3), "top_k": 2}
    bad = {
        "logits": [torch.randn(4, 6), torch.randn(5), torch.randint(3, (4, 5)), None, [[0.0] * 5] * 4],
        "group_ids": [torch.tensor([0, 1, 2, 0]), torch.tensor([0, -1, 1, 0]), torch.zeros(4), torch.zeros(3).long(),
                      torch.tensor([0, 1, 2**40, 0]), torch.zeros(4).bool(), None],
        "group_sizes": [(2, 4), (), (5, 0), (2, -3), (6, -1)],
        "top_k": [0, -1, 3, 10**9],
        "shared": [-1],
        "balance_coef": [[0.1], [0.1] * 3],
        "scoring": ["relu", None, 3],
        "selection_bias": [torch.zeros(4), torch.zeros(5, 1), torch.zeros(5).long(), 3.0],
    }[argument]  # fmt: skip
    changed = good | {argument: data.draw(st.sampled_from(bad))}
    with pytest.raises(ValueError, match=rf"^({argument}|logits|group_ids|top_k): expected"):
        moe.route(**changed)
