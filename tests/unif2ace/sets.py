"""Small sets of pictures with words, and a quick image tokenizer and encoder: what the tests of data share."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import tiny
import torch
from PIL import Image
from quick import CODE_BITS, CODES, job
from safetensors.torch import save_file

from unif2ace.configs import VocabularyConfig
from unif2ace.data.base import Source
from unif2ace.data.config import DataConfig, MixConfig, SetConfig
from unif2ace.data.precompute import precompute
from unif2ace.data.sources import open_source
from unif2ace.model.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from unif2ace.model.image_tokenizers import describe_image_tokenizer
from unif2ace.model.text_tokenizer import TextTokenizer

WORDS = ("a face with dark hair", "a person, big smile", "portrait, soft light", "a face", "bright green background")


def picture(number: int, side: int = 12) -> np.ndarray:
    """Of its own for every number."""
    return np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, format="PNG")
    return file.getvalue()


def record(number: int) -> dict:
    """A LLaVA record with a caption beside it; some have two turns, some one."""
    turns = [
        {"from": "human", "value": f"<image>\nwhich face is this, {number}?"},
        {"from": "gpt", "value": f"the face {number}"},
        {"from": "human", "value": "and the hair?"},
        {"from": "gpt", "value": "dark hair"},
    ]
    return {
        "id": f"face-{number}",
        "image": f"{number}.png",
        "caption": f"{WORDS[number % 5]} {number}",
        "conversations": turns[: 4 if number % 3 else 2],
    }


def llava(folder: Path, count: int, first: int = 0) -> Path:
    """faces.json and its pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        (folder / f"{number}.png").write_bytes(png(picture(number)))
    path = folder / "faces.json"
    path.write_text(json.dumps([record(number) for number in range(first, first + count)]))
    return path


def open_raw(path: Path) -> Source:
    return open_source(SetConfig(str(path)), "set")


def saved_tokenizer(folder: Path) -> tuple[Path, ImageTokenizer]:
    """A small image tokenizer with a config.json and weights, as an import leaves one."""
    torch.manual_seed(0)
    tokenizer = ImageTokenizer(ImageTokenizerConfig(side=16, bits=CODE_BITS, fine=8, coarse=8, blocks=1))
    save_file({f"image_tokenizer.{k}": v for k, v in tokenizer.state_dict().items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"image_tokenizer": describe_image_tokenizer(tokenizer)}))
    return folder, tokenizer


def shards(folder: Path, count: int = 23, **changes) -> Path:
    """`count` samples precomputed."""
    out = folder / "shards"
    precompute(job(llava(folder / "raw", count), out, **changes), progress=False)
    return out


def text() -> TextTokenizer:
    return tiny.text_tokenizer()


def model(text: TextTokenizer, **changes):
    """A model that reads these samples."""
    vocabulary = VocabularyConfig(text.size, 2**CODE_BITS)
    return tiny.config(vocabulary=vocabulary, image_tokens=CODES, text_slots=24, identity=6, semantic=5, **changes)


def config(*sets: SetConfig, **changes) -> DataConfig:
    values = {"batch": 6, "mix": MixConfig(3, 2, 0), "seed": 5, **changes}
    return DataConfig(sets=sets, **values)


def same(a, b) -> bool:
    """Whether two batches are bitwise the same."""
    pairs = [(getattr(a, each.name), getattr(b, each.name)) for each in dataclasses.fields(a)]
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)
