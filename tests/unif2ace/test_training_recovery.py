"""What goes wrong in weeks of training: kills, signals, full disks, losses that are not numbers, ranks that die."""

from __future__ import annotations

import json
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
import training_runs as runs
import yaml

from unif2ace.checkpoint import Checkpoint
from unif2ace.errors import UserError
from unif2ace.training import states

STEPS = 24
EXACT = ("loss", "terms", "grad_norm", "grad_norms", "experts", "lr", "rows", "tokens", "stage")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recovery")
    values = runs.prepare(folder, text=True)
    values["save"] = {"every": 2, "minutes": 0, "keep": 2}
    values["ema"] = 0.9
    half = {"steps": STEPS // 2, "lr": 1e-2, "warmup": 2}
    values["stages"] = [
        {"name": "first", **half, "freeze": ["blocks.*.sequence.*"], "loss": {"lm": 0.5}},
        {"name": "second", **half, "data": {"mix": {"t2i": 2, "mmu": 5, "lm": 2}}},
    ]
    return folder, runs.write(values, folder / "config.json")


@pytest.fixture(scope="module")
def undisturbed(prepared):
    folder, config = prepared
    runs.train(config, f"--run={folder / 'whole'}", hook="training_hooks:keys_told")
    return folder / "whole"


def exact(run: Path) -> list[dict]:
    return [{key: record.get(key) for key in EXACT} for record in runs.records(run)]


def same_run(run: Path, undisturbed: Path) -> None:
    """Bit for bit, and with the same samples."""
    assert exact(run) == exact(undisturbed)
    assert [record["step"] for record in runs.records(run)] == list(range(STEPS))
    expected = runs.weights(undisturbed)
    assert all(value.equal(expected[name]) for name, value in runs.weights(run).items())


def test_an_epoch_has_every_sample_once(undisturbed):
    keys = [key for _, batches in _told(undisturbed) for key in sum(batches, [])]
    counts = Counter(key for key in keys if key.startswith("mmu:"))
    walked = 4 * STEPS // 2 + 5 * STEPS // 2
    assert sum(counts.values()) == walked
    assert set(counts.values()) <= {walked // 23, walked // 23 + 1} and len(counts) == 23


def test_stages_train_what_they_say(undisturbed):
    first, second = (runs.records(undisturbed)[step] for step in (0, STEPS // 2))
    assert (first["stage"], second["stage"]) == ("first", "second")
    assert first["rows"] == {"t2i": 4, "mmu": 4, "lm": 1} and second["rows"] == {"t2i": 2, "mmu": 5, "lm": 2}
    for record, lm in ((first, 0.5), (second, 0.1)):
        terms = record["terms"]
        total = terms["mask"] + 0.01 * terms["score"] + terms["mmu"] + lm * terms["lm"] + terms["balance"]
        assert record["loss"] == pytest.approx(total, rel=1e-5)
    assert "sequence" not in first["grad_norms"] and second["grad_norms"]["sequence"] > 0
    rates = [record["lr"] for record in runs.records(undisturbed)]
    assert rates[: STEPS // 2] == rates[STEPS // 2 :]  # each stage warms up and falls by itself
    assert max(rates) == pytest.approx(1e-2, rel=0.05) and rates[STEPS // 2 - 1] < 1e-3


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_killed_at_random_it_goes_on_bit_for_bit(prepared, undisturbed, kills):
    """As many runs as it takes for so many kills, a few steps or none between two of them."""
    folder, config = prepared
    told, chance, done, runs_made = dict(_told(undisturbed)), random.Random(kills), 0, 0
    while done < kills:
        run, ended = folder / f"killed{kills}-{runs_made}", False
        while done < kills and not ended:
            with runs.Ranks(config, f"--run={run}", hook="training_hooks:keys_told") as ranks:
                wanted = len(_told(run)) + chance.randrange(6)
                while len(_told(run)) < wanted and ranks.wait(0.01) == [None]:
                    pass
                time.sleep(chance.random() * 0.1)
                ended = ranks.wait(0.0) != [None]
                ranks.kill()
                done += not ended
        runs.train(config, f"--run={run}", hook="training_hooks:keys_told")
        same_run(run, undisturbed)
        assert all(told[step] == keys for step, keys in _told(run))  # each time that a step was done
        assert {step for step, _ in _told(run)} == set(range(STEPS))
        runs_made += 1


def _told(run: Path) -> list:
    path = run / "keys.0.jsonl"
    whole = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in whole]


def test_killed_while_a_state_is_written(prepared, undisturbed):
    folder, config = prepared
    run = folder / "written"
    with runs.Ranks(config, f"--run={run}", hook="training_hooks:killed_in_write") as ranks:
        assert ranks.wait() == [-signal.SIGKILL]
    assert list((run / "states").glob(".step-*.partial")) and states.listed(run / "states")
    (run / "states" / ".step-00000007.partial").mkdir()  # as of a run that saved at other steps
    runs.train(config, f"--run={run}")
    same_run(run, undisturbed)
    assert not list((run / "states").glob(".*")) and len(states.listed(run / "states")) == 2


@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_saves_and_ends(prepared, undisturbed, ranks):
    folder, config = prepared
    run = folder / f"stopped{ranks}"
    given = [f"--run={run}", "--save.every=1000"]
    with runs.Ranks(config, *given, ranks=ranks, hook="training_hooks:slow_steps") as going:
        while not (run / "log.jsonl").exists() or len(runs.records(run)) < 3:
            assert going.wait(0.05) == [None] * ranks, going.said
        going.signal(signal.SIGTERM, rank=ranks - 1)  # any one of them
        assert going.wait() == [128 + signal.SIGTERM] * ranks, going.said
        assert going.said.count("its state is saved") == 1
    stopped = states.number(states.listed(run / "states")[-1])
    assert stopped == len(runs.records(run)) < STEPS
    runs.train(config, f"--run={run}", ranks=ranks)
    if ranks == 1:
        same_run(run, undisturbed)
    assert [record["step"] for record in runs.records(run)] == list(range(STEPS))


def test_other_ranks_go_on_from_the_state(prepared, undisturbed):
    """Two ranks, then one, then two that share the experts."""
    folder, config = prepared
    run = folder / "elastic"
    shape = [(2, "--parallel.experts=1", 6), (1, "--parallel.experts=1", 14), (2, "--parallel.experts=2", STEPS)]
    for ranks, experts, until in shape:
        with runs.Ranks(config, f"--run={run}", experts, ranks=ranks, hook="training_hooks:slow_steps") as going:
            while until < STEPS and (not (run / "log.jsonl").exists() or len(runs.records(run)) < until):
                assert going.wait(0.05) == [None] * ranks, going.said
            if until < STEPS:
                going.signal(signal.SIGTERM, rank=0)
            assert set(going.wait()) == {128 + signal.SIGTERM if until < STEPS else 0}, going.said
    for ours, theirs in zip(runs.records(run), runs.records(undisturbed), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["tokens"] == theirs["tokens"]
    assert {event["ranks"] for event in runs.events(run, "resumed")} == {1, 2}


def test_a_rank_that_dies_ends_the_others(prepared, undisturbed):
    folder, config = prepared
    run = folder / "lost"
    with runs.Ranks(config, f"--run={run}", ranks=2, hook="training_hooks:slow_steps") as going:
        while not (run / "log.jsonl").exists() or len(runs.records(run)) < 3:
            assert going.wait(0.05) == [None, None], going.said
        going.signal(signal.SIGKILL, rank=1)
        assert going.wait(20) == [1, -signal.SIGKILL], going.said
        last = going.said.strip().splitlines()[-1]
    assert re.fullmatch(r"unif2ace: rank 0: another rank was lost; start the same command again .*", last)
    for ours, theirs in zip(runs.train(config, f"--run={run}", ranks=2), runs.records(undisturbed), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_a_device_that_is_full_is_told_with_what_helps(prepared):
    """By the rank whose it is; the others know only that it is gone."""
    folder, config = prepared
    with runs.Ranks(config, f"--run={folder / 'no memory'}", ranks=2, hook="training_hooks:no_memory") as going:
        assert going.wait() == [1, 1], going.said
        told = going.logs[1].read_text()
    full = "rank 1: cpu has no memory left; start it again with a larger parallel.micro, or with "
    assert f"unif2ace: {full}parallel.checkpointing=block\n" in told and "Traceback" not in told


def test_a_state_that_cannot_be_written_leaves_those_that_are(prepared, undisturbed):
    folder, config = prepared
    run = folder / "full"
    with runs.Ranks(config, f"--run={run}", hook="training_hooks:killed_in_write") as ranks:
        ranks.wait()
    before = states.listed(run / "states")
    with runs.Ranks(config, f"--run={run}", hook="training_hooks:no_space") as ranks:
        assert ranks.wait() == [1]
        assert "3 states in a row could not be written" in ranks.said and "free space" in ranks.said
        assert "training goes on" in ranks.said and "Traceback" not in ranks.said
    assert states.listed(run / "states") == before and not list((run / "states").glob(".*"))
    assert len(runs.events(run, "state_failed")) == 3
    runs.train(config, f"--run={run}")
    same_run(run, undisturbed)


def test_a_loss_that_is_no_number_is_passed_over(prepared):
    folder, config = prepared
    records = runs.train(config, f"--run={folder / 'nan'}", hook="training_hooks:nan_twice")
    assert [record["skipped"] for record in records[:5]] == [0, 1, 2, 2, 2]
    assert all(record["loss"] == record["loss"] for record in records if record["step"] not in (1, 2))
    assert [event["step"] for event in runs.events(folder / "nan", "skipped")] == [1, 2]


def test_too_many_of_them_stop_the_run_with_a_report(prepared):
    folder, config = prepared
    run = folder / "nans"
    with runs.Ranks(config, f"--run={run}", "--max_skipped=1", ranks=2, hook="training_hooks:nan_twice") as ranks:
        assert ranks.wait() == [1, 1], ranks.said
        assert ranks.said.count("2 steps had no finite gradient, max_skipped allows 1") == 1
    report = json.loads((run / "skipped.json").read_text())
    assert report["step"] == 2 and len(report["samples"]) == 2 and sum(map(len, sum(report["samples"], []))) == 9
    assert states.listed(run / "states")


def test_data_that_cannot_be_read_stops_all_ranks_with_the_files_name(prepared):
    folder, config = prepared
    values = json.loads(config.read_text())
    values |= {"run": str(folder / "unread"), "stages": [{"name": "only", "steps": 40, "lr": 1e-3}]}
    broken = folder / "broken"
    shard = next(Path(values["data"]["sets"][0]["path"]).glob("*.tar"))
    broken.mkdir()
    for each in shard.parent.iterdir():
        (broken / each.name).write_bytes(each.read_bytes())
    content = bytearray((broken / shard.name).read_bytes())
    content[len(content) // 3 :] = b"\xff" * (len(content) - len(content) // 3)
    (broken / shard.name).write_bytes(content)
    values["data"]["sets"][0]["path"] = str(broken)
    with runs.Ranks(runs.write(values, folder / "broken.json"), ranks=2) as ranks:
        assert ranks.wait() == [1, 1], ranks.said
        told = [line for line in ranks.said.splitlines() if line.startswith("unif2ace: ")]
    assert len(told) == 1 and "data.max_corrupt allows 3" in told[0] and shard.name in told[0], told


def test_samples_on_the_way_change_nothing(prepared, undisturbed):
    folder, config = prepared
    run = folder / "sampled"
    asked = [f"--run={run}", "--watch.samples_every=8", "--watch.prompts=[a face]", "--watch.questions=['who is it ?']"]
    runs.train(config, *asked)
    same_run(run, undisturbed)
    taken = sorted((run / "samples").iterdir())
    assert [each.name for each in taken] == ["step-00000008", "step-00000016", "step-00000024"]
    first, second = (json.loads((each / "samples.json").read_text()) for each in taken[:2])
    assert first["prompts"] == ["a face"] and {answer["question"] for answer in second["answers"]} == {"who is it ?"}
    assert (taken[0] / "faces.png").read_bytes() == (taken[1] / "faces.png").read_bytes()


def test_a_prompt_that_is_too_long_is_told_before_the_first_step(prepared):
    folder, config = prepared
    long = ["--watch.samples_every=8", f"--watch.prompts=[{'a very ' * 30} face]"]
    with runs.Ranks(config, f"--run={folder / 'long'}", *long, ranks=2) as ranks:
        assert ranks.wait() == [1, 1]
        assert ranks.said.count("watch.prompts[0]: ") == 1 and "Traceback" not in ranks.said
    assert not runs.records(folder / "long")


def test_what_one_rank_cannot_read_all_are_told(prepared):
    folder, config = prepared
    values = json.loads(config.read_text())
    values |= {"run": str(folder / "raw-run"), "stages": [{"name": "only", "steps": 4}]}
    values["data"]["sets"] = [{"path": str(folder / "raw" / "faces.json")}]  # pictures, and no encoding
    values["data"]["mix"] = {"t2i": 4, "mmu": 4}
    with runs.Ranks(runs.write(values, folder / "raw.json"), ranks=2) as ranks:
        assert ranks.wait() == [1, 1]
        assert ranks.said.count("unif2ace: ") == 1 and "it has no codes; run `unif2ace precompute`" in ranks.said
        assert "Traceback" not in ranks.said


def test_waiting_for_data_is_told_of_whichever_rank(prepared):
    """In the step whose time it took, before which the next one's rows are waited for."""
    folder, config = prepared
    given = [f"--run={folder / 'late'}", "--stages.0.steps=4", "--stages.1.steps=1"]
    for record in runs.train(config, *given, ranks=2, hook="training_hooks:late_rows"):
        assert (0.5 <= record["data_seconds"] < record["step_seconds"]) == (record["step"] == 2), record


def test_machines_that_do_not_share_the_folder_are_told_at_once(prepared, monkeypatch):
    """Not when the run is to go on, from states that lack the parts of some."""
    folder, config = prepared
    monkeypatch.chdir(folder)
    with runs.Ranks(config, "--run=unshared", ranks=2, hook="training_hooks:folder_of_its_own") as ranks:
        assert ranks.wait() == [1, 1], ranks.said
        told = [line for line in ranks.said.splitlines() if line.startswith("unif2ace: ")]
    assert told == ["unif2ace: rank 1: unshared is not rank 0's folder: it must be one that all machines see"]


def test_two_at_once_are_one(prepared):
    """The second would remove what the first one writes."""
    folder, config = prepared
    run = folder / "twice"
    with runs.Ranks(config, f"--run={run}", "--stages.0.steps=500", hook="training_hooks:slow_steps") as going:
        while not (run / "log.jsonl").exists() or len(runs.records(run)) < 1:
            assert going.wait(0.05) == [None], going.said
        with runs.Ranks(runs.write(json.loads(config.read_text()), folder / "second.json"), f"--run={run}") as second:
            assert second.wait() == [1]
            assert second.said == f"unif2ace: {run} is held by another process that writes to it\n"
        assert going.wait(0.0) == [None]
    assert len(runs.events(run, "started")) == 1 and not runs.events(run, "resumed")


def test_a_state_that_is_read_is_not_let_go(prepared):
    """An export takes longer than the training beside it takes to write the states that push it out."""
    folder, config = prepared
    run = folder / "read"
    given = [f"--run={run}", "--stages.0.steps=500", "--save.keep=1", "--save.wait=true"]

    def others(step: int, count: int) -> None:
        while len([each for each in runs.events(run, "state_saved") if each["step"] > step]) < count:
            assert going.wait(0.05) == [None], going.said

    with runs.Ranks(config, *given, hook="training_hooks:slow_steps") as going:
        while not states.listed(run / "states"):
            assert going.wait(0.05) == [None], going.said
        with states.reading(run / "states") as state:
            others(states.number(state), 3)
            held = {"model.norm.weight": torch.zeros_like(Checkpoint.load(folder / "start").model.norm.weight)}
            states.load(state, held)
            assert held["model.norm.weight"].count_nonzero()
            assert len(states.listed(run / "states")) == 2 and states.listed(run / "states")[0] == state
        others(states.number(states.listed(run / "states")[-1]), 2)
        assert not state.exists()
    with pytest.raises(UserError, match=f"has no state before step {states.number(state)}; there are: "):
        states.reading(run / "states", states.number(state)).__enter__()


def test_what_changed_is_told_and_what_is_refused_is_not_taken(prepared):
    folder, config = prepared
    run = folder / "changed"
    short = [f"--run={run}", "--stages.1.steps=2", "--stages.0.steps=2"]
    runs.train(config, *short)
    was = (run / "config.yaml").read_bytes()
    with runs.Ranks(config, *short, "--stages.1.steps=3", "--data.seed=7") as ranks:
        assert ranks.wait() == [1]
        assert "data.seed: expected 0, the run's so far, got 7" in ranks.said, ranks.said
    assert (run / "config.yaml").read_bytes() == was and not runs.events(run, "changed")
    with runs.Ranks(config, *short, "--stages.1.steps=3", "--stages.1.lr=1e-3") as ranks:
        assert ranks.wait() == [0], ranks.said
        told = [line for line in ranks.said.splitlines() if line.startswith("unif2ace: ")]
    assert told == [
        f"unif2ace: {run} goes on with step 4 of 5",
        f"unif2ace: {run} goes on with other settings: stages[1].steps 2 -> 3, stages[1].lr 0.01 -> 0.001",
    ]
    (event,) = runs.events(run, "changed")
    assert event["step"] == 4 and event["settings"] == {"stages[1].steps": [2, 3], "stages[1].lr": [0.01, 0.001]}
    assert yaml.safe_load((run / "config.yaml").read_text())["stages"][1]["lr"] == 0.001


def test_a_stage_may_have_other_data(prepared):
    folder, config = prepared
    values = json.loads(config.read_text())
    other = {"sets": [{"path": str(runs.sets.shards(folder / "other", 9))}], "mix": {"t2i": 4, "mmu": 5, "lm": 0}}
    stages = [{"name": "first", "steps": 3}, {"name": "second", "steps": 3, "data": other}]
    values |= {"run": str(folder / "others"), "stages": stages}
    records = runs.train(runs.write(values, folder / "others.json"))
    assert [record["rows"]["mmu"] for record in records] == [4] * 3 + [5] * 3
