"""The plan of a training step against steps that are run, and against arithmetic by hand."""

from __future__ import annotations

import dataclasses

import pytest
import tiny
import torch

from benchmarks import planned
from benchmarks.planned import Point, compare, training_of
from unif2ace.cli import main
from unif2ace.configs import TokenMoEConfig, UniF2aceConfig, VocabularyConfig
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.planning import activations
from unif2ace.planning.activations import PRECISIONS, Step
from unif2ace.planning.plan import (
    GB,
    Training,
    counts,
    forward_flops,
    largest_batch,
    memory,
    scaled,
    step_flops,
    usable,
)

SMALL = UniF2aceConfig.base(
    hidden_size=128, num_hidden_layers=3, num_attention_heads=2, intermediate_size=512, image_tokens=64, text_slots=31,
    identity=32, semantic=64, vocabulary=VocabularyConfig(text=1000, codes=512),
    token_moe=TokenMoEConfig(experts=(4, 4), top_k=2, width=32, shared_width=0, dense=True),
)  # fmt: skip
GROUPED = SMALL.replace(
    parallel_block=False, token_moe=TokenMoEConfig(experts=(3, 4), top_k=2, width=64, shared_width=64)
)
POINTS = [
    Point("beside the FFN", SMALL, "float32", 4, 3),
    Point("beside the FFN, padded", SMALL, "autocast", 4, 3, 9, 12),
    Point("beside the FFN", SMALL, "bf16", 4, 3),
    Point("in place of the FFN, padded", GROUPED, "float32", 4, 3, 9, 12),
    Point("in place of the FFN", GROUPED, "autocast", 3, 4),
    Point("dense", SMALL.replace(token_moe=None, sequence_moe=None), "float32", 4, 3),
    Point("checkpointing", SMALL, "float32", 4, 3, checkpointing="block"),
]


@pytest.fixture(autouse=True)
def _as_it_comes(monkeypatch):
    """Filling memory with NaN makes tensors of its own, which a measurement of memory must not count."""
    monkeypatch.undo()


@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point.name}, {point.precision}")
def test_steps_take_what_is_planned(point):
    found = compare(point)
    assert found["states_planned"] == pytest.approx(found["states"], rel=0.01)
    assert found["peak_planned"] == pytest.approx(found["peak"], rel=0.1)
    if point.checkpointing == "none":  # its hooks hold tensors of their own
        assert found["kept_ratio"] == pytest.approx(1, abs=0.05)


def test_each_part_is_planned_as_it_is_kept():
    """By part too, so that two wrong terms cannot make up for each other."""
    found = compare(POINTS[0])
    kept, foreseen = found["kept"], found["kept_planned"]
    for part in ("attention", "FFN", "head"):
        assert foreseen[part] == pytest.approx(kept[part], rel=0.02), part


def test_counts_are_the_models():
    with torch.device("meta"):
        model = UniF2aceForConditionalGeneration(tiny.CONFIG)
    number = counts(tiny.CONFIG)
    assert number.all == sum(each.numel() for each in model.parameters())
    assert number.blocks == tiny.CONFIG.num_hidden_layers * number.block
    assert number.apart == number.all - number.blocks - number.head - number.embedding > 0


def test_flops_by_hand():
    """tiny: D 32, 2 layers, experts of width 16, 2 of 7 and a shared one of width 16; L 16."""
    step = Step(2, 3, 0, 16)
    T, D = 5 * 16, 32
    found = forward_flops(tiny.CONFIG, step)
    assert found["attention"] == 2 * (2 * T * 4 * D * D + 4 * 5 * 16 * 16 * D)
    assert found["experts"] == 2 * (2 * T * 3 * 2 * D * 16 + 2 * T * 7 * D)
    image, text = round(2 / 3.141592653589793 * 4 * 2), (16 - 4 - 3) * 3
    assert found["head"] == 2 * D * (image * 16 + text * tiny.CONFIG.vocabulary.size)
    assert "FFN" not in found
    own, run = step_flops(Training(tiny.CONFIG, step, checkpointing="block"))
    assert own == 3 * sum(found.values())
    assert run == own + found["attention"] + found["experts"]


def test_sharing_among_gpus():
    training = Training(UniF2aceConfig.base(), Step(5, 2, 1, 392))
    number = counts(training.config).all
    one, eight = memory(training, 1), memory(training, 8)
    assert one.states["parameters, float32"] == 4 * number
    assert one.states["optimizer, adamw"] == 8 * number
    assert eight.states["parameters, float32"] == 4 * number // 8
    assert eight.peak < one.peak
    repeated = dataclasses.replace(training, sharding="ddp", precision="autocast", ema=True)
    assert memory(repeated, 8).states["parameters, float32"] == memory(repeated, 1).states["parameters, float32"]
    assert memory(repeated, 8).states["EMA"] == 4 * number


