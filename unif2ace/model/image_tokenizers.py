"""The image tokenizers that a model may carry, by the kind that its config names."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from unif2ace.model.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from unif2ace.model.magvit import Magvit, MagvitConfig

IMAGE_TOKENIZERS: dict[str, tuple[type, Any]] = {
    "lfq": (ImageTokenizer, lambda sizes: ImageTokenizerConfig(**sizes)),
    "magvit": (Magvit, MagvitConfig.from_dict),
}

LARGEST_SIZE = 4096  # of sides, channels, and blocks, each of which is built before a weight is read


def build_image_tokenizer(described: dict[str, Any]) -> ImageTokenizer | Magvit:
    """An image tokenizer from a config's `image_tokenizer`.

    Raises:
        ValueError: of an unknown kind, or sizes that are not its.
    """
    sizes = dict(described)
    kind = sizes.pop("kind", None)
    if kind not in IMAGE_TOKENIZERS:
        raise ValueError(f"config.image_tokenizer: expected a kind of {sorted(IMAGE_TOKENIZERS)}, got {kind!r}")
    tokenizer, config = IMAGE_TOKENIZERS[kind]
    if _largest(sizes) > LARGEST_SIZE:
        raise ValueError(f"config.image_tokenizer: expected sizes of at most {LARGEST_SIZE}, got {_largest(sizes)}")
    try:
        return tokenizer(config(sizes))
    except (AttributeError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"config.image_tokenizer: {error}") from error


def _largest(value: Any) -> float:
    """The largest number in nested lists and dicts."""
    if isinstance(value, (dict, list, tuple)):
        return max(map(_largest, value.values() if isinstance(value, dict) else value), default=0)
    return value if isinstance(value, (int, float)) else 0


def describe_image_tokenizer(tokenizer: ImageTokenizer | Magvit) -> dict[str, Any]:
    """The inverse of `build_image_tokenizer`."""
    kind = next(kind for kind, (each, _) in IMAGE_TOKENIZERS.items() if type(tokenizer) is each)
    return json.loads(json.dumps({"kind": kind, **dataclasses.asdict(tokenizer.config)}))
