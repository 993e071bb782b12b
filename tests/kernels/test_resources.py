"""Every Triton kernel compiles for every GPU we name, and needs there what kernels/RESOURCES.md says."""

import re

import pytest

pytest.importorskip("triton", reason="needs Triton")

import resources  # noqa: E402
from aot import ARCHS, SHARED_LIMIT, triton  # noqa: E402

CASES = [(room, case) for room in resources.ROOMS for case in resources.cases(room)]


def _runs():
    """Every kernel at every size on every architecture; one of each kernel's on sm_90 is not slow.

    That is enough to see that a kernel still compiles and fits after a change; compiling all of them takes minutes.
    """
    seen = set()
    for room, case in CASES:
        for arch in ARCHS:
            is_first = arch == 90 and case.kernel not in seen
            marks = () if is_first else (pytest.mark.slow,)
            yield pytest.param(room, case, arch, marks=marks, id=f"{room}: {case.name}-{arch}")
        seen.add(case.kernel)


def _committed(room: str, name: str) -> list[str]:
    """The cells of a kernel in the committed table."""
    text = resources.TABLE.read_text().partition(f"\n## {room}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith(f"| {name} |")]
    assert len(rows) == 1, f"{resources.TABLE.name} has {len(rows)} rows for {room}, {name}"
    return rows[0][1:]


@pytest.mark.parametrize("room, case, arch", list(_runs()))
def test_needs_what_the_table_says(room, case, arch):
    report = case.compile(arch)
    assert (report.spill_bytes > 0) == (case.spills is not None)
    assert report.shared_bytes <= SHARED_LIMIT[arch]
    assert 0 < report.registers < 256
    assert f"sm_{arch}" in report.ptx
    if f"that Triton {triton.__version__}\n" in resources.TABLE.read_text():
        assert _committed(room, case.name)[ARCHS.index(arch)] == resources.cell(report)


def test_the_table_has_no_other_kernels():
    rows = re.findall(r"^\| (?!kernel |---)", resources.TABLE.read_text(), re.MULTILINE)
    assert len(rows) == len(CASES)
