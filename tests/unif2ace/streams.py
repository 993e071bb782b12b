"""Streams of the usual shards, and their rows looked at: what the tests of the stream share."""

from __future__ import annotations

import itertools

import pytest
import sets

from unif2ace.data.config import SetConfig
from unif2ace.data.stream import Stream

COUNT = 23  # samples of the usual set


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sets.shards(tmp_path_factory.mktemp("stream"), COUNT)


@pytest.fixture(scope="module")
def text():
    return sets.text()


@pytest.fixture(scope="module")
def model(text):
    return sets.model(text)


@pytest.fixture
def stream(folder, text, model):
    """Streams of the same shards."""

    def make(changes=None, **arguments) -> Stream:
        return Stream(sets.config(SetConfig(str(folder)), **(changes or {})), model, text, **arguments)

    return make


def take(stream, count):
    return list(itertools.islice(stream, count))


def rows(batch) -> list[tuple]:
    """Each row's content without its padding, which hangs on the rows beside it."""
    found = []
    for row in range(len(batch.task)):
        real = batch.attention_mask[row]
        first = int(real.int().argmax())
        last = len(real) - int(real.flip(0).int().argmax())
        found.append(
            (
                int(batch.task[row]),
                int(batch.image_start[row]) - first,
                batch.input_ids[row, first:last].tolist(),
                batch.labels[row, first:last].tolist(),
                float(batch.mask_prob[row]),
                batch.identity[row].tolist(),
                batch.semantic[row].tolist() if batch.semantic[row].any() else None,
            )
        )
    return found


def whole(streams, count) -> list[list]:
    """What all ranks do in each of `count` steps, in an order of its own."""
    steps = zip(*(take(each, count) for each in streams))
    return [sorted(row for part in step for batch in part.batches for row in rows(batch)) for step in steps]
