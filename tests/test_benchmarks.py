"""The benchmark runner: what it writes, and what it refuses."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks import measure, run
from benchmarks.case import FORWARD, TRAINING, Baseline, Case, Work, bind, error_against, relative_error, truth_of
from benchmarks.cases import CASES, cases_of, data, generation, model, transformers_experts
from benchmarks.environment import ROOT, without_folders
from benchmarks.measure import Spread, balanced, counted, interleaved, peak_and_saved_bytes, peak_bytes, saved_bytes
from unif2ace_kernels import _library

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
        raise RuntimeError("needs a newer library\nand says much more")

    records = run_toy(square_case(absent=Baseline(None, missing="not installed"), fails=fails))
    assert records["absent"]["status"] == "missing" and records["absent"]["reason"] == "not installed"
    assert records["fails"]["status"] == "missing" and records["fails"]["reason"].endswith("and says much more")
    assert run.row(records["fails"]).endswith("missing: RuntimeError: needs a newer library")
    assert run.failures(records.values()) == []


def test_a_kernel_that_fails_is_its_contenders(monkeypatch) -> None:
    """On a GPU a call returns before its kernels have run."""

    def fault(device: torch.device) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", fault)
    work = square_case(other=lambda x: (x * x,)).build(CPU)
    for contender, status in ((work.baselines["other"], "missing"), (Baseline(work.ours), "error")):
        verdict, _ = run._admit(contender, work, True, torch.device("cuda"))
        assert verdict["status"] == status and "illegal memory access" in verdict["reason"]


def test_a_run_in_place_of_one_that_broke_off_takes_what_that_one_left(tmp_path: Path) -> None:
    named = [dataclasses.replace(square_case(), shape=each) for each in "abcde"]
    took, ours = {"median_ms": 1.0}, {"op": "toy.square", "dtype": "float32", "mode": FORWARD, "contender": "ours"}
    lines = [
        {**ours, "shape": "a", "status": "ok", **took},
        {**ours, "shape": "b", "status": "error", "reason": "the device was lost"},
        {**ours, "shape": "c", "status": "wrong"},
        {**ours, "shape": "d", "status": "ok", **took, "contender": "other"},
        {"op": "ceilings", "contender": "torch", "status": "ok"},
    ]
    path = tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in lines))
    assert [each.shape for each in run.unmeasured(named, path)] == ["b", "d", "e"]
    assert run.unmeasured(named, tmp_path / "none.jsonl") == named
    assert run.main(["--smoke", "--unmeasured", "--json", str(path)], named) == 0
    written = [json.loads(line) for line in path.read_text().splitlines()[len(lines) :]]
    assert [each["shape"] for each in written] == ["b", "d", "e"]


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
    assert run_toy(case, against="Oth").keys() == {"ours", "other"}
    assert run_toy(case, against="none").keys() == {"ours"}
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
    told = capsys.readouterr()
    assert "while building" in told.err and "error: ZeroDivisionError: while building\n" in told.out


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


def test_rounds_are_interleaved_and_balanced() -> None:
    calls: list[str] = []
    contenders = {name: (lambda name=name: calls.append(name) or time.sleep(0.002)) for name in "abc"}
    samples = interleaved(contenders, CPU, seconds=0.0, max_rounds=4)
    assert "".join(calls[3:]) == "abcbcacabcba"  # the first three estimate the time
    assert {name: len(each) for name, each in samples.items()} == {"a": 4, "b": 4, "c": 4}
    for names in ("ab", "abc", "abcdef", "abcdefg"):
        n = len(names)
        orders = ["".join(balanced(names, turn)) for turn in range(2 * n)]
        places = Counter(pair for order in orders for pair in enumerate(order))
        neighbours = Counter(pair for order in orders for pair in pairwise(order))
        assert len(places) == n * n and set(places.values()) == {2}
        assert len(neighbours) == n * (n - 1) and set(neighbours.values()) == {2}


def test_spread_and_relative_error() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 4.0, 3.0]) == Spread(3.0, 2.0, 4.0)
    truth = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert relative_error(torch.tensor([3.0, 4.5]), truth) == pytest.approx(0.1)
    assert relative_error(torch.tensor([3.0, math.inf]), truth) == math.inf
    assert relative_error(torch.tensor([3.0, 4.0, 0.0]), truth) == math.inf
    long = torch.arange(200_000.0, dtype=torch.float64).view(2, -1)  # in parts, and not as it lies in memory
    other = long.t().contiguous().t().float()
    other[0, 0] += 1e7
    other[1, -1] += 1e7
    assert relative_error(other, long) == pytest.approx(2**0.5 * 1e7 / long.norm().item())
    assert relative_error(torch.tensor(0.5), torch.tensor(0.0, dtype=torch.float64)) == 0.5


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


def test_saved_memory_is_what_autograd_keeps_beside_the_inputs() -> None:
    x, w = torch.randn(1000, requires_grad=True), torch.randn(10, 1000, requires_grad=True)

    def step(depth: int):
        def run():
            y = x * w[2:4].sum(0)  # saves x, and the sum that is made here
            for _ in range(depth):
                y = y.exp()  # saves what it gives
            return torch.autograd.grad(y.sum(), [x, w])

        return run

    assert saved_bytes(step(0)) == 4000
    assert saved_bytes(step(3)) == 16000


@pytest.mark.parametrize("readable", [True, False])
def test_both_memories_are_read_in_one_call(monkeypatch, readable: bool) -> None:
    x, calls = torch.randn(1 << 20, requires_grad=True), []

    def step():
        calls.append(1)
        return torch.autograd.grad(x.exp().exp().sum(), [x])

    if not readable:  # another system than Linux
        monkeypatch.setattr("benchmarks.measure._proc_status", lambda key: {}[key])
        monkeypatch.setattr("benchmarks.measure.peak_bytes", lambda run, device: None)
    peak, saved = peak_and_saved_bytes(step, CPU)
    assert calls == [1] and saved == 2 * x.nbytes
    assert peak is None if not readable or not sys.platform.startswith("linux") else peak > 2 * x.nbytes - (1 << 20)


def test_counted_work_grows_with_work() -> None:
    x, y = torch.randn(64, 64), torch.randn(128, 64)
    once, twice = counted(lambda: x + x), counted(lambda: (x + x) + x)
    assert once["allocated"] == 64 * 64 * 4 and twice["allocated"] == 2 * once["allocated"]
    assert 0 < once["calls"] < twice["calls"]
    assert counted(lambda: y + y)["allocated"] == 2 * once["allocated"]


def test_slow_contenders_take_part_in_the_first_rounds_only(monkeypatch) -> None:
    clock = {"fast": 0.4, "slow": 2.0, "slowest": 9.0}
    monkeypatch.setattr("benchmarks.measure._cpu_sample", lambda run, inner: clock[run()])
    contenders = {name: (lambda name=name: name) for name in clock}
    samples = interleaved(contenders, CPU, seconds=4.5, known={"slowest": 9.0})
    assert {name: len(each) for name, each in samples.items()} == {"fast": 11, "slow": 5, "slowest": 3}
    alone = interleaved({"slowest": contenders["slowest"]}, CPU, seconds=0)
    assert len(alone["slowest"]) == 3


def test_ceilings_are_looked_at_again_and_only_rise(monkeypatch) -> None:
    now, rates = [0.0], iter([2.0, 1.0, 5.0])
    monkeypatch.setattr(measure.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(measure, "_BEST", {})
    seen = []
    for moment in (0.0, 1.0, 100.0, 101.0, 200.0):
        now[0] = moment
        seen.append(measure._ceiling(("copy", "toy"), lambda: next(rates)))
    assert seen == [2.0, 2.0, 2.0, 2.0, 5.0]


def test_a_run_says_which_of_ours_is_not_built(monkeypatch, capsys) -> None:
    lacking = _library.Explanation("any", "cpu", "torch", (("c++", "not built: no compiler"),))
    monkeypatch.setattr(_library, "explain", lambda op, *tensors: lacking)
    run.run_all([], CPU, None)
    said = f"ours without c++ in {len(_library.registered_ops())} ops: not built: no compiler\n"
    assert capsys.readouterr().out == said


def test_no_case_is_begun_that_would_not_end_in_time(tmp_path: Path, monkeypatch, capsys) -> None:
    clock = [0.0]
    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(run, "ceilings", lambda device: {"op": "ceilings", "contender": "torch", "status": "ok"})

    def taking(seconds: float, name: str) -> Case:
        def ours(x):
            clock[0] += seconds / 6  # checked, sampled, 3 rounds, memory
            return (x * x,)

        return dataclasses.replace(square_case(ours=ours), shape=name, smoke=False)

    monkeypatch.setattr(run, "floor_seconds", lambda *work: 1e-3)
    monkeypatch.setattr(measure, "MIN_SAMPLE_S", 0.0)
    cases = [taking(10.0, "a"), taking(30.0, "b"), taking(1.0, "c"), taking(1.0, "d")]
    arguments = ["--json", str(tmp_path / "out.jsonl"), "--rounds", "3", "--seconds", "0"]
    for limit, done in ((69.0, "a b"), (70.5, "a b c"), (1000.0, "a b c d"), (0.0, "a")):
        clock[0] = 0.0
        (tmp_path / "out.jsonl").unlink(missing_ok=True)
        status = run.main([*arguments, "--limit", str(limit)], cases)
        written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
        assert [each.get("shape") for each in written] == [*done.split(), None]  # the ceilings at last
        left = 4 - len(done.split())
        assert status == (run.CUT if left else 0)
        assert (f"CUT {left} of 4 cases" in capsys.readouterr().err) == (left > 0)


def test_a_long_call_is_not_made_again_to_learn_its_time(monkeypatch) -> None:
    clock, calls = [0.0], []
    monkeypatch.setattr(run.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(run, "floor_seconds", lambda *work: 1e-3)

    def taking(name: str, seconds: float):
        def function(x):
            calls.append(name)
            clock[0] += seconds
            return (x * x,)

        return function

    records = run_toy(square_case(ours=taking("ours", 0.09), long=taking("long", 0.11)))
    assert records["long"]["median_ms"] == pytest.approx(110) and records["long"]["rounds"] == 3
    assert calls.count("long") == 5  # checked, 3 rounds, memory
    assert calls.count("ours") == 6  # and once for its time


def test_micro_cases_run_without_being_timed() -> None:
    command = [sys.executable, "-m", "pytest", "benchmarks/micro.py", "--benchmark-disable", "-k", "gumbel"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr  # 5 would be: no test of that name


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        (f"--json {ROOT}/benchmarks/x.jsonl", "--json benchmarks/x.jsonl"),
        ("/home/me/out.jsonl", "out.jsonl"),
        ('File "/a/lib/site-packages/torch/nn/f.py", line 3', 'File "torch/nn/f.py", line 3'),
        ("1 / 2 of a/b at 3/4", "1 / 2 of a/b at 3/4"),
    ],
)
def test_results_name_no_folder_of_the_machine(said: str, kept: str) -> None:
    assert without_folders(said) == kept


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
    for wrong in (["--seconds", "-1"], ["--rounds", "0"], ["--op", "random", "--smoke", "--against", "nobody"]):
        with pytest.raises(SystemExit) as stopped:
            run.main(wrong)
        assert stopped.value.code == 2 and wrong[-1] in capsys.readouterr().err
    for arguments in (["--op", "no.such"], ["--device", "cuda"]):
        if arguments[1] == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(SystemExit) as stopped:
            run.main(arguments)
        assert stopped.value.code == 2
    assert "no case matches" in capsys.readouterr().err


def test_the_cases_of_an_op_are_all_there_and_a_kernels_are_had_without_the_model() -> None:
    everything = [*CASES, *model.CASES, *generation.CASES, *transformers_experts.CASES, *data.CASES]
    for op in {"", "m", "sampling", "data", *(case.op for case in everything)}:
        wanted = {case.name for case in everything if case.op.startswith(op)}
        assert {case.name for case in cases_of(op) if case.op.startswith(op)} == wanted
    code = "import sys; from benchmarks.cases import cases_of; cases_of('moe'); print('transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "False", done.stderr
