"""Small models that the sampler tests paint with."""

from __future__ import annotations

import torch

MASK = 40


def model(hidden=24, codes=40, seed=0):
    """(step_fn giving two branches of hidden states, head): every token sees the mean of its sample."""
    rng = torch.Generator().manual_seed(seed)
    embed, weight = torch.randn(codes + 1, hidden, generator=rng), torch.randn(codes, hidden, generator=rng)
    place = torch.randn(64, hidden, generator=rng)

    def step_fn(ids, step):
        h = embed[ids]
        return (h + h.mean(1, keepdim=True) + place[: ids.shape[1]]) / 2, (h + place[: ids.shape[1]]) / 2

    return step_fn, (weight / 3, torch.randn(codes, generator=rng) / 3)


def run(sampler, ids, **arguments):
    steps = []
    return sampler(ids, callback=steps.append, **arguments), steps


def batch(rows=3, length=48):
    return torch.full((rows, length), MASK)
