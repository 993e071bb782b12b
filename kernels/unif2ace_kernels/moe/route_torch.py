"""Routing in vectorised torch: scores, selection, the order of the slots, balance and z losses, and their gradient.

A token reads only its group's columns of the logits, so they are gathered into one table of
N = max(group_sizes) columns, padded where a group is smaller:

    group_sizes (2, 3), logits [T, 5]    token of group 0: columns 0 1 .    (. padding: never chosen, probability 0)
                                         token of group 1: columns 2 3 4
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import arrange_torch

# DeepSeek-V3's guard of the normalisation: sigmoid scores may all underflow, softmax ones never do.
_TINY = 1e-20


def _columns(group_ids: Tensor, group_sizes: Sequence[int]) -> tuple[Tensor, Tensor | None]:
    """Column of the logits for each entry of the table [T, N], and which entries are padding (None: none are)."""
    device, width = group_ids.device, max(group_sizes)
    sizes = torch.tensor(group_sizes, device=device)
    first = sizes.cumsum(0) - sizes
    local = torch.arange(width, device=device)
    if min(group_sizes) == width:
        return first[group_ids][:, None] + local, None
    padding = (local >= sizes[:, None])[group_ids]
    return (first[group_ids][:, None] + local).masked_fill(padding, 0), padding


def _table(logits: Tensor, columns: Tensor, padding: Tensor | None) -> Tensor:
    """The logits at `columns` in the dtype that computes, -inf in the padding: scores are 0 there."""
    table = logits.gather(1, columns).to(torch.promote_types(logits.dtype, torch.float32))
    return table if padding is None else table.masked_fill(padding, float("-inf"))


def _scores(table: Tensor, scoring: str) -> Tensor:
    return table.softmax(-1) if scoring == "softmax" else table.sigmoid()


def _tokens_of_group(counts: Tensor, group_sizes: Sequence[int], top_k: int) -> Tensor:
    """Number of tokens of each group [G] from the experts' counts: a token has K slots in its group.

    At least 1, so that an empty group's statistics are 0 and not 0 / 0.
    """
    routed = counts[: sum(group_sizes)].split(list(group_sizes))
    return (torch.stack([each.sum() for each in routed]) // top_k).clamp(min=1)


def check_group_ids(group_ids: Tensor, groups: int) -> None:
    """On the CPU, refuse an id out of range; elsewhere looking would cost a synchronisation."""
    if group_ids.device.type == "cpu" and len(group_ids):
        low, high = (int(bound) for bound in group_ids.aminmax())
        if low < 0 or high >= groups:
            raise ValueError(f"group_ids: expected values in [0, {groups}), got values in [{low}, {high}]")


def _per_expert(value_of_group: Tensor, group_sizes: Sequence[int]) -> Tensor:
    """[G] -> [E]: each routed expert gets its group's value."""
    sizes = torch.tensor(group_sizes, device=value_of_group.device)
    return value_of_group.repeat_interleave(sizes, output_size=sum(group_sizes))


def forward(
    logits: Tensor,
    group_ids: Tensor,
    group_sizes: Sequence[int],
    top_k: int,
    shared: int,
    balance_coef: Sequence[float],
    normalize: bool,
    scoring: str,
    selection_bias: Tensor | None,
    z_coef: float,
) -> tuple[Tensor, ...]:
    """See `functions.route`; returns its fields in order."""
    groups, routed, tokens = len(group_sizes), sum(group_sizes), len(logits)
    check_group_ids(group_ids, groups)
    group_ids = group_ids.long()
    columns, padding = _columns(group_ids, group_sizes)
    table = _table(logits, columns, padding)
    score, dtype = _scores(table, scoring), table.dtype
    # Scores rise with the logits; a choice by logits hangs on no exponential's rounding, so all devices make the same.
    by = table
    if selection_bias is not None:
        by = score + selection_bias.to(dtype)[columns]
        by = by if padding is None else by.masked_fill(padding, float("-inf"))
    # Not topk, which promises no order among equals: of these the lower index is first.
    chosen = by.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    picked = score.gather(1, chosen)
    weight = picked / (picked.sum(-1, keepdim=True) + _TINY) if normalize else picked
    expert = columns.gather(1, chosen)

    if shared:
        always = routed + shared * group_ids[:, None] + torch.arange(shared, device=logits.device)
        expert = torch.cat([expert, always], 1)
        weight = torch.cat([weight, weight.new_ones(tokens, shared)], 1)
    counts, offsets, order = arrange_torch.forward(expert, routed + shared * groups)

    tokens_of_group = _tokens_of_group(counts, group_sizes, top_k)
    share = score if scoring == "softmax" else score / (score.sum(-1, keepdim=True) + _TINY)
    # index_add_ of narrow rows crawls; a one-hot product over the G groups does the same sum at memory speed.
    in_group = torch.nn.functional.one_hot(group_ids, groups).to(dtype)
    mean = torch.where(in_group.bool().t()[:, :, None], share, 0).sum(1) / tokens_of_group[:, None]
    probability = torch.cat([mean[g, :size] for g, size in enumerate(group_sizes)])
    sizes = torch.tensor(group_sizes, dtype=dtype, device=logits.device)
    frequency = counts[:routed] * _per_expert(sizes / (top_k * tokens_of_group), group_sizes)
    coef = _per_expert(torch.tensor(balance_coef, dtype=dtype, device=logits.device), group_sizes)
    balance_loss = (coef * frequency * probability).sum()
    z_loss = logits.new_zeros((), dtype=dtype)
    if z_coef:
        z_loss = z_coef * table.logsumexp(-1).square().sum() / max(tokens, 1)
    return weight, expert, counts, offsets, order, frequency, probability, balance_loss, z_loss


