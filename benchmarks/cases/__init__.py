"""Every benchmark case: the ops', and the model's where what it is built on is installed."""

import importlib.util

from ..case import Case
from ..environment import MODEL_NEEDS, not_found
from . import d3diff, moe, random, sampling, scaling

CASES: list[Case] = [*moe.CASES, *d3diff.CASES, *sampling.CASES, *random.CASES, *scaling.CASES]

if not not_found(MODEL_NEEDS):
    from . import generation, model, transformers_experts

    CASES += [*model.CASES, *generation.CASES, *transformers_experts.CASES]
    if importlib.util.find_spec("cv2") is not None:  # the loader's, which reads pictures
        from . import data

        CASES += data.CASES