def test_the_largest_batch_fits_and_one_more_does_not():
    training = Training(SMALL, Step(5, 2, 1, 104))
    space = 3 * GB
    most = largest_batch(training, 1, space)
    peaks = [memory(dataclasses.replace(training, step=scaled(training.step, rows))).peak for rows in (most, most + 1)]
    assert most > 1 and peaks[0] <= usable(space) < peaks[1]
    assert largest_batch(training, 1, 1) == 0
    again = dataclasses.replace(training, checkpointing="block")
    assert largest_batch(again, 1, space) > 2 * most


def test_scaled_steps_keep_their_rows():
    for rows in (1, 2, 7, 8, 100):
        step = scaled(Step(5, 2, 1, 10, 60), rows)
        assert step.rows == rows and min(step[:3]) >= 0 and step.t2i >= 1
    assert scaled(Step(5, 2, 1, 10, 60), 16) == Step(10, 4, 2, 10, 120)


def test_a_tensor_that_two_ops_keep_counts_once():
    """In a parallel block, attention and FFN read one LayerNorm's output: in float32 one tensor, cast, two."""
    step, T, D = Step(1, 1, 0, 104), 2 * 104, SMALL.hidden_size
    config = SMALL.replace(token_moe=None)
    shared, cast = (sum(activations.of_block(config, step, PRECISIONS[p]).values()) for p in ("bf16", "autocast"))
    apart = sum(activations.of_block(config.replace(parallel_block=False), step, PRECISIONS["bf16"]).values())
    assert apart - shared == 2 * T * D + (2 * T * D + 8 * T)  # another normed x, another norm
    assert cast > shared


@pytest.mark.parametrize("wrong", ["precision", "optimizer", "checkpointing", "sharding", "attention", "device"])
def test_a_wrong_choice_is_named(wrong):
    with pytest.raises(ValueError, match=f"{wrong}: expected one of .*, got 'none such'"):
        Training(tiny.CONFIG, Step(1, 0, 0, 8), **{wrong: "none such"})
    with pytest.raises(ValueError, match="step: expected at least one row, got 0"):
        Training(tiny.CONFIG, Step(0, 0, 0, 8))


def test_the_command_prints_memory_steps_and_assumptions(capsys):
    assert main(["plan", "base", "--batch", "16", "--gpus", "1", "8", "64"]) == 0
    told = capsys.readouterr().out
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in told.splitlines() if line.startswith("| ")}
    assert len(rows["GiB a GPU"]) == 3
    parts = list(rows)[list(rows).index("GiB a GPU") + 1 : list(rows).index("all")]
    for column in range(3):
        total = sum(float(rows[part][column]) for part in parts)
        assert total == pytest.approx(float(rows["all"][column]), abs=0.01 * len(parts))
    assert [each.strip() for each in rows["rows a step"]] == ["16", "128", "1,024"]
    assert "1,802,440,074 parameters" in told and "not yet measured on GPU" in told
    assert main(["plan", "tiny", "--gpus", "1", "--batch", "1000000"]) == 0
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpus", "0"], "--gpus: expected a number above 0"),
        (["--batch", "-3"], "--batch: expected a number above 0, got -3"),
        (["--gpu-memory", "0"], "--gpu-memory: expected a number above 0"),
        (["--length", "100"], "--length: a t2i row has 387 tokens, got 100"),
    ],
)
def test_what_cannot_be_planned_is_said_in_one_line(options, words, capsys):
    assert main(["plan", "base", *options]) == 1
    told = capsys.readouterr()
    assert words in told.err and told.err.count("\n") == 1 and told.out == ""


def test_points_of_the_benchmark_are_what_they_say(tmp_path, monkeypatch):
    """Every committed point can be planned, and the command writes a line a point."""
    for point in planned.POINTS:
        length = point.config.text_slots + point.config.image_tokens + 2
        assert -(-length // 8) * 8 >= length
    monkeypatch.setattr(planned, "POINTS", POINTS[:1])
    assert planned.main(["--json", str(tmp_path / "plan.jsonl")]) == 0
    assert len((tmp_path / "plan.jsonl").read_text().splitlines()) == 1
    stepper = planned.Stepper(POINTS[0])
    assert training_of(POINTS[0], stepper.batch).step == Step(4, 3, 0, 104, 4 * 97 + 3 * 97)
