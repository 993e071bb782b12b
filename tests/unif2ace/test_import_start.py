"""The sequence-level experts' start: y = x to the bit, and a way on from there."""

import pytest
import tiny
import torch

from unif2ace.configs import MMU, T2I, SequenceMoEConfig
from unif2ace.model.sequence_moe import EXPERTS, SequenceMoE

TASK = torch.tensor([T2I, MMU, MMU, T2I, MMU])
N, D = tiny.CONFIG.image_tokens, tiny.CONFIG.hidden_size


def start(dtype=torch.float64, **changes) -> SequenceMoE:
    """A layer whose gates and norm have moved, then told to begin as the identity."""
    module = SequenceMoE(tiny.config(sequence_moe=SequenceMoEConfig(**changes))).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn_like(parameter)
    module.start_as_identity()
    return module


def inputs(dtype=torch.float64):
    return torch.randn(len(TASK), N, D, dtype=dtype), torch.randn(len(TASK), 3, N, D, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("clip,face", [(True, True), (False, True), (True, False), (False, False)])
def test_it_is_the_identity_to_the_bit(dtype, top_k, clip, face):
    module = start(dtype, top_k=top_k, clip=clip, face=face)
    x, injected = inputs(dtype)
    y, routing = module(x, TASK, injected)
    assert torch.equal(y, x) and y.dtype == dtype
    assert torch.equal(routing.weight, torch.full_like(routing.weight, 1 / top_k))


def test_under_autocast_too():
    module = start(torch.float32)
    x, injected = inputs(torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(x, TASK, injected)[0], x)


def test_both_copies_of_each_task_are_chosen():
    _, routing = start()(inputs()[0], TASK, inputs()[1])
    for row, task in enumerate(TASK.tolist()):
        assert [EXPERTS[task][index % 4] for index in routing.expert[row].tolist()] == ["copy", "copy"]
        assert len(set(routing.expert[row].tolist())) == 2


@pytest.mark.parametrize("top_k,changes,copies", [(3, {}, 2), (4, {"clip": False}, 2)])
def test_more_experts_than_copies_cannot_be_an_identity(top_k, changes, copies):
    """t2i has two copies whatever mmu has."""
    with pytest.raises(ValueError, match=f"top_k: expected at most {copies}.*got {top_k}"):
        start(top_k=top_k, **changes)


def test_the_balance_loss_brings_the_others_in():
    module = start(torch.float32)
    x, injected = inputs(torch.float32)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.02)
    shares = []
    for _ in range(60):
        _, routing = module(x, TASK, injected)
        shares.append(routing.counts.view(2, 4).float() / routing.counts.view(2, 4).sum(1, keepdim=True))
        optimizer.zero_grad()
        routing.balance_loss.backward()
        optimizer.step()
    first, last = shares[0], torch.stack(shares[30:]).amax(0)
    assert first.tolist() == [[0.5, 0, 0, 0.5], [0, 0, 0.5, 0.5]] and (last > 0).all()
    assert module.router.weight.abs().sum() > 0
