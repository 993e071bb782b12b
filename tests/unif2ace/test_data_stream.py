"""The stream: every sample once an epoch whatever ranks and workers there are, and bitwise the same after any death."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import sets
import torch
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from quick import QuickEncoding, job

from unif2ace.data import stream as module
from unif2ace.data.config import DataConfig, MixConfig, SetConfig
from unif2ace.data.precompute import PrecomputeConfig
from unif2ace.data.shards import index_path
from unif2ace.data.stream import Stream
from unif2ace.errors import UserError
from unif2ace.settings import parse

COUNT = 23
COUNTS = {"t2i": 4, "mmu": 2}  # of the usual config


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


def test_an_epoch_has_every_sample_once(stream):
    for task, each in COUNTS.items():
        steps = take(stream(), COUNT * 3 // each + 1)
        keys = [key for step in steps for key in step.keys[0] if key.startswith(task)]
        for epoch in range(3):
            assert Counter(keys[epoch * COUNT : (epoch + 1) * COUNT]) == Counter(
                f"{task}:face-{n}" for n in range(COUNT)
            )
        assert keys[:COUNT] != keys[COUNT : 2 * COUNT]


def test_each_step_has_exactly_the_rows_asked_for(stream):
    for step in take(stream(), 9):
        assert Counter(key.partition(":")[0] for key in step.keys[0]) == COUNTS
        assert step.batches[0].task.tolist() == [0] * 4 + [1] * 2


@settings(max_examples=12, deadline=None, phases=[Phase.generate])
@given(ranks=st.integers(1, 4), micro=st.integers(1, 2), resumed=st.integers(0, 6), other=st.integers(1, 4))
def test_ranks_do_one_run_between_them(folder, text, model, ranks, micro, resumed, other):
    """No row twice, none missing, whatever the number of ranks and micro-batches, and whenever that changes."""
    data = sets.config(SetConfig(str(folder)), batch=12)

    def streams(ranks, micro):
        return [Stream(data, model, text, rank=rank, ranks=ranks, micro=micro) for rank in range(ranks)]

    expected = whole(streams(1, 1), 8)
    if micro * max(ranks, other) > 7:
        micro = 1
    first = streams(ranks, micro)
    done = whole(first, resumed)
    states = [json.loads(json.dumps(each.state_dict())) for each in first]
    assert all(state == states[0] for state in states), "ranks agree on where they are"
    second = streams(other, 1)
    for each in second:
        each.load_state_dict(states[0])
    assert done + whole(second, 8 - resumed) == expected


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(stream, workers):
    alone, among = take(stream(), 11), take(stream({"workers": workers, "prefetch": 2}), 11)
    assert [each.step for each in among] == list(range(11)) and [each.keys for each in among] == [e.keys for e in alone]
    assert all(sets.same(a.batches[0], b.batches[0]) for a, b in zip(alone, among))


def test_a_step_hangs_on_config_and_step_alone(stream):
    first = stream()
    expected = take(first, 5)
    torch.manual_seed(99)
    assert sets.same(stream().make(3).batches[0], expected[3].batches[0])
    before = torch.get_rng_state()
    take(stream({"workers": 1}), 1)
    assert torch.equal(before, torch.get_rng_state()), "the run's own random numbers are left alone"
    other = take(stream({"seed": 6}), 5)
    assert all(a.keys != b.keys for a, b in zip(expected, other))
    times = {tuple(step.batches[0].mask_prob.tolist()) for step in expected}
    assert len(times) == 5, "each step has times of its own"


def test_resumed_it_is_bitwise_the_same(stream):
    expected = take(stream(), 12)
    one = stream({"workers": 2})
    taken = take(one, 5)
    state = json.loads(json.dumps(one.state_dict()))
    assert state["step"] == 5 and len(json.dumps(state)) < 300
    two = stream()
    two.load_state_dict(state)
    for a, b in zip(taken + take(two, 7), expected, strict=True):
        assert a.step == b.step and a.keys == b.keys and sets.same(a.batches[0], b.batches[0])
    assert two.epochs()["t2i"] == pytest.approx(12 * 4 / COUNT)


def test_another_mix_goes_on_where_each_task_was(stream):
    """A later stage has other rows a step; samples that an epoch has left still come before others come again."""
    first = stream()
    seen = [key for step in take(first, 3) for key in step.keys[0] if key.startswith("t2i")]
    second = stream({"mix": MixConfig(1, 1, 0)})
    second.load_state_dict(first.state_dict())
    steps = take(second, 4)
    assert [each.step for each in steps] == [3, 4, 5, 6]
    later = [key for step in steps for key in step.keys[0] if key.startswith("t2i")]
    assert len(later) == 12 and len({*seen, *later[: COUNT - len(seen)]}) == COUNT


def test_other_samples_are_no_continuation(stream, text, model, tmp_path):
    state = stream().state_dict()
    other = Stream(sets.config(SetConfig(str(sets.shards(tmp_path, 20)))), model, text)
    for refused, told in ((other, "data.sets: other samples"), (stream({"seed": 1}), r"data.seed: expected \d, .* 1$")):
        with pytest.raises(UserError, match=told):
            refused.load_state_dict({**state, "step": 7})
        refused.load_state_dict({**state, "step": 7}, same_data=False)
        assert refused.step == 7 and set(refused.places(7).values()) == {0}


def _walk(folder, text, model, log, workers):
    """What a training loop does: take a step, write down what it was, write down the state."""
    stream = Stream(sets.config(SetConfig(str(folder)), workers=workers), model, text)
    state = log.with_suffix(".state")
    if state.exists():
        stream.load_state_dict(json.loads(state.read_text()))
    for step in itertools.islice(stream, 24 - stream.step):
        with log.open("a") as file:
            file.write(json.dumps([step.step, step.keys, step.batches[0].input_ids.tolist()]) + "\n")
        partial = log.with_suffix(".partial")
        partial.write_text(json.dumps(stream.state_dict()))
        partial.replace(state)
        time.sleep(0.01)


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_at_any_moment_it_goes_on(folder, text, model, tmp_path, kills, workers):
    """SIGKILL at odd times: what follows the state is bitwise what would have followed."""
    expected = [[each.step, each.keys, each.batches[0].input_ids.tolist()] for each in take(
        Stream(sets.config(SetConfig(str(folder))), model, text), 24)]  # fmt: skip
    died, round_ = 0, 0
    while died < kills:
        log = tmp_path / f"{round_}.log"
        for attempt in range(1000):
            process = multiprocessing.get_context("fork").Process(
                target=_walk, args=(folder, text, model, log, workers)
            )
            process.start()
            process.join(0.05 + 0.3 * (attempt * 7919 % 97) / 97 if died < kills else None)
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            died += process.exitcode == -signal.SIGKILL
            if process.exitcode == 0:
                break
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        # A step that was taken and not yet written into the state is taken once more, and is the same.
        assert sorted({line[0] for line in lines}) == list(range(24))
        assert all(line == expected[line[0]] for line in lines)
        round_ += 1


def test_a_worker_that_is_killed_is_reported(stream, monkeypatch):
    lost = stream({"workers": 1})
    monkeypatch.setattr(lost, "make", lambda step: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(UserError, match="a data worker was lost"):
        take(lost, 1)


# damage


def flip(folder, key) -> str:
    """Damage one sample on disk; what the message will call it."""
    for path in sorted(folder.glob("*.tar")):
        index = json.loads(index_path(path).read_text())
        if key in index["keys"]:
            offset, size, _ = index["places"][index["keys"].index(key)][0]
            with path.open("r+b") as file:
                file.seek(offset + size // 2)
                byte = file.read(1)
                file.seek(-1, os.SEEK_CUR)
                file.write(bytes([byte[0] ^ 4]))
            return f"{path} at byte {offset}"
    raise KeyError(key)


@pytest.fixture
def damaged(folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "damaged")
    return copy, {flip(copy, f"face-{number}") for number in (4, 17)}


def test_damage_is_passed_over_alike_by_all(damaged, folder, text, model, caplog):
    """Others stay in their places, a stand-in has the damaged one's, on any number of ranks and workers, resumed or
    not."""
    copy, wheres = damaged
    data = sets.config(SetConfig(str(copy)), max_corrupt=2)
    sound = take(Stream(sets.config(SetConfig(str(folder))), model, text), 12)
    one = Stream(data, model, text)
    with caplog.at_level(logging.WARNING):
        steps = take(one, 12)
    assert set(one.corrupt) == wheres and len(caplog.records) == 2
    assert all("its bytes are not those that were written" in record.getMessage() for record in caplog.records)
    changed = 0
    for a, b in zip(steps, sound):
        for mine, theirs in zip(a.keys[0], b.keys[0]):
            lost = theirs.endswith(("face-4", "face-17"))
            assert (mine == theirs) != lost
            changed += lost
    assert changed == one.told["stand_in"] > 3, "more than an epoch"
    expected = whole([Stream(data, model, text)], 12)
    assert whole([Stream(data, model, text, rank=rank, ranks=2) for rank in range(2)], 12) == expected
    among = Stream(dataclasses.replace(data, workers=2), model, text)
    first = whole([among], 5)
    rest = Stream(data, model, text)
    rest.load_state_dict(among.state_dict())
    assert first + whole([rest], 7) == expected and set(rest.corrupt) == wheres


@pytest.mark.parametrize("workers", [0, 2])
def test_too_much_damage_stops_it_with_the_file_s_name(damaged, text, model, workers):
    copy, wheres = damaged
    stream = Stream(sets.config(SetConfig(str(copy)), max_corrupt=1, workers=workers), model, text)
    with pytest.raises(
        UserError, match=r"2 samples could not be read, data.max_corrupt allows 1; the last: (.*tar at byte .*)"
    ) as e:
        take(stream, 12)
    assert any(where in str(e.value) for where in wheres) and "\n" not in str(e.value)


def test_the_count_goes_on_after_a_resume(damaged, text, model):
    copy, _ = damaged
    data = sets.config(SetConfig(str(copy)), max_corrupt=1)
    stream = Stream(data, model, text)
    while len(stream.corrupt) < 1:
        take(stream, 1)
    again = Stream(data, model, text)
    again.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert again.corrupt == stream.corrupt and len(again.corrupt) == 1
    with pytest.raises(UserError, match="2 samples could not be read"):
        take(again, 12)


def test_a_shard_that_goes_away_stops_it(damaged, text, model):
    copy, _ = damaged
    stream = Stream(sets.config(SetConfig(str(copy)), max_corrupt=6), model, text)
    take(stream, 1)
    for number in range(5):
        (copy / f"shard-{number:05d}.tar").unlink()
    from unif2ace.data import sources

    sources._opened.cache_clear()  # a file that is open can still be read
    with pytest.raises(UserError, match=r"7 samples could not be read.*shard-0000\d\.tar at byte \d+: No such file"):
        take(stream, 30)


def test_codes_of_another_tokenizer_stop_it(folder, text):
    with pytest.raises(UserError, match=r"its codes are \[4\] up to \d+, this model's are \[9\] below 16"):
        take(Stream(sets.config(SetConfig(str(folder)), max_corrupt=3), sets.model(text).__class__(
            **{**sets.model(text).to_dict(), "image_tokens": 9}), text), 1)  # fmt: skip


# sets, ranks, settings


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
