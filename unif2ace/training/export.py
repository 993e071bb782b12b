"""A state of a run as a checkpoint that everything else reads: safetensors, config, processor."""

from __future__ import annotations

from pathlib import Path

import torch

from unif2ace.checkpoint import Checkpoint
from unif2ace.errors import UserError
from unif2ace.training import states
from unif2ace.training.config import TrainConfig

FOLDER = "checkpoint"


def export(config: TrainConfig, folder: Path, step: int | None = None, out: Path | None = None) -> Path:
    """Write the model of a state, the average of its weights where the run keeps one; in one process, on the CPU.

    Args:
        folder: of the states. step: which one; the newest when None.
        out: the checkpoint's folder; RUN/checkpoint when None.

    Raises:
        UserError: there is no such state, or it cannot be read or written.
    """
    found = {states.number(each): each for each in states.listed(folder)}
    if not found or (step is not None and step not in found):
        there = ", ".join(map(str, found)) or "none"
        raise UserError(f"{folder} has no state {'' if step is None else f'before step {step}'}; there are: {there}")
    state = found[max(found) if step is None else step]
    checkpoint = Checkpoint.load(Path(config.checkpoint))
    model = checkpoint.model.float()
    kind = "ema" if config.ema else "model"
    tensors = {
        f"{kind}.{name}": torch.empty_like(each)
        for name, each in model.named_parameters() if not name.startswith("image_tokenizer.")
    }  # fmt: skip
    states.load(state, tensors)
    model.load_state_dict({name.removeprefix(f"{kind}."): each for name, each in tensors.items()}, strict=False)
    out = config.folder / FOLDER if out is None else out
    checkpoint.save(out)
    return out
