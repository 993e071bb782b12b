"""The stream: every sample once an epoch whatever ranks and workers there are, and bitwise the same after any death."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import time
from collections import Counter

import pytest
import sets
import streams
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from streams import COUNT, take, whole

from unif2ace.data.config import MixConfig, SetConfig
from unif2ace.data.stream import Stream
from unif2ace.errors import UserError

COUNTS = {"t2i": 4, "mmu": 2}  # of the usual config

folder, text, model, stream = streams.folder, streams.text, streams.model, streams.stream  # fixtures


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


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than there are cores
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
