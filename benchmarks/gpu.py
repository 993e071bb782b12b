"""Everything that a GPU machine can tell about the package, in one command that ends in time.

    python -m benchmarks.gpu --out DIR [--budget SECONDS] [--stages tests,bench] [--dry-run]

Needs no network and installs nothing into the machine: Python with torch (and its Triton), nvcc where there is one.
pytest and the peers may come along as wheels in .whl, which are unpacked aside.
Stages run one after the other, each in a process of its own with its own slice of the time that is left; one that
fails, hangs or crashes does not stop the next. Left in DIR, valid after every stage: gpu.json (what each stage did),
benches.jsonl (see run.py), stages.log (all output). The exit status is 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .environment import ROOT, commit, versions

OK, FAILED, TIMEOUT, NOT_RUN = "ok", "failed", "timeout", "not run"
NO_CUDA = "no CUDA device"
MIN_SLICE_S = 3.0  # less is left: the stage is not begun
CARRIED = ".whl"  # folder of packages for a machine without a network: wheels, and folders of plain source
TAIL = 6000  # characters of a stage's output that gpu.json keeps
_PYTHON = sys.executable

_REPORT = """
import json, torch
found = {"torch_cuda": torch.version.cuda, "cuda": torch.cuda.is_available()}
if found["cuda"]:
    p = torch.cuda.get_device_properties(0)
    found |= {"name": p.name, "capability": [p.major, p.minor], "memory": p.total_memory,
              "multiprocessors": p.multi_processor_count}
print(json.dumps(found))
"""
# The build leaves out what it cannot build; here that is a failure where the machine has the tool for it.
_BUILD = """
import json, shutil, subprocess, sys
subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], check=True)
with open("kernels/unif2ace_kernels/_build.json") as record:
    missing = {part: reason for part, reason in json.load(record)["missing"].items() if reason}
for part, reason in missing.items():
    print(f"built without {part}: {reason}")
tools = {"c++": "c++", "cuda c++": "nvcc"}
sys.exit(any(part in missing and shutil.which(tool) for part, tool in tools.items()))
"""
# A process a file, side by side: most of their time goes into compiling kernels, on a core each.
_TESTS = """
import glob, subprocess, sys, threading
def tell(lines):
    for line in lines:
        print(line, end="", flush=True)
