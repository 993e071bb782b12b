"""Streams of rows looked at: what the tests of the stream share."""

from __future__ import annotations

import itertools

COUNT = 23  # samples of the usual set


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
