"""The attention module: positions, rows that are padded on the left, cached keys, a prefix that is kept."""

from __future__ import annotations

import math

import pytest
import torch
from attention_rows import BATCHES, N, Rows, assert_close
from transformers import DynamicCache

from unif2ace.configs import MMU, T2I
from unif2ace.model.attention import Attention, positions, rotary_table, rotate
from unif2ace.model.visibility import Visibility


def test_padding_counts_in_a_t2i_row_alone():
    rows = Rows([(T2I, 3, 4, 0, -1), (T2I, 0, 7, 0, -1), (MMU, 3, 4, 0, -1), (MMU, 0, 5, 2, -1)])
    assert positions(*rows.facts[:2]).tolist() == [
        [0, 1, 2, 3, 4, 5, 6],
        [0, 1, 2, 3, 4, 5, 6],
        [0, 0, 0, 0, 1, 2, 3],
        [0, 1, 2, 3, 4, 4, 4],
    ]


def test_the_rotary_table_turns_a_pair_of_channels_by_its_angle():
    ids = torch.tensor([[0, 3], [7, 100]])
    cos, sin = rotary_table(ids, 6, base=50.0)
    x = torch.randn(2, 2, 2, 8, dtype=torch.float64)
    out = rotate(x, (cos, sin))
    for b, h, i in ((b, h, i) for b in range(2) for h in range(2) for i in range(2)):
        for pair in range(3):
            turn = complex(math.cos(a := ids[b, i].item() * 50.0 ** (-2 * pair / 6)), math.sin(a))
            z = complex(x[b, h, i, pair], x[b, h, i, pair + 3]) * turn
            assert complex(out[b, h, i, pair], out[b, h, i, pair + 3]) == pytest.approx(z, abs=1e-5)
    assert torch.equal(out[..., 6:], x[..., 6:])
    shared = rotary_table(ids[1], 6, base=50.0)
    assert torch.equal(rotate(x, shared)[1], out[1])


# ---------------------------------------------------------------------------------------------------------- the module


@pytest.fixture
def layer() -> Attention:
    layer = Attention(32, 2, layer=1).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def table_of(rows: Rows) -> tuple[torch.Tensor, torch.Tensor]:
    return rotary_table(positions(*rows.facts[:2]), 8)


@torch.no_grad()
def test_rows_padded_on_the_left_give_what_they_give_alone(layer):
    rows = BATCHES["mmu, pads before"]
    x = torch.randn(len(rows.rows), rows.length, 32, dtype=torch.float64)
    together = layer(x, rows.visibility(), table_of(rows))
    for i, (task, before, tokens, _, image) in enumerate(rows.rows):
        bare = Rows([(task, 0, tokens, 0, image - before)])
        assert_close(layer(x[i : i + 1, before:], bare.visibility(), table_of(bare)), together[i : i + 1, before:])


@torch.no_grad()
def test_token_by_token_from_a_cache(layer):
    """Prompts of unequal length with their images, then some tokens."""
    rows = Rows([(MMU, 0, 14, 0, 2), (MMU, 3, 11, 0, 5), (MMU, 5, 9, 0, -1)])
    valid, task, image, _ = rows.facts
    cos, sin = table_of(rows)
    x = torch.randn(len(rows.rows), rows.length, 32, dtype=torch.float64)
    want = layer(x, rows.visibility(), (cos, sin))
    cache = DynamicCache()
    for a, b in ((0, 10), (10, 11), (11, 13), (13, 14)):
        seen = Visibility(valid[:, :b], task, image, N, queries=b - a)
        got = layer(x[:, a:b], seen, (cos[:, a:b], sin[:, a:b]), past_key_values=cache)
        assert_close(got[valid[:, a:b]], want[:, a:b][valid[:, a:b]])
    assert cache.get_seq_length(0) == 0, "the layer keeps to its own place"


@torch.no_grad()
def test_a_prefix_that_is_kept_and_some_rows_alone(layer):
    """Two captions, one image: what comes before is written once, and only the wanted rows attend."""
    rows = Rows([(T2I, 3, 11, 0, 9), (T2I, 0, 14, 0, 9)])
    table = table_of(rows)
    x = torch.randn(2, rows.length, 32, dtype=torch.float64)
    x[1, 8:] = x[0, 8:]
    want = layer(x, rows.visibility(), table)
    held = tuple(torch.nn.functional.pad(each[:, :, :8], (0, 0, 0, 6)) for each in layer.key_value(x, table))
    image = tuple(each[0, 8:] for each in table)
    seen = Visibility.everything(rows.facts[0])
    assert_close(layer(x[:1, 8:], seen, image, prefix=held), want[:, 8:])
    some = torch.tensor([[4, 1], [0, 2]])
    got = layer(x[:1, 8:], seen, image, prefix=held, rows=some)
    assert_close(got, want[:, 8:].gather(1, some[:, :, None].expand(-1, -1, 32)))
