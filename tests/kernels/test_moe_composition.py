"""The mixture within what people put around a layer: compilation, autocast, checkpointing, functional_call, FSDP2;
and what bad values, bad arguments and far addresses do to it."""

import copy
import mmap

import pytest
import ranks
import torch
from torch import nn

from unif2ace_kernels.moe import GroupedMoE, experts, route

OPTIONS = [{}, {"activation": "swiglu", "bias": False, "scoring": "sigmoid", "routed_scale": 1.5, "z_coef": 0.1}]


def make(**options):
    """A mixture of 4 + 3 routed experts and two shared pieces a group: 11 experts, which two processes cannot halve."""
    torch.manual_seed(0)
    layer = GroupedMoE(16, 8, (4, 3), top_k=2, shared_width=16, **options)
    nn.init.normal_(layer.router_weight, std=0.3)
    return layer


def batch(tokens=30):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(2, tokens, 16, generator=rng), torch.randint(2, (2, tokens), generator=rng)


def loss_of(outputs):
    y, routing = outputs
    return y.square().mean() + routing.balance_loss + routing.z_loss


def gradients(layer, loss):
    return dict(zip(dict(layer.named_parameters()), torch.autograd.grad(loss, list(layer.parameters())), strict=True))


@pytest.mark.parametrize("options", OPTIONS)
def test_one_graph_for_every_number_of_tokens(options):
    from torch._dynamo.testing import CompileCounterWithBackend  # slow to import, also for the processes below

    layer = make(**options)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, groups: loss_of(layer(x, groups)), fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for tokens in (30, 17, 64):
        x, groups = batch(tokens)
        want, got = loss_of(layer(x, groups)), compiled(x, groups)
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(gradients(layer, got), gradients(layer, want))
        compilations.append(counter.frame_count)
    assert len(set(compilations)) == 1


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS)
def test_compiles_with_inductor(options):
    layer = make(**options)
    x, groups = batch()
    want = loss_of(layer(x, groups))
    got = torch.compile(lambda x, groups: loss_of(layer(x, groups)), fullgraph=True)(x, groups)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(layer, got), gradients(layer, want))


@pytest.mark.parametrize("options", OPTIONS)
def test_compiles_under_autocast(options):
    layer = make(**options)
    x, groups = batch()

    def loss(x, groups):
        with torch.autocast("cpu", torch.bfloat16):
            return loss_of(layer(x, groups))

    want, got = loss(x, groups), torch.compile(loss, fullgraph=True, backend="aot_eager")(x, groups)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(layer, got), gradients(layer, want))


@pytest.mark.parametrize("autocast", [False, True])
def test_checkpointing_gives_the_same_bits(autocast):
    layer = make()
    x, groups = batch()
    found = []
    for run in (layer, lambda *inputs: torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=False)):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of(run(leaf, groups))
        found.append([loss, *torch.autograd.grad(loss, [leaf, *layer.parameters()])])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_functional_call_computes_with_the_weights_it_is_given():
    layer, other = make(), make()
    nn.init.normal_(other.experts_w_out)
    x, groups = batch()
    given = {name: parameter.detach().requires_grad_() for name, parameter in other.named_parameters()}
    got, want = loss_of(torch.func.functional_call(layer, given, (x, groups))), loss_of(other(x, groups))
    assert torch.equal(got, want) and not torch.equal(got, loss_of(layer(x, groups)))
    grads = dict(zip(given, torch.autograd.grad(got, list(given.values())), strict=True))
    torch.testing.assert_close(grads, gradients(other, want), atol=0, rtol=0)


def test_same_bits_on_every_run():
    layer = make()
    x, groups = batch(200)
    runs = []
    for _ in range(3):
        loss = loss_of(layer(x, groups))
        runs.append([loss, *gradients(layer, loss).values()])
    assert all(torch.equal(a, b) for again in runs[1:] for a, b in zip(runs[0], again, strict=True))


