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


def repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    """x [B, ...] as [times * B, ...], rows in turn; x itself for once."""
    return x if times == 1 else x.repeat(times, *[1] * (x.dim() - 1))


class Attention(nn.Module):
    """Self-attention over [B, L, D] under a boolean mask (True: sees)."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.q_norm = nn.LayerNorm(hidden // heads)
        self.k_norm = nn.LayerNorm(hidden // heads)
        self.out = nn.Linear(hidden, hidden)

    def key_value(self, x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values [B, H, L, C] of x [B, L, D]."""
        return self._project(x, table)[1:]

    def _project(
        self, x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(self.q_norm(q), table), rotate(self.k_norm(k), table)
        return q.to(v.dtype), k.to(v.dtype), v

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None,
        table: tuple[torch.Tensor, torch.Tensor],
        cache: tuple[torch.Tensor, torch.Tensor] | None = None,
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from x, or from some of its rows.

        Args:
            x: [B, L, D]. mask: [B, 1, L or 1, keys]. table: of the rotary embedding at the positions of x.
            cache: keys and values [R, H, keys, C] of which those of x are the last L: they are written there. R is B
                or a multiple of it: sequences that differ before x alone, of which row r continues with x[r % B].
            rows: [R, M] the positions of x that attend, all when None.

        Returns:
            [R, L or M, D].
        """
        length = x.shape[1]
        q, k, v = self._project(x, table)
        if cache is not None:
            times = len(cache[0]) // len(x)
            for held, new in zip(cache, (k, v)):
                held[:, :, -length:] = repeated(new, times)
            q, (k, v) = repeated(q, times), cache
        if rows is not None:
            q = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        return self.out(attend(q, k, v, mask).transpose(1, 2).flatten(2))