command = [sys.executable, "-m", "pytest", "-v", "-ra", "-p", "no:cacheprovider", *sys.argv[1:]]
processes = [subprocess.Popen([*command, file], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
             for file in sorted(glob.glob("tests/kernels/test_*.py"))]
threads = [threading.Thread(target=tell, args=[each.stdout]) for each in processes]
[each.start() for each in threads]
[each.join() for each in threads]
codes = {each.wait() for each in processes}
sys.exit(1 if codes - {0, 5} else min(codes))
"""
_EXPLAIN = """
import sys, torch
from unif2ace_kernels import d3diff, moe, random, sampling
from unif2ace_kernels._library import explain, registered_ops
for op in registered_ops():
    print(explain(op, torch.empty(0, device=sys.argv[1])))
"""


@dataclass(frozen=True)
class Stage:
    """A command of the run.

    Attributes:
        name: ``"tests gpu"``; --stages matches its beginning.
        command: argument list, run in the repository's root.
        seconds: the most it may take.
        missing: why it cannot run here; None where it can.
        environment: variables set beside the machine's.
        empty_code: the exit status that means that there was nothing to do.
    """

    name: str
    command: Sequence[str]
    seconds: float
    missing: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)
    empty_code: int | None = None


def _python(*arguments: str) -> list[str]:
    return [_PYTHON, *arguments]


def _output(command: Sequence[str]) -> str:
    """What a command prints, or why it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not available: {error}"
    return (done.stdout + done.stderr).strip()


def machine() -> dict:
    """GPU, driver, compiler and package versions, found without importing torch into this process."""
    report = _output(_python("-c", _REPORT)).splitlines()
    try:
        found = json.loads(report[-1])
    except (IndexError, json.JSONDecodeError):
        found = {"cuda": False, "torch": "\n".join(report)[-2000:]}
    nvcc = _output(["nvcc", "--version"]).splitlines()
    return {
        **found,
        "nvidia_smi": _output(["nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.sm", "--format=csv"]),
        "nvcc": next((line for line in nvcc if "release" in line), nvcc[-1] if nvcc else "not available"),
        "versions": versions(),
        "cores": os.cpu_count(),
    }


def carried_packages(folder: Path) -> tuple[list[str], dict[str, str]]:
    """Packages that came along in `folder`, for a machine that can fetch none: (folders for the path, what happened).

    Wheels are unpacked aside, each alone, so that one that does not install keeps no other from being used; a
    subfolder is source that is used as it is.
    """
    site = tempfile.mkdtemp(prefix="carried-")
    said = {}
    for wheel in sorted(folder.glob("*.whl")):
        install = _python("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", site)
        said[wheel.name] = _output([*install, str(wheel)]) or "installed"
    inside = [each.parent for each in Path(site).glob("*/python_packages/*")]  # as nvidia-cutlass-dsl has it
    sources = [each for each in sorted(folder.glob("*")) if each.is_dir()]
    return [site, *map(str, dict.fromkeys(inside)), *map(str, sources)], said


def plan(found: Mapping, out: Path, *, dry_run: bool, path: Sequence[str] = ()) -> list[Stage]:
    """The stages in order of importance. A dry run starts what the real one would, on nothing: it collects tests,
    lists cases and times the smallest of them on the CPU. `path`: folders with packages, see `carried_packages`."""
    cuda = bool(found.get("cuda"))
    device = "cuda" if cuda else "cpu"
    needs_cuda = None if cuda or dry_run else NO_CUDA
    not_dry = "a dry run" if dry_run else None if cuda else NO_CUDA
    major, minor = found.get("capability", (9, 0))
    archs = {"UNIF2ACE_CUDA_ARCHS": f"{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")}
    has_pytest = importlib.util.find_spec("pytest") or any((Path(each) / "pytest").is_dir() for each in path)
    no_pytest = None if has_pytest else f"pytest is not installed and no wheel of it is in {CARRIED}"
    collect = ["--collect-only"] if dry_run else []

    def tests(name: str, arguments: list[str], seconds: float, missing: str | None) -> Stage:
        command = _python("-c", _TESTS, *arguments, *collect)
        return Stage(name, command, seconds, no_pytest or missing, empty_code=5)

    def bench(op: str, shape: str, seconds: float, *more: str) -> Stage:
        how = ["--list", "--device", "cuda"] if dry_run else ["--device", "cuda", "--json", str(out / "benches.jsonl")]
        command = _python("-m", "benchmarks.run", "--op", op, "--shape", shape, "--seconds", "1", *how, *more)
        compiled = ["compiled"] if "torch.compile" in more else []
        return Stage(" ".join(filter(None, ["bench", op, shape, *compiled])), command, seconds, needs_cuda)

    def sweep(knob: str, seconds: float) -> Stage:
        how = ["--list"] if dry_run else ["--json", str(out / "benches.jsonl")]
        command = _python("-m", "benchmarks.sweep", "--knob", knob, "--seconds", "2", *how)
        return Stage(f"sweep {knob}", command, seconds, needs_cuda)

    sanitizer = shutil.which("compute-sanitizer")
    smallest = ["--smoke", "--op", "random", "--device", device, "--json", str(out / "benches.jsonl")]
    return [
        Stage("build", _python("-c", _BUILD), 150, not_dry, archs),
        Stage("explain", _python("-c", _EXPLAIN, device), 120),
        Stage("bench smallest", _python("-m", "benchmarks.run", *smallest), 120),
        tests("tests gpu", ["-m", "gpu"], 200, needs_cuda),
        Stage(
            "sanitizer",
            [sanitizer or "", "--error-exitcode", "9", *_python("-m", "benchmarks.run", "--smoke", "--check"),
             "--against", "no baseline", "--device", "cuda"],
            60,
            not_dry or (None if sanitizer else "no compute-sanitizer on the path"),
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # so that each tensor has bounds of its own
        ),
        bench("moe.layer", "gpu-core", 110, "--no-compile"),
        bench("d3diff.loss", "x256 slice", 70, "--no-compile"),
        bench("sampling", "paper-64x256", 60, "--no-compile"),
        bench("moe.route", "", 40, "--no-compile"),
        bench("moe.mix", "paper-16", 30, "--no-compile"),
        bench("d3diff.n", "paper-16x256", 30, "--no-compile"),
        bench("random", "", 20),
        tests("tests kernels", ["-m", "not slow and not gpu"], 150, needs_cuda),
        bench("d3diff.loss", "x1024 slice", 60, "--no-compile"),
        bench("d3diff.loss", "paper-16x256", 80, "--against", "torch.compile"),
        bench("moe.layer", "paper-16k", 80, "--against", "torch.compile"),
        bench("sampling", "paper-16", 60, "--against", "torch.compile"),
        bench("moe.layer", "gpu-grid", 200, "--no-compile"),
        sweep("moe.layer", 400),
        sweep("d3diff.loss", 200),
        sweep("sampling", 100),
    ]  # fmt: skip


