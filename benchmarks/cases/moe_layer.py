"""A token-level mixture: its sizes, its tensors, and what a user would write in plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..case import FORWARD

COEF = 0.01


@dataclass(frozen=True)
class Layer:
    """A token-level mixture and the load of its experts.

    Attributes:
        T, D, F, N, K, shared: tokens, hidden, width, experts a group, routed and shared slots.
        bias: whether the experts have biases.
        load: of a group's experts: "uniform"; "zipf", expert i about 1 / i as often as the first; "one-hot", all
            tokens choose the same K experts.
        first: share of the tokens that belong to the first group, the rest being shared by the others.
        compiles: whether torch.compile takes part, at tens of seconds a contender.
    """

    T: int
    D: int
    F: int
    N: int
    K: int
    shared: int
    activation: str = "gelu_tanh"
    groups: int = 2
    bias: bool = True
    load: str = "uniform"
    first: float = 0.5
    compiles: bool = True

    @property
    def tokens_of_group(self) -> list[int]:
        first = round(self.T * self.first) if self.groups > 1 else self.T
        rest = [(self.T - first) * (g + 1) // (self.groups - 1) for g in range(self.groups - 1)]
        return [first, *(end - start for start, end in zip([0, *rest], rest))]

    @property
    def slots(self) -> int:
        return self.K + self.shared

    @property
    def experts(self) -> int:
        return self.groups * (self.N + self.shared)

    @property
    def width_in(self) -> int:
        return self.F * (2 if self.activation == "swiglu" else 1)

    def flops(self, mode: str) -> float:
        forward = 2.0 * self.T * self.slots * self.D * (self.width_in + self.F)
        return forward if mode == FORWARD else 3 * forward

    def bytes(self, mode: str, itemsize: int) -> float:
        weights = self.experts * self.D * (self.width_in + self.F) * itemsize
        tokens = self.T * self.D * itemsize
        # forward: x, W in, y out; backward: x, W, dy in, dx, dW out
        return weights + 2 * tokens + (0 if mode == FORWARD else 2 * weights + 3 * tokens)


def activate(h: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate, value = h.chunk(2, -1)
        return F.silu(gate) * value
    return F.gelu(h, approximate="tanh")


def router(logits: Tensor, group: Tensor, size: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """What a user would write: other groups' logits at -inf, softmax, top-k; experts, weights [T, S] and the loss."""
    own = group[:, None] == torch.arange(size.groups, device=group.device).repeat_interleave(size.N)
    scores = logits.masked_fill(~own, float("-inf")).softmax(-1)
    weight, expert = scores.topk(size.K, -1)
    weight = weight / weight.sum(-1, keepdim=True)
    members = own[:, :: size.N].sum(0).repeat_interleave(size.N).clamp(min=1)
    chosen = F.one_hot(expert, size.groups * size.N).sum((0, 1))
    loss = COEF * (chosen * size.N / (size.K * members) * scores.sum(0) / members).sum()
    if size.shared:
        first = size.groups * size.N + size.shared * group[:, None]
        expert = torch.cat([expert, first + torch.arange(size.shared, device=group.device)], 1)
        weight = torch.cat([weight, weight.new_ones(len(group), size.shared)], 1)
    return expert, weight, loss


def _plus(product: Tensor, bias: Tensor | None, index) -> Tensor:
    return product if bias is None else product + bias[index]


def every_expert(x, expert, weight, w_in, b_in, w_out, b_out, activation):
    """All experts on all tokens, masked by their weights."""
    y = torch.zeros_like(x)
    for e in range(w_in.shape[0]):
        out = _plus(activate(_plus(x @ w_in[e], b_in, e), activation) @ w_out[e], b_out, e)
        y = y + out * ((expert == e) * weight).sum(-1, keepdim=True).to(x.dtype)
    return y


def loop(x, expert, weight, w_in, b_in, w_out, b_out, activation):
    """A loop over the experts, each on its tokens, added back with index_add: the usual eager code."""
    y = torch.zeros_like(x)
    mask = F.one_hot(expert, w_in.shape[0]).permute(2, 1, 0)
    for e in mask.sum((1, 2)).nonzero()[:, 0].tolist():
        slot, token = torch.where(mask[e])
        out = _plus(activate(_plus(x[token] @ w_in[e], b_in, e), activation) @ w_out[e], b_out, e)
        y.index_add_(0, token, out * weight[token, slot, None].to(x.dtype))
    return y


def sorted_grouped(x, expert, weight, w_in, b_in, w_out, b_out, activation):
    """Slots sorted by expert, one grouped product for all experts, scattered back.

    Biases are spread over the rows in float32: their gradient is a sum over rows, 4 % off when summed in bfloat16.
    """
    order = expert.flatten().argsort(stable=True)
    ends = torch.bincount(expert.flatten(), minlength=w_in.shape[0]).cumsum(0).to(torch.int32)
    by_row, token = expert.flatten()[order], order // expert.shape[1]
    dtype = torch.promote_types(x.dtype, torch.float32)
    b_in, b_out = (None if bias is None else bias.to(dtype) for bias in (b_in, b_out))
    h = _plus(F.grouped_mm(x[token], w_in, offs=ends), b_in, by_row).to(x.dtype)
    out = _plus(F.grouped_mm(activate(h, activation), w_out, offs=ends), b_out, by_row).to(x.dtype)
    out = out * weight.flatten()[order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, token, out)


def tensors(size: Layer, dtype: torch.dtype, device: torch.device) -> tuple[list[Tensor], Tensor]:
    """[x, logits, w_in, w_out] and, with biases, [b_in, b_out], of order 1; and group ids, in ascending order."""
    random = torch.randn
    x = random(size.T, size.D, device=device).to(dtype)
    logits = random(size.T, size.groups * size.N, device=device)
    if size.load == "zipf":
        logits -= torch.arange(1.0, 1 + size.N, device=device).log().repeat(size.groups)
    if size.load == "one-hot":
        logits[:, torch.arange(size.groups * size.N, device=device) % size.N < size.K] += 20
    w_in = (random(size.experts, size.D, size.width_in, device=device) * size.D**-0.5).to(dtype)
    w_out = (random(size.experts, size.F, size.D, device=device) * size.F**-0.5).to(dtype)
    shapes = (size.width_in, size.D) if size.bias else ()
    biases = [(random(size.experts, width, device=device) * 0.1).to(dtype) for width in shapes]
    tokens = torch.tensor(size.tokens_of_group, device=device)
    group = torch.arange(size.groups, device=device).repeat_interleave(tokens, output_size=size.T)
    return [x, logits, w_in, w_out, *biases], group
