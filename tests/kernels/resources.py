"""What every Triton kernel needs on every GPU we name: registers, spills, shared memory, without a GPU.

    python tests/kernels/resources.py          # writes kernels/RESOURCES.md

Each room lists its kernels at real sizes, with the launch that the package chooses for them, as `CASES` in
aot_<room>.py.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from aot import ARCHS, SHARED_LIMIT, CompiledReport, compile_ahead, triton

TABLE = Path(__file__).parents[2] / "kernels" / "RESOURCES.md"
ROOMS = tuple(sorted(file.stem.removeprefix("aot_") for file in Path(__file__).parent.glob("aot_*.py")))
_COMMAND = "python tests/kernels/resources.py"


@dataclass(frozen=True)
class AotCase:
    """A kernel as it is launched at one size.

    Attributes:
        name: the kernel and the size in words, ``"rows times weights, D 2048, F 512, bf16"``.
        kernel, signature: as for `aot.compile_ahead`.
        launch: architecture -> (constexprs, launch options such as num_warps), as the package chooses them.
        spills: why registers are spilled; None where none may be.
    """

    name: str
    kernel: object
    signature: Mapping[str, str]
    launch: Callable[[int], tuple[Mapping[str, object], Mapping[str, object]]]
    spills: str | None = None

    def compile(self, arch: int) -> CompiledReport:
        constexprs, options = self.launch(arch)
        return compile_ahead(self.kernel, self.signature, constexprs, arch, **options)


def cases(room: str) -> list[AotCase]:
    """The kernels of a room."""
    return importlib.import_module(f"aot_{room}").CASES


def cell(report: CompiledReport) -> str:
    """Registers / spilled bytes / KiB of shared memory, as the table has them."""
    return f"{report.registers} / {report.spill_bytes} / {report.shared_bytes / 1024:.1f}"


def row(case: AotCase) -> str:
    return f"| {case.name} | " + " | ".join(cell(case.compile(arch)) for arch in ARCHS) + " |"


def page() -> str:
    """The whole of RESOURCES.md."""
    limits = ", ".join(f"{SHARED_LIMIT[arch] // 1024} KiB (sm_{arch})" for arch in ARCHS)
    lines = [
        "# What the Triton kernels need",
        "",
        "Registers a thread / bytes spilled a thread / KiB of shared memory a block, read from the code that Triton"
        f" {triton.__version__}",
        "makes for each architecture, at real sizes and with the launch that the package chooses. A block may have",
        f"at most {limits}.",
        f"Written by `{_COMMAND}`; the tests compile the kernels again and compare. How fast they",
        "are is not yet measured on GPU.",
    ]
    for room in ROOMS:
        listed = cases(room)
        lines += ["", f"## {room}", "", "| kernel | " + " | ".join(f"sm_{arch}" for arch in ARCHS) + " |"]
        lines += ["|---|" + "---|" * len(ARCHS), *map(row, listed)]
        lines += [f"\n{case.name} spills: {case.spills}" for case in listed if case.spills]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(page())
    sys.stdout.write(f"{TABLE.name} written\n")
