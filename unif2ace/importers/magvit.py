"""Show-o's image tokenizer (showlab/magvitv2) to ours, by its public state-dict names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from unif2ace.errors import UserError
from unif2ace.importers.weights import Weights
from unif2ace.model.magvit import Down, Magvit, MagvitConfig, Residual, SelfAttention, Up

LICENCE = "MIT (as published at showlab/magvitv2)"


def import_magvit(path: Path | Weights, config: MagvitConfig | None = None) -> tuple[Magvit, list[str]]:
    """Read a MAGVIT-v2 of `config` (Show-o's sizes where none is given).

    Returns:
        The tokenizer, and lines that say what went where.

    Raises:
        UserError: it is not one, whole and of these sizes, or its codes are numbered otherwise.
    """
    weights = Weights.of(path)
    tokenizer = Magvit(config or MagvitConfig()).eval()
    powers, embedding = "quantize.power_vals", "quantize.embedding"
    sources = dict(_sources(tokenizer))
    values = tokenizer.state_dict()
    shapes: dict[str, tuple[int, ...]] = {
        powers: (tokenizer.config.bits,),
        embedding: (tokenizer.config.codes, tokenizer.config.bits),
    }
    for name, theirs in sources.items():
        rows, *rest = values[name].shape
        square = [1, 1] if values[name].dim() == 2 else []  # their attention is 1 x 1 convolutions
        shapes |= dict.fromkeys(theirs, (rows // len(theirs), *rest, *square))
    weights.check(shapes, "a MAGVIT-v2 of these sizes")
    every = torch.arange(tokenizer.config.codes)
    if not (
        torch.equal(weights[powers], tokenizer.powers)
        and torch.equal(weights[embedding].float(), tokenizer.code_signs(every))
    ):
        raise UserError(
            f"{weights.path}: its codes are numbered in another way than Show-o's: it cannot be used with one"
        )
    for name, theirs in sources.items():
        values[name].copy_(torch.cat([weights[each] for each in theirs]).view_as(values[name]))
    count = sum(value.numel() for value in values.values())
    placed = f"placed: {len(shapes)} tensors, {count:,} parameters"
    return tokenizer, [f"licence: {weights.licence(LICENCE)}", *weights.checked, placed]


def _sources(tokenizer: Magvit) -> Iterator[tuple[str, list[str]]]:
    """Each of our parameters and the tensors of theirs that make it."""
    for side, names in (("encoder", _encoder_names(tokenizer.config)), ("decoder", _decoder_names(tokenizer.config))):
        layers = [(n, m) for n, m in enumerate(getattr(tokenizer, side)) if list(m.parameters())]
        for (number, module), theirs in zip(layers, names, strict=True):
            for ours, parts in _parts(module).items():
                for kind in ("weight", "bias"):
                    name = ".".join(filter(None, (side, str(number), ours, kind)))
                    yield name, [".".join(filter(None, (side, theirs, part, kind))) for part in parts]


def _parts(module: torch.nn.Module) -> dict[str, list[str]]:
    if isinstance(module, Residual):
        parts = {"first_norm": ["norm1"], "first": ["conv1"], "second_norm": ["norm2"], "second": ["conv2"]}
        return parts | ({"skip": ["nin_shortcut"]} if list(module.skip.parameters()) else {})
    if isinstance(module, SelfAttention):
        return {"norm": ["norm"], "qkv": ["q", "k", "v"], "out": ["proj_out"]}
    return {"conv": ["conv"]} if isinstance(module, (Down, Up)) else {"": [""]}


_MIDDLE = ["mid.block_1", "mid.attn_1", "mid.block_2"]


def _encoder_names(config: MagvitConfig) -> list[str]:
    names = ["conv_in"]
    for level, (_, blocks) in enumerate(config.encoder):
        names += [f"down.{level - 1}.downsample"] if level else []
        names += [f"down.{level}.block.{block}" for block in range(blocks)]
    return [*names, *_MIDDLE, "norm_out", "conv_out", "quant_conv"]


def _decoder_names(config: MagvitConfig) -> list[str]:
    names = ["post_quant_conv", "conv_in", *_MIDDLE]
    for level, (_, blocks) in reversed(list(enumerate(config.decoder))):
        names += [f"up.{level}.block.{block}" for block in range(blocks)]
        names += [f"up.{level}.upsample"] if level else []
    return [*names, "norm_out", "conv_out"]
