"""Runs of many commands, on a GPU machine and on this one: what they leave whatever happens, and what they ask for."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import gpu, run, stages
from benchmarks.cases import CASES
from benchmarks.sweep import KNOBS


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_stages_survive_crashes_hangs_and_each_other(tmp_path: Path) -> None:
    hang = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('begun', flush=True)\n"
    torn = f"open({str(tmp_path / 'benches.jsonl')!r}, 'w').write('{{\"a\": 1}}\\n{{\"b\": '); raise SystemExit(3)"
    planned = [
        stages.Stage("crash", python("import os; os.abort()"), 20),
        stages.Stage("hang", python(hang + "time.sleep(60)"), 4),
        stages.Stage("torn", python(torn), 20),
        stages.Stage("empty", python("raise SystemExit(5)"), 20, empty_code=5),
        stages.Stage("cut", python("raise SystemExit(124)"), 20),
        stages.Stage("absent", ["/no/such/program"], 20),
        stages.Stage("here", python("print('still here')"), 20),
        stages.Stage("missing", ["never run"], 20, missing=gpu.NO_CUDA),
        stages.Stage("late", python("print('never')"), 0.5),
    ]
    returned = stages.run_stages(planned, tmp_path, time.monotonic() + 60, {"commit": "c"})
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert report == returned and report["commit"] == "c"
    status = {stage["name"]: stage["status"] for stage in report["stages"]}
    assert status == {"crash": "failed", "hang": "timeout", "torn": "failed", "empty": "not run", "cut": "timeout",
                      "absent": "failed", "here": "ok", "missing": "not run", "late": "not run"}  # fmt: skip
    by_name = {stage["name"]: stage for stage in report["stages"]}
    assert by_name["hang"]["seconds"] < 15 and "begun" in by_name["hang"]["tail"]
    assert by_name["here"]["tail"].strip() == "still here"
    assert by_name["missing"]["reason"] == "no CUDA device" and by_name["late"]["reason"] == "no time left"
    assert (tmp_path / "benches.jsonl").read_text() == '{"a": 1}\n'
    assert "still here" in (tmp_path / "stages.log").read_text()


def test_sigterm_ends_the_stage_that_runs(tmp_path: Path) -> None:
    stage = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    runner = (
        "import pathlib, sys, time; from benchmarks.stages import Stage, run_stages\n"
        f"stage = Stage('stage', [sys.executable, '-c', {stage!r}], 60)\n"
        "run_stages([stage, stage], pathlib.Path(sys.argv[1]), time.monotonic() + 60, {})"
    )
    process = subprocess.Popen([*python(runner), str(tmp_path)], cwd=stages.ROOT)
    log, pid = tmp_path / "stages.log", ""
    while not pid.isdigit():
        assert process.poll() is None
        time.sleep(0.05)
        pid = log.read_text().splitlines()[-1] if log.exists() and log.read_text().endswith("\n") else ""
    process.terminate()
    assert process.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid), 0)
    assert [each["status"] for each in json.loads((tmp_path / "gpu.json").read_text())["stages"]] == ["running"]


def test_a_stage_that_fails_or_hangs_has_another_run_in_its_place(tmp_path: Path) -> None:
    plain = stages.Stage("plain", python("print('alone')"), 20)
    planned = [
        stages.Stage("well", python(""), 20, instead=stages.Stage("never", python(""), 20)),
        stages.Stage("bad", python("raise SystemExit(1)"), 20, instead=plain),
        stages.Stage("slow", python("import time; time.sleep(60)"), 3.5, instead=plain),
        stages.Stage("last", python(""), 20),
    ]
    report = stages.run_stages(planned, tmp_path, time.monotonic() + 60, {})
    ran = " ".join(f"{each['name']}: {each['status']}." for each in report["stages"])
    assert ran == "well: ok. bad: failed. plain: ok. slow: timeout. plain: ok. last: ok."
    assert stages.summary(report)[1] == 1

    plan = gpu.plan({"cuda": True}, tmp_path, dry_run=False)
    for stage in (each for each in plan if each.name.startswith("bench ") and "--json" in each.command):
        if stage.name != "bench smallest" and "compiled" not in stage.name:
            assert stage.instead is not None and stage.instead.command[-3:] == ["--against", run.NOBODY, "--unmeasured"]


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
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    done = stages.run_stage(stages.Stage("build", python(gpu._BUILD), 20), 20, tmp_path / "log")
    assert done["status"] == status
    for part, reason in missing.items():
        assert (f"built without {part}: {reason}" in done["tail"]) == (reason is not None)


def test_gpu_report_is_whole_while_a_stage_runs(tmp_path: Path) -> None:
    look = f"import json; print(json.load(open({str(tmp_path / 'gpu.json')!r}))['stages'][-1]['status'])"
    report = stages.run_stages([stages.Stage("look", python(look), 20)], tmp_path, time.monotonic() + 30, {})
    assert report["stages"][0]["tail"].strip() == "running"


def test_gpu_plan_without_cuda_says_why_each_stage_is_left_out(tmp_path: Path) -> None:
    plan = {stage.name: stage for stage in gpu.plan({"cuda": False}, tmp_path, dry_run=False)}
    assert plan["explain"].missing is None
    benches = [name for name in plan if name.startswith("bench ") and name != "bench smallest"]
    assert {plan[name].missing for name in benches} == {gpu.NO_CUDA}
    hopper = gpu.plan({"cuda": True, "capability": [9, 0]}, tmp_path, dry_run=False)
    assert next(stage for stage in hopper if stage.name == "build").environment == {"UNIF2ACE_CUDA_ARCHS": "90a"}
    left_out = [stage.name for stage in hopper if stage.missing is not None]
    assert all(name.startswith("sanitizer") for name in left_out)  # where there is no compute-sanitizer


@pytest.mark.parametrize(
    ("bodies", "status"),
    [
        (["def test_a(): pass", "def test_b(): assert False"], "failed"),
        (["def test_a(): pass", ""], "ok"),
        (["", ""], "not run"),
        (["def test_a(): pass", "raise ImportError"], "failed"),
        ([], "not run"),
    ],
)
def test_gpu_tests_run_in_shares(tmp_path, monkeypatch, bodies, status) -> None:
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    for index, body in enumerate(bodies):
        (folder / f"test_{index}.py").write_text(body)
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    stage = stages.Stage("tests", [*python(gpu._TESTS), gpu._SHARE, "kernels", "all"], 60, empty_code=5)
    done = stages.run_stage(stage, 60, tmp_path / "log")
    assert done["status"] == status
    assert done["tail"].count("test_0.py::test_a PASSED") == ("test_a" in "".join(bodies))


def test_gpu_tests_are_run_once_each_whatever_the_number_of_processes(tmp_path, monkeypatch) -> None:
    folder = tmp_path / "tests" / "kernels"
    folder.mkdir(parents=True)
    marked = "import pytest\n@pytest.mark.{0}\n@pytest.mark.parametrize('i', range(5))\ndef test_{0}(i): pass\n"
    (folder / "test_some.py").write_text(marked.format("gpu") + marked.format("slow"))
    (folder / "test_others.py").write_text("raise ImportError")  # has none for a GPU
    monkeypatch.setattr(stages, "ROOT", tmp_path)
    command = [*python(f"import os; os.cpu_count = lambda: 3\n{gpu._TESTS}"), gpu._SHARE, "kernels", "gpu", "-m", "gpu"]
    done = stages.run_stage(stages.Stage("tests", command, 60, empty_code=5), 60, tmp_path / "log")
    assert done["status"] == "ok", done["tail"]
    assert all(done["tail"].count(f"test_gpu[{i}] PASSED") == 1 for i in range(5)) and "test_slow" not in done["tail"]


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


def test_gpu_main_results_are_checked_first_and_fit_in_one_call(tmp_path: Path) -> None:
    plan = gpu.plan({"cuda": True}, tmp_path, dry_run=False)
    names = [stage.name for stage in plan]
    main = plan[: names.index("build")]
    assert names[0] == "check" and {"bench model.step base", "bench sampling.generate base"} <= set(names[: len(main)])
    assert sum(stage.seconds for stage in main) <= 530 - 50  # what machine() and imports take
    assert f"BUDGET ?= {gpu.BUDGET_S}" in (stages.ROOT / "Makefile").read_text()

    timed = [stage.command for stage in main if "bfloat16" in stage.command]
    asked = [{name: command[command.index(f"--{name}") + 1] for name in ("op", "shape", "dtype")} for command in timed]
    wanted = [case.name for each in asked for case in run.select(CASES, **each, device="cuda", smoke=False)]
    share = [*python(gpu._CHECK_SHARE), "1", "2", "list", *map(json.dumps, asked)]
    environment = {**os.environ, "PYTHONPATH": f"{stages.ROOT}{os.pathsep}{stages.ROOT / 'kernels'}"}
    assert subprocess.check_output(share, text=True, env=environment).splitlines() == wanted[1::2]
    assert main[0].command[4:] == ["check", *map(json.dumps, asked)]


def test_gpu_check_fails_where_any_share_fails(tmp_path: Path) -> None:
    def status(share: str) -> str:
        command = [*python(f"import os; os.cpu_count = lambda: 2\n{gpu._CHECK}"), share]
        return stages.run_stage(stages.Stage("check", command, 60), 60, tmp_path / "log")["status"]

    assert status("import sys; print(sys.argv[1:])") == "ok"
    assert status("import sys; sys.exit(sys.argv[1] == '1')") == "failed"
    assert status("import os, sys; sys.argv[1] == '0' and os.abort()") == "failed"


def test_gpu_digest_has_a_line_for_each_case() -> None:
    base = {"shape": "s", "dtype": "bfloat16", "mode": "forward", "status": "ok", "compared": True}
    took = {"median_ms": 2.0, "share_of_floor": 0.5, "times_ours": 1.0}
    trace = "Traceback (most recent call last):\n  a line\nMemoryError: out of memory\n"
    lines = [
        {**base, **took, "op": "moe.layer", "contender": "ours"},
        {**base, **took, "op": "moe.layer", "contender": "slow", "times_ours": 3.0},
        {**base, **took, "op": "moe.layer", "contender": "fast", "times_ours": 0.875},
        {**base, **took, "op": "moe.layer", "contender": "dense", "times_ours": 0.5, "compared": False},
        {**base, **took, "op": "moe.mix", "contender": "ours", "axis": "T"},
        {**base, "op": "random", "contender": "ours", "status": "error", "reason": trace},
        {"op": "ceilings"},
    ]
    assert gpu.digest([json.dumps(line) for line in lines]) == [
        "moe.layer s bfloat16 forward: 2.000 ms, 50 % of the floor's rate, fast x0.88",
        "random s bfloat16 forward: error, MemoryError: out of memory",
    ]


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
    stage = stages.Stage("look", python("import alpha, plain; print(alpha.NAME, plain.NAME)"), 20)
    assert stages.run_stage(stage, 20, tmp_path / "log", path)["tail"].strip() == "alpha plain"

    (carried / "broken-0-py3-none-any.whl").unlink()
    ran: list[Sequence[str]] = []
    monkeypatch.setattr(gpu, "_output", lambda command, *_: ran.append(command) or "")
    assert set(gpu.carried_packages(carried)[1].values()) == {"installed"} and len(ran) == 1  # all of them at once

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    hopper = {"cuda": True, "capability": [9, 0]}
    for with_path, missing in ((path, None), ((), "pytest: not installed, and no wheel in .whl")):
        plan = {stage.name: stage for stage in gpu.plan(hopper, tmp_path, dry_run=False, path=with_path)}
        assert plan["tests gpu"].missing == missing
