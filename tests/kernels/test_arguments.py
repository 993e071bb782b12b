"""Arguments of the public functions: of the wrong kind, as symbols under torch.compile, without a row, on meta."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from unif2ace_kernels import d3diff, explain, moe, registered_ops, sampling
from unif2ace_kernels._checks import expect_int
from unif2ace_kernels.random import gumbel

T, D, F, E, K, V = 6, 8, 4, 4, 2, 11
WEIGHT, EXPERT = torch.full((T, K), 0.5), torch.zeros(T, K, dtype=torch.int64)
LOGITS, GROUP = torch.zeros(T, E), torch.zeros(T, dtype=torch.int64)
IDS = torch.full((2, 3), V)


def experts(**change):
    routing = moe.arrange(EXPERT, WEIGHT, E)
    routing = change.pop("routing", routing._replace(**{k: change.pop(k) for k in ("order", "offsets") if k in change}))
    return moe.experts(
        torch.zeros(T, D), routing, torch.zeros(E, D, F), None, torch.zeros(E, F, D), None, activation="relu"
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: moe.arrange(EXPERT, WEIGHT, "4"), "num_experts: expected an int >= 1, got '4'"),
        (lambda: moe.arrange(EXPERT, WEIGHT, 4.0), "num_experts: expected an int >= 1, got 4.0"),
        (lambda: moe.route(LOGITS, GROUP, [4], 2.0), "top_k: expected an int >= 1, got 2.0"),
        (lambda: moe.route(LOGITS, GROUP, 4, 2), "group_sizes: expected a size for each group, got <class 'int'>"),
        (lambda: moe.route(LOGITS, GROUP, [4.0], 2), "group_sizes: expected an int >= 1, got 4.0"),
        (lambda: experts(routing=(EXPERT, WEIGHT)), "routing: expected a Routing, of route or arrange, got tuple"),
        (lambda: experts(order=torch.arange(3)), r"routing.order: expected shape \[12\], got shape \[3\]"),
        (lambda: experts(order=torch.arange(12).int()), "routing.order: expected dtype int64, got int32"),
        (lambda: experts(offsets=torch.arange(4)), r"routing.offsets: expected shape \[5\], got shape \[4\]"),
        (lambda: moe.GroupedMoE(0, F, E), "hidden: expected an int >= 1, got 0"),
        (lambda: moe.GroupedMoE(D, 0, E), "expert_width: expected an int >= 1, got 0"),
        (lambda: moe.GroupedMoE(D, F, E, groups=0), "groups: expected an int >= 1, got 0"),
        (lambda: moe.GroupedMoE(D, F, [4, -1]), "experts_per_group: expected an int >= 1, got -1"),
        (lambda: moe.GroupedMoE(D, F, E, shared_width=-F), "shared_width: expected an int >= 0, got -4"),
        (lambda: d3diff.noise(IDS, torch.ones(2), V, seed=1.5), "seed: expected an int in .*, got 1.5"),
        (lambda: d3diff.noise(IDS, torch.ones(2), V, seed=2**64), "seed: expected an int in .*, got 18446"),
        (lambda: d3diff.noise(IDS, torch.ones(2), V, seed=1, offset=-1), r"offset: expected an int in \[0, 429"),
        (lambda: d3diff.Objective(5), r"code_range: expected \(start, end\), got 5"),
        (lambda: d3diff.next_token_loss(torch.zeros(T, D), torch.zeros(V, D), None, GROUP, columns=(1, 2, 3)),
         r"columns: expected \(start, end\), got \(1, 2, 3\)"),
        (lambda: sampling.sample_from_logits(torch.zeros(2, 3, V), None, IDS, V, seed=0, code_range=5),
         r"code_range: expected \(start, end\), got 5"),
        (lambda: sampling.sample_from_logits(torch.zeros(2, 3, V), None, IDS, V, seed=-1), "seed: expected an int in"),
    ],
)  # fmt: skip
def test_the_wrong_kind_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_int_of_another_library_is_one():
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    expect_int(numpy.int32(3), "steps", 1, 4)
    assert moe.arrange(EXPERT, WEIGHT, numpy.int64(E)).counts.tolist() == [T * K, 0, 0, 0]


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_every_op_knows_its_shapes_on_meta():
    """Where models are made and their shapes tried before there is memory for them."""
    ids, m = on_meta(2, 3, dtype=torch.int64), on_meta(2)
    hidden, head, logits = on_meta(2, 3, D), on_meta(V, D), on_meta(2, 3, V)
    layer = moe.GroupedMoE(D, F, E, top_k=K, shared_width=F, device="meta")
    y, routing = layer(hidden, ids)
    assert y.device.type == "meta" and y.shape == (2, 3, D) and routing.order.shape == (6 * (K + 1),)
    y = moe.experts(
        on_meta(T, D), moe.arrange(EXPERT.to("meta"), WEIGHT.to("meta"), E), on_meta(E, D, F), None, on_meta(E, F, D),
        None, activation="relu",
    )  # fmt: skip
    assert y.shape == (T, D)
    assert moe.mix(hidden, on_meta(2, 2), on_meta(2, 1, 3, D)).shape == (2, 3, D)
    assert d3diff.noise(ids, m, V, seed=0)[1].shape == (2, 3)
    assert d3diff.loss(hidden, head, None, ids, m, code_range=(0, V))[0].shape == ()
    assert d3diff.loss_from_logits(logits, ids, m, code_range=(0, V))[0].shape == ()
    assert d3diff.next_token_loss(hidden, head, None, ids)[0].shape == ()
    assert sampling.sample_from_logits(logits, None, ids, V, seed=0)[0].shape == (2, 3)
    assert sampling.sample_from_hidden(hidden, None, head, None, ids, V, seed=0)[1].shape == (2, 3)
    assert sampling.remask(on_meta(2, 3), on_meta(2, 3, dtype=torch.bool), 1, seed=0).shape == (2, 3)
    word = on_meta(1, dtype=torch.int64)
    assert gumbel(word, word, 3, 5).shape == (3, 5)


def test_a_seed_that_changes_is_compiled_once():
    """torch.compile makes a symbol of an int that changes from call to call."""

    def draw(logits, ids, seed):
        return sampling.sample_from_logits(logits, None, ids, V, seed=seed)[0]

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(draw, fullgraph=True, backend=counter)
    logits, ids = torch.randn(2, 300, V), torch.full((2, 300), V)
    for seed in (3, 5, 8, 13):
        assert torch.equal(compiled(logits, ids, seed), draw(logits, ids, seed))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("shape", [(0, 3), (2, 0), (0, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_losses_of_no_row_are_zero_and_give_gradients(shape, dtype):
    """A rank's batch, or the labelled rows of a step, may be empty."""
    hidden = torch.zeros(*shape, D, dtype=dtype, requires_grad=True)
    weight, bias = torch.full((V, D), torch.inf, dtype=dtype), torch.zeros(V, dtype=dtype)
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    labels, m = torch.zeros(shape, dtype=torch.int64), torch.ones(shape[0])
    flat, flat_labels, whole = hidden.reshape(-1, D), labels.reshape(-1), torch.ones(1)
    logits = torch.zeros(*shape, V, dtype=dtype, requires_grad=True)
    for score in d3diff.READINGS:
        options = {"code_range": (0, V), "score": score}
        for value, stats in (
            d3diff.loss(hidden, weight, bias, labels, m, **options),
            d3diff.next_token_loss(hidden, weight, bias, labels),
            d3diff.joint_loss(flat, weight, bias, flat_labels, flat_labels > 0, whole, flat_labels, **options),
            d3diff.loss_from_logits(logits, labels, m, **options),
        ):
            assert value == 0 and value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert all(float(each) == 0 for task in ([stats] if hasattr(stats, "ce") else stats) for each in task)
            value.backward()
    for each in (hidden, weight, bias, logits):
        assert each.grad is not None and each.grad.shape == each.shape and not each.grad.any()


PUBLIC = {
    "d3diff": ("joint_loss", "loss", "loss_from_logits", "next_token_loss", "noise"),
    "moe": ("arrange", "experts", "mix", "parallel_experts", "route"),
    "random": ("gumbel",),
    "sampling": ("remask", "sample_from_hidden", "sample_from_logits"),
}


@pytest.mark.parametrize("name", [f"{room}.{name}" for room, names in PUBLIC.items() for name in names])
def test_explain_takes_the_name_of_a_public_function(name):
    explanation = explain(name, torch.zeros(1))
    assert explanation == explain(explanation.op, torch.zeros(1)) and explanation.op in registered_ops()


def test_explain_names_what_it_takes():
    with pytest.raises(ValueError, match="op: expected one of d3diff.joint_loss, .* moe.experts, .* moe_experts, "):
        explain("experts")


def test_a_mixture_says_its_sizes():
    layer = moe.GroupedMoE(D, F, [4, 6], top_k=3, shared_width=2 * F, scoring="sigmoid")
    expected = f"hidden={D}, expert_width={F}, experts=4+6, top_k=3, shared_width={2 * F}, activation=gelu_tanh"
    assert expected + ", bias=True, scoring=sigmoid" in repr(layer)
