"""Every Triton kernel compiles for every GPU we name, and needs there what kernels/RESOURCES.md says."""

import re

import pytest

pytest.importorskip("triton", reason="needs Triton")

import resources  # noqa: E402
from aot import ARCHS, SHARED_LIMIT, triton  # noqa: E402

CASES = [(room, case) for room in resources.ROOMS for case in resources.cases(room)]
# One architecture is enough to see that a kernel compiles and fits after a change; the others take minutes.
ARCHS_BY_SPEED = [arch if arch == 90 else pytest.param(arch, marks=pytest.mark.slow) for arch in ARCHS]


def _committed(room: str, name: str) -> list[str]:
    """The cells of a kernel in the committed table."""
    text = resources.TABLE.read_text().partition(f"\n## {room}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith(f"| {name} |")]
    assert len(rows) == 1, f"{resources.TABLE.name} has {len(rows)} rows for {room}, {name}"
    return rows[0][1:]


@pytest.mark.parametrize("arch", ARCHS_BY_SPEED)
@pytest.mark.parametrize("room, case", CASES, ids=[f"{room}: {case.name}" for room, case in CASES])
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
