"""The benchmark runner, the comparison of results and the GPU run: what they write, and what they refuse."""

from __future__ import annotations

import io
import json
import math
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch

from benchmarks import compare, gpu, run
from benchmarks.case import FORWARD, TRAINING, Baseline, Case, Work, bind, error_against, relative_error, truth_of
from benchmarks.cases import CASES
from benchmarks.measure import Spread, interleaved, peak_bytes, rotated
from benchmarks.sweep import KNOBS

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


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_gpu_stages_survive_crashes_hangs_and_each_other(tmp_path: Path) -> None:
    hang = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('begun', flush=True)\n"
    torn = f"open({str(tmp_path / 'benches.jsonl')!r}, 'w').write('{{\"a\": 1}}\\n{{\"b\": '); raise SystemExit(3)"
    stages = [
        gpu.Stage("crash", python("import os; os.abort()"), 20),
        gpu.Stage("hang", python(hang + "time.sleep(60)"), 4),
        gpu.Stage("torn", python(torn), 20),
        gpu.Stage("empty", python("raise SystemExit(5)"), 20, empty_code=5),
        gpu.Stage("absent", ["/no/such/program"], 20),
        gpu.Stage("here", python("print('still here')"), 20),
        gpu.Stage("missing", ["never run"], 20, missing=gpu.NO_CUDA),
        gpu.Stage("late", python("print('never')"), 0.5),
    ]
    returned = gpu.run_stages(stages, tmp_path, time.monotonic() + 60, {"commit": "c"})
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report == returned and report["commit"] == "c"
    status = {stage["name"]: stage["status"] for stage in report["stages"]}
    assert status == {"crash": "failed", "hang": "timeout", "torn": "failed", "empty": "not run", "absent": "failed",
                      "here": "ok", "missing": "not run", "late": "not run"}  # fmt: skip
    by_name = {stage["name"]: stage for stage in report["stages"]}
    assert by_name["hang"]["seconds"] < 15 and "begun" in by_name["hang"]["tail"]
    assert by_name["here"]["tail"].strip() == "still here"
    assert by_name["missing"]["reason"] == "no CUDA device" and by_name["late"]["reason"] == "no time left"
    assert (tmp_path / "benches.jsonl").read_text() == '{"a": 1}\n'
    assert "still here" in (tmp_path / "stages.log").read_text()


