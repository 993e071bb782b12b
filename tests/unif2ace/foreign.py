"""Weights in other projects' names, drawn from each tensor's name: they need no file and are the same anywhere."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import numpy as np
import torch

NUMBERS = Path(__file__).parent / "numbers"


def drawn(name: str, shape) -> torch.Tensor:
    """float32: scales about 1, biases and shifts about 0, matrices that keep the size of what they turn."""
    # RandomState's stream is frozen: every numpy gives the same.
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
    if len(shape) > 1:
        values /= np.prod(shape[1:]) ** 0.5
    elif "norm" in name and name.endswith("weight"):
        values = 1 + 0.2 * values
    else:
        values *= 0.1
    return torch.from_numpy(values).float()


def tensors(shapes: dict) -> dict[str, torch.Tensor]:
    return {name: drawn(name, shape) for name, shape in shapes.items()}


def numbers(name: str) -> dict:
    """What the real code computed; see numbers/make.py."""
    return json.loads((NUMBERS / f"{name}.json").read_text())


def load_model(folder):
    """An imported transformer, float32, in evaluation mode."""
    from unif2ace.checkpoint import read_model  # numbers/make.py has no need of it
    from unif2ace.importers.parts import model_config

    return read_model(Path(folder), model_config(folder), torch.float32).eval()


def logits(model, batch) -> torch.Tensor:
    """[B, L, V] of our model, in its dtype."""
    given = {name: value for name, value in vars(batch).items() if name != "labels" and value is not None}
    given |= {name: value.to(model.dtype) for name, value in given.items() if value.is_floating_point()}
    with torch.no_grad():
        return model(**given).logits
