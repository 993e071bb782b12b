"""One imported part of a model in one folder, laid out as in a checkpoint: config.json and model.safetensors.

A part is the transformer (`model`) or the image tokenizer (`image_tokenizer`): its sizes stand in config.json under its
name, and its weights' names begin with it.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from unif2ace.checkpoint import CONFIG, FORMAT, WEIGHTS
from unif2ace.configs import ModelConfig
from unif2ace.errors import UserError
from unif2ace.files import read_json, write_json
from unif2ace.importers.weights import Weights
from unif2ace.model.magvit import Magvit, MagvitConfig
from unif2ace.model.transformer import UniF2ace

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def can_write(folder: Path) -> None:
    """Fail before the work, not after it.

    Raises:
        UserError: there is something at `folder` already.
    """
    if Path(folder).exists():
        raise UserError(f"{folder} exists: name a new folder, or remove it first")


def save(part: UniF2ace | Magvit, folder: Path, dtype: str = "float32") -> None:
    """Write the folder, whole or not at all.

    Raises:
        UserError: it exists, or the file system refuses.
    """
    folder = Path(folder)
    can_write(folder)
    name = "model" if isinstance(part, UniF2ace) else "image_tokenizer"
    sizes = (
        part.config.to_dict() if isinstance(part, UniF2ace) else {"kind": "magvit", **dataclasses.asdict(part.config)}
    )
    tensors = {f"{name}.{key}": value.to(DTYPES[dtype]).contiguous() for key, value in part.state_dict().items()}
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        save_file(tensors, partial / WEIGHTS)
        write_json(partial / CONFIG, {"format": FORMAT, name: sizes})
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}; free space or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_model(folder: Path) -> UniF2ace:
    """The transformer that `save` wrote, float32, in evaluation mode.

    Raises:
        UserError: the folder or a file of it is missing, damaged or of another model.
    """
    return _fill(UniF2ace(model_config(folder)), folder, "model")


def load_image_tokenizer(folder: Path) -> Magvit:
    """The image tokenizer that `save` wrote; see `load_model`."""
    sizes = _sizes(folder, "image_tokenizer")
    if sizes.pop("kind", None) != "magvit":
        raise UserError(f"{folder} holds another image tokenizer than MAGVIT-v2: load it as a checkpoint")
    try:
        tokenizer = Magvit(MagvitConfig.from_dict(sizes))
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise UserError(f"{Path(folder) / CONFIG} does not describe an image tokenizer: {error}") from error
    return _fill(tokenizer, folder, "image_tokenizer")


def model_config(folder: Path) -> ModelConfig:
    """What config.json says of the transformer.

    Raises:
        UserError: no folder, no config, of another format or of no model that could be built.
    """
    try:
        config = ModelConfig.from_dict(_sizes(folder, "model"))
        with torch.device("meta"):
            UniF2ace(config)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{Path(folder) / CONFIG} does not describe a model: {error}") from error
    return config


def _sizes(folder: Path, part: str) -> dict:
    path = Path(folder) / CONFIG
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}: run `unif2ace import` or name another")
    config = read_json(path)
    found = config.get("format") if isinstance(config, dict) else None
    if found != FORMAT:
        raise UserError(f"{path} has format {found}, this version reads {FORMAT}")
    if not isinstance(config.get(part), dict):
        raise UserError(f"{folder} holds no {part}: it has {', '.join(sorted(set(config) - {'format'})) or 'nothing'}")
    return dict(config[part])


def _fill(module: nn.Module, folder: Path, part: str):
    weights = Weights(Path(folder) / WEIGHTS)
    wanted = {f"{part}.{name}": tuple(value.shape) for name, value in module.state_dict().items()}
    weights.check(wanted, f"the {part} that {CONFIG} describes")
    with torch.no_grad():
        for name, value in module.state_dict().items():
            value.copy_(weights[f"{part}.{name}"])
    return module.eval()
