"""Tensors that fuzzing feeds to the ops: every layout in memory, ordinary and extraordinary values; and the 2x rule."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from hypothesis import strategies as st

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ORDINARY = ("normal", "ties", "zeros", "equal rows", "wide")
EXTRAORDINARY = ("NaN", "inf", "-inf", "all -inf", "all NaN", "huge", "denormal")
LAYOUTS = ("contiguous", "transposed", "every second", "offset", "expanded")

dtypes = st.sampled_from(FLOATS)
ordinary = st.sampled_from(ORDINARY)
any_values = st.sampled_from(ORDINARY + EXTRAORDINARY)
layouts = st.sampled_from(LAYOUTS)
seeds = st.integers(0, 2**32 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def values(rng: torch.Generator, shape: Sequence[int], kind: str = "normal") -> torch.Tensor:
    """A float64 tensor of `shape` whose contents are of a kind."""
    x = torch.randn(*shape, dtype=torch.float64, generator=rng)
    if kind == "ties":
        return x.round()
    if kind == "zeros":
        return torch.zeros_like(x) * x.sign()  # zeros of both signs
    if kind == "equal rows":
        return x[..., :1].expand(shape).clone() if x.numel() else x
    if kind == "wide":
        return x * 20
    if kind == "huge":
        return x * 1e37
    if kind == "denormal":
        return x * 1e-40
    if kind.startswith("all "):
        rows = torch.rand(x.shape[:1], generator=rng) < 0.4
        x[rows] = float(kind.removeprefix("all "))
        return x
    if kind in EXTRAORDINARY:
        x[torch.rand(x.shape, generator=rng) < 0.15] = float(kind)
    return x


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """`x` with other strides or another start in memory; "expanded" repeats its first row with a stride of 0."""
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "every second" and x.dim() > 0:
        return torch.stack([x, torch.full_like(x, 77)], -1).flatten(-2)[..., ::2]
    if layout == "offset":
        return torch.cat([x.new_full((3,), 77), x.reshape(-1)])[3:].view(x.shape)
    if layout == "expanded" and x.dim() > 0 and x.shape[0] > 0:
        return x[:1].expand(x.shape)
    return x.contiguous()


def assert_as_good(
    ours: torch.Tensor,
    peer: torch.Tensor,
    truth: torch.Tensor,
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    size: float = 1.0,
) -> None:
    """err(ours) <= 2 err(same-dtype torch) + a few roundings of `dtype`, both against float64.

    One number of a tiny problem may come out exact by luck, hence the roundings, of the largest true value or of
    `size`, that of what cancels on the way;
    the rooms' own tests hold the tighter rule where there are enough numbers.
    """
    assert ours.shape == truth.shape, name
    ours, peer, truth = (each.detach().double() for each in (ours, peer, truth))
    if not truth.numel():
        return
    assert ours.isfinite().all(), f"{name}: not finite, the truth is"
    scale = max(size, truth.abs().max().item())
    error, peers = ((each - truth).abs().max().item() for each in (ours, peer))
    allowed = 2 * peers + scale * max(4 * torch.finfo(dtype).eps, 1e-10)
    assert not math.isnan(allowed) and error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"
