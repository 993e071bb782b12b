"""Multi-head attention with partial rotary position embedding and normalised queries and keys (as Show-o's Phi)."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel


def rotary_table(length: int, channels: int, base: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of position * base**(-2i / channels), each [length, channels / 2], float32."""
    frequency = base ** (-torch.arange(0, channels, 2).float() / channels)
    angle = torch.arange(length).float()[:, None] * frequency
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn the first 2 * table-width channels of x [B, H, L, C] by position; the others pass through."""
    cos, sin = (each[: x.shape[-2]].to(x.dtype) for each in table)
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Scaled dot-product attention of [B, H, L, C] under an optional boolean mask (True: sees)."""
    if q.device.type == "cpu" and torch.is_grad_enabled():
        # At the lengths of a face and its text the CPU's flash kernel has the slower backward.
        with sdpa_kernel(SDPBackend.MATH):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


class Attention(nn.Module):
    """Self-attention over [B, L, D] under a boolean mask [B, 1, L, L] (True: sees)."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.q_norm = nn.LayerNorm(hidden // heads)
        self.k_norm = nn.LayerNorm(hidden // heads)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        rows, length, hidden = x.shape
        q, k, v = self.qkv(x).view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), table), rotate(self.k_norm(k), table)
        y = attend(q.to(v.dtype), k.to(v.dtype), v, mask)
        return self.out(y.transpose(1, 2).reshape(rows, length, hidden))
