"""Every benchmark case: the ops', and where transformers is installed the model's, which is built on it."""

import importlib.util

from ..case import Case
from . import d3diff, moe, random, sampling, scaling

CASES: list[Case] = [*moe.CASES, *d3diff.CASES, *sampling.CASES, *random.CASES, *scaling.CASES]

if importlib.util.find_spec("transformers") is not None:
    from . import generation, model, transformers_experts

    CASES += [*model.CASES, *generation.CASES, *transformers_experts.CASES]
    if importlib.util.find_spec("cv2") is not None:  # the loader's, which reads pictures
        from . import data

        CASES += data.CASES