def run_stage(stage: Stage, seconds: float, log: Path, path: Sequence[str] = ()) -> dict:
    """Run one stage for at most `seconds`; append its output to `log`; say what happened."""
    folders = [*path, str(ROOT / "kernels"), str(ROOT), os.environ.get("PYTHONPATH")]
    environment = {**os.environ, **stage.environment, "PYTHONPATH": os.pathsep.join(filter(None, folders))}
    environment["PYTHONUNBUFFERED"] = "1"
    start = time.monotonic()
    with log.open("a+b") as output:
        output.write(f"\n===== {stage.name}: {' '.join(stage.command)[:300]}\n".encode())
        output.flush()
        begin = output.tell()
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            code = process.wait(timeout=seconds)
            status = OK if code == 0 else NOT_RUN if code == stage.empty_code else FAILED
        except subprocess.TimeoutExpired:
            status, code = TIMEOUT, None
        finally:
            _end(process)
        output.seek(begin)
        tail = output.read().decode(errors="replace")[-TAIL:]
    return {"status": status, "exit_code": code, "seconds": round(time.monotonic() - start, 2), "tail": tail}


def _end(process: subprocess.Popen) -> None:
    """End the stage's process group, gently and then not; a group that is gone already is what is wanted."""
    for sign, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=patience)
        except subprocess.TimeoutExpired:
            continue


def write_report(report: Mapping, path: Path) -> None:
    """Replace `path` in one step, so that whoever reads it finds a whole one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(report, indent=1) + "\n")
    part.replace(path)


def keep_whole_lines(path: Path) -> None:
    """Drop a last line that a killed stage left unfinished."""
    if path.exists() and not path.read_bytes().endswith(b"\n"):
        path.write_bytes(path.read_bytes().rpartition(b"\n")[0] + b"\n" * (b"\n" in path.read_bytes()))


def run_stages(stages: Sequence[Stage], out: Path, deadline: float, head: Mapping, path: Sequence[str] = ()) -> dict:
    """Run `stages` until `deadline` (monotonic seconds), rewriting gpu.json before and after each."""
    out.mkdir(parents=True, exist_ok=True)
    done: list[dict] = []
    report = {**head, "stages": done}
    for stage in stages:
        record: dict = {"name": stage.name, "command": list(stage.command)}
        done.append(record)
        left = min(stage.seconds, deadline - time.monotonic())
        if stage.missing is not None:
            record |= {"status": NOT_RUN, "reason": stage.missing}
        elif left < MIN_SLICE_S:
            record |= {"status": NOT_RUN, "reason": "no time left"}
        else:
            record["status"] = "running"
            write_report(report, out / "gpu.json")
            try:
                record |= run_stage(stage, left, out / "stages.log", path)
            except OSError as error:
                record |= {"status": FAILED, "reason": str(error)}
            keep_whole_lines(out / "benches.jsonl")
        write_report(report, out / "gpu.json")
        print(f"{record['status']:>8}  {record.get('seconds', 0):6.1f} s  {stage.name}  {record.get('reason', '')}")
        if record["status"] in (FAILED, TIMEOUT):
            print("\n".join("          | " + line for line in record.get("tail", "").splitlines()[-15:]))
        sys.stdout.flush()
    return report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json, benches.jsonl and stages.log")
    parser.add_argument("--budget", type=float, default=500, help="seconds for everything together")
    parser.add_argument("--stages", default="", help="comma-separated beginnings of the stages' names; all if empty")
    parser.add_argument("--dry-run", action="store_true", help="start every stage on next to nothing, CUDA or not")
    options = parser.parse_args(arguments)
    deadline = time.monotonic() + options.budget - 5
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for name in ("gpu.json", "benches.jsonl", "stages.log"):
        (out / name).unlink(missing_ok=True)
    found = machine()
    path, carried = carried_packages(ROOT / CARRIED)
    head = {**commit(), "machine": found, "carried": carried, "dry_run": options.dry_run, "budget_s": options.budget}
    print(json.dumps({**found, "carried": carried}, indent=1), flush=True)
    wanted = tuple(each.strip() for each in options.stages.split(","))
    stages = [stage for stage in plan(found, out, dry_run=options.dry_run, path=path) if stage.name.startswith(wanted)]
    report = run_stages(stages, out, deadline, head, path)
    counts = Counter(record["status"] for record in report["stages"])
    print(", ".join(f"{count} {status}" for status, count in counts.items()) + f"; results in {out}")
    return 1 if counts[FAILED] or counts[TIMEOUT] else 0


if __name__ == "__main__":
    sys.exit(main())
