"""Slots sorted by expert in torch, without a wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor


def check_range(expert: Tensor, experts: int) -> None:
    """On the CPU, refuse an expert out of range; elsewhere looking would cost a synchronisation."""
    if expert.device.type == "cpu" and expert.numel():
        low, high = (int(bound) for bound in expert.aminmax())
        if low < 0 or high >= experts:
            raise ValueError(f"expert: expected values in [0, {experts}), got values in [{low}, {high}]")


def forward(expert: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """counts [A], offsets [A + 1] and order [R] of the slots whose experts are `expert`, int64 of R elements.

    An expert out of range is a ValueError on the CPU; elsewhere it is taken as the nearest one that there is.
    """
    check_range(expert, experts)
    rows, order = expert.flatten().clamp(0, experts - 1).sort(stable=True)
    offsets = torch.searchsorted(rows, torch.arange(experts + 1, device=expert.device))
    return offsets.diff(), offsets, order
