"""The loss where models are trained: checkpointing, FSDP2, dynamic shapes, and the switch that looks at values."""

import math

import pytest
import ranks
import torch
import torch._dynamo.testing
from torch.utils.checkpoint import checkpoint

from unif2ace_kernels import d3diff

CODES = (6, 20)
B, N, D, V = 3, 8, 16, 23


class Head(torch.nn.Module):
    """A layer, then the head in the loss; the head's weight is a parameter like another."""

    def __init__(self, score: str = "radd") -> None:
        super().__init__()
        self.score = score
        self.layer = torch.nn.Linear(D, D)
        self.weight = torch.nn.Parameter(torch.randn(V, D) / 4)
        self.bias = torch.nn.Parameter(torch.randn(V) / 4)

    def forward(self, x, targets, mask_prob):
        h = torch.tanh(self.layer(x))
        return d3diff.loss(h, self.weight, self.bias, targets, mask_prob, code_range=CODES, score=self.score)[0]


def batch(seed: int = 0, samples: int = B):
    rng = torch.Generator().manual_seed(seed)
    mask_prob = torch.rand(samples, generator=rng).clamp(min=0.2)
    targets = torch.randint(*CODES, (samples, N), generator=rng)
    targets[torch.rand(samples, N, generator=rng) < 0.4] = -100
    return torch.randn(samples, N, D, generator=rng), targets, mask_prob


def gradients(module, value):
    return dict(zip(dict(module.named_parameters()), torch.autograd.grad(value, list(module.parameters()))))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("score", ["radd", "unnormalized"])
def test_activation_checkpointing(score, reentrant):
    module, (x, targets, mask_prob) = Head(score), batch()
    x.requires_grad_()
    plain = module(x, targets, mask_prob)
    wanted = torch.autograd.grad(plain, [x, *module.parameters()])
    again = checkpoint(module, x, targets, mask_prob, use_reentrant=reentrant)
    assert torch.equal(plain, again)
    again.backward()
    assert all(map(torch.equal, [x.grad, *(each.grad for each in module.parameters())], wanted))


def test_backward_twice_over_a_kept_graph():
    module = Head()
    value = module(*batch())
    first = torch.autograd.grad(value, list(module.parameters()), retain_graph=True)
    second = torch.autograd.grad(2 * value, list(module.parameters()))
    for one, two in zip(first, second, strict=True):
        torch.testing.assert_close(two, 2 * one, rtol=1e-6, atol=0)


def test_any_number_of_samples_in_one_compiled_graph():
    torch._dynamo.reset()
    module = Head()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, fullgraph=True, backend=counter, dynamic=True)
    for samples in (2, 3, 5):
        inputs = batch(samples, samples)
        ours, eager = compiled(*inputs), module(*inputs)
        torch.testing.assert_close(ours, eager, rtol=1e-6, atol=0)
        for one, other in zip(gradients(module, ours).values(), gradients(module, eager).values(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert counter.frame_count <= 2


def _on_two_ranks(group: torch.distributed.ProcessGroup) -> None:
    from torch.distributed.fsdp import fully_shard

    whole = Head()
    wanted = gradients(whole, sum(whole(*batch(rank, 2)) for rank in range(2)) / 2)
    torch.manual_seed(0)
    module = Head()
    fully_shard(module, mesh=torch.distributed.device_mesh.init_device_mesh("cpu", (2,)))
    module(*batch(group.rank(), 2)).backward()
    found = {name: each.grad.full_tensor() for name, each in module.named_parameters()}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.slow
def test_fsdp2_shards_the_head():
    assert ranks.run(2, [("head", _on_two_ranks)]) == {"head": ""}


def arguments(**change):
    x, targets, mask_prob = batch()
    good = {"hidden": x, "weight": torch.randn(V, D), "bias": None, "targets": targets, "mask_prob": mask_prob}
    return {**good, "code_range": CODES, **change}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_the_switch_finds_rows_that_are_not_finite(bad):
    x, targets, _ = batch()
    row = int((targets.flatten() != -100).nonzero()[1])
    x.view(-1, D)[row, 3] = bad
    assert not d3diff.loss(**arguments(hidden=x))[0].isfinite()  # off: training code sees it in the loss
    wanted = rf"logits: expected finite values in every labelled row, got NaN or inf in rows \[{row}\]"
    with pytest.raises(ValueError, match=wanted):
        d3diff.loss(**arguments(hidden=x), check_values=True)
    with pytest.raises(ValueError, match=wanted):
        d3diff.loss_from_logits(x @ torch.randn(D, V).abs(), targets, batch()[2], code_range=CODES, check_values=True)
    with pytest.raises(ValueError, match=wanted):
        d3diff.next_token_loss(x, torch.randn(V, D), None, targets, check_values=True)
    x.view(-1, D)[row] = 0
    x.view(-1, D)[int((targets.flatten() == -100).nonzero()[0])] = bad  # a row without a label is not looked at
    assert d3diff.loss(**arguments(hidden=x), check_values=True)[0].isfinite()


def test_the_switch_is_off_when_told_so():
    below = torch.tensor([0.5, 0.0, 1.0])
    with pytest.raises(ValueError, match=r"mask_prob: expected values in \(0, 1\]"):
        d3diff.loss(**arguments(mask_prob=below))
    d3diff.loss(**arguments(mask_prob=below), check_values=False)
    tokens = torch.zeros(3, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"mask_prob: expected values in \(0, 1\], got \[0.0\]"):
        d3diff.noise(tokens, below, 9, seed=0, check_values=True)
    _, mask = d3diff.noise(tokens, below, 9, seed=0, check_values=False)
    assert mask.sum(1).tolist() == [2, 1, 4]
    minus = torch.full((V,), -math.inf)
    value, _ = d3diff.loss(**arguments(bias=minus), check_values=False)
    assert value == math.inf


@pytest.mark.gpu
def test_the_switch_on_cuda_is_off_until_asked_for():
    moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in arguments().items()}
    moved["mask_prob"] = torch.tensor([0.5, 2.0, 1.0], device="cuda")
    d3diff.loss(**moved)
    with pytest.raises(ValueError, match=r"mask_prob: expected values in \(0, 1\], got \[2.0\]"):
        d3diff.loss(**moved, check_values=True)
