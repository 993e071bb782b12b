"""GroupedMoE: against the reference, its start from a dense layer, precision, compilation; and the README's example."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from unif2ace_kernels import moe
from unif2ace_kernels.moe import GroupedMoE, reference

README = Path(moe.__file__).parent / "README.md"


def make(**options):
    torch.manual_seed(0)
    return GroupedMoE(16, 8, (4, 3), top_k=2, **options), torch.randn(3, 7, 16), torch.randint(2, (3, 7))


@pytest.mark.parametrize("shared_width", [0, 8, 24])
def test_against_the_reference(shared_width):
    layer, x, groups = make(shared_width=shared_width)
    y, routing = layer(x, groups)
    w_in, b_in, w_out, b_out = layer.experts_w_in, layer.experts_b_in, layer.experts_w_out, layer.experts_b_out
    tokens = x.view(-1, 16).double()
    want = reference.route(
        tokens @ layer.router_weight.double().t(), groups.view(-1), (4, 3), 2, balance_coef=(0.01, 0.01)
    )
    assert torch.equal(routing.expert[:, :2], want["expert"])
    parameters = [each.double() for each in (w_in, b_in, w_out, b_out)]
    exact = reference.experts(tokens, routing.expert, routing.weight.double(), *parameters, "gelu_tanh")
    torch.testing.assert_close(y.double(), exact.view(x.shape), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(routing.balance_loss.double(), want["balance_loss"], atol=1e-7, rtol=1e-5)


def test_starts_small_and_even():
    layer = GroupedMoE(64, 32, 8, top_k=2, shared_width=32)
    assert layer.router_weight.std().item() == pytest.approx(0.02, rel=0.1)
    for weight, inputs in ((layer.experts_w_in, 64), (layer.experts_w_out, 32)):
        assert 0.99 < weight.abs().max() * inputs**0.5 <= 1
    assert (layer.experts_b_in == 0).all() and (layer.experts_b_out == 0).all()


def test_every_parameter_learns_and_is_named():
    layer, x, groups = make(shared_width=16)
    y, routing = layer(x, groups)
    (y.square().sum() + routing.balance_loss).backward()
    shapes = {name: list(parameter.shape) for name, parameter in layer.named_parameters()}
    assert shapes == {
        "router_weight": [7, 16],
        "experts_w_in": [11, 16, 8],
        "experts_w_out": [11, 8, 16],
        "experts_b_in": [11, 8],
        "experts_b_out": [11, 16],
    }
    assert all((parameter.grad != 0).any() for parameter in layer.parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["gelu_tanh", "swiglu"])
def test_from_dense_is_the_dense_layer(activation, bias):
    torch.manual_seed(0)
    halves = 2 if activation == "swiglu" else 1
    up, down = nn.Linear(16, 24 * halves, bias=bias).double(), nn.Linear(24, 16, bias=bias).double()
    layer = GroupedMoE.from_dense(
        up.weight, up.bias, down.weight, down.bias,
        expert_width=8, experts_per_group=5, top_k=2, activation=activation,
    )  # fmt: skip
    x, groups = torch.randn(2, 9, 16).double(), torch.randint(2, (2, 9))
    y, routing = layer(x, groups)
    torch.testing.assert_close(y, down(reference.ACTIVATIONS[activation](up(x))), atol=1e-12, rtol=0)
    y.square().sum().backward()
    routed = routing.counts[:10] > 0
    assert routed.any() and (layer.experts_w_out.grad[:10][routed] != 0).any((1, 2)).all()


def test_load_dense_wants_the_shared_width():
    layer, _, _ = make(shared_width=16)
    with pytest.raises(ValueError, match="^in_weight: expected shape \\[16, 16\\], got shape \\[24, 16\\]"):
        layer.load_dense(torch.zeros(24, 16), None, torch.zeros(16, 24), None)


def test_autocast_routes_in_float32_and_computes_in_bfloat16():
    layer, x, groups = make(shared_width=8)
    logits = F.linear(x.view(-1, 16), layer.router_weight)
    full = moe.route(logits, groups.view(-1), (4, 3), 2, shared=1)
    with torch.autocast("cpu", torch.bfloat16):
        y, routing = layer(x, groups)
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16 and torch.equal(routing.weight, full.weight)
    assert layer.experts_w_in.grad.dtype == torch.float32


def test_compiles_whole():
    layer, x, groups = make(shared_width=8)

    def loss(x, groups):
        y, routing = layer(x, groups)
        return y.square().sum() + routing.balance_loss

    results = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        layer.zero_grad()
        value = function(x, groups)
        value.backward()
        results.append([value.detach()] + [parameter.grad.clone() for parameter in layer.parameters()])
    torch.testing.assert_close(*results)


def test_balance_selection_moves_load():
    layer, _, _ = make(scoring="sigmoid")
    nn.init.normal_(layer.router_weight, std=0.2)
    x, groups = torch.randn(600, 16) + 1, torch.arange(600) % 2
    spread = []
    for _ in range(60):
        _, routing = layer(x, groups)
        spread.append(routing.frequency.std().item())
        layer.balance_selection(routing, rate=0.01)
    assert spread[-1] < spread[0] / 2


def test_balance_selection_moves_a_bias_by_the_rate_whatever_the_load():
    layer, x, groups = make(scoring="sigmoid")
    _, routing = layer(x, groups)
    layer.balance_selection(routing, rate=0.25)
    assert len(set(routing.frequency.tolist())) > 3
    assert torch.equal(layer.selection_bias, 0.25 * (routing.frequency < 1) - 0.25 * (routing.frequency > 1))


@pytest.mark.parametrize("shared_width", [0, 16])
def test_the_routed_scale_is_of_the_routed_experts_alone(shared_width):
    layer, x, groups = make(shared_width=shared_width)
    scaled, _, _ = make(shared_width=shared_width, routed_scale=2.5)
    factor = torch.tensor([2.5, 2.5] + [1.0] * (shared_width // 8))
    _, plain = layer(x, groups)
    y, routing = scaled(x, groups)
    assert torch.equal(routing.weight, plain.weight * factor)
    parameters = scaled.experts_w_in, scaled.experts_b_in, scaled.experts_w_out, scaled.experts_b_out
    assert torch.equal(y.view(-1, 16), moe.experts(x.view(-1, 16), routing, *parameters, activation="gelu_tanh"))


@pytest.mark.parametrize(
    ("name", "options"),
    [("top_k", {"top_k": 4}), ("shared_width", {"shared_width": 5}), ("experts_per_group", {"groups": 3})],
)
def test_bad_input_is_named(name, options):
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        GroupedMoE(16, 8, (4, 3), **({"top_k": 2} | options))


@pytest.mark.parametrize("shape", [(6,), (2, 3), ()])
def test_the_output_is_no_view_and_may_be_added_to(shape):
    """FSDP2 warns of views: `y += residual` would drop its hook of the backward."""
    layer = GroupedMoE(16, 8, 4, top_k=2)
    x, task = torch.randn(*shape, 16), torch.zeros(shape, dtype=torch.int64)
    gradients = []
    for in_place in (False, True):
        y, _ = layer(x, task)
        assert y.shape == x.shape and not y._is_view()
        y = y.add_(x) if in_place else y + x
        gradients.append(torch.autograd.grad(y.square().sum(), list(layer.parameters())))
    assert all(map(torch.equal, *gradients))


def test_readme_examples_run():
    layer, block, _ = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    names = {}
    exec(layer, names)  # noqa: S102
    assert names["y"].shape == names["x"].shape and names["moe"].router_weight.grad is not None
    exec(block, names)  # noqa: S102
    x, gate, gate_up, down = (torch.randn(shape).double() for shape in ((9, 6), (5, 6), (5, 8, 6), (5, 6, 4)))
    y, _ = names["sparse_block"](x, gate, gate_up, down, 2)
    weight, expert = (x @ gate.t()).softmax(-1).topk(2)
    weight = weight / weight.sum(-1, keepdim=True)
    exact = reference.experts(x, expert, weight, gate_up.mT, None, down.mT, None, "swiglu")
    torch.testing.assert_close(y, exact)


def test_readme_layout_is_what_route_returns():
    logits = torch.tensor([[2.0, 1, 9, 9], [9, 9, 0, 3], [1, 2, 9, 9]])
    routing = moe.route(logits, torch.tensor([0, 1, 0]), (2, 2), 1, shared=1)
    table = dict(re.findall(r"^    (\w+) +(\[.*\])$", README.read_text(), re.M))
    assert {name: str(getattr(routing, name).tolist()) for name in table} == table and len(table) == 4


def test_dense_layer_of_equal_pieces():
    """A feed-forward layer is the sum of its pieces, which is how a shared expert is kept."""
    layer, x, groups = make(shared_width=24)
    with torch.no_grad():
        layer.experts_w_out[:7] = 0
        layer.experts_b_out[:7] = 0
    y, _ = layer(x, torch.zeros_like(groups))
    w_in = layer.experts_w_in[7:10].permute(1, 0, 2).reshape(16, 24)
    h = F.gelu(x @ w_in + layer.experts_b_in[7:10].flatten(), approximate="tanh")
    torch.testing.assert_close(y, h @ layer.experts_w_out[7:10].reshape(24, 16) + layer.experts_b_out[7:10].sum(0))