@pytest.mark.parametrize(
    ("tools", "missing", "status"),
    [
        (["c++", "nvcc"], {"c++": None, "cuda c++": None, "_C": "no pybind11"}, "ok"),
        (["c++", "nvcc"], {"c++": None, "cuda c++": "an error in gumbel.cu"}, "failed"),
        (["c++"], {"c++": None, "cuda c++": "no nvcc"}, "ok"),
        (["c++"], {"c++": "no header", "cuda c++": "no header"}, "failed"),
        ([], {"c++": "no C++ compiler", "cuda c++": "no C++ compiler"}, "ok"),
    ],
)
def test_gpu_build_fails_where_a_part_is_missing_whose_tool_is_there(tmp_path, monkeypatch, tools, missing, status):
    (tmp_path / "kernels" / "unif2ace_kernels").mkdir(parents=True)
    record = tmp_path / "kernels" / "unif2ace_kernels" / "_build.json"
    (tmp_path / "setup.py").write_text(f"open({str(record)!r}, 'w').write({json.dumps({'missing': missing})!r})")
    (tmp_path / "bin").mkdir()
    for tool in tools:
        (tmp_path / "bin" / tool).write_text("#!/bin/sh\n")
        (tmp_path / "bin" / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    done = gpu.run_stage(gpu.Stage("build", python(gpu._BUILD), 20), 20, tmp_path / "log")
    assert done["status"] == status
    for part, reason in missing.items():
        assert (f"built without {part}: {reason}" in done["tail"]) == (reason is not None)


def test_gpu_report_is_whole_while_a_stage_runs(tmp_path: Path) -> None:
    look = f"import json; print(json.load(open({str(tmp_path / 'gpu.json')!r}))['stages'][-1]['status'])"
    report = gpu.run_stages([gpu.Stage("look", python(look), 20)], tmp_path, time.monotonic() + 30, {})
    assert report["stages"][0]["tail"].strip() == "running"


def test_gpu_plan_without_cuda_says_why_each_stage_is_left_out(tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in gpu.plan({"cuda": False}, tmp_path, dry_run=False)}
    assert stages["explain"].missing is None
    assert {stages[name].missing for name in stages if name.startswith("bench ") and name != "bench smallest"} == {
        gpu.NO_CUDA
    }
    hopper = gpu.plan({"cuda": True, "capability": [9, 0]}, tmp_path, dry_run=False)
    assert next(stage for stage in hopper if stage.name == "build").environment == {"UNIF2ACE_CUDA_ARCHS": "90a"}
    assert sum(stage.missing is None for stage in hopper) >= len(hopper) - 1  # compute-sanitizer may be missing


@pytest.mark.parametrize(
    ("bodies", "status"),
    [
        (["def test_a(): pass", "def test_b(): assert False"], "failed"),
        (["def test_a(): pass", ""], "ok"),
        (["", ""], "not run"),
        (["def test_a(): pass", "raise ImportError"], "failed"),
    ],
)
def test_gpu_tests_run_a_process_a_file(tmp_path, monkeypatch, bodies, status) -> None:
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    for index, body in enumerate(bodies):
        (folder / f"test_{index}.py").write_text(body)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    stage = gpu.Stage("tests", python(gpu._TESTS), 60, empty_code=5)
    done = gpu.run_stage(stage, 60, tmp_path / "log")
    assert done["status"] == status
    assert ("test_0.py::test_a PASSED" in done["tail"]) == ("test_a" in bodies[0])


def test_gpu_plan_asks_for_cases_and_knobs_that_exist(tmp_path: Path) -> None:
    asked = [stage.command for stage in gpu.plan({"cuda": True}, tmp_path, dry_run=False)]
    benches = [command for command in asked if "benchmarks.run" in command and "--smoke" not in command]
    sweeps = [command for command in asked if "benchmarks.sweep" in command]
    assert len(benches) > 8 and len(sweeps) > 2
    for command in benches:
        op, shape = (command[command.index(name) + 1] for name in ("--op", "--shape"))
        assert run.select(CASES, op=op, shape=shape, device="cuda", smoke=False), (op, shape)
    for command in sweeps:
        assert any(knob.name.startswith(command[command.index("--knob") + 1]) for knob in KNOBS)


def test_gpu_dry_run_leaves_results(tmp_path: Path) -> None:
    chosen = "explain,bench smallest"
    assert gpu.main(["--out", str(tmp_path), "--budget", "300", "--dry-run", "--stages", chosen]) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    status = {stage["name"]: stage["status"] for stage in report["stages"]}
    assert status["explain"] == status["bench smallest"] == "ok"
    assert set(status.values()) <= {"ok", "not run"}
    assert "gumbel on" in next(stage["tail"] for stage in report["stages"] if stage["name"] == "explain")
    records = [json.loads(line) for line in (tmp_path / "benches.jsonl").read_text().splitlines()]
    assert {record["op"] for record in records} == {"random.gumbel"}


def _wheel(folder: Path, name: str) -> None:
    """A wheel of one module that says its own name."""
    with zipfile.ZipFile(folder / f"{name}-1-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", f"NAME = {name!r}")
        archive.writestr(f"{name}-1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        tag = "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        archive.writestr(f"{name}-1.dist-info/WHEEL", tag)
        archive.writestr(f"{name}-1.dist-info/RECORD", "")


def test_carried_packages_are_there_for_every_stage(tmp_path: Path, monkeypatch) -> None:
    carried = tmp_path / "carried"
    (carried / "plainsource" / "plain").mkdir(parents=True)
    (carried / "plainsource" / "plain" / "__init__.py").write_text("NAME = 'plain'")
    _wheel(carried, "alpha")
    _wheel(carried, "pytest")
    (carried / "broken-0-py3-none-any.whl").write_text("not a wheel")
    path, said = gpu.carried_packages(carried)
    assert {name: text == "installed" for name, text in said.items()} == {
        "alpha-1-py3-none-any.whl": True, "pytest-1-py3-none-any.whl": True, "broken-0-py3-none-any.whl": False
    }  # fmt: skip
    stage = gpu.Stage("look", python("import alpha, plain; print(alpha.NAME, plain.NAME)"), 20)
    assert gpu.run_stage(stage, 20, tmp_path / "log", path)["tail"].strip() == "alpha plain"

    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    hopper = {"cuda": True, "capability": [9, 0]}
    for with_path, missing in ((path, None), ((), "pytest is not installed and no wheel of it is in .whl")):
        stages = {stage.name: stage for stage in gpu.plan(hopper, tmp_path, dry_run=False, path=with_path)}
        assert stages["tests gpu"].missing == missing