def test_second_derivative_is_refused():
    layer = make()
    x, groups = batch()
    x.requires_grad_()
    (grad_x,) = torch.autograd.grad(loss_of(layer(x, groups)), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        grad_x.sum().backward()


def _sharded(group):
    """On each of two processes half the batch goes through a sharded mixture; the whole gradients are the mean's."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layer, whole, (x, groups) = make(), make(), batch()
    fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    assert layer.experts_w_in.to_local().shape[0] == [6, 5][group.rank()]
    half = slice(group.rank(), group.rank() + 1)
    y, routing = layer(x[half], groups[half])
    loss_of((y, routing)).backward()
    halves = [whole(x[i : i + 1], groups[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(y, halves[group.rank()][0])
    want = gradients(whole, sum(loss_of(each) for each in halves) / 2)  # FSDP takes the mean over the processes
    torch.testing.assert_close({name: each.grad.full_tensor() for name, each in layer.named_parameters()}, want)


def test_fully_sharded_over_two_processes():
    assert ranks.run(2, [("sharded", _sharded)]) == {"sharded": ""}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_weights_stay_with_the_tokens_of_their_expert(bad, dtype):
    layer = make().to(dtype)
    x, groups = batch()
    x = x.to(dtype).requires_grad_()
    clean, routing = layer(x.detach(), groups)
    with torch.no_grad():
        layer.experts_w_in[2, 5] = bad
    y, _ = layer(x, groups)
    y.sum().backward()
    users = (routing.expert == 2).any(1).view(groups.shape)
    assert users.any() and not users.all()
    assert torch.equal(y[~users], clean[~users]) and not y[users].isfinite().all(-1).any()
    assert x.grad[~users].isfinite().all()
    others = torch.arange(len(layer.experts_w_in)) != 2
    for name in ("experts_w_in", "experts_b_in", "experts_w_out", "experts_b_out"):
        assert getattr(layer, name).grad[others].isfinite().all(), name


def test_bad_tokens_stay_alone_in_a_padded_batch():
    """In bfloat16 an expert's rows are padded on the CPU: nothing of the padding is seen, whatever the weights are."""
    layer = make().bfloat16()
    x, groups = batch(3)
    with torch.no_grad():
        layer.experts_w_in[:, 0] = float("inf")
        layer.experts_w_out[:, 0] = 1e30
    x[..., 0] = 1
    y, _ = layer(x.bfloat16(), groups)
    assert not y.isfinite().any()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    layer.zero_grad()
    y, _ = layer(x.bfloat16(), groups)
    y.sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())


def test_expert_weights_beyond_two_to_the_31_elements():
    """Strides whose product with the expert's index passes int32; the memory between is never touched."""
    stride, hidden, width = 2**31 + 11, 4, 3
    torch.manual_seed(0)
    x, logits, groups = torch.randn(9, hidden), torch.randn(9, 3), torch.zeros(9, dtype=torch.int64)
    routing = route(logits, groups, (3,), 2)
    small = [torch.randn(3, hidden, width), torch.randn(3, width, hidden)]
    far = []
    for weight in small:
        size = 4 * (2 * stride + weight[0].numel())
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
        view = torch.frombuffer(memory, dtype=torch.float32).as_strided(weight.shape, (stride, *weight.stride()[1:]))
        far.append(view.copy_(weight))
    found = []
    for w_in, w_out in (small, far):
        leaves = [each.detach().requires_grad_() for each in (x, w_in, w_out)]
        y = experts(leaves[0], routing, leaves[1], None, leaves[2], None, activation="relu")
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=0)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda x, g, p: (x[..., :5], g, p)),
        ("group_ids", lambda x, g, p: (x, g[:, 1:], p)),
        ("group_ids", lambda x, g, p: (x, g.float(), p)),
        ("group_ids", lambda x, g, p: (x, g + 1, p)),
        ("group_ids", lambda x, g, p: (x, g - 1, p)),
        ("group_ids", lambda x, g, p: (x, g.to("meta"), p)),
        ("w_in", lambda x, g, p: (x, g, p | {"experts_w_in": p["experts_w_in"][1:]})),
        ("w_in", lambda x, g, p: (x, g, p | {"experts_w_in": p["experts_w_in"].to("meta")})),
        ("w_in", lambda x, g, p: (x, g, p | {"experts_w_in": p["experts_w_in"].double()})),
        ("w_out", lambda x, g, p: (x, g, p | {"experts_w_out": torch.cat([p["experts_w_out"]] * 2)})),
        ("b_in", lambda x, g, p: (x, g, p | {"experts_b_in": p["experts_b_in"][0]})),
        ("b_out", lambda x, g, p: (x, g, p | {"experts_b_out": p["experts_b_out"].half()})),
    ],
)
def test_bad_input_is_named(name, change):
    layer = make()
    x, groups, parameters = change(*batch(), dict(layer.named_parameters()))
    with pytest.raises(ValueError, match=rf"^{name}: expected .*, got "):
        torch.func.functional_call(layer, parameters, (x, groups))


def test_strided_inputs_are_handled():
    layer = make()
    x, groups = batch()
    spread = torch.empty(2, 30, 32)
    spread[..., ::2] = x
    strided = copy.deepcopy(layer)
    with torch.no_grad():
        for name in ("experts_w_in", "experts_w_out"):
            weight = getattr(layer, name)
            setattr(strided, name, nn.Parameter(weight.transpose(1, 2).contiguous().transpose(1, 2)))
    got, want = (
        loss_of(m(*inputs))
        for m, inputs in [(strided, (spread[..., ::2], groups.t().contiguous().t())), (layer, (x, groups))]
    )
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(gradients(strided, got), gradients(layer, want))
