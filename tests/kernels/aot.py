"""Compiles Triton kernels ahead of time for GPUs that are not here, and reads what the compiler made of them::

    report = compile_ahead(kernel, {"p_x": "*fp32", "n": "i32"}, {"BLOCK": 1024}, arch=90, num_warps=4)
    assert report.spill_bytes == 0 and report.shared_bytes <= SHARED_LIMIT[90]

What ran nowhere is at least known to compile, and to fit.
"""

from __future__ import annotations

import functools
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs Triton")

from triton import knobs  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

ARCHS = (80, 89, 90, 100)
# Bytes of shared memory that one block may have (CUDA C++ Programming Guide, technical specifications).
SHARED_LIMIT = {80: 163 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class CompiledReport:
    """What the cubin needs.

    Attributes:
        registers: a thread.
        spill_bytes: the stack a thread, which in a Triton kernel holds spilled registers and nothing else.
        shared_bytes: a block, static and dynamic together.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    ptx: str
    cubin: bytes


def compile_ahead(
    kernel: object,
    signature: Mapping[str, str],
    constexprs: Mapping[str, object],
    arch: int,
    *,
    num_warps: int = 4,
    num_stages: int = 3,
    aligned: tuple[str, ...] | None = None,
    **options: object,
) -> CompiledReport:
    """Compile a ``@triton.jit`` kernel for compute capability `arch`; equal calls are compiled once a session.

    Args:
        kernel: the JIT function itself (under an autotuner: its ``.fn``).
        signature: Triton type of every argument that is not a constexpr: "*fp32", "*i64", "i32", ...
        constexprs: value of every constexpr.
        arch: one of `ARCHS`.
        aligned: arguments that a launch would find divisible by 16; by default all pointers, as torch allocates them.
        options: further launch options, such as ``enable_fp_fusion=False``.
    """
    if aligned is None:
        aligned = tuple(name for name, kind in signature.items() if kind.startswith("*"))
    key = (tuple(signature.items()), tuple(constexprs.items()), aligned, tuple(sorted(options.items())))
    return _compile(kernel, arch, num_warps, num_stages, *key)


@functools.cache
def _compile(kernel, arch, num_warps, num_stages, signature, constexprs, aligned, options) -> CompiledReport:
    unknown = {name for name, _ in (*signature, *constexprs)} ^ set(kernel.arg_names)
    assert not unknown, f"arguments of {kernel.__name__} that are missing, or that it does not have: {unknown}"
    source = ASTSource(
        kernel,
        {**dict(signature), **{name: "constexpr" for name, _ in constexprs}},
        dict(constexprs),
        {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": num_warps, "num_stages": num_stages, **dict(options)}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    registers, stack, shared = _resources(compiled.asm["cubin"])
    shared += compiled.metadata.shared
    return CompiledReport(registers, stack, shared, compiled.asm["ptx"], compiled.asm["cubin"])


def _resources(cubin: bytes) -> tuple[int, int, int]:
    """(registers a thread, stack bytes a thread, static shared bytes a block) as the cubin states them."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage)
    assert found, f"cuobjdump printed no resources:\n{usage}"
    return int(found[1]), int(found[2]), int(found[3])
