"""Three attention kernels, one truth: who sees whom row by row, padding on either side, cached keys, positions."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch
from attention_rows import BATCHES, N, Rows, assert_close
from torch.nn.attention import flex_attention

from unif2ace.configs import MMU, T2I
from unif2ace.errors import UserError
from unif2ace.model.attention import IMPLEMENTATIONS, attend
from unif2ace.model.visibility import Visibility

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(params=BATCHES.values(), ids=BATCHES)
def rows(request) -> Rows:
    return request.param


def truth(q, k, v, rows: Rows, first: int = 0) -> torch.Tensor:
    """One query at a time, in float64: [B, Lq, H, C], zeros where a query is padding."""

    def one(row: int, i: int) -> torch.Tensor:
        keys = rows.seen(row, first + i)
        scores = k[row, :, keys].double() @ q[row, :, i, :, None].double() / math.sqrt(q.shape[3])
        return (scores.softmax(dim=1) * v[row, :, keys].double()).sum(1)

    return torch.stack([torch.stack([one(row, i) for i in range(q.shape[2])]) for row in range(len(q))])


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, *, causal=False, deterministic=False
):
    """flash-attn's function of this name in plain torch: float64 inside, one rounding at the end.

    A sequence without keys gives zeros; causal is aligned to the bottom right.
    """
    assert q.dim() == k.dim() == v.dim() == 3 and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert len(cu_seqlens_q) == len(cu_seqlens_k) and cu_seqlens_q[0] == cu_seqlens_k[0] == 0
    for cumulated, total, longest in ((cu_seqlens_q, len(q), max_seqlen_q), (cu_seqlens_k, len(k), max_seqlen_k)):
        assert 0 <= cumulated.diff().min() and cumulated.diff().max() <= longest
        assert cumulated[-1] == total, "the kernel leaves the output and the gradients of the rest unwritten"
    parts = []
    for qa, qb, ka, kb in zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:]):
        queries, keys = int(qb - qa), int(kb - ka)
        if queries and keys:
            scores = torch.einsum("qhc,khc->hqk", q[qa:qb].double(), k[ka:kb].double()) / math.sqrt(q.shape[2])
            if causal:
                seen = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
                assert seen.any(1).all(), "a query without a key"
                scores = scores.masked_fill(~seen, -math.inf)
            parts.append(torch.einsum("hqk,khc->qhc", scores.softmax(-1), v[ka:kb].double()).to(q.dtype))
        else:
            parts.append(torch.zeros_like(q[qa:qb]))
    return torch.cat(parts)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch) -> str:
    """Each one; flash-attn as if it were installed, and FlexAttention as if it let a CPU train, as it could."""
    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *each: None)
    return request.param


def dtype_of(implementation: str) -> torch.dtype:
    return torch.bfloat16 if implementation == "flash_attention_2" else torch.float64


# ------------------------------------------------------------------------------------------------------- who sees whom


def test_outputs_and_gradients_are_those_of_the_layouts_prose(rows, implementation):
    q, k, v = rows.qkv(dtype=dtype_of(implementation), grad=True)
    real = rows.facts[0]
    out = attend(q, k, v, rows.visibility(), implementation).transpose(1, 2)
    exact = [each.detach().double().requires_grad_() for each in (q, k, v)]
    expected = truth(*exact, rows)
    assert out.dtype == q.dtype and out.isfinite().all(), "padding is finite"
    assert_close(out[real], expected[real])
    weight = torch.randn(expected.shape, dtype=torch.float64)
    given = torch.autograd.grad((weight * out)[real].sum(), (q, k, v))
    for each, want in zip(given, torch.autograd.grad((weight * expected)[real].sum(), exact)):
        assert_close(each, want)
        assert not each.transpose(1, 2)[~real].any(), "padding has no part in what is no padding"


def test_padding_sees_itself(rows):
    """So that no kernel has a softmax over nothing to get right."""
    for queries in (rows.length, 5):
        seen = rows.visibility(queries=queries).mask(queries)
        assert seen.diagonal(rows.length - queries, dim1=2, dim2=3).all()


@pytest.mark.parametrize("queries", [14, 5, 1])
def test_flash_attns_calls_share_out_the_queries_that_are_no_padding(rows, queries):
    calls = rows.visibility(queries=queries).varlen_calls(queries)
    assert torch.equal(sum(call.mine.int() for call in calls), rows.facts[0][:, -queries:].int())
    for call in calls:
        sequences = torch.stack([call.cu_queries.diff(), call.cu_keys.diff()]).view(2, len(rows.rows), 5)
        assert torch.equal(sequences[0, :, 2], call.mine.sum(1)), "the third of a row's five"
        assert not sequences[:, :, [0, 1, 3, 4]].prod(0).any(), "the others compute nothing"


@pytest.mark.parametrize("queries", [1, 3, 7, 13])
def test_the_last_queries_of_a_longer_key_axis(rows, implementation, queries):
    """Decoding: what a cache holds comes first, one token follows or several."""
    q, k, v = rows.qkv(queries, dtype_of(implementation))
    real = rows.facts[0][:, -queries:]
    out = attend(q, k, v, rows.visibility(queries=queries), implementation).transpose(1, 2)
    assert_close(out[real], truth(q, k, v, rows, rows.length - queries)[real])


def test_everything_but_padding_is_seen_by_any_number_of_queries(implementation):
    """A face after its cached caption, and some of its rows alone."""
    rows = Rows([(T2I, 3, 11, 0, 9), (T2I, 0, 14, 0, 9)])
    q, k, v = rows.qkv(dtype=dtype_of(implementation))
    expected = truth(q, k, v, rows)
    face = Visibility.everything(rows.facts[0])
    for queries in ([8, 9, 10, 11, 12, 13], [12, 9], [10]):
        assert_close(attend(q[:, :, queries], k, v, face, implementation).transpose(1, 2), expected[:, queries])


def test_a_mixed_batch_gives_what_its_rows_give_alone(implementation):
    rows = BATCHES["mixed"]
    q, k, v = rows.qkv(dtype=dtype_of(implementation))
    together = attend(q, k, v, rows.visibility(), implementation)
    for i, (task, before, tokens, _, image) in enumerate(rows.rows):
        bare = Rows([(task, 0, tokens, 0, image - before if image >= 0 else -1)])
        part = slice(before, before + tokens)
        alone = attend(*(each[i : i + 1, :, part] for each in (q, k, v)), bare.visibility(), implementation)
        assert_close(alone, together[i : i + 1, :, part])


LONG = Rows([(T2I, 140, 160, 0, 200), (MMU, 0, 170, 130, 2), (MMU, 150, 150, 0, -1), (MMU, 0, 300, 0, 2)], 99)


def test_lengths_of_several_blocks(implementation):
    """Past FlexAttention's block of 128: blocks that nobody sees, blocks that are seen whole."""
    q, k, v = LONG.qkv(dtype=dtype_of(implementation))
    real = LONG.facts[0]
    out = attend(q, k, v, LONG.visibility(), implementation).transpose(1, 2)
    assert_close(out[real], truth(q, k, v, LONG)[real])