def backward(
    grad_weight: Tensor | None,
    grad_probability: Tensor | None,
    grad_balance_loss: Tensor | None,
    grad_z_loss: Tensor | None,
    logits: Tensor,
    group_ids: Tensor,
    expert: Tensor,
    counts: Tensor,
    group_sizes: Sequence[int],
    top_k: int,
    balance_coef: Sequence[float],
    normalize: bool,
    scoring: str,
    z_coef: float,
) -> Tensor:
    """Gradient of the logits [T, E]: scores are computed again from the logits, f and T_g come from the counts.

    A gradient that is None is zero; f is a constant to the gradient.
    """
    group_ids = group_ids.long()
    columns, padding = _columns(group_ids, group_sizes)
    table = _table(logits, columns, padding)
    score, dtype = _scores(table, scoring), table.dtype

    grad_score = torch.zeros_like(score)
    if grad_balance_loss is not None or grad_probability is not None:
        sizes = torch.tensor(group_sizes, dtype=dtype, device=logits.device)
        tokens_of_group = _tokens_of_group(counts, group_sizes, top_k)
        grad_share = score.new_zeros(sum(group_sizes))
        if grad_balance_loss is not None:
            coef = torch.tensor(balance_coef, dtype=dtype, device=logits.device) * sizes / (top_k * tokens_of_group)
            grad_share = grad_balance_loss * _per_expert(coef, group_sizes) * counts[: sum(group_sizes)]
        if grad_probability is not None:
            grad_share = grad_share + grad_probability
        grad_score = (grad_share / _per_expert(tokens_of_group, group_sizes))[columns]
        if padding is not None:
            grad_score = grad_score.masked_fill(padding, 0)
        if scoring == "sigmoid":
            total = score.sum(-1, keepdim=True) + _TINY
            grad_score = (grad_score - (grad_score * score / total).sum(-1, keepdim=True)) / total
    if grad_weight is not None:
        chosen = expert[:, :top_k] - columns[:, :1]
        grad_picked = grad_weight[:, :top_k].to(dtype)
        if normalize:
            picked = score.gather(1, chosen)
            total = picked.sum(-1, keepdim=True) + _TINY
            grad_picked = (grad_picked - (grad_picked * picked / total).sum(-1, keepdim=True)) / total
        grad_score = grad_score.scatter_add(1, chosen, grad_picked)

    if scoring == "softmax":
        grad_table = score * (grad_score - (grad_score * score).sum(-1, keepdim=True))
    else:
        grad_table = grad_score * score * (1 - score)
    if z_coef and grad_z_loss is not None:
        z = table.logsumexp(-1, keepdim=True)
        probability = score if scoring == "softmax" else table.softmax(-1)
        grad_table = grad_table + grad_z_loss * (2 * z_coef / max(len(logits), 1)) * z * probability
    if padding is not None:
        grad_table = grad_table.masked_fill(padding, 0)
    # scatter_add and not scatter: padding points at column 0, and adds nothing there.
    return torch.zeros_like(logits, memory_format=torch.contiguous_format).scatter_add_(
        1, columns, grad_table.to(logits.dtype)
    )
