"""The mixture of experts as the equations read: what every faster path is compared with, in float64.

T tokens, D hidden, E experts (routed, then shared), N_g routed experts and T_g tokens of group g, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda h: F.gelu(h, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
    "silu": F.silu,
    "swiglu": lambda h: F.silu(h.chunk(2, -1)[0]) * h.chunk(2, -1)[1],
    "geglu": lambda h: F.gelu(h.chunk(2, -1)[0], approximate="tanh") * h.chunk(2, -1)[1],
}


def route(
    logits: Tensor,
    group_ids: Tensor,
    group_sizes: Sequence[int],
    top_k: int,
    *,
    balance_coef: Sequence[float],
    normalize: bool = True,
    scoring: str = "softmax",
    selection_bias: Tensor | None = None,
    z_coef: float = 0.0,
) -> dict[str, Tensor]:
    """Experts, weights, frequencies f, probabilities P, balance loss and z loss, group by group.

    s = softmax(logits_g) or sigmoid(logits_g);  w = s / sum_K s
    experts = top-K of s (+ selection_bias), of equals the first
    f_i = N_g / (K T_g) * #{tokens of g that chose i};  P_i = mean over g of s_i / sum_j s_j
    balance = sum_g coef_g sum_i f_i P_i;  z = z_coef / T * sum_t logsumexp(logits_t,g)^2
    """
    expert = torch.zeros(len(logits), top_k, dtype=torch.int64)
    weight = logits.new_zeros(len(logits), top_k)
    frequency, probability = logits.new_zeros(sum(group_sizes)), logits.new_zeros(sum(group_sizes))
    balance, z = logits.new_zeros(()), logits.new_zeros(())
    for g, size in enumerate(group_sizes):
        tokens, first = (group_ids == g).nonzero()[:, 0], sum(group_sizes[:g])
        if len(tokens) == 0:
            continue
        own = slice(first, first + size)
        group_logits = logits[tokens, own]
        score = group_logits.softmax(-1) if scoring == "softmax" else group_logits.sigmoid()
        by = group_logits if selection_bias is None else score + selection_bias[own]  # scores rise with the logits
        chosen = by.detach().argsort(descending=True, stable=True)[:, :top_k]
        picked = score.gather(1, chosen)
        expert[tokens] = chosen + first
        weight = weight.index_put((tokens,), picked / picked.sum(-1, keepdim=True) if normalize else picked)
        f = torch.bincount(chosen.flatten(), minlength=size).to(logits.dtype) * size / (top_k * len(tokens))
        p = (score / score.sum(-1, keepdim=True)).mean(0)
        frequency[own], probability[own] = f, p.detach()
        balance = balance + balance_coef[g] * (f * p).sum()
        z = z + z_coef * group_logits.logsumexp(-1).square().sum() / len(logits)
    statistics = {"frequency": frequency, "probability": probability, "balance_loss": balance, "z_loss": z}
    return {"expert": expert, "weight": weight, **statistics}


def arrange(expert: Tensor, num_experts: int) -> tuple[list[int], list[int], list[int]]:
    """counts, offsets and order: the numbers t K + k of the slots of expert 0, then those of expert 1, ..."""
    slots = expert.flatten().tolist()
    of_expert = [[i for i, e in enumerate(slots) if e == each] for each in range(num_experts)]
    counts = [len(each) for each in of_expert]
    return counts, [sum(counts[:e]) for e in range(num_experts + 1)], sum(of_expert, [])


def experts(
    x: Tensor,
    expert: Tensor,
    weight: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
) -> Tensor:
    """y_t = sum_k weight_tk (act(x_t w_in[e] + b_in[e]) w_out[e] + b_out[e]), e = expert_tk; experts [T, K]."""
    y = []
    for x_t, expert_t, weight_t in zip(x, expert.tolist(), weight, strict=True):
        y_t = torch.zeros_like(x_t)
        for e, w in zip(expert_t, weight_t, strict=True):
            h = x_t @ w_in[e] + (0 if b_in is None else b_in[e])
            y_t = y_t + w * (ACTIVATIONS[activation](h) @ w_out[e] + (0 if b_out is None else b_out[e]))
        y.append(y_t)
    return torch.stack(y) if y else x.clone()


def mix(x: Tensor, coef: Tensor, injected: Tensor) -> Tensor:
    """y_b = coef_b0 x_b + sum_m coef_b(1+m) injected_bm; x [B, L, D], coef [B, 1+M], injected [B, M, L, D]."""
    return torch.einsum("bm,bmld->bld", coef, torch.cat([x[:, None], injected], 1))
