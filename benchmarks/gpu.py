"""Everything that a GPU machine can tell about the package, in one command that ends in time.

    python -m benchmarks.gpu --out DIR [--budget SECONDS] [--stages tests,bench] [--dry-run]

Needs no network and installs nothing into the machine: Python with torch (and its Triton), nvcc where there is one.
pytest and the peers may come along as wheels in .whl, which are unpacked aside.
Stages run one after the other, each in a process of its own with its own slice of the time that is left; one that
fails, hangs or crashes does not stop the next, and if it timed ours beside peers, ours is then timed alone. Left in
DIR, valid after every stage: gpu.json (what each stage did), benches.jsonl (see run.py), stages.log (all output). The
exit status is 1 if a stage failed.

The main results come first. "check" makes each of their calls once, ours and the peers', on all cores: so what is wrong
is known within a minute or two, and the kernels that are timed afterwards lie compiled in Triton's cache, whose
compilation one by one would take longer than the timing. Tests follow, then launch choices (sweep.py), then the rest.
The output ends with a line a case: our time, its share of what the device could do, and the fastest other contender; a
candidate of a sweep below x1 is one to put into the room's configs.py.
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
BUDGET_S = 530  # where a GPU is shared, a command often has ten minutes
CARRIED = ".whl"  # folder of packages for a machine without a network: wheels, and folders of plain source
NOBODY = "none"  # run.NOBODY, which brings torch
_PYTHON = sys.executable
_OF_MODEL = ("model.step", "model.block", "model.forward", "sampling.generate", "transformers.experts")
# What the package is chosen by: op, shape, and the most seconds it may take.
_MAIN_DTYPE = "bfloat16"
_MAIN = [
    ("moe.layer", "swiglu-24k", 30),
    ("moe.layer", "gpu-core", 100),
    ("d3diff.loss", "x256 slice", 45),
    ("d3diff.next_token_loss", "paper-16x256", 25),
    ("sampling", "paper-64x256", 35),
]
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
# The exit statuses of processes that are told their number and how many they are; their lines as they come.
_ON_EVERY_CORE = """
import concurrent.futures, os, subprocess, sys
def on_every_core(processes, script, *arguments):
    def run(first):
        command = [sys.executable, "-c", script, str(first), str(processes), *arguments]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for line in process.stdout:
            print(line, end="", flush=True)
        return process.wait()
    with concurrent.futures.ThreadPoolExecutor(processes or 1) as pool:
        return set(pool.map(run, range(processes)))
"""
# Every contender of the cases asked for is called once and compared; the launch choices' cases if none are asked for.
_CHECK_SHARE = """
import json, sys, torch
from benchmarks import run, sweep
from benchmarks.cases import cases_of
first, step, how, *asked = sys.argv[1:]
known = cases_of("moe")  # those of all kernels, without the model's
chosen = [case for each in asked for case in run.select(known, device="cuda", smoke=False, **json.loads(each))]
chosen = chosen if asked else list(sweep.cases("", "", "cuda", known, sweep.KNOBS))
chosen = chosen[int(first)::int(step)]
if how == "list":
    sys.exit(print(*(case.name for case in chosen), sep="\\n"))
records = run.run_all(chosen, torch.device("cuda"), None, timing=False, compiling=False)
sys.exit(1 if run.failures(records) else 0)
"""
_CHECK = (
    _ON_EVERY_CORE
    + """
sys.exit(1 if on_every_core(os.cpu_count(), *sys.argv[1:]) - {0} else 0)
"""
)
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
_TESTS = (
    _ON_EVERY_CORE
    + """
import glob
share, folder, which, *arguments = sys.argv[1:]
files = sorted(glob.glob(f"tests/{folder}/test_*.py"))
if which == "gpu":
    files = [file for file in files if "mark.gpu" in open(file).read()]
