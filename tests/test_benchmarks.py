"""The benchmark runner and the comparison of results: what they write, and what they refuse."""

from __future__ import annotations

import io
import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import compare, run
from benchmarks.case import FORWARD, TRAINING, Baseline, Case, Work, bind, error_against, relative_error, truth_of
from benchmarks.cases import CASES
from benchmarks.measure import Spread, interleaved, peak_bytes, rotated

CPU = torch.device("cpu")
X = torch.linspace(-1, 2, 64)
FIELDS = {"op", "shape", "sizes", "source", "mode", "dtype", "flops", "bytes", "contender", "status"}
ENVIRONMENT = {"commit", "dirty", "versions", "implementations", "device", "device_name", "threads", "date", "command"}
MEASURED = {"median_ms", "quartiles_ms", "rounds", "times_ours", "times_ours_quartiles", "floor_ms",
            "share_of_floor", "peak_bytes"}  # fmt: skip


def square_case(ours=lambda x: (x * x,), build=None, **baselines) -> Case:
    """x * x against `baselines`; a function becomes one that is compared."""

    def work(device: torch.device) -> Work:
        others = {
            name: each if isinstance(each, Baseline) else Baseline(bind(each, [X], FORWARD))
            for name, each in baselines.items()
        }
        truth = truth_of(lambda x: (x * x,), [X], FORWARD)
        return Work(bind(ours, [X], FORWARD), others, error_against(truth), 1e-6)

    sizes = {"n": X.numel()}
    return Case("toy.square", "tiny", sizes, "made up", FORWARD, torch.float32, 64, 512, build or work, smoke=True)


def run_toy(case: Case, **options) -> dict[str, run.Record]:
    options = {"seconds": 0.0, "max_rounds": 3, **options}
    return {str(record["contender"]): record for record in run.run_case(case, CPU, **options)}


def test_wrong_outputs_are_refused_and_not_timed() -> None:
    records = run_toy(square_case(right=lambda x: (x.pow(2),), wrong=lambda x: (x * x + 1e-4,)))
    assert records["right"]["status"] == "ok" and MEASURED <= records["right"].keys()
    assert records["wrong"]["status"] == "wrong" and "median_ms" not in records["wrong"]
    assert "1e-06" in records["wrong"]["reason"]


@pytest.mark.parametrize(
    "outputs",
    [lambda x: (x[:-1] ** 2,), lambda x: (x * math.nan,), lambda x: (), lambda x: (x * x, x)],
    ids=["shape", "nan", "too few", "too many"],
)
def test_malformed_outputs_are_refused(outputs) -> None:
    assert run_toy(square_case(odd=outputs))["odd"]["status"] == "wrong"


def test_ours_is_compared_too_and_then_nothing_is_timed() -> None:
    records = run_toy(square_case(ours=lambda x: (x * 1.01 * x,), right=lambda x: (x.pow(2),)))
    assert records["ours"]["status"] == "wrong"
    assert "median_ms" not in records["right"]
    assert run.failures(records.values()) == [records["ours"]]


def test_a_yardstick_is_timed_without_comparison() -> None:
    yardstick = Baseline(lambda: (X + 1,), rate_only=True)
    record = run_toy(square_case(yardstick=yardstick))["yardstick"]
    assert record["status"] == "ok" and record["compared"] is False and MEASURED <= record.keys()


def test_missing_and_failing_baselines_are_recorded_with_the_reason_and_are_no_failure() -> None:
    def fails(x):
        raise RuntimeError("needs a newer library")

    records = run_toy(square_case(absent=Baseline(None, missing="not installed"), fails=fails))
    assert records["absent"]["status"] == "missing" and records["absent"]["reason"] == "not installed"
    assert records["fails"]["status"] == "missing" and "needs a newer library" in records["fails"]["reason"]
    assert run.failures(records.values()) == []


