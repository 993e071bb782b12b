"""A trained model in one folder: weights as safetensors, sizes as JSON, the text tokenizer.

config.json            every size
model.safetensors      the transformer and the image tokenizer
text_tokenizer.json
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from unif2ace.configs import ModelConfig
from unif2ace.errors import UserError
from unif2ace.files import read_json, write_json
from unif2ace.model.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from unif2ace.model.text_tokenizer import TextTokenizer
from unif2ace.model.transformer import UniF2ace

FORMAT = 1
CONFIG, WEIGHTS, TEXT = "config.json", "model.safetensors", "text_tokenizer.json"


@dataclass
class Checkpoint:
    """What `unif2ace generate` and `unif2ace ask` need."""

    model: UniF2ace
    image_tokenizer: ImageTokenizer
    text_tokenizer: TextTokenizer

    def save(self, folder: Path) -> None:
        """Write the folder, whole or not at all: beside `folder` first, then in its place.

        Raises:
            UserError: the file system refuses; an older checkpoint at `folder` is untouched.
        """
        folder = Path(folder)
        partial, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("partial", "old"))
        config = {
            "format": FORMAT,
            "model": self.model.config.to_dict(),
            "image_tokenizer": dataclasses.asdict(self.image_tokenizer.config),
        }
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"image_tokenizer.{name}": value for name, value in self.image_tokenizer.state_dict().items()}
        try:
            partial.mkdir(parents=True)
            (partial / WEIGHTS).write_bytes(save({name: value.contiguous() for name, value in tensors.items()}))
            self.text_tokenizer.save(partial / TEXT)
            write_json(partial / CONFIG, config)
            if folder.exists():
                folder.rename(old)
            partial.rename(folder)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot write {folder}: {error}; free space or choose another folder") from error
        finally:
            if old.exists() and not folder.exists():
                old.rename(folder)
            for each in (partial, old):
                shutil.rmtree(each, ignore_errors=True)

    @classmethod
    def load(cls, folder: Path) -> Checkpoint:
        """Read a folder that `save` wrote.

        Raises:
            UserError: it or a file of it is missing, damaged, or of another config than its weights.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError(f"no checkpoint at {folder}: run `unif2ace demo` or name one with --checkpoint")
        config = read_json(folder / CONFIG)
        found = config.get("format") if isinstance(config, dict) else None
        if found != FORMAT:
            raise UserError(f"{folder / CONFIG} has format {found}, this version reads {FORMAT}")
        try:
            model = UniF2ace(ModelConfig.from_dict(config["model"]))
            tokenizer = ImageTokenizer(ImageTokenizerConfig(**config["image_tokenizer"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder / CONFIG} does not describe a model: {error}") from error
        if not (folder / TEXT).is_file():
            raise UserError(f"{folder / TEXT} is missing: copy the whole folder again")
        tensors = _read_weights(folder / WEIGHTS)
        for prefix, module in (("model.", model), ("image_tokenizer.", tokenizer)):
            _fill(module, {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}, folder)
        try:
            text = TextTokenizer.load(folder / TEXT)
        except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
            raise UserError(f"{folder / TEXT} is damaged ({error}): copy it again") from error
        if text.size != model.config.vocabulary.text:
            raise UserError(
                f"{folder}: {CONFIG} and {TEXT} are of different models, {model.config.vocabulary.text} text tokens in "
                f"the one, {text.size} in the other; put all files of one training run together"
            )
        return cls(model.eval(), tokenizer.eval(), text)


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: copy the whole folder again") from error
    except SafetensorError as error:
        raise UserError(f"{path} is truncated or damaged ({error}): copy it again") from error


def _fill(module: nn.Module, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    wanted = module.state_dict()
    for name in sorted(wanted.keys() | tensors.keys()):
        want, have = (tuple(each[name].shape) if name in each else "nothing" for each in (wanted, tensors))
        if want != have:
            raise UserError(
                f"{folder}: {CONFIG} and {WEIGHTS} are of different models: {name} is {want} in the one, {have} in "
                "the other; put both files of one training run together"
            )
    module.load_state_dict(tensors)
