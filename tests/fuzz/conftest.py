"""How long hypothesis looks: a few seconds an op with fixed examples, or (make fuzz) with ever new ones.

The profile is the environment's UNIF2ACE_FUZZ, "quick" unless it says "long".
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("hypothesis", reason="needs hypothesis")

from hypothesis import HealthCheck, settings  # noqa: E402

from unif2ace_kernels import _library  # noqa: E402

# The fixtures that every test has (seeds, NaN in new memory) need no fresh start for each example.
_COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}
settings.register_profile("quick", max_examples=15, derandomize=True, database=None, **_COMMON)
settings.register_profile("long", max_examples=400, **_COMMON)
settings.load_profile(os.environ.get("UNIF2ACE_FUZZ", "quick"))


@pytest.fixture(params=["c++", "torch"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every op that has an implementation of this name for the CPU runs it inside the test."""
    name = request.param
    if name == "c++" and _library.EXTENSION_MISSING is not None:
        pytest.skip(f"extension not built: {_library.EXTENSION_MISSING}")
    with torch.library._scoped_library("unif2ace", "IMPL") as library, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that an implementation takes another's place is the point
        for op in _library.registered_ops():
            for each in _library.runnable(op, "cpu"):
                if each.name == name:
                    library.impl(op, each.function, "CPU")
        yield name
