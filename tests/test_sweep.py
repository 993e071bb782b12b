"""The sweep of launch choices: every knob is there, candidates are tried in its place, and it is put back."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

from benchmarks import sweep
from benchmarks.case import FORWARD, Case, Work, bind, error_against
from benchmarks.cases import CASES
from benchmarks.sweep import KNOBS, Knob

X = torch.linspace(-1, 2, 64)
STEP = 2.0  # what the toy's knob turns


def _toy_case(op: str = "toy.scale", smoke: bool = False, shape: str = "tiny") -> Case:
    def work(device: torch.device) -> Work:
        if STEP == 0:
            raise RuntimeError("out of shared memory")
        return Work(bind(_scaled, [X], FORWARD), {}, error_against([2 * X.double()]), 1e-6)

    return Case(op, shape, {"n": 64}, "made up", FORWARD, torch.float32, 64, 512, work, smoke=smoke)


def _scaled(x: torch.Tensor) -> list[torch.Tensor]:
    if STEP == 0:
        raise RuntimeError("out of shared memory")
    return [x * STEP]


def _toy_knob(**candidates: float) -> Knob:
    changes = {name: (lambda _, value=value: value) for name, value in candidates.items()}
    return Knob("toy.scale step", "toy.scale", FORWARD, torch.float32, __name__, "STEP", changes, "tiny", "cpu")


def test_candidates_are_contenders_and_the_choice_is_put_back(tmp_path):
    out = tmp_path / "sweep.jsonl"
    arguments = ["--device", "cpu", "--seconds", "0", "--json", str(out)]
    known = [_toy_case(), _toy_case("toy.other"), _toy_case(smoke=True), _toy_case(shape="large")]
    assert sweep.main(arguments, known, [_toy_knob(same=2.0, none=0.0)]) == 0
    records = {record["contender"]: record for record in map(json.loads, out.read_text().splitlines())}
    assert len(out.read_text().splitlines()) == 3 and set(records) == {"ours", "same", "none"}
    assert records["same"]["status"] == "ok" and records["same"]["times_ours"] > 0
    assert records["none"]["status"] == "missing" and "out of shared memory" in records["none"]["reason"]
    assert all(record["op"] == "toy.scale step" for record in records.values())
    assert STEP == 2.0


def test_a_candidate_that_computes_something_else_fails_the_sweep(capsys):
    assert sweep.main(["--device", "cpu", "--seconds", "0"], [_toy_case()], [_toy_knob(wrong=2.001)]) == 1
    assert "wrong" in capsys.readouterr().out


def test_no_case_and_no_device_are_said(capsys):
    with pytest.raises(SystemExit):
        sweep.main(["--device", "cpu", "--knob", "nothing"], [_toy_case()], [_toy_knob(same=2.0)])
    assert "no case matches" in capsys.readouterr().err


@pytest.mark.parametrize("knob", KNOBS, ids=lambda knob: knob.name)
def test_every_knob_turns_something_that_shows_on_a_case(knob):
    pytest.importorskip("triton", reason="needs Triton")
    standing = getattr(importlib.import_module(knob.module), knob.attribute)
    values = {name: change(standing) for name, change in knob.candidates.items()}
    assert len(values) > 1 and all(value is not standing for value in values.values())
    assert 1 <= sum(map(knob.applies, CASES)) <= 2
    if callable(standing):
        arguments = {
            "of_arch": (knob.name.removeprefix("moe.layer "), 90, torch.bfloat16, False, 65536, 32, 2048, 512),
            "product": (90, torch.bfloat16, False, True),
            "head_tile": (torch.bfloat16, False),
        }[knob.attribute]
        choices = [value(*arguments) for value in values.values()]
        assert len(set(choices)) == len(choices) and type(choices[0]) is type(standing(*arguments))
