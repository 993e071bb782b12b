"""Compiles and runs CUDA kernels on the CPU (tests/cuda_on_cpu/cuda_on_cpu.h says what that finds and what not).

    execute("gumbel.cpp", "gumbel", seed, offset, rows, columns, stream)

compiles tests/cuda_on_cpu/gumbel.cpp with the sanitizers, once per content of csrc and of that folder, and calls its
function in a process of its own, once per scheduling seed.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "cuda_on_cpu"
SEEDS = (0, 1, 2)


class KernelFault(RuntimeError):
    """What the sanitizer or the fibers found."""


def execute(source: str, function: str, *arguments: object, seeds: tuple[int, ...] = SEEDS) -> object:
    """The result of `function` in tests/cuda_on_cpu/`source`: equal for every seed, or it is a fault.

    Args:
        source: file that defines a pybind11 module named CUDA_ON_CPU_MODULE (see cuda_on_cpu_python.h).
        function, arguments: what to call; arguments and result are pickled (numpy arrays, numbers).
        seeds: the orders of threads and blocks to run; 0 is in order, odd ones are shuffled, in other even ones warps
            run ahead of each other.

    Raises:
        KernelFault: a sanitizer's report, a deadlock, a wrong mask, or results that differ between seeds.
    """
    results = execute_each(source, function, *arguments, seeds=seeds)
    first = pickle.dumps(results[0])
    for seed, result in zip(seeds, results, strict=True):
        if pickle.dumps(result) != first:
            raise KernelFault(f"{function}: the result with seed {seed} is not that with seed {seeds[0]}: a race?")
    return results[0]


def execute_each(source: str, function: str, *arguments: object, seeds: tuple[int, ...] = SEEDS) -> list:
    """As `execute`, but the results of the seeds, not compared (for sums whose order is free)."""
    name, library = _build(FOLDER / source)
    # The interpreter is not built with the sanitizer, which wants to be first; the C++ library comes along because
    # the sanitizer looks for its throw when it starts.
    runtime = [_compiler_says(f"-print-file-name={each}") for each in ("libasan.so", "libstdc++.so")]
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", str(FOLDER / "worker.py")],
        input=pickle.dumps((name, str(library), function, arguments, seeds)),
        capture_output=True,
        env={
            **os.environ,
            "LD_PRELOAD": " ".join(runtime),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=0",
            "OMP_NUM_THREADS": "1",
        },
    )
    if done.returncode:
        raise KernelFault(done.stderr.decode(errors="replace"))
    results = pickle.loads(done.stdout)
    for seed, result in zip(seeds, results, strict=True):
        if isinstance(result, Exception):
            raise KernelFault(f"seed {seed}: {result}")
    return results


def _compiler_says(question: str) -> str:
    return subprocess.run(["g++", question], capture_output=True, text=True, check=True).stdout.strip()


def _build(source: Path) -> tuple[str, Path]:
    if shutil.which("g++") is None:
        pytest.skip("needs g++, whose sanitizers check the kernels")
    pytest.importorskip("numpy", reason="needs numpy, in which the kernels' arrays come and go")
    pybind11 = pytest.importorskip("pybind11", reason="needs pybind11, to call the kernels from Python")
    digest = hashlib.sha256(sys.version.encode())
    for path in sorted([*(ROOT / "csrc").rglob("*.cu*"), *(ROOT / "csrc").rglob("*.h"), *FOLDER.glob("*.h"), source]):
        digest.update(path.read_bytes())
    name = f"{source.stem}_{digest.hexdigest()[:12]}"
    library = ROOT / ".cache" / "cuda_on_cpu" / f"{name}.so"
    library.parent.mkdir(parents=True, exist_ok=True)
    with (library.parent / f"{source.stem}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes: the first to come compiles for all
        if not library.exists():
            _compile(source, name, library, pybind11.get_include())
    return name, library


def _compile(source: Path, name: str, library: Path, pybind11: str) -> None:
    partial = library.with_suffix(".tmp")
    command = ["g++", "-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-ffp-contract=off", "-Wall", "-Wextra"]
    command += ["-Wno-unknown-pragmas", "-fsanitize=address,undefined", "-fno-sanitize=vptr"]
    command += ["-fno-sanitize-recover=all", f"-DCUDA_ON_CPU_MODULE={name}", f"-I{FOLDER}", f"-I{ROOT / 'csrc'}"]
    command += ["-isystem", pybind11, "-isystem", sysconfig.get_path("include")]
    done = subprocess.run([*command, str(source), "-o", str(partial)], capture_output=True, text=True)
    assert done.returncode == 0, f"{source.name} does not compile:\n{done.stderr}"
    partial.rename(library)


def assert_bits_equal(actual: object, expected: object) -> None:
    """Equal shapes and bits, NaN and the sign of zero included."""
    np = pytest.importorskip("numpy", reason="needs numpy")
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual.view(np.uint8), expected.view(np.uint8))
