"""Which optimizer trains which weights: Muon the matrices inside the blocks, AdamW everything else.

Muon (Jordan et al., 2024) is torch's. It takes matrices only, so a stack of experts' weights [E, m, n] is given to it
as E matrices that are views of the stack.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from unif2ace.model.modeling import UniF2aceForConditionalGeneration


@dataclass(frozen=True)
class OptimizerConfig:
    """Attributes:
    lr: of AdamW (embeddings, head, biases, norms, routers, resamplers).
    matrix_lr: of Muon, scaled so that its updates have the size of AdamW's.
    weight_decay: of both.
    """

    lr: float = 6e-3
    matrix_lr: float = 6e-3
    weight_decay: float = 0.02


class StackedMuon(torch.optim.Muon):
    """`torch.optim.Muon` for parameters [..., m, n], each m x n matrix updated as one of its own."""

    def __init__(self, params: Iterable[nn.Parameter], **options) -> None:
        self.stacks = [(param, [nn.Parameter(each) for each in _matrices(param.detach())]) for param in params]
        super().__init__([matrix for _, matrices in self.stacks for matrix in matrices], **options)

    def step(self, closure=None):
        for stack, matrices in self.stacks:
            for matrix, gradient in zip(matrices, _matrices(stack.grad)):
                matrix.grad = gradient
        return super().step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none)
        for stack, _ in self.stacks:
            stack.grad = None


def _matrices(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return x.reshape(-1, *x.shape[-2:]).unbind(0)


def build(model: UniF2aceForConditionalGeneration, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    """The two optimizers of a model's parameters, each parameter in exactly one."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        in_block = name.startswith("blocks.") and name.endswith(("weight", "w_in", "w_out")) and "router" not in name
        (matrices if in_block and parameter.dim() >= 2 else others).append(parameter)
    return [
        StackedMuon(matrices, lr=config.matrix_lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True),
    ]
