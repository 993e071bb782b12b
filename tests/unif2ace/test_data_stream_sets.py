"""What a stream is made of: pictures, several sets, plain text, ranks, settings."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import pytest
import sets
import streams
import torch
import yaml
from quick import QuickEncoding, job
from streams import COUNT, take

from unif2ace.data import stream as module
from unif2ace.data.config import DataConfig, MixConfig, SetConfig
from unif2ace.data.precompute import PrecomputeConfig
from unif2ace.data.stream import Stream
from unif2ace.errors import UserError
from unif2ace.settings import parse

folder, text, model, stream = streams.folder, streams.text, streams.model, streams.stream  # fixtures


def test_pictures_are_encoded_on_the_way(text, model, tmp_path, folder):
    """Slow, but the same rows as from shards, up to the half floats that shards hold."""
    path = sets.llava(tmp_path, COUNT)
    for workers in (0, 1):  # one line from a worker too, and no traceback in it
        with pytest.raises(UserError, match="^[^\n]*it has no codes; run `unif2ace precompute`[^\n]*$"):
            take(Stream(sets.config(SetConfig(str(path)), workers=workers), model, text), 1)
    encoded = take(Stream(sets.config(SetConfig(str(path))), model, text, encode=QuickEncoding().build()), 4)
    for a, b in zip(encoded, take(Stream(sets.config(SetConfig(str(folder))), model, text), 4)):
        assert a.keys == b.keys and torch.equal(a.batches[0].input_ids, b.batches[0].input_ids)
        assert torch.allclose(a.batches[0].semantic, b.batches[0].semantic, atol=1e-3)


def test_sets_are_mixed_by_their_sizes(folder, text, model, tmp_path):
    more = sets.precompute(job(sets.llava(tmp_path / "raw", 7, first=100), tmp_path / "more"), progress=False)
    assert more["samples"] == 7
    both = (SetConfig(str(folder), tasks=("t2i", "mmu")), SetConfig(str(tmp_path / "more"), tasks=("t2i",)))
    steps = take(Stream(sets.config(*both), model, text), 15)
    keys = [key for step in steps for key in step.keys[0]]
    assert len({key for key in keys if key.startswith("t2i")}) == 30
    assert not any(key.startswith("mmu:face-10") and len(key) == len("mmu:face-100") for key in keys)


def test_plain_text_is_read_once_an_epoch(text, model, tmp_path):
    words = [f"text {number} of plain words, {'more ' * (number % 7)}" for number in range(30)]
    path = tmp_path / "plain.jsonl"
    path.write_text("\n".join(json.dumps({"text": each}) for each in words))
    data = sets.config(SetConfig(str(path), tasks=("lm",)), mix=MixConfig(0, 0, 1), batch=4, lm_length=16)
    stream = Stream(data, model, text, rank=0, ranks=1)
    ((tokens, _),) = stream.walks["lm"].sets
    steps = take(stream, -(-len(tokens) // 4))
    windows = [row for step in steps for row in zip(step.keys[0], *(each.tolist() for each in (
        step.batches[0].input_ids, step.batches[0].labels)))][: len(tokens)]  # fmt: skip
    assert len({key for key, _, _ in windows}) == len(tokens)
    predicted = [label for _, _, labels in windows for label in labels if label != -100]
    expected = [token for each in words for token in [*text.encode(each), text.end]]
    assert Counter(predicted) == Counter(expected[1:]), "every token but the first is a target once"
    batch = steps[0].batches[0]
    assert batch.task.tolist() == [1] * 4 and batch.image_start.tolist() == [-1] * 4 and batch.input_ids.shape[1] == 16
    again = Stream(data, model, text)
    assert again.walks["lm"].sets[0][0].path == tokens.path and len(list(tmp_path.glob("*.tokens"))) == 1


def test_other_text_in_the_same_file_is_tokenised_anew(text, model, tmp_path):
    path = tmp_path / "plain.jsonl"
    data = sets.config(SetConfig(str(path), tasks=("lm",)), mix=MixConfig(0, 0, 1))
    for words in ("some words that are long enough", "other words that are long enough"):
        path.write_text(json.dumps({"text": words}))
        (batch,) = Stream(data, model, text).make(0).batches
        assert text.decode(batch.input_ids[0].tolist()) == words


def test_text_that_cannot_be_read_is_counted_once_and_for_all(text, model, tmp_path):
    path = tmp_path / "plain.jsonl"
    path.write_text('{"text": "some words that are long enough"}\n{"text": "br\n')
    data = sets.config(SetConfig(str(path), tasks=("lm",)), mix=MixConfig(0, 0, 1), max_corrupt=1)
    for _ in range(2):  # the second takes the token file as it is
        assert [*Stream(data, model, text).corrupt] == [f"{path} at byte 44"]
    with pytest.raises(UserError, match="1 samples could not be read, data.max_corrupt allows 0"):
        Stream(dataclasses.replace(data, max_corrupt=0), model, text)


def test_samples_that_do_not_serve_a_task_are_not_asked(text, model, tmp_path):
    raw = tmp_path / "raw"
    records = json.loads(sets.llava(raw, 12).read_text())
    for number in (2, 5):
        del records[number]["caption"]
    (raw / "faces.json").write_text(json.dumps(records))
    sets.precompute(job(raw / "faces.json", tmp_path / "out"), progress=False)
    steps = take(Stream(sets.config(SetConfig(str(tmp_path / "out"))), model, text), 10)
    captioned = [key for step in steps for key in step.keys[0] if key.startswith("t2i")]
    assert {"t2i:face-2", "t2i:face-5"}.isdisjoint(captioned) and len(set(captioned)) == 10
    assert sum(step.told["stand_in"] for step in steps) == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch": 0}, r"^data\.batch: expected at least 1, got 0"),
        ({"mix": MixConfig(1, 0, 0.001)}, r"^data\.batch: expected enough rows that mix\.lm gets one, got 6"),
        ({"mix": MixConfig(1, 0, 1)}, r"^data\.mix\.lm: expected 0, as no set has lm among its tasks, got 1"),
        ({"mix": MixConfig(1, -1, 0)}, r"^data\.mix\.mmu: expected a weight of at least 0, got -1"),
        ({"mix": MixConfig(0, 0, 0)}, r"^data\.mix: expected a weight above 0"),
        ({"guidance_dropout": 1.5}, r"^data\.guidance_dropout: expected a probability, got 1.5"),
        ({"over_long": "x"}, r"^data\.over_long: expected truncate or drop, got 'x'"),
        ({"questions": 0}, r"^data\.questions: expected at least 1, got 0"),
        ({"max_corrupt": -1}, r"^data\.max_corrupt: expected at least 0, got -1"),
        ({"sets": ()}, r"^data\.sets: expected at least one set"),
        ({"sets": (SetConfig("x", kind="y"),)}, r"^data\.sets\[0\]\.kind: expected one of auto, .*, got 'y'"),
        ({"sets": (SetConfig("x", tasks=("y",)),)}, r"^data\.sets\[0\]\.tasks: expected some of t2i, mmu, lm"),
    ],
)
def test_bad_settings_are_named(folder, text, model, changes, message):
    with pytest.raises(UserError, match=message):
        Stream(dataclasses.replace(sets.config(SetConfig(str(folder))), **changes), model, text)


def test_too_many_ranks(stream):
    stream(ranks=4, rank=3)
    with pytest.raises(
        UserError, match="data.batch: 6 rows are .* a step, too few for 2 ranks with 3 micro-batches each"
    ):
        stream(ranks=2, micro=3)
    with pytest.raises(ValueError, match="rank: expected 0 to ranks - 1 = 1, got 2"):
        stream(ranks=2, rank=2)


def test_the_page_s_settings_are_settings():
    """README.md of the data names keys that there are."""
    page = (Path(module.__file__).parent / "README.md").read_text()
    first, second = re.findall(r"```yaml\n(.*?)```", page, re.S)
    data = parse(DataConfig, yaml.safe_load(first), "data").check()
    assert data.counts == {"t2i": 24, "mmu": 19, "lm": 1}
    parse(PrecomputeConfig, yaml.safe_load(second), "").check()
