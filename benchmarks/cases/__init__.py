"""Every benchmark case, `CASES`: the ops', and the model's where what it is built on is installed."""

from __future__ import annotations

import functools
from typing import Any

from ..case import Case
from ..environment import MODEL_NEEDS, not_found
from . import d3diff, moe, random, sampling, scaling

_OF_KERNELS = [*moe.CASES, *d3diff.CASES, *sampling.CASES, *random.CASES, *scaling.CASES]
_MODEL_OPS = ("model.", "sampling.generate", "transformers.experts", "data.")  # how the model's begin


@functools.cache
def _of_model() -> list[Case]:
    if not_found(MODEL_NEEDS):
        return []
    from . import generation, model, transformers_experts

    found = [*model.CASES, *generation.CASES, *transformers_experts.CASES]
    if not not_found(["cv2"]):  # the loader's, which reads pictures
        from . import data

        found += data.CASES
    return found


def cases_of(op: str) -> list[Case]:
    """Cases among which are all whose op begins with `op`; the model, which takes seconds, is imported for its own."""
    is_of_model = any(op.startswith(each) or each.startswith(op) for each in _MODEL_OPS)
    return _OF_KERNELS + _of_model() if is_of_model else _OF_KERNELS


def __getattr__(name: str) -> Any:
    if name == "CASES":
        return cases_of("")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
