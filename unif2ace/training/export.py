"""A state of a run as a checkpoint that everything else reads: safetensors, config, processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from unif2ace.checkpoint import Checkpoint
from unif2ace.errors import UserError
from unif2ace.files import digest, read_json, write_json
from unif2ace.training import states
from unif2ace.training.config import TrainConfig

FOLDER = "checkpoint"
ORIGIN = "training.json"  # in a checkpoint: the state that it is of


def export(config: TrainConfig, folder: Path, step: int | None = None, out: Path | None = None) -> Path:
    """Write the model of a state, the average of its weights where the run keeps one; in one process, on the CPU.

    Args:
        folder: of the states. step: which one; the newest when None.
        out: the checkpoint's folder; RUN/checkpoint when None.

    Raises:
        UserError: there is no such state, or it cannot be read or written.
    """
    with states.reading(folder, step) as state:
        checkpoint = Checkpoint.load(Path(config.checkpoint))
        model = checkpoint.model.float()
        kind = "ema" if config.ema else "model"
        tensors = {
            f"{kind}.{name}": torch.empty_like(each)
            for name, each in model.named_parameters() if not name.startswith("image_tokenizer.")
        }  # fmt: skip
        states.load(state, tensors)
        origin = _origin(config, state)
    model.load_state_dict({name.removeprefix(f"{kind}."): each for name, each in tensors.items()}, strict=False)
    out = config.folder / FOLDER if out is None else out
    checkpoint.save(out)
    write_json(out / ORIGIN, origin)
    return out


def exported(config: TrainConfig, state: Path) -> bool:
    """Whether RUN/checkpoint is of this state already."""
    path = config.folder / FOLDER / ORIGIN
    try:
        return path.exists() and read_json(path) == _origin(config, state)
    except UserError:  # what cannot be read is written again
        return False


def _origin(config: TrainConfig, state: Path) -> dict[str, Any]:
    weights = "average" if config.ema else "trained"
    return {"step": states.number(state), "weights": weights, "state": digest((state / states.RUN).read_bytes())}
