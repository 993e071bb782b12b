"""Three attention kernels, one truth: who sees whom row by row, padding on either side, cached keys, any batch of tasks."""

from __future__ import annotations

import dataclasses
import math
import sys
import types

import pytest
import torch

from unif2ace.configs import MMU, T2I
from unif2ace.errors import UserError
from unif2ace.model.attention import attend, positions, rotary_table, rotate
from unif2ace.model.visibility import Visibility

N = 4  # image tokens


@dataclasses.dataclass
class Rows:
    """Rows told apart by what a person would say of them: pads before, tokens, pads after, and where the image is."""

    rows: list[tuple[int, int, int, int, int]]  # task, pads before, tokens, pads after, image_start or -1

    @property
    def length(self) -> int:
        return sum(self.rows[0][1:4])

    @property
    def facts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        mask = [[False] * before + [True] * tokens + [False] * after for _, before, tokens, after, _ in self.rows]
        return torch.tensor(mask), torch.tensor([r[0] for r in self.rows]), torch.tensor([r[4] for r in self.rows]), N

    def visibility(self, **options) -> Visibility:
        return Visibility(*self.facts, **options)

    def sees(self, row: int, query: int, key: int) -> bool:
        """The prose of the layouts, a pair at a time."""
        task, before, tokens, _, image = self.rows[row]
        if not before <= key < before + tokens:
            return False
        if image >= 0 and task == T2I and image - 1 <= query <= image + N:
            return True
        if image >= 0 and task == MMU and key <= image + N:
            return True
        return key <= query

    def real(self, row: int, position: int) -> bool:
        return self.rows[row][1] <= position < sum(self.rows[row][1:3])


BATCHES = {
    # Every row has 14 positions. t2i: text, then <soi> codes <eoi> (6), which end the row.
    "t2i": Rows([(T2I, 0, 14, 0, 9), (T2I, 3, 11, 0, 9), (T2I, 6, 6, 2, 7), (T2I, 0, 8, 6, 3)]),
    "mmu, pads after": Rows([(MMU, 0, 14, 0, 2), (MMU, 0, 9, 5, 2), (MMU, 0, 7, 7, 2)]),
    "mmu, pads before": Rows([(MMU, 0, 14, 0, 2), (MMU, 5, 9, 0, 7), (MMU, 7, 7, 0, 9)]),
    "text": Rows([(MMU, 0, 14, 0, -1), (MMU, 4, 10, 0, -1), (MMU, 0, 1, 13, -1), (T2I, 3, 8, 3, -1)]),
    "mixed": Rows([(T2I, 3, 11, 0, 9), (MMU, 0, 12, 2, 2), (MMU, 2, 9, 3, -1), (T2I, 0, 11, 3, 6), (MMU, 4, 10, 0, 6)]),
}


@pytest.fixture(params=BATCHES.values(), ids=BATCHES)
def rows(request) -> Rows:
    return request.param


def truth(q, k, v, rows: Rows, first: int = 0) -> torch.Tensor:
    """One query at a time, float64; zeros where a query is padding."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for row in range(len(rows.rows)):
        for i in range(q.shape[2]):
            if rows.real(row, first + i):
                keys = [j for j in range(k.shape[2]) if rows.sees(row, first + i, j)]
                scores = k[row, :, keys].double() @ q[row, :, i, :, None].double() / math.sqrt(q.shape[3])
                out[row, :, i] = (scores.softmax(dim=1) * v[row, :, keys].double()).sum(1)
    return out


def qkv(rows: Rows, queries: int | None = None, heads: int = 2, channels: int = 16, dtype=torch.float64):
    lengths = (queries or rows.length, rows.length, rows.length)
    return [torch.randn(len(rows.rows), heads, n, channels, dtype=dtype) for n in lengths]


def real_queries(rows: Rows, first: int = 0) -> torch.Tensor:
    return rows.facts[0][:, first:]


def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal=False):
    """flash-attn's function of this name in plain torch: float64 inside, one rounding at the end.

    A sequence without keys gives zeros, causal is aligned to the bottom right; what no sequence covers, and what lies
    beyond the longest lengths that were promised, is left unwritten: NaN here.
    """
    assert q.dim() == k.dim() == v.dim() == 3 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert (
        len(cu_seqlens_q) == len(cu_seqlens_k) and (cu_seqlens_q.diff() >= 0).all() and (cu_seqlens_k.diff() >= 0).all()
    )
    assert cu_seqlens_q[0] == cu_seqlens_k[0] == 0, "sequences begin at the first token"
    assert cu_seqlens_q[-1] == len(q) and cu_seqlens_k[-1] == len(k), "gradients of the rest would be unwritten"
    assert cu_seqlens_q.diff().max() <= max_seqlen_q and cu_seqlens_k.diff().max() <= max_seqlen_k
    parts = []
    for qa, qb, ka, kb in zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:]):
        queries, keys = int(qb - qa), int(kb - ka)
        if queries and not keys:
            parts.append(torch.zeros_like(q[qa:qb]))
        elif queries:
            scores = torch.einsum("qhc,khc->hqk", q[qa:qb].double(), k[ka:kb].double()) / math.sqrt(q.shape[2])
            if causal:
                seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
                assert seen.any(1).all(), "a query without a key"
                scores = scores.masked_fill(~seen, -math.inf)
            parts.append(torch.einsum("hqk,khc->qhc", scores.softmax(-1), v[ka:kb].double()).to(q.dtype))
    return torch.cat(parts)


@pytest.fixture
def flash(monkeypatch):
    """flash-attn as if it were installed, float64 included."""
    double = types.ModuleType("flash_attn")
    double.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", double)


@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention", "flash_attention_2"])
def test_every_query_sees_what_the_layouts_say(rows, implementation, flash):
    dtype = torch.bfloat16 if implementation == "flash_attention_2" else torch.float64
    q, k, v = qkv(rows, dtype=dtype)
    out = attend(q, k, v, rows.visibility(), implementation)
    assert out.dtype == dtype and out.isfinite().all()
    mine = real_queries(rows)
    expected = truth(q, k, v, rows).to(dtype)
    torch.testing.assert_close(out.transpose(1, 2)[mine], expected.transpose(1, 2)[mine], rtol=1e-12, atol=1e-12)
