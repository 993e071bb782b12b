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
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from .environment import MODEL_NEEDS, ROOT, commit, not_found, versions
from .stages import Stage, run_stages, summary

NO_CUDA = "no CUDA device"
CARRIED = ".whl"  # folder of packages for a machine without a network: wheels, and folders of plain source
_PYTHON = sys.executable
_OF_MODEL = ("model.step", "model.block", "model.forward", "sampling.generate", "transformers.experts")
_FIRST_IMPORT_S = 200  # of torch, on a machine that has not read its files before

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
# A process a core, each with its share of every file's tests: most of their time goes into compiling kernels, and the
# variants of one test compile different ones. Whether a file has tests for a GPU is seen in its text, since importing
# torch to find none would cost seconds a file.
_SHARE = """
import sys, pytest
first, step, *arguments = sys.argv[1:]
class Share:
    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = items[int(first)::int(step)]
sys.exit(pytest.main(arguments, plugins=[Share()]))
"""
_TESTS = """
import concurrent.futures, glob, os, subprocess, sys
share, folder, which, *arguments = sys.argv[1:]
files = sorted(glob.glob(f"tests/{folder}/test_*.py"))
if which == "gpu":
    files = [file for file in files if "mark.gpu" in open(file).read()]
processes = os.cpu_count() if files else 0
options = ["-v", "-ra", "-p", "no:cacheprovider", "--continue-on-collection-errors", *arguments]
def run(first):
    command = [sys.executable, "-c", share, str(first), str(processes), *options, *files]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    for line in process.stdout:
        print(line, end="", flush=True)
    return process.wait()
with concurrent.futures.ThreadPoolExecutor(processes or 1) as pool:
    codes = set(pool.map(run, range(processes))) or {5}
sys.exit(1 if codes - {0, 5} else min(codes))
"""
_EXPLAIN = """
import sys, torch
from unif2ace_kernels import d3diff, moe, random, sampling
from unif2ace_kernels._library import explain, registered_ops
for op in registered_ops():
    print(explain(op, torch.empty(0, device=sys.argv[1])))
"""


def _python(*arguments: str) -> list[str]:
    return [_PYTHON, *arguments]


def _output(command: Sequence[str], seconds: float = 60) -> str:
    """What a command prints, or why it does not run."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not available: {error}"
    return (done.stdout + done.stderr).strip()


def machine() -> dict:
    """GPU, driver, compiler and package versions, found without importing torch into this process."""
    report = _output(_python("-c", _REPORT), _FIRST_IMPORT_S).splitlines()
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
    collect = ["--collect-only"] if dry_run else []

    def absent(*packages: str) -> str | None:
        missing = " and ".join(not_found(packages, path))
        return f"{missing}: not installed, and no wheel in {CARRIED}" if missing else None

    no_model = absent(*MODEL_NEEDS)

    def tests(name: str, folder: str, which: str, marks: str, seconds: float, missing: str | None = None) -> Stage:
        command = _python("-c", _TESTS, _SHARE, folder, which, "-m", marks, *collect)
        return Stage(name, command, seconds, absent("pytest") or missing or needs_cuda, empty_code=5)

    def bench(op: str, shape: str, seconds: float, *more: str, each: float = 1) -> Stage:
        how = ["--list", "--device", "cuda"] if dry_run else ["--device", "cuda", "--json", str(out / "benches.jsonl")]
        command = _python("-m", "benchmarks.run", "--op", op, "--shape", shape, "--seconds", str(each), *how, *more)
        compiled = ["compiled"] if "torch.compile" in more else []
        missing = no_model if op in _OF_MODEL else None
        return Stage(" ".join(filter(None, ["bench", op, shape, *compiled])), command, seconds, missing or needs_cuda)

    def sweep(knob: str, seconds: float) -> Stage:
        how = ["--list"] if dry_run else ["--json", str(out / "benches.jsonl")]
        command = _python("-m", "benchmarks.sweep", "--knob", knob, "--seconds", "2", *how)
        return Stage(f"sweep {knob}", command, seconds, needs_cuda)

    def sanitizer(tool: str, op: str, seconds: float) -> Stage:
        found = shutil.which("compute-sanitizer")
        run = _python("-m", "benchmarks.run", "--smoke", "--check", "--op", op, "--against", "no baseline")
        # Calls that fail are no finding: torch asks CUDA for what may not be there, and ours raise.
        options = ["--error-exitcode", "9", "--report-api-errors", "no"]
        return Stage(
            f"sanitizer {tool}",
            [found or "", "--tool", tool, *options, *run, "--device", "cuda"],
            seconds,
            not_dry or (None if found else "no compute-sanitizer on the path"),
            {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # so that each tensor has bounds of its own
        )

    smallest = ["--smoke", "--op", "random", "--device", device, "--json", str(out / "benches.jsonl")]
    return [
        Stage("build", _python("-c", _BUILD), 150, not_dry, archs),
        Stage("explain", _python("-c", _EXPLAIN, device), 120),
        Stage("bench smallest", _python("-m", "benchmarks.run", *smallest), 120),
        tests("tests gpu", "kernels", "gpu", "gpu", 200),
        bench("moe.layer", "gpu-core", 110, "--no-compile"),
        bench("d3diff.loss", "x256 slice", 70, "--no-compile"),
        bench("sampling", "paper-64x256", 60, "--no-compile"),
        bench("model.step", "base", 90, "--no-compile"),
        bench("sampling.generate", "base", 60, "--no-compile"),
        bench("moe.route", "router", 40, "--no-compile"),
        bench("moe.mix", "paper-16", 30, "--no-compile"),
        bench("d3diff.n", "paper-16x256", 30, "--no-compile"),
        bench("random", "paper", 20),
        sanitizer("memcheck", "", 120),
        tests("tests gpu model", "unif2ace", "gpu", "gpu", 150, no_model),
        bench("", "scaling", 120, "--no-compile", each=0.3),
        tests("tests kernels", "kernels", "all", "not slow and not gpu", 150),
        bench("d3diff.loss", "x1024 slice", 60, "--no-compile"),
        bench("d3diff.loss", "paper-16x256", 80, "--against", "torch.compile"),
        bench("moe.layer", "paper-16k", 80, "--against", "torch.compile"),
        bench("sampling", "paper-16", 60, "--against", "torch.compile"),
        bench("model.step", "base", 150, "--against", "torch.compile"),
        bench("model.block", "base", 40, "--no-compile"),
        bench("model.forward", "base", 40, "--no-compile"),
        bench("transformers.experts", "olmoe", 60, "--no-compile"),
        sanitizer("racecheck", "moe.route", 60),
        bench("moe.layer", "gpu-grid", 200, "--no-compile"),
        sweep("moe.layer", 400),
        sweep("d3diff.loss", 200),
        sweep("sampling", 100),
    ]


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
    words, status = summary(report)
    print(f"{words}; results in {out}")
    return status


if __name__ == "__main__":
    sys.exit(main())
