"""What `unif2ace init` is told, and the config of the model that comes of it; every wrong key is named."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from unif2ace import settings
from unif2ace.configs import NESTED, UniF2aceConfig, VocabularyConfig
from unif2ace.data.config import DataConfig, SetConfig
from unif2ace.data.encode import FRAMES
from unif2ace.errors import UserError
from unif2ace.importers.assemble import LATENTS
from unif2ace.importers.parts import DTYPES
from unif2ace.model.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.settings import typed
from unif2ace.training.tokenizer import TokenizerRecipe

SIZES = ("tiny", "base")


@dataclass(frozen=True)
class TextConfig:
    """Attributes:
    path: a tokenizer.json, or a folder that has one (a checkpoint, an import), to take; None: one is learned.
    size: most tokens to learn.
    samples: of the sets, how many words are read from at most.
    """

    path: str | None = None
    size: int = 1024
    samples: int = 100_000


@dataclass(frozen=True)
class ImagesConfig:
    """Attributes:
    path: folder of a checkpoint or of an import whose image tokenizer is taken; None: one is trained.
    sizes: of one that is trained.
    training: its recipe.
    pictures: pictures that it is trained on, at most; they are held in memory.
    held_out: pictures kept from training to measure on; a tenth of all at most.
    """

    path: str | None = None
    sizes: ImageTokenizerConfig = ImageTokenizerConfig()
    training: TokenizerRecipe = TokenizerRecipe()
    pictures: int = 10_000
    held_out: int = 256


@dataclass(frozen=True)
class InitConfig:
    """Attributes:
    sets: where words and pictures come from.
    out: folder of the run; the checkpoint is its folder `checkpoint`.
    frame: `face`: the largest face of a picture is found and brought into the frame; `square`: the picture's middle.
    text_tokenizer, image_tokenizer: taken, or made from the sets.
    identity: encoder of `unif2ace.encoders` that the model is to have identity features of; None: none.
    semantic: likewise for semantic features; `image_tokenizer`: its latents.
    describe: the request that captions answer.
    model: `size`, tiny or base, and any keys of UniF2aceConfig over it that do not follow from the rest.
    dtype: of the written weights.
    max_corrupt: samples that cannot be read are passed over up to this many, then it stops.
    device: where an image tokenizer is trained.
    seed: of all that is drawn.
    """

    sets: tuple[SetConfig, ...]
    out: str
    frame: str = "face"
    text_tokenizer: TextConfig = TextConfig()
    image_tokenizer: ImagesConfig = ImagesConfig()
    identity: str | None = "sface"
    semantic: str | None = LATENTS
    describe: str = DataConfig().describe[0]
    model: dict[str, Any] = field(default_factory=dict)
    dtype: str = "float32"
    max_corrupt: int = 100
    device: str = "cpu"
    seed: int = 0

    def check(self) -> InitConfig:
        """The config itself.

        Raises:
            UserError: a value is not possible; the message names its key.
        """
        need = partial(settings.need, self)
        need(len(self.sets) > 0, "sets", "at least one set")
        need(self.frame in FRAMES, "frame", f"one of {', '.join(FRAMES)}")
        need(self.dtype in DTYPES, "dtype", f"one of {', '.join(DTYPES)}")
        text, images = self.text_tokenizer, self.image_tokenizer
        for key, got, least in (
            ("text_tokenizer.size", text.size, 257),  # the end of text and every byte
            ("text_tokenizer.samples", text.samples, 1),
            ("image_tokenizer.pictures", images.pictures, 1),
            ("image_tokenizer.held_out", images.held_out, 1),
            ("image_tokenizer.sizes.bits", images.sizes.bits, 1),
            ("image_tokenizer.sizes.blocks", images.sizes.blocks, 0),
            ("image_tokenizer.training.steps", images.training.steps, 1),
            ("image_tokenizer.training.batch", images.training.batch, 1),
            ("max_corrupt", self.max_corrupt, 0),
            ("seed", self.seed, 0),
        ):
            need(got >= least, key, f"at least {least}")
        if images.path is None:
            try:
                with torch.device("meta"):
                    ImageTokenizer(images.sizes)
            except ValueError as error:
                raise UserError(f"image_tokenizer.sizes.{error}") from error
        # Whatever the tokenizers will be: a mistake in a size is told before they are trained.
        channels = {name: 8 for name in ("identity", "semantic") if getattr(self, name) is not None}
        build_config(self.model, VocabularyConfig(300, 16), image_tokens=4, **channels)
        return self


def build_config(given: dict[str, Any], vocabulary: VocabularyConfig, **follows: Any) -> UniF2aceConfig:
    """The config of `given["size"]` with the other keys of `given` over it, and what follows from the other parts.

    Raises:
        UserError: a key that there is not, that follows from the rest or whose value cannot be; it is named.
    """
    values = dict(given)
    size = values.pop("size", SIZES[0])
    if size not in SIZES:
        raise UserError(f"model.size: expected one of {', '.join(SIZES)}, got {size!r}")
    start = UniF2aceConfig.tiny(vocabulary) if size == "tiny" else UniF2aceConfig.base(vocabulary=vocabulary)
    fixed = {"vocabulary", "image_tokens", "image_tokenizer", "eos_token_id", "semantic_source", *follows}
    hints = {k: hint for k, hint in inspect.get_annotations(UniF2aceConfig, eval_str=True).items() if k not in fixed}
    changes: dict[str, Any] = {}
    for key, value in values.items():
        if key in fixed:
            raise UserError(f"model.{key}: it follows from the tokenizers and encoders; leave it out")
        if key not in hints:
            close = difflib.get_close_matches(str(key), hints, n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are: size, {', '.join(hints)}"
            raise UserError(f"model.{key}: there is no such key; {hint}")
        if key in NESTED and isinstance(value, dict) and getattr(start, key) is not None:
            value = dataclasses.asdict(getattr(start, key)) | value
        changes[key] = typed(hints[key], value, f"model.{key}")
    try:
        made = start.replace(**changes, **follows)
        with torch.device("meta"):
            UniF2aceForConditionalGeneration(made)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"model.{reason.removeprefix('config.')}") from error
    return made