@pytest.mark.parametrize("call", [2, 6], ids=["first sample", "peak memory"])  # checked, sampled, 3 rounds, memory
def test_a_contender_that_fails_while_timed_is_not_ours(monkeypatch, call: int) -> None:
    def fails():
        calls = []

        def square(x):
            calls.append(x)
            if len(calls) == call:
                raise MemoryError("too large")
            return (x * x,)

        return square

    monkeypatch.setattr("benchmarks.measure.MIN_SAMPLE_S", 0.0)
    records = run_toy(square_case(other=lambda x: (x.pow(2),), fails=fails()))
    assert records["fails"]["status"] == "missing" and records["fails"]["reason"] == "MemoryError: too large"
    assert "median_ms" not in records["fails"]
    assert MEASURED <= records["ours"].keys() and MEASURED <= records["other"].keys()
    assert run.failures(records.values()) == []
    records = run_toy(square_case(ours=fails(), other=lambda x: (x.pow(2),)))
    assert run.failures(records.values()) == [records["ours"]]
    assert records["ours"]["reason"] == "MemoryError: too large"


def test_options_leave_out_compilers_other_baselines_and_timing() -> None:
    compiler = Baseline(lambda: pytest.fail("was run"), compiles=True)
    case = square_case(compiler=compiler, other=lambda x: (x.pow(2),))
    assert run_toy(case, compiling=False)["compiler"]["status"] == "missing"
    assert run_toy(case, against="oth").keys() == {"ours", "other"}
    checked = run_toy(case, compiling=False, timing=False)["ours"]
    assert checked["status"] == "ok" and checked["error"] <= 1e-6 and "median_ms" not in checked


def test_a_broken_case_gives_a_line_and_a_failing_exit(tmp_path: Path, capsys) -> None:
    def build(device: torch.device) -> Work:
        raise ZeroDivisionError("while building")

    def explodes(x):
        raise ZeroDivisionError("while running")

    cases = [square_case(build=build), square_case(ours=explodes), square_case()]
    assert run.main(["--smoke", "--json", str(tmp_path / "out" / "r.jsonl")], cases) == 1
    records = [json.loads(line) for line in (tmp_path / "out" / "r.jsonl").read_text().splitlines()]
    assert [record["status"] for record in records] == ["error", "error", "ok"]
    assert "while building" in records[0]["reason"] and "while running" in records[1]["reason"]
    assert "while building" in capsys.readouterr().err


def test_lines_carry_the_case_the_measurement_and_the_machine() -> None:
    out = io.StringIO()
    run.run_all([square_case(other=lambda x: (x.pow(2),))], CPU, out, seconds=0.0, max_rounds=3)
    ours, other = (json.loads(line) for line in out.getvalue().splitlines())
    for record in (ours, other):
        assert FIELDS | MEASURED | ENVIRONMENT <= record.keys()
        low, high = record["quartiles_ms"]
        assert 0 < low <= record["median_ms"] <= high
    assert ours["times_ours"] == 1.0 and ours["times_ours_quartiles"] == [1.0, 1.0]
    assert ours["versions"]["torch"] == torch.__version__ and ours["rounds"] == 3
    assert ours["share_of_floor"] == pytest.approx(ours["floor_ms"] / ours["median_ms"])


def test_ratios_are_taken_round_by_round(monkeypatch) -> None:
    samples = {"ours": [1.0, 10.0, 2.0], "other": [2.0, 20.0, 1.0]}
    monkeypatch.setattr(run, "interleaved", lambda *_: samples)
    record = run_toy(square_case(other=lambda x: (x.pow(2),)))["other"]
    assert record["times_ours"] == 2.0  # of 2, 2, 1/2; the ratio of the medians would be 1
    assert record["times_ours_quartiles"] == [1.25, 2.0]


