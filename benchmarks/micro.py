"""The smallest calls of every op under pytest-benchmark: what one call costs when there is next to nothing to do.

python -m pytest benchmarks/micro.py [--benchmark-compare] [--benchmark-disable] [-k moe]
"""

from __future__ import annotations

import pytest
import torch

from .case import OURS
from .cases import CASES

SMALLEST = [case for case in CASES if case.smoke and case.dtype in (torch.float32, torch.int64)]


@pytest.mark.parametrize("case", SMALLEST, ids=lambda case: case.name)
def test_micro(case, benchmark) -> None:
    """Ours at the tiny shape, checked once against float64."""
    torch.manual_seed(0)
    work = case.build(torch.device("cpu"))
    benchmark.group, benchmark.extra_info["contender"] = case.op, OURS
    outputs = benchmark(work.ours)
    assert work.error(outputs) <= work.tolerance
