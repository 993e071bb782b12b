"""Who sees whom in rows of both tasks, told by a few facts a row and made once into what each attention kernel reads.

    t2i   text is causal; <soi> codes <eoi> see everything but padding
    mmu   causal, and every row sees the whole prefix through <eoi>
    text  a row without an image is causal

Padding is seen by nobody but itself (a softmax over nothing would be NaN). Layout and rules are Show-o's.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from unif2ace.configs import MMU, T2I


class VarlenCall(NamedTuple):
    """One call of a kernel over sequences of unequal length: in each row one run of queries that sees one run of keys.

    The rows lie one after another, [B * Lq] queries and [B * Lk] keys, and nothing is gathered: each row is five
    sequences, of which four have either no keys or no queries and only skip what is not in the run.

        cu_queries   0 | qa  qa  qb  Lq  Lq | Lq+ ..         queries [qa, qb) see keys [ka, kb)
        cu_keys      0 | 0   ka  kb  kb  Lk | Lk+ ..

    Attributes:
        cu_queries, cu_keys: [5 B + 1] int32, where each sequence begins.
        causal: each query sees the keys up to its own place, the last query all of them; otherwise all see all.
        mine: [B, Lq] the queries whose output this call gives.
    """

    cu_queries: Tensor
    cu_keys: Tensor
    causal: bool
    mine: Tensor


class Visibility:
    """Who sees whom; made once for a forward pass and shared by its layers. No method reads a value on the host.

    What a kernel reads is made when the first layer asks for it and kept in the object, by kernel and number of
    queries. The facts are copied: a tensor that is edited later changes nothing here, so what is kept can never be out
    of date, and facts that change need a new object.

    Args:
        attention_mask: [B, Lk] bool, False on padding, which may lie before and after a row's tokens; the keys that
            a cache holds come first.
        task: [B] `T2I` or `MMU`.
        image_start: [B] position of the first image code, <soi> before it; -1 for a row without an image.
        image_tokens: codes of an image; <eoi> follows them.
        queries: positions that attend, the last of the keys; all of them when None.

    Raises:
        ValueError: shapes that do not go together.
    """

    def __init__(
        self,
        attention_mask: Tensor,
        task: Tensor,
        image_start: Tensor,
        image_tokens: int,
        queries: int | None = None,
    ) -> None:
        if attention_mask.dim() != 2:
            raise ValueError(f"attention_mask: expected [B, L], got {list(attention_mask.shape)}")
        rows, keys = attention_mask.shape
        for name, each in (("task", task), ("image_start", image_start)):
            if each.shape != (rows,):
                raise ValueError(f"{name}: expected [{rows}], one value a row, got {list(each.shape)}")
        queries = keys if queries is None else queries
        if not 0 < queries <= keys:
            raise ValueError(f"queries: expected 1 to {keys}, the number of keys, got {queries}")
        device = attention_mask.device
        self.attention_mask = attention_mask.to(torch.bool, copy=True)
        self.queries: int | None = queries
        # Filled on the device: a tensor made of a number on the host would be waited for.
        self._first = torch.full((), keys - queries, device=device)
        paints, has_image = task == T2I, image_start >= 0
        soi, eoi = image_start - 1, image_start + image_tokens
        # [B] each: queries in [full_from, full_to) see everything, and keys before prefix_to are seen by every query.
        self._full_from = torch.where(paints & has_image, soi, 0)
        self._full_to = torch.where(paints & has_image, eoi + 1, 0)
        self._prefix_to = torch.where((task == MMU) & has_image, eoi + 1, 0)
        self._made: dict[tuple[str, int], Any] = {}

    @classmethod
    def everything(cls, attention_mask: Tensor) -> Visibility:
        """Any number of queries, of which each sees everything but padding (an image after a cached caption)."""
        rows, keys = attention_mask.shape
        zeros = torch.zeros(rows, dtype=torch.int64, device=attention_mask.device)
        self = cls(attention_mask, zeros, zeros, keys)
        self.queries = None
        return self

    def _rule(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """Whether in row b the query q (from 0) sees the key k, of index tensors that broadcast."""
        valid, first = self.attention_mask, self._first
        full_from, full_to, prefix_to = self._full_from, self._full_to, self._prefix_to

        def sees(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
            q = q + first
            full = (q >= full_from[b]) & (q < full_to[b])
            return (valid[b, k] & ((k <= q) | (k < prefix_to[b]) | full)) | (k == q)

        return (lambda b, q, k: valid[b, k]) if self.queries is None else sees

    def mask(self, queries: int) -> Tensor:
        """For `scaled_dot_product_attention`: [B, 1, Lq or 1, Lk] bool, True where the query sees the key."""
        return self._once("mask", queries, self._mask)

    def block_mask(self, queries: int) -> BlockMask:
        """For `flex_attention`, the same for all heads."""
        return self._once("block_mask", queries, self._block_mask)

    def varlen_calls(self, queries: int) -> list[VarlenCall]:
        """For flash-attn: the calls of `flash_attn_varlen_func` that each query is in exactly one of.

        It takes padding at the ends of a row only and no text after a t2i row's image; whether this holds is
        asserted on the device, without waiting for it.
        """
        return self._once("varlen_calls", queries, self._varlen_calls)

    def _once(self, name: str, queries: int, make: Callable[[int], Any]) -> Any:
        if queries != (self.queries or queries):
            raise ValueError(f"queries: this visibility is of {self.queries}, got {queries}")
        if (name, queries) not in self._made:
            self._made[name, queries] = make(queries)
        return self._made[name, queries]

    def _mask(self, queries: int) -> Tensor:
        device, (rows, keys) = self.attention_mask.device, self.attention_mask.shape
        b, q, k = (torch.arange(length, device=device) for length in (rows, queries, keys))
        return self._rule()(b[:, None, None], q[:, None], k)[:, None]

    def _block_mask(self, queries: int) -> BlockMask:
        (rows, keys), rule = self.attention_mask.shape, self._rule()
        device = str(self.attention_mask.device)
        return create_block_mask(lambda b, h, q, k: rule(b, q, k), rows, None, queries, keys, device)

    def _varlen_calls(self, queries: int) -> list[VarlenCall]:
        valid = self.attention_mask
        keys = valid.shape[1]
        count = valid.sum(1)
        begin = valid.int().argmax(1)  # of the row's tokens, [begin, end)
        end = begin + count
        last = keys - valid.flip(1).int().argmax(1)
        contiguous = ((count == 0) | (last == end)).all()
        if self.queries is None:
            torch._assert_async(contiguous, "flash-attn: padding only before and after a row's tokens")
            zero = torch.zeros_like(begin)
            return [self._call(zero, zero + queries, begin, end, queries, causal=False)]
        paints = self._full_to > 0
        whole = contiguous & (~paints | (end <= self._full_to)).all()
        torch._assert_async(whole, "flash-attn: padding only before and after a row's tokens, no text after a face")
        first, stop = self._first, self._first + queries

        def window(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            """Those of the positions [a, b) that are tokens and attend."""
            a = a.maximum(begin).maximum(first).minimum(stop)
            return a, b.minimum(end).minimum(stop).maximum(a)

        a, b = window(torch.where(paints, self._full_from, 0), torch.where(paints, self._full_to, self._prefix_to))
        seen = torch.where(paints, end, self._prefix_to.minimum(end)).maximum(begin)
        full = self._call(a - first, b - first, begin, seen, queries, causal=False)
        a, b = window(self._prefix_to, torch.where(paints, self._full_from, end))
        causal = self._call(a - first, b - first, begin, torch.where(b > a, b, begin), queries, causal=True)
        return [full, causal]

    def _call(self, qa: Tensor, qb: Tensor, ka: Tensor, kb: Tensor, queries: int, causal: bool) -> VarlenCall:
        rows, keys = self.attention_mask.shape
        row = torch.arange(rows, device=qa.device)

        def cumulated(bounds: list[Tensor | int], length: int) -> Tensor:
            each = torch.stack([row * length + bound for bound in bounds], dim=1).flatten()
            return torch.nn.functional.pad(each, (1, 0)).int()

        position = torch.arange(queries, device=qa.device)
        return VarlenCall(
            cumulated([qa, qa, qb, queries, queries], queries),
            cumulated([0, ka, kb, kb, keys], keys),
            causal,
            (position >= qa[:, None]) & (position < qb[:, None]),
        )
