"""The balance losses of all routers, over the batches of all ranks: each group's f and P are the step's, not a rank's.

A mean over ranks of per-rank losses would be another function: it asks every rank to be balanced by itself, and ranks
that hold few rows of a task never are (Qiu et al., arXiv 2501.11873, on what that costs).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import distributed as dist

from unif2ace_kernels import moe


class Routers(NamedTuple):
    """Routers of one kind, a layer each: group_sizes and coefs are of the groups."""

    routings: Sequence[moe.Routing]
    group_sizes: Sequence[int]
    coefs: Sequence[float]


def balance_loss(kinds: Sequence[Routers], group: dist.ProcessGroup | None = None) -> torch.Tensor | None:
    """sum over routers and task groups of lambda_g sum_i f_i P_i; None where there are no routers.

    Args:
        group: the ranks whose batches are one; all of them call this together. The result is then this rank's part:
            the parts add up to the loss of the batch of all, and so do their gradients. One all-reduce of the
            counts, whatever the number of layers.
    """
    kinds = [kind for kind in kinds if len(kind.routings)]
    if not kinds:
        return None
    if group is None:
        return torch.stack([routing.balance_loss for kind in kinds for routing in kind.routings]).sum()
    own = [torch.stack([each.counts[: sum(kind.group_sizes)] for each in kind.routings]) for kind in kinds]
    everyone = torch.cat([counts.flatten() for counts in own])
    dist.all_reduce(everyone, group=group)
    parts = everyone.split([counts.numel() for counts in own])
    return torch.stack([_part(kind, a, b.view_as(a)) for kind, a, b in zip(kinds, own, parts)]).sum()


def _part(kind: Routers, own: torch.Tensor, everyone: torch.Tensor) -> torch.Tensor:
    """Counts [layers, E] of this rank and of all."""
    probability = torch.stack([routing.probability for routing in kind.routings]).split(list(kind.group_sizes), 1)
    parts = []
    counts = (each.split(list(kind.group_sizes), 1) for each in (own, everyone))
    for P, here, all_, coef in zip(probability, *counts, kind.coefs):
        slots = all_.sum(1, keepdim=True).clamp(min=1)
        frequency = all_ * (all_.shape[1] / slots)
        share = here.sum(1, keepdim=True) / slots  # of the group's tokens: P is a mean over this rank's
        parts.append(coef * (frequency * share * P).sum())
    return torch.stack(parts).sum()
