"""What `unif2ace train` is told: every wrong key is named, what is right is printed, a state becomes a checkpoint."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import training_runs as runs
import yaml

from unif2ace.checkpoint import read_config as read_model_config
from unif2ace.cli import main
from unif2ace.errors import UserError
from unif2ace.planning.plan import counts
from unif2ace.training import states
from unif2ace.training.config import changes, plain, read_config
from unif2ace.training.gradients import PARTS, freeze, part_of
from unif2ace.training.sharding import copies, local


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("config")
    return folder, runs.prepare_drawn(folder)


def changed(values: dict, key: str, value) -> dict:
    values, names = copy.deepcopy(values), key.split(".")
    at = values
    for name in names[:-1]:
        at = at[int(name)] if isinstance(at, list) else at.setdefault(name, {})
    at[int(names[-1]) if isinstance(at, list) else names[-1]] = value
    return values


@pytest.mark.parametrize(
    ("key", "value", "named", "expected"),
    [
        ("stages", [], "stages", "at least one stage"),
        ("stages.0.steps", 0, "stages[0].steps", "at least 1, got 0"),
        ("stages.0.lr", 0.0, "stages[0].lr", "a learning rate above 0"),
        ("stages.0.warmup", 0, "stages[0].warmup", "at least 1"),
        ("stages.0.floor", 1.5, "stages[0].floor", "from 0 to 1"),
        ("stages.0.loss", {"alpha": -1.0}, "stages[0].loss.alpha", "at least 0, got -1.0"),
        ("stages.0.los", {}, "stages[0].los", "did you mean loss?"),
        ("stages.0.data", {"batch": 0}, "stages[0].data.batch", "at least 1"),
        ("stages.0.data", {"mix": {"t2i": "many"}}, "stages[0].data.mix.t2i", "a number"),
        ("optimizer.beta2", 1.0, "optimizer.beta2", "below 1"),
        ("optimizer.eps", 0.0, "optimizer.eps", "above 0"),
        ("optimizer.eps", float("inf"), "optimizer.eps", "above 0, got inf"),
        ("optimizer.weight_decay", float("inf"), "optimizer.weight_decay", "at least 0, got inf"),
        ("optimizer.weight_decay", -0.1, "optimizer.weight_decay", "at least 0"),
        ("optimizer.clip", 0.0, "optimizer.clip", "above 0"),
        ("parallel.precision", "fp8", "parallel.precision", "one of float32, bf16, got 'fp8'"),
        ("parallel.device", "tpu", "parallel.device", "auto, cpu, cuda"),
        ("parallel.checkpointing", "all", "parallel.checkpointing", "none, block"),
        ("parallel.micro", 0, "parallel.micro", "at least 1"),
        ("parallel.experts", 0, "parallel.experts", "at least 1"),
        ("parallel.sharded", -1, "parallel.sharded", "at least 0"),
        ("parallel.threads", -1, "parallel.threads", "at least 0"),
        ("parallel.timeout", 0.0, "parallel.timeout", "above 0"),
        ("parallel.timeout", float("inf"), "parallel.timeout", "a million at most"),
        ("seed", 2**63, "seed", "0 to 2**63 - 1"),
        ("data.seed", 2**63, "stages[0].data.seed", "0 to 2**63 - 1"),
        ("data.describe", ["what ?", " "], "stages[0].data.describe[1]", "a text, got ' '"),
        ("save.every", 0, "save.every", "at least 1"),
        ("save.keep", 0, "save.keep", "at least 1"),
        ("save.minutes", -1.0, "save.minutes", "at least 0"),
        ("save.keep_every", -1, "save.keep_every", "at least 0"),
        ("ema", 1.0, "ema", "below 1"),
        ("max_skipped", -1, "max_skipped", "at least 0"),
        ("encoding", {"tokenizer": "x", "frame": "round"}, "encoding.frame", "face, square"),
        ("watch.every", 0, "watch.every", "at least 1"),
        ("colour", "red", "colour", "there is no such key"),
    ],
)
def test_a_wrong_value_is_named(prepared, key, value, named, expected):
    with pytest.raises(UserError) as raised:
        read_config(changed(prepared[1], key, value))
    message = str(raised.value)
    assert message.startswith(f"{named}: ") and expected in message and "\n" not in message


def test_two_stages_of_one_name_are_refused(prepared):
    stage = {"name": "same", "steps": 1}
    with pytest.raises(UserError, match=r"^stages\[0\].name: expected a name of its own, got 'same'"):
        read_config(prepared[1] | {"stages": [stage, stage]})


def test_a_stage_puts_its_keys_over_the_runs(prepared):
    second = {"name": "b", "steps": 2, "data": {"mix": {"mmu": 1}, "batch": 10}}
    config = read_config(prepared[1] | {"stages": [{"name": "a", "steps": 3}, second]})
    assert config.stages[0].data == config.data
    assert config.stages[1].data.batch == 10 and config.stages[1].data.counts == {"t2i": 8, "mmu": 2, "lm": 0}
    assert config.stages[1].data.sets == config.data.sets
    assert [config.stage_at(step) for step in range(6)] == [(0, 0)] * 3 + [(1, 3)] * 3
    assert read_config(yaml.safe_load(yaml.safe_dump(plain(config)))) == config


@pytest.mark.parametrize(
    ("ranks", "parallel", "message"),
    [
        (0, {}, "--ranks: expected at least 1, got 0"),
        (3, {"experts": 2}, "parallel.experts: expected a divisor of the 3 ranks, got 2"),
        (4, {"sharded": 3}, "parallel.sharded: expected a divisor of the 4 ranks, got 3"),
        (5, {}, "stages[0].data.batch: 8 rows are {'t2i': 4, 'mmu': 4, 'lm': 0} a step, too few for 5 ranks"),
        (2, {"micro": 3}, "too few for 2 ranks with 3 micro-batches each"),
    ],
)
def test_ranks_that_cannot_share_a_step_are_refused(prepared, ranks, parallel, message):
    config = read_config(prepared[1] | {"parallel": prepared[1]["parallel"] | parallel})
    with pytest.raises(UserError) as raised:
        config.check_ranks(ranks)
    assert message in str(raised.value)


def test_a_dry_run_says_what_would_be_done_and_does_nothing(prepared, capsys):
    folder, values = prepared
    path = runs.write(values | {"run": str(folder / "dry")}, folder / "dry.json")
    assert main(["train", str(path), "--dry-run", "--ranks=2", "--ema=0.99"]) == 0
    said = capsys.readouterr().out
    assert yaml.safe_load(said[: said.index("\n\n")])["ema"] == 0.99
    assert "6 steps on 2 ranks" in said
    assert "joint: 6 steps of 8 rows (4 t2i, 4 mmu, 0 lm)" in said and "GiB a rank" in said and "EMA" in said
    assert not (folder / "dry").exists()
    all_of = counts(read_model_config(folder / "start")).all
    assert f"\n{all_of:,} parameters: " in said
    assert f"  {all_of:,} parameters that are trained" in said and "as if all" not in said
    assert main(["train", str(path), "--dry-run", "--stages.0.freeze=[head.weight]"]) == 0
    said, head = capsys.readouterr().out, runs.Checkpoint.load(folder / "start").model.head.weight.numel()
    assert f"  {all_of - head:,} parameters that are trained" in said and "by plan, as if all were trained" in said
    assert main(["train", str(path), "--dry-run", "--stages.0.freeze=[heed.*]"]) == 1
    assert capsys.readouterr().err.startswith("unif2ace: stages[0].freeze[0]: no parameter is named like 'heed.*'")
    assert main(["train", str(path), "--dry-run", "--ranks=5"]) == 1
    assert capsys.readouterr().err.startswith("unif2ace: stages[0].data.batch: ")


def test_a_state_becomes_a_checkpoint(prepared, capsys):
    folder, values = prepared
    run = folder / "exported"
    config = values | {"run": str(run), "ema": 0.5, "save": {"every": 2, "minutes": 0, "keep": 2, "keep_every": 4}}
    runs.train(runs.write(config | {"stages": [{"name": "s", "steps": 9, "lr": 1e-2}]}, folder / "exported.json"))
    assert [states.number(each) for each in states.listed(run / "states")] == [4, 8, 9]
    last = runs.weights(run)
    assert main(["export", str(run), "--step=4", "--out", str(folder / "four")]) == 0
    four = runs.Checkpoint.load(folder / "four").model.state_dict()
    assert any(not four[name].equal(last[name]) for name in last)
    assert all(four[name].equal(last[name]) for name in last if name.startswith("image_tokenizer."))
    assert main(["export", str(run), "--out", str(folder / "again")]) == 0
    assert all(
        each.equal(last[name]) for name, each in runs.Checkpoint.load(folder / "again").model.state_dict().items()
    )
    held = {f"{kind}.norm.weight": torch.zeros_like(last["norm.weight"]) for kind in ("ema", "model")}
    states.load(states.listed(run / "states")[-1], held)
    assert held["ema.norm.weight"].equal(last["norm.weight"]) and not held["model.norm.weight"].equal(
        last["norm.weight"]
    )
    capsys.readouterr()
    assert main(["export", str(run), "--step=3"]) == 1
    assert "has no state before step 3; there are: 4, 8, 9" in capsys.readouterr().err
    assert main(["export", str(folder / "start")]) == 1
    assert "name the folder of a run" in capsys.readouterr().err


def test_what_is_exported_is_not_exported_again(prepared):
    """What was added to RUN/checkpoint stays; what is of another state, or of other weights, gives way."""
    folder, values = prepared
    run = folder / "twice"
    save = {"every": 2, "minutes": 0, "keep": 3}
    config = runs.write(values | {"run": str(run), "ema": 0.5, "save": save}, folder / "twice.json")
    runs.train(config)
    (run / "checkpoint" / "notes.txt").write_text("mine")
    last = runs.weights(run)
    runs.train(config)
    assert (run / "checkpoint" / "notes.txt").read_text() == "mine"
    for given, same in ((["--step=4"], True), ([], False)):  # the second time the average is asked for no more
        assert main(["export", str(run), *given]) == 0
        runs.train(config, *([] if same else ["--ema=0"]))
        assert all(each.equal(last[name]) for name, each in runs.weights(run).items()) == same


def test_what_a_state_lacks_is_told_by_the_key_that_asks_for_it(prepared):
    """Not as damage, with the advice to remove the state."""
    folder, values = prepared
    run = folder / "lacks"
    stage = {"name": "s", "steps": 1, "freeze": ["blocks.0.*"]}
    path = runs.write(values | {"run": str(run), "stages": [stage]}, folder / "lacks.json")
    runs.train(path)
    (state,) = states.listed(run / "states")
    frozen = next(name for name in sorted(states.names(state)) if name.startswith("model.blocks.0."))[6:]
    for wanted, told in (
        (f"ema.{frozen}", "ema: expected 0, "),
        (f"optimizer.{frozen}.exp_avg", f"freeze: {frozen} was not trained in this stage"),
        ("model.blocks.7.x", "checkpoint: the run so far is of another model, without blocks.7.x"),
    ):
        with pytest.raises(UserError, match=f"^{state}: {told}"):
            states.load(state, {wanted: torch.zeros(1)})


def test_settings_that_changed_by_their_keys():
    before = {"a": 1, "b": {"c": [1, {"d": 2}]}, "e": None, "f": [1]}
    after = {"a": 1, "b": {"c": [1, {"d": 3}]}, "e": {"g": 1}, "f": [1, 2], "h": 0}
    assert changes(before, after) == {
        "b.c[1].d": [2, 3], "e": [None, {"g": 1}], "f[1]": [None, 2], "h": [None, 0],
    }  # fmt: skip
    assert changes(before, before) == {}


def test_a_damaged_state_is_named(prepared):
    folder, values = prepared
    run = folder / "damaged"
    config = runs.write(values | {"run": str(run)}, folder / "damaged.json")
    runs.train(config)
    state = states.listed(run / "states")[-1]
    (state / ".metadata").write_bytes(b"nothing")
    with runs.Ranks(config, "--stages.0.steps=7") as ranks:
        assert ranks.wait() == [1]
        assert f"{state} is damaged" in ranks.said and "remove it to go on" in ranks.said
        assert "Traceback" not in ranks.said
    config.write_text(json.dumps(json.loads(config.read_text()) | {"checkpoint": str(folder / "nowhere")}))
    with runs.Ranks(config, "--stages.0.steps=8") as ranks:
        assert ranks.wait() == [1] and "nowhere" in ranks.said and "Traceback" not in ranks.said


def test_what_is_frozen_and_which_part_is_whose(prepared):
    model = runs.Checkpoint.load(prepared[0] / "start").model
    names = [name for name, each in model.named_parameters() if each.requires_grad]
    assert {part_of(name) for name in names} <= set(PARTS)
    assert part_of("blocks.0.experts.router_weight") == part_of("blocks.0.sequence.router.bias") == "routers"
    assert part_of("blocks.0.sequence.norm.weight") == "norms" and part_of("image_position") == "embedding"
    freeze(model, ("blocks.0.*", "head.*"), "stages[0]")
    left = [name for name, each in model.named_parameters() if each.requires_grad]
    assert left == [name for name in names if not name.startswith(("blocks.0.", "head."))]
    with pytest.raises(UserError, match=r"^stages\[0\].freeze\[1\]: no parameter is named like 'bloks"):
        freeze(model, ("head.*", "bloks.*"), "stages[0]")
    with pytest.raises(UserError, match=r"^stages\[0\].freeze: nothing is left"):
        freeze(model, ("*",), "stages[0]")
    weight = torch.zeros(2)
    assert local(weight) is weight and copies(weight) == 1
