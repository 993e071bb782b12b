"""Imported parts joined into one checkpoint that paints and answers: each is held against the others first."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from unif2ace.checkpoint import Checkpoint, read_model
from unif2ace.encoders import IDENTITY, LATENTS, SEMANTIC, Encoder, encoder
from unif2ace.errors import UserError
from unif2ace.importers.parts import DTYPES, can_write, load_image_tokenizer, model_config
from unif2ace.importers.texts import load_text_tokenizer


def assemble(
    model: Path,
    images: Path,
    text: Path | None,
    out: Path,
    *,
    semantic: str | None = None,
    identity: str | None = None,
    dtype: str = "float32",
) -> list[str]:
    """Join parts into one checkpoint, which `unif2ace generate` and `from_pretrained` read.

    Args:
        model: folder of an imported transformer. images: of an imported image tokenizer.
        text: a tokenizer.json or its folder; None where the model's folder has one.
        semantic: `clip:PATH`, `open-clip:PATH`, or `image_tokenizer` for its latents.
        identity: `antelopev2:PATH`, `arcface-mbf` or `sface`. An encoder is opened, and held against the model; its
            name and folder go into the checkpoint, its weights do not.

    Returns:
        Lines that say what it was made of.

    Raises:
        UserError: a part is missing or damaged, or does not fit the others; nothing is written.
    """
    can_write(out)
    config = model_config(model)
    words = load_text_tokenizer(model if text is None else text)
    _same(config.vocabulary.text, words.size, "text tokens", f"the tokenizer at {text or model}")
    if not words.end < config.vocabulary.text:
        raise UserError(f"{text or model}: the end-of-text token is {words.end}, past the model's text tokens")
    grid = math.isqrt(config.image_tokens)
    _same(config.image_tokens, grid * grid, "image tokens", "the next square of them is")
    pictures = load_image_tokenizer(images)
    own = pictures.config = dataclasses.replace(pictures.config, side=grid * pictures.config.patch)
    _same(config.vocabulary.codes, own.codes, "image codes", f"the image tokenizer at {images}")
    encoders = {}
    for kind, name in (("semantic", semantic), ("identity", identity)):
        if name is None:
            continue
        latents = kind == "semantic" and name == LATENTS
        channels = own.bits if latents else open_encoder(kind, name, f"--{kind}").channels
        _same(getattr(config, kind), channels, f"channels of {kind} features", name, f"import with --{kind} {channels}")
        encoders[kind] = name if latents else absolute(name)
    loaded = read_model(Path(model), config, DTYPES[dtype])
    if semantic is not None:
        loaded.config.semantic_source = "image_tokenizer" if semantic == LATENTS else "clip"
    Checkpoint.of(loaded, pictures.to(DTYPES[dtype]), words, encoders=encoders).save(out)
    return [
        f"model: {model}, {config.num_hidden_layers} layers, {config.vocabulary.size} rows of vocabulary",
        f"image tokenizer: {images}, {own.codes} codes, pictures of {pictures.config.side} x {pictures.config.side}",
        f"text tokenizer: {text or model}, {words.size} tokens",
        *(f"{kind} encoder: {name}" for kind, name in encoders.items()),
        *([] if len(encoders) == 2 else ["without both encoders it answers no questions on pictures"]),
    ]


def open_encoder(kind: str, name: str, where: str) -> Encoder:
    """The semantic or the identity encoder of that name; `where` names the option.

    Raises:
        UserError: there is none, or it cannot be opened.
    """
    known = SEMANTIC if kind == "semantic" else IDENTITY
    if name.partition(":")[0] not in known:
        more = f", {LATENTS}" if kind == "semantic" else ""
        raise UserError(f"{where}: expected one of {', '.join(known)}{more}, with :PATH where it has one, got {name!r}")
    return encoder(name)


def absolute(name: str) -> str:
    """An encoder's name, its folder as it is found from anywhere."""
    kind, _, path = name.partition(":")
    return f"{kind}:{Path(path).resolve()}" if path else kind


def _same(wanted: int, found: int, what: str, where: str, remedy: str = "") -> None:
    if wanted != found:
        raise UserError(f"the model has {wanted} {what}, {where} {found}: {remedy or 'they are not of one model'}")
