"""Multi-head attention with partial rotary position embedding and normalised queries and keys (as Show-o's Phi).

Three kernels give the same output wherever a query is no padding; what each reads is made once by `Visibility`:

    sdpa                torch's scaled_dot_product_attention under a bool mask; everywhere, the default
    flex_attention      torch's FlexAttention, which skips blocks of keys that nobody sees; on CUDA compiled on first
                        use, on a CPU unfused and without a backward
    flash_attention_2   flash-attn's varlen kernel, two calls a layer; on CUDA, float16 and bfloat16, where installed

Their names are transformers' (`attn_implementation`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import flex_attention
from transformers.cache_utils import Cache

from unif2ace.configs import T2I
from unif2ace.errors import UserError
from unif2ace.model.visibility import Visibility


def positions(attention_mask: torch.Tensor, task: torch.Tensor) -> torch.Tensor:
    """Positions [B, L] of the rotary embedding: in a t2i row padding counts (as in Show-o), in others it does not.

    Args:
        attention_mask: [B, L] bool. task: [B] `T2I` or `MMU`.
    """
    all_count = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    tokens_count = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return torch.where((task == T2I)[:, None], all_count, tokens_count)


def rotary_table(position_ids: torch.Tensor, channels: int, base: float = 10000.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of position * base**(-2i / channels) at positions [B, L] or, shared by all rows, [L].

    Returns:
        Both [B, L, channels / 2] or [L, channels / 2], float32.
    """
    frequency = base ** (-torch.arange(0, channels, 2, device=position_ids.device).float() / channels)
    angle = position_ids[..., None].float() * frequency
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, table: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn the first 2 * table-width channels of x [B, H, L, C] by position; the others pass through."""
    cos, sin = (each.to(x.dtype).unsqueeze(-3) for each in table)
    half = cos.shape[-1]
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visibility: Visibility | None = None,
    implementation: str = "sdpa",
) -> torch.Tensor:
    """Scaled dot-product attention.

    Args:
        q: [B, H, Lq, C]. k, v: [B, H, Lk, C].
        visibility: who sees whom; all see all when None, which is always sdpa's.
        implementation: "sdpa", "flex_attention" or "flash_attention_2".

    Returns:
        [B, H, Lq, C]. Where a query is padding, what it is depends on the implementation; it is finite.

    Raises:
        ValueError: an implementation that is none, or one that does not take q's dtype.
        UserError: flash-attn is asked for and not installed.
    """
    if visibility is None:
        return _sdpa(q, k, v, None)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation: expected one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    return IMPLEMENTATIONS[implementation](q, k, v, visibility)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if q.device.type == "cpu" and torch.is_grad_enabled():
        return _products(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _products(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Attention as it reads, which trains fastest on a CPU at the lengths of a face and its text.

    The flash kernel there has the slower backward, and torch's "math" takes 16 bits to float32 and back and looks for
    rows that see nothing; here such a row would see everything alike.
    """
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    if mask is not None:
        unseen = torch.finfo(scores.dtype).min
        scores = scores + torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, unseen)
    return torch.matmul(scores.softmax(-1), v)


def _masked(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visibility: Visibility) -> torch.Tensor:
    return _sdpa(q, k, v, visibility.mask(q.shape[2]))


@functools.cache
def _compiled_flex_attention() -> Callable[..., torch.Tensor]:
    return torch.compile(flex_attention)


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visibility: Visibility) -> torch.Tensor:
    kernel: Any = _compiled_flex_attention() if q.device.type == "cuda" else flex_attention
    return kernel(q, k, v, block_mask=visibility.block_mask(q.shape[2]))


def _flash(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visibility: Visibility) -> torch.Tensor:
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f"q: expected float16 or bfloat16 for flash_attention_2, got {q.dtype}; or use sdpa")
    try:
        from flash_attn import flash_attn_varlen_func
    except ImportError as error:
        raise UserError(
            f"flash_attention_2 needs the package flash-attn ({error}): install it, or use sdpa or flex_attention"
        ) from error
    rows, heads, queries, channels = q.shape
    q, k, v = (each.transpose(1, 2).flatten(0, 1) for each in (q, k, v))  # [B * L, H, C]
    out = q.new_zeros(rows, queries, heads, channels)
    same_each_time = torch.are_deterministic_algorithms_enabled()
    for cu_queries, cu_keys, causal, mine in visibility.varlen_calls(queries):
        given = flash_attn_varlen_func(
            q, k, v, cu_queries, cu_keys, queries, len(k) // rows, causal=causal, deterministic=same_each_time
        )
        out = torch.where(mine[:, :, None, None], given.view_as(out), out)
    return out.transpose(1, 2)


IMPLEMENTATIONS: dict[str, Callable[..., torch.Tensor]] = {
    "sdpa": _masked,
    "flex_attention": _flex,
    "flash_attention_2": _flash,
}


def repeated(x: torch.Tensor, times: int) -> torch.Tensor:
    """x [B, ...] as [times * B, ...], rows in turn; x itself for once."""
    return x if times == 1 else x.repeat(times, *[1] * (x.dim() - 1))


class Attention(nn.Module):
    """Self-attention over [B, L, D].

    Args:
        hidden_size: D. num_attention_heads: H, a divisor of D. layer: the place of this layer's keys and values in a
            transformers `Cache`.
    """

    def __init__(self, hidden_size: int, num_attention_heads: int, layer: int = 0) -> None:
        super().__init__()
        self.heads, self.layer = num_attention_heads, layer
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.q_norm = nn.LayerNorm(hidden_size // num_attention_heads)
        self.k_norm = nn.LayerNorm(hidden_size // num_attention_heads)
        self.out = nn.Linear(hidden_size, hidden_size)

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
        visibility: Visibility | None,
        table: tuple[torch.Tensor, torch.Tensor],
        past_key_values: Cache | None = None,
        prefix: tuple[torch.Tensor, torch.Tensor] | None = None,
        rows: torch.Tensor | None = None,
        implementation: str = "sdpa",
    ) -> torch.Tensor:
        """Attend from x, or from some of its rows.

        Args:
            x: [B, L, D]. visibility: of the queries and of all keys, those of a cache included.
            table: of the rotary embedding at the positions of x.
            past_key_values: keys and values of the positions before x, to which those of x are added.
            prefix: keys and values [R, H, keys, C] of which those of x are the last L: they are written there. R is B
                or a multiple of it: sequences that differ before x alone, of which row r continues with x[r % B].
            rows: [R, M] the positions of x that attend, all when None.
            implementation: see `attend`.

        Returns:
            [R, L or M, D].
        """
        length = x.shape[1]
        q, k, v = self._project(x, table)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer)
        if prefix is not None:
            times = len(prefix[0]) // len(x)
            for held, new in zip(prefix, (k, v)):
                held[:, :, -length:] = repeated(new, times)
            q, (k, v) = repeated(q, times), prefix
        if rows is not None:
            q = q.gather(2, rows[:, None, :, None].expand(-1, q.shape[1], -1, q.shape[3]))
        return self.out(attend(q, k, v, visibility, implementation).transpose(1, 2).flatten(2))