options = ["-v", "-ra", "-p", "no:cacheprovider", "--continue-on-collection-errors", *arguments]
codes = on_every_core(os.cpu_count() if files else 0, share, *options, *files) or {5}
sys.exit(1 if codes - {0, 5} else min(codes))
"""
)
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

    Wheels are unpacked aside: at once, as each start of pip takes seconds, or else each alone, so that one that does
    not install keeps no other from being used. A subfolder is source that is used as it is.
    """
    site = tempfile.mkdtemp(prefix="carried-")
    install = _python("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", site)
    wheels = sorted(folder.glob("*.whl"))
    if wheels and not _output([*install, *map(str, wheels)], 120):
        said = {wheel.name: "installed" for wheel in wheels}
    else:
        said = {wheel.name: _output([*install, str(wheel)]) or "installed" for wheel in wheels}
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

    def bench(op: str, shape: str, seconds: float, *more: str, each: float = 1, dtype: str = "") -> Stage:
        how = ["--list", "--device", "cuda"] if dry_run else ["--device", "cuda", "--json", str(out / "benches.jsonl")]
        command = _python("-m", "benchmarks.run", "--op", op, "--shape", shape, "--dtype", dtype, *more)
        compiled = "compiled" if "torch.compile" in more else ""
        name = " ".join(filter(None, ["bench", op, shape, dtype, compiled]))
        missing = (no_model if op in _OF_MODEL else None) or needs_cuda
        command = [*command, "--seconds", str(each), *how]
        # A kernel of a peer's that takes the device along, or never ends, shall not cost our figures.
        alone = [*command, "--against", NOBODY, "--unmeasured"]
        instead = None if "--against" in more else Stage(f"{name}, ours alone", alone, min(seconds, 40))
        return Stage(name, command, seconds, missing, instead=instead)

    def check(name: str, seconds: float, asked: Sequence[Mapping[str, str]]) -> Stage:
        how = "list" if dry_run else "check"
        return Stage(name, _python("-c", _CHECK, _CHECK_SHARE, how, *map(json.dumps, asked)), seconds, needs_cuda)

    def sweep(knob: str, seconds: float) -> Stage:
        how = ["--list"] if dry_run else ["--json", str(out / "benches.jsonl")]
        command = _python("-m", "benchmarks.sweep", "--knob", knob, "--seconds", "2", *how)
        return Stage(f"sweep {knob}", command, seconds, needs_cuda)

    def sanitizer(tool: str, op: str, seconds: float) -> Stage:
        found = shutil.which("compute-sanitizer")
        run = _python("-m", "benchmarks.run", "--smoke", "--check", "--op", op, "--against", "none")
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
        check("check", 120, [{"op": op, "shape": shape, "dtype": _MAIN_DTYPE} for op, shape, _ in _MAIN]),
        *(bench(op, shape, slice_s, "--no-compile", dtype=_MAIN_DTYPE) for op, shape, slice_s in _MAIN),
        bench("model.step", "base", 75, "--no-compile"),
        bench("sampling.generate", "base", 50, "--no-compile"),
        Stage("build", _python("-c", _BUILD), 150, not_dry, archs),
        Stage("explain", _python("-c", _EXPLAIN, device), 120),
        Stage("bench smallest", _python("-m", "benchmarks.run", *smallest), 120),
        tests("tests gpu", "kernels", "gpu", "gpu", 200),
        check("sweep check", 150, []),
        sweep("moe.layer", 200),
        sweep("d3diff.loss", 90),
        sweep("sampling", 60),
        bench("moe.route", "router", 40, "--no-compile"),
        bench("moe.mix", "paper-16", 30, "--no-compile"),
        bench("random", "paper", 20),
        sanitizer("memcheck", "", 120),
        tests("tests gpu model", "unif2ace", "gpu", "gpu", 150, no_model),
        bench("", "scaling", 120, "--no-compile", each=0.3),
        tests("tests kernels", "kernels", "all", "not slow and not gpu", 150),
        bench("d3diff", "paper-16x256", 60, "--no-compile", dtype="float32"),
        bench("d3diff.loss", "x1024 slice", 60, "--no-compile"),
        bench("sampling", "paper-64x256", 60, "--no-compile", dtype="float32"),
        bench("d3diff.loss", "paper-16x256", 80, "--against", "torch.compile"),
        bench("moe.layer", "paper-16k", 80, "--against", "torch.compile"),
        bench("sampling", "paper-16", 60, "--against", "torch.compile"),
        bench("model.step", "base", 150, "--against", "torch.compile"),
        bench("model.block", "base", 40, "--no-compile"),
        bench("model.forward", "base", 40, "--no-compile"),
        bench("transformers.experts", "olmoe", 60, "--no-compile"),
        sanitizer("racecheck", "moe.route", 60),
        bench("moe.layer", "gpu-grid", 200, "--no-compile"),
    ]


def digest(lines: Sequence[str]) -> list[str]:
    """A line for each case of result lines: our time, or why there is none; series are left to their pages."""
    from .results import in_a_line, results_of  # brings torch, which this process does without before

    found = []
    for result in results_of(lines)[0]:
        ours, fastest = result.ours, result.peers[:1]
        name = " ".join(result[key] for key in ("op", "shape", "dtype", "mode"))
        if not result.measured:
            found.append(f"{name}: {ours['status']}, {in_a_line(ours.get('reason', 'not timed'))}")
        elif not result.axis:
            time_and_share = f"{ours['median_ms']:.3f} ms, {100 * ours['share_of_floor']:.0f} % of the floor's rate"
            found.append(f"{name}: {time_and_share}" + "".join(f", {_contender(each)}" for each in fastest))
    return found


def _contender(record: Mapping) -> str:
    return f"{record['contender']} x{record['times_ours']:.2f}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json, benches.jsonl and stages.log")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for everything together")
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
    benches = out / "benches.jsonl"
    print("\n".join(digest(benches.read_text().splitlines() if benches.exists() else [])))
    print(f"{words}; results in {out}")
    return status


if __name__ == "__main__":
    sys.exit(main())