def test_rounds_are_interleaved_and_rotate() -> None:
    calls: list[str] = []
    contenders = {name: (lambda name=name: calls.append(name) or time.sleep(0.002)) for name in "abc"}
    samples = interleaved(contenders, CPU, seconds=0.0, max_rounds=4)
    assert "".join(calls[3:]) == "abcbcacababc"  # the first three estimate the time
    assert {name: len(each) for name, each in samples.items()} == {"a": 4, "b": 4, "c": 4}
    assert rotated("abc", 5) == ["c", "a", "b"]


def test_spread_and_relative_error() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, math.inf]), truth) == math.inf


def test_bind_appends_gradients_in_training_only() -> None:
    def function(a, b):
        return a * b, (a > 0)

    a, b, seed = torch.randn(5), torch.randn(5), torch.randn(5)
    assert [each.requires_grad for each in bind(function, [a, b], FORWARD)()] == [False, False]
    y, sign, da, db = bind(function, [a, b], TRAINING, [seed])()
    assert torch.equal(da, seed * b) and torch.equal(db, seed * a) and torch.equal(sign, a > 0)
    assert truth_of(function, [a, b], TRAINING, [seed])[2].dtype == torch.float64


def test_peak_memory_counts_what_a_call_frees_again() -> None:
    n = 16 << 20
    peak = peak_bytes(lambda: torch.ones(n, dtype=torch.uint8) + 1, CPU)
    if not sys.platform.startswith("linux"):
        pytest.skip("peak memory on the CPU is read from Linux's /proc")
    assert 2 * n - (1 << 20) <= peak < 3 * n  # proc(5): the kernel keeps these counts inexact, to scale


def test_registry_is_complete_and_unambiguous() -> None:
    names = [(case.name, case.smoke) for case in CASES]
    assert len(set(names)) == len(names)
    assert {case.op for case in CASES if case.smoke} == {case.op for case in CASES}
    for case in CASES:
        assert case.source and case.bytes > 0 and case.flops >= 0
        assert case.devices and set(case.devices) <= {"cpu", "cuda"}


def test_every_tiny_case_runs_and_every_contender_agrees(tmp_path: Path) -> None:
    out = tmp_path / "smoke.jsonl"
    assert run.main(["--smoke", "--json", str(out)]) == 0
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert {record["op"] for record in records} == {case.op for case in CASES}
    for record in records:
        assert record["status"] == "ok" or (record["status"] == "missing" and record["reason"])
        assert record["status"] == "missing" or MEASURED <= record.keys()


def test_unknown_selection_and_missing_device_are_errors(capsys) -> None:
    for arguments in (["--op", "no.such"], ["--device", "cuda"]):
        if arguments[1] == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit) as stopped:
            run.main(arguments)
        assert stopped.value.code == 2
    assert "no case matches" in capsys.readouterr().err


def line(median: float, spread: float, **other) -> str:
    record = {"op": "toy", "shape": "s", "mode": FORWARD, "dtype": "float32", "device_name": "d", "threads": 1}
    record |= {"contender": "ours", "median_ms": median, "quartiles_ms": [median - spread, median + spread]}
    return json.dumps({**record, **other})


@pytest.mark.parametrize(
    ("after", "spread", "status"), [(12.0, 0.1, 1), (12.0, 3.0, 0), (10.3, 0.1, 0), (8.0, 0.1, 0)],
    ids=["slower", "noise", "small", "faster"],
)  # fmt: skip
def test_compare_names_what_is_slower_beyond_noise(tmp_path: Path, capsys, after, spread, status) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text("\n".join([line(10.0, 0.1), line(1.0, 0.1, contender="other"), line(1.0, 0.1, shape="gone")]))
    new.write_text("\n".join([line(after, spread), line(9.0, 0.1, contender="other")]))
    assert compare.main([str(old), str(new)]) == status
    said = capsys.readouterr().out
    assert said.startswith(f"1 cases in both, {status} slower")
    assert ("toy s forward float32: 10.000 -> 12.000 ms" in said) == bool(status)