@pytest.mark.slow
def test_flex_attention_walks_the_blocks_that_it_is_told_of(monkeypatch):
    """Compiled it reads the lists of blocks, uncompiled only the rule: they must say the same."""
    compiled = torch.compile(flex_attention.flex_attention)
    monkeypatch.setattr("unif2ace.model.attention.flex_attention", compiled)
    q, k, v = LONG.qkv(dtype=torch.float32)
    real, visibility = LONG.facts[0], LONG.visibility()
    blocks = visibility.block_mask(300)
    assert not blocks.to_dense().all() and blocks.full_kv_num_blocks.any()
    given, expected = (attend(q, k, v, visibility, each).transpose(1, 2)[real] for each in ("flex_attention", "sdpa"))
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------- made once, on the device


def test_layers_share_what_is_made_once_and_no_later_edit_reaches_it(implementation):
    rows = BATCHES["mixed"]
    facts = rows.facts
    q, k, v = rows.qkv(dtype=dtype_of(implementation))
    fresh = attend(q, k, v, rows.visibility(), implementation)
    visibility = Visibility(*facts)
    for each in facts[:3]:
        each.zero_()  # a caller's tensors, used again for the next step
    assert torch.equal(attend(q, k, v, visibility, implementation), fresh)
    made = dict(visibility._made)
    assert torch.equal(attend(q, k, v, visibility, implementation), fresh)
    assert len(made) == 1 and all(visibility._made[name] is each for name, each in made.items())


