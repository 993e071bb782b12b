"""Muon on stacks of matrices is torch's Muon on each; and who trains what."""

import pytest
import tiny
import torch
from torch import nn

from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.training.optimizers import OptimizerConfig, StackedMuon, build

OPTIONS = {"lr": 0.03, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}


def test_a_stack_is_updated_as_its_matrices_are():
    torch.manual_seed(0)
    shapes = [(5, 7, 3), (6, 4), (2, 3, 4, 4)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [[nn.Parameter(m.clone()) for m in each.detach().reshape(-1, *each.shape[-2:])] for each in ours]
    stacked = StackedMuon(ours, **OPTIONS)
    plain = torch.optim.Muon([matrix for each in theirs for matrix in each], **OPTIONS)
    start = [each.detach().clone() for each in ours]
    for _ in range(3):
        for parameter, matrices in zip(ours, theirs):
            gradient = torch.randn_like(parameter)
            parameter.grad = gradient
            for matrix, part in zip(matrices, gradient.reshape(-1, *gradient.shape[-2:])):
                matrix.grad = part.clone()
        stacked.step()
        plain.step()
        stacked.zero_grad()
    for parameter, matrices, before in zip(ours, theirs, start):
        assert torch.equal(parameter.detach(), torch.stack([m.detach() for m in matrices]).reshape(parameter.shape))
        assert (parameter - before).abs().min() > 0


def test_one_experts_gradient_moves_that_expert_alone():
    """A stack as one matrix, or one normalisation for all, would move the others too."""
    parameter = nn.Parameter(torch.randn(3, 4, 4))
    before = parameter.detach().clone()
    optimizer = StackedMuon([parameter], lr=0.1, weight_decay=0.0)
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad[1] = torch.randn(4, 4)
    optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(parameter, before)] == [True, False, True]


def test_zero_grad_leaves_nothing_to_step_on():
    parameter = nn.Parameter(torch.randn(2, 3, 3))
    optimizer = StackedMuon([parameter], **OPTIONS)
    parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    assert parameter.grad is None
    assert all(matrix.grad is None for group in optimizer.param_groups for matrix in group["params"])


def trained_by(optimizers, model):
    """[(name, index of the optimizer that holds its memory)], an entry for each that does."""
    held = [{p.data_ptr(): p for group in each.param_groups for p in group["params"]} for each in optimizers]
    return {name: [i for i, each in enumerate(held) if p.data_ptr() in each] for name, p in model.named_parameters()}


@pytest.mark.parametrize(
    "config",
    [tiny.CONFIG, tiny.config(parallel_block=True), tiny.config(token_moe=None), tiny.config(sequence_moe=None)],
    ids=["full", "parallel", "no token experts", "no sequence experts"],
)
def test_every_parameter_is_in_exactly_one(config):
    model = UniF2aceForConditionalGeneration(config)
    muon, adamw = build(model, OptimizerConfig())
    where = trained_by([muon, adamw], model)
    assert all(len(each) == 1 for each in where.values()), where
    counted = sum(p.numel() for each in (muon, adamw) for group in each.param_groups for p in group["params"])
    assert counted == sum(p.numel() for p in model.parameters())
    for name, parameter in model.named_parameters():
        matrix = name.startswith("blocks.") and parameter.dim() > 1 and "router" not in name and "_b_" not in name
        assert where[name] == [0 if matrix else 1], name


def test_a_step_of_both_moves_every_parameter():
    model = UniF2aceForConditionalGeneration(tiny.CONFIG)
    optimizers = build(model, OptimizerConfig(lr=0.01, matrix_lr=0.01))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tiny.loss(model, tiny.single(tiny.mixed(rows=8)))[0].backward()
    for optimizer in optimizers:
        optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_rates_are_the_configs():
    muon, adamw = build(
        UniF2aceForConditionalGeneration(tiny.CONFIG), OptimizerConfig(lr=0.5, matrix_lr=0.25, weight_decay=0.125)
    )
    assert {group["lr"] for group in muon.param_groups} == {0.25}
    assert {group["lr"] for group in adamw.param_groups} == {0.5}
    assert {group["weight_decay"] for each in (muon, adamw) for group in each.param_groups} == {0.125}
