"""The order of an epoch: every sample once, another order every epoch, nothing favoured."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from unif2ace.data.order import Order


def whole(*arguments) -> list[int]:
    order = Order(*arguments)
    return [order[place] for place in range(order.count)]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 700), st.integers(0, 2**64), st.integers(0, 1000))
def test_every_sample_once(count, seed, epoch):
    assert sorted(whole(count, "t2i", seed, epoch)) == list(range(count))


def test_it_hangs_on_all_that_it_is_made_from():
    first = whole(50, "t2i", 1, 2)
    assert first == whole(50, "t2i", 1, 2)
    others = [whole(50, "mmu", 1, 2), whole(50, "t2i", 2, 1), whole(50, "t2i", 1, 3), whole(50, "t2i", 12, 2)]
    assert len({tuple(each) for each in [first, *others]}) == 5


@pytest.mark.parametrize("count", [2, 3, 7, 16, 33])
def test_every_place_gets_every_sample_equally_often(count):
    """And neighbours are no likelier to stay neighbours than chance has it."""
    epochs = 60 * count
    seen: Counter = Counter()
    steps: Counter = Counter()
    for epoch in range(epochs):
        order = whole(count, "t2i", 3, epoch)
        seen.update(enumerate(order))
        steps.update((b - a) % count for a, b in zip(order, order[1:]))
    cells = [seen[place, index] for place in range(count) for index in range(count)]
    assert stats.chisquare(cells).pvalue > 1e-4
    assert count < 3 or stats.chisquare([steps[each] for each in range(1, count)]).pvalue > 1e-4


def test_a_large_order_is_had_at_once():
    order = Order(10**12, "t2i", 0, 0)
    assert len({order[place] for place in range(10**12 - 1000, 10**12)}) == 1000


@pytest.mark.parametrize("place", [-1, 5])
def test_there_is_no_such_place(place):
    with pytest.raises(IndexError, match="place: expected 0 to 4"):
        Order(5, "t2i", 0, 0)[place]
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        Order(0, "t2i", 0, 0)