def test_nothing_is_read_on_the_host():
    """On the meta device there are no values to be read: whatever asks for one fails."""
    facts = [each.to("meta") for each in BATCHES["mixed"].facts[:3]]
    for visibility in (
        Visibility(*facts, N),
        Visibility(*facts, N, queries=2),
        Visibility.everything(facts[0]),
    ):
        queries = visibility.queries or 5
        assert visibility.mask(queries).is_meta
        assert all(each.cu_keys.is_meta for each in visibility.varlen_calls(queries))
        assert visibility.block_mask(queries).kv_num_blocks.is_meta


# ------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    "mask,task,start,options,told",
    [
        ([3], [3], [3], {}, r"attention_mask: expected \[B, L\], got \[3\]"),
        ([2, 5], [3], [2], {}, r"task: expected \[2\], one value a row, got \[3\]"),
        ([2, 5], [2], [2, 1], {}, r"image_start: expected \[2\], one value a row, got \[2, 1\]"),
        ([2, 5], [2], [2], {"queries": 6}, "queries: expected 1 to 5, the number of keys, got 6"),
        ([2, 5], [2], [2], {"queries": 0}, "queries: expected 1 to 5, the number of keys, got 0"),
    ],
)
def test_facts_that_do_not_go_together(mask, task, start, options, told):
    with pytest.raises(ValueError, match=told):
        Visibility(torch.ones(mask, dtype=torch.bool), torch.zeros(task), torch.zeros(start), N, **options)


def test_queries_that_are_not_those_it_was_made_of():
    rows = BATCHES["t2i"]
    with pytest.raises(ValueError, match="this visibility is of 2, got 14"):
        attend(*rows.qkv(), rows.visibility(queries=2))


def test_an_implementation_that_is_none():
    with pytest.raises(ValueError, match="expected one of sdpa, flex_attention, flash_attention_2, got 'eager'"):
        attend(*BATCHES["t2i"].qkv(), BATCHES["t2i"].visibility(), "eager")


def test_flash_attn_that_is_not_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    rows = BATCHES["t2i"]
    with pytest.raises(UserError, match="needs the package flash-attn.*install it, or use sdpa or flex_attention"):
        attend(*rows.qkv(dtype=torch.bfloat16), rows.visibility(), "flash_attention_2")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_flash_attn_in_single_or_double_precision(dtype):
    rows = BATCHES["t2i"]
    with pytest.raises(ValueError, match=f"expected float16 or bfloat16 for flash_attention_2, got {dtype}"):
        attend(*rows.qkv(dtype=dtype), rows.visibility(), "flash_attention_2")


@pytest.mark.parametrize(
    "valid,image_start",
    [([1, 1, 0, 1, 1, 1, 1, 1, 1, 1], 4), ([1, 1, 1, 1, 1, 1, 1, 1, 1, 1], 2)],
    ids=["padding among tokens", "text after a t2i image"],
)
def test_rows_that_flash_attn_cannot_be_told_of(valid, image_start):
    """Two runs a row are all it takes; the other kernels take such rows."""
    valid = torch.tensor([valid, [1] * 10]).bool()  # one row is as it should be
    visibility = Visibility(valid, torch.tensor([T2I, T2I]), torch.tensor([image_start, 5]), N)
    with pytest.raises(RuntimeError, match="padding only before and after a row's tokens, no text after a face"):
        visibility.varlen_calls(10)
    assert visibility.mask(10).shape == (2, 1, 10, 10)
