"""Imported parts in folders of their own.

A transformer is written as transformers writes it (config.json, model.safetensors or shards), with its tokenizer.json
where it came with one: `from_pretrained` reads it. An image tokenizer has its sizes in config.json under
`image_tokenizer`, and its weights' names begin with that.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TypeAlias, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from unif2ace.checkpoint import CONFIG, TEXT, WEIGHTS, quiet, read_config
from unif2ace.configs import UniF2aceConfig
from unif2ace.errors import UserError
from unif2ace.files import read_json, write_json
from unif2ace.importers.weights import Weights
from unif2ace.model.image_tokenizers import build_image_tokenizer, describe_image_tokenizer
from unif2ace.model.magvit import Magvit
from unif2ace.model.modeling import UniF2aceForConditionalGeneration

Part: TypeAlias = UniF2aceForConditionalGeneration | Magvit
FORMAT = 2  # of an image tokenizer's config.json
IMAGES = "image_tokenizer"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def can_write(folder: Path) -> None:
    """Fail before the work, not after it.

    Raises:
        UserError: there is something at `folder` already.
    """
    if Path(folder).exists():
        raise UserError(f"{folder} exists: name a new folder, or remove it first")


def save(part: Part, folder: Path, dtype: str = "float32", text: Path | None = None) -> None:
    """Write the folder, whole or not at all.

    Args:
        text: a tokenizer.json that goes along.

    Raises:
        UserError: it exists, or the file system refuses.
    """
    folder = Path(folder)
    can_write(folder)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        if isinstance(part, UniF2aceForConditionalGeneration):
            with quiet():
                torch.nn.Module.to(part, DTYPES[dtype])
                part.save_pretrained(partial)
        else:
            tensors = {f"{IMAGES}.{key}": v.to(DTYPES[dtype]).contiguous() for key, v in part.state_dict().items()}
            save_file(tensors, partial / WEIGHTS)
            write_json(partial / CONFIG, {"format": FORMAT, IMAGES: describe_image_tokenizer(part)})
        if text is not None:
            shutil.copyfile(text, partial / TEXT)
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {folder}: {error}; free space or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def load_image_tokenizer(folder: Path) -> Magvit:
    """The image tokenizer that `save` wrote.

    Raises:
        UserError: the folder or a file of it is missing, damaged or of another part.
    """
    described = _config(folder)
    if IMAGES not in described or "model_type" in described:
        what = "a model" if "model_type" in described else ", ".join(sorted(described)) or "nothing"
        raise UserError(f"{folder} holds no {IMAGES} of its own: it has {what}")
    if described.get("format") != FORMAT:
        raise UserError(f"{Path(folder) / CONFIG} has format {described.get('format')}, this version reads {FORMAT}")
    sizes = described[IMAGES]
    if not isinstance(sizes, dict) or sizes.get("kind") != "magvit":
        raise UserError(f"{folder} holds another image tokenizer than MAGVIT-v2: load it as a checkpoint")
    try:
        tokenizer = cast(Magvit, build_image_tokenizer(sizes))
    except ValueError as error:
        raise UserError(f"{Path(folder) / CONFIG} does not describe an image tokenizer: {error}") from error
    weights = Weights(Path(folder) / WEIGHTS)
    wanted = {f"{IMAGES}.{name}": tuple(value.shape) for name, value in tokenizer.state_dict().items()}
    weights.check(wanted, f"the {IMAGES} that {CONFIG} describes")
    with torch.no_grad():
        for name, value in tokenizer.state_dict().items():
            value.copy_(weights[f"{IMAGES}.{name}"])
    return tokenizer.eval()


def model_config(folder: Path) -> UniF2aceConfig:
    """What config.json says of the transformer.

    Raises:
        UserError: no folder, no config, of something else or of no model that could be built.
    """
    described = _config(folder)
    if "model_type" not in described and IMAGES in described:
        raise UserError(f"{folder} holds no model: it has {IMAGES}")
    return read_config(Path(folder))


def _config(folder: Path) -> dict:
    path = Path(folder) / CONFIG
    if not Path(folder).is_dir():
        raise UserError(f"there is no folder {folder}: run `unif2ace import` or name another")
    described = read_json(path)
    if not isinstance(described, dict):
        raise UserError(f"{path} describes nothing: copy the whole folder again")
    return described
