"""A model and its processor in one folder, as transformers lays it out; whole or not there, and checked on the way in.

config.json, generation_config.json            every size; how text is generated
model.safetensors, or shards and their index   the transformer and its image tokenizer
tokenizer.json, tokenizer_config.json          the text tokenizer
processor_config.json                          sizes of rows, encoders, prompts
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.utils import logging

from unif2ace.auto import UniF2aceConfig, UniF2aceForConditionalGeneration, UniF2aceProcessor
from unif2ace.errors import UserError, first_line
from unif2ace.files import read_json
from unif2ace.importers.weights import Weights
from unif2ace.model.image_tokenizer import ImageTokenizer
from unif2ace.model.magvit import Magvit
from unif2ace.model.text_tokenizer import TextTokenizer
from unif2ace.parsing import reading

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
TEXT, PROCESSOR = "tokenizer.json", "processor_config.json"


@dataclass
class Checkpoint:
    """What painting and answering need."""

    model: UniF2aceForConditionalGeneration
    processor: UniF2aceProcessor

    @classmethod
    def of(
        cls,
        model: UniF2aceForConditionalGeneration,
        images: ImageTokenizer | Magvit,
        text: TextTokenizer,
        **options: Any,
    ) -> Checkpoint:
        """A model with its two tokenizers; `options` are the processor's."""
        model.set_image_tokenizer(images)
        model.config.eos_token_id = model.generation_config.eos_token_id = text.end
        return cls(model, UniF2aceProcessor.of(model.config, text, image_size=images.config.side, **options))

    @property
    def image_tokenizer(self) -> ImageTokenizer | Magvit:
        """The model's.

        Raises:
            UserError: it has none.
        """
        if self.model.image_tokenizer is None:
            raise UserError("this checkpoint has no image tokenizer: import one into it")
        return self.model.image_tokenizer

    @property
    def text_tokenizer(self) -> TextTokenizer:
        return self.processor.text

    def save(self, folder: Path, max_shard_size: str = "5GB") -> None:
        """Write the folder, whole or not at all: beside `folder` first, then in its place.

        Raises:
            UserError: the file system refuses, then an older checkpoint at `folder` is untouched; or what is there is
                no checkpoint of ours, so that nothing else is ever lost to one.
        """
        folder = Path(folder)
        if not _gives_way(folder):
            raise UserError(f"{folder} is there and is no checkpoint: name another folder, or remove it")
        partial, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("partial", "old"))
        try:
            partial.mkdir(parents=True)
            with quiet():
                self.model.save_pretrained(partial, max_shard_size=max_shard_size)
                self.processor.save_pretrained(partial)
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
    def load(cls, folder: Path, device: str = "cpu", dtype: torch.dtype | None = None) -> Checkpoint:
        """Read a folder that `save` wrote, in evaluation mode.

        Args:
            dtype: of the weights; what they were saved in when None.

        Raises:
            UserError: it or a file of it is missing, damaged, or of another config than its weights.
        """
        folder = Path(folder)
        config = read_config(folder)
        processor = _read_processor(folder)
        model = read_model(folder, config, dtype)
        model.to(torch.device(device))  # type: ignore[arg-type]
        text, wanted = processor.text.size, config.vocabulary.text
        if text > wanted:
            raise UserError(
                f"{folder}: {CONFIG} and {TEXT} are of different models, {wanted} text tokens in the one, {text} in "
                "the other; put all files of one training run together"
            )
        return cls(model.eval(), processor)


def _gives_way(folder: Path) -> bool:
    """Whether a checkpoint may take this place: there is nothing, an empty folder, or another checkpoint."""
    if not folder.name or (folder.exists() and not folder.is_dir()):
        return False
    if not folder.exists():
        return True
    path = folder / CONFIG
    if not path.is_file():
        return not any(folder.iterdir())
    with contextlib.suppress(UserError):
        described = read_json(path)
        return isinstance(described, dict) and described.get("model_type") == UniF2aceConfig.model_type
    return False


def read_config(folder: Path) -> UniF2aceConfig:
    """What config.json says of the model.

    Raises:
        UserError: there is no folder or no config, or it describes no model that could be built.
    """
    if not Path(folder).is_dir():
        raise UserError(f"no checkpoint at {folder}: run `unif2ace demo` or name one with --checkpoint")
    path = Path(folder) / CONFIG
    values = read_json(path)
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind != UniF2aceConfig.model_type:
        raise UserError(f"{path} is of a {kind} model, expected {UniF2aceConfig.model_type}")
    try:
        config = UniF2aceConfig.from_dict(values)
        with torch.device("meta"):
            UniF2aceForConditionalGeneration(config)
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} does not describe a model: {first_line(error)}") from error
    return config


def read_model(folder: Path, config: UniF2aceConfig, dtype: torch.dtype | None) -> UniF2aceForConditionalGeneration:
    files = [folder / name for name in (WEIGHTS, INDEX) if (folder / name).is_file()]
    if not files:
        raise UserError(f"{folder / WEIGHTS} is missing: copy the whole folder again")
    if not isinstance(read_json(folder / GENERATION) if (folder / GENERATION).exists() else {}, dict):
        raise UserError(f"{folder / GENERATION} is damaged: copy it again")
    # Shapes first: a config that asks for more than memory holds is told, not tried.
    have = Weights(files[0]).shapes
    with torch.device("meta"):
        want = {name: tuple(each.shape) for name, each in UniF2aceForConditionalGeneration(config).state_dict().items()}
    for name in [*sorted(want), *sorted(have.keys() - want.keys())]:
        if have.get(name) != want.get(name):
            _of_different_models(folder, name, want.get(name, "nothing"), have.get(name, "nothing"))
    with reading(folder / WEIGHTS, "weights of this model"), quiet():
        return UniF2aceForConditionalGeneration.from_pretrained(
            folder, config=config, dtype=dtype or "auto", local_files_only=True, use_safetensors=True
        )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars and warnings."""
    bars, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _of_different_models(folder: Path, name: str, want: object, have: object) -> None:
    raise UserError(
        f"{folder}: {CONFIG} and {WEIGHTS} are of different models: {name} is {want} in the one, {have} in the other; "
        "put both files of one training run together"
    )


def _read_processor(folder: Path) -> UniF2aceProcessor:
    for name in (TEXT, PROCESSOR):
        if not (folder / name).is_file():
            raise UserError(f"{folder / name} is missing: copy the whole folder again")
    read_json(folder / PROCESSOR)
    with reading(folder / TEXT, "tokenizer"):
        return UniF2aceProcessor.from_pretrained(folder, local_files_only=True)
