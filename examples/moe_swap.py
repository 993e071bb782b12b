"""A mixture of experts as one writes it, and the same with its loop swapped for `moe.experts`: equal, and timed.

python examples/moe_swap.py
"""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unif2ace_kernels import moe


class Mixture(nn.Module):
    """top-K of E experts, a loop over them: the usual eager code."""

    def __init__(self, hidden: int, width: int, experts: int, top_k: int) -> None:
        super().__init__()
        self.router, self.top_k = nn.Linear(hidden, experts, bias=False), top_k
        self.gate_up = nn.Parameter(torch.randn(experts, 2 * width, hidden) * hidden**-0.5)
        self.down = nn.Parameter(torch.randn(experts, hidden, width) * width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        weight, expert = self.router(x).softmax(-1).topk(self.top_k)
        return self.compute(x, expert, weight / weight.sum(-1, keepdim=True))

    def compute(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in range(len(self.down)):
            token, slot = torch.where(expert == e)
            gate, up = F.linear(x[token], self.gate_up[e]).chunk(2, -1)
            y.index_add_(0, token, F.linear(F.silu(gate) * up, self.down[e]) * weight[token, slot, None])
        return y


class Swapped(Mixture):
    """The same parameters and router; the weights are read through views."""

    def compute(self, x: Tensor, expert: Tensor, weight: Tensor) -> Tensor:
        routing = moe.arrange(expert, weight, num_experts=len(self.down))
        w_in, w_out = self.gate_up.transpose(1, 2), self.down.transpose(1, 2)
        return moe.experts(x, routing, w_in, None, w_out, None, activation="swiglu")


def difference(a: Mixture, b: Mixture, x: Tensor) -> float:
    """The largest of outputs and parameter gradients, over their size."""
    outcomes = []
    for each in (a, b):
        y = each(x)
        outcomes.append([y, *torch.autograd.grad(y.square().mean(), tuple(each.parameters()))])
    return max(((p - q).norm() / p.norm()).item() for p, q in zip(*outcomes))


def seconds(mixture: Mixture, x: Tensor) -> float:
    """The best of five training steps."""
    taken = []
    for _ in range(5):
        started = time.perf_counter()
        mixture(x).square().mean().backward()
        taken.append(time.perf_counter() - started)
    return min(taken)


def main() -> None:
    torch.manual_seed(0)
    before, after = (kind(hidden=256, width=256, experts=32, top_k=4) for kind in (Mixture, Swapped))
    after.load_state_dict(before.state_dict())
    x = torch.randn(1024, 256)
    print(f"outputs and gradients differ by {difference(before, after, x):.1e} of their size")
    print(f"a training step: loop {1e3 * seconds(before, x):.1f} ms, swapped {1e3 * seconds(after, x):.1f} ms")


if __name__ == "__main__":
    main()
