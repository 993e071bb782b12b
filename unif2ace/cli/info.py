"""`unif2ace info`: a model's parameters by part, in all and used by a token, its vocabulary and its config."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import nn

from unif2ace.configs import TASKS, UniF2aceConfig
from unif2ace.importers.parts import model_config
from unif2ace.model.blocks import Block
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace_kernels.moe import GroupedMoE


class Part(NamedTuple):
    """Parameters of one part: all of them, and those that a token of each task goes through."""

    name: str
    total: int
    used: tuple[int, int]


def info(parsed: argparse.Namespace) -> None:
    """Print what the config of a checkpoint comes to; `base` is the 1.8B shape. No weights are read."""
    config = UniF2aceConfig.base() if parsed.checkpoint == "base" else model_config(Path(parsed.checkpoint))
    found = parameters(config)
    print("\n".join([*table(found), "", made_of(found), *vocabulary(config), "", json.dumps(config.to_dict())]))


def parameters(config: UniF2aceConfig) -> list[Part]:
    """Every part of the model of `config`, counted on a model without memory.

    Used by a token: all of what it passes through. Embedding and head count whole; of routed experts its top-k, of the
    shared ones and of the routers' rows its own task's; of the sequence-level resamplers its task's.
    """
    with torch.device("meta"):
        model = UniF2aceForConditionalGeneration(config)
    return [part for part in _parts(model) if part.total]


def _parts(model: UniF2aceForConditionalGeneration) -> Iterator[Part]:
    def whole(name: str, *modules: nn.Module | nn.Parameter | None) -> Part:
        total = sum(map(_count, modules))
        return Part(name, total, (total, total))

    blocks = cast(list[Block], list(model.blocks))
    yield whole("embedding", model.embedding, model.image_position)
    yield whole("attention", *(block.attention for block in blocks))
    yield whole("LayerNorms", model.norm, *(each for block in blocks for each in (block.norm, block.ffn_norm)))
    yield whole("FFN", *(block.ffn for block in blocks if block.ffn is not None))
    experts = [_token_experts(block.experts) for block in blocks if block.experts is not None]
    for kinds in zip(*experts):
        yield _sum(kinds)
    yield whole("sequence-level routers", *(block.sequence for block in blocks))
    if model.injection is not None:
        noise, clip, face = map(_count, (model.injection.noise, model.injection.clip, model.injection.face))
        yield Part("noise resampler", noise, (noise, 0))
        yield Part("CLIP resampler", clip, (0, clip))
        yield Part("face resampler", face, (0, face))
    yield whole("head", model.head)


def _token_experts(moe: GroupedMoE) -> list[Part]:
    """Router, routed and shared experts of one layer."""
    stacks = [moe.experts_w_in, moe.experts_b_in, moe.experts_w_out, moe.experts_b_out]
    one = sum(each[0].numel() for each in stacks if each is not None)
    sizes, groups = moe.group_sizes, len(moe.group_sizes)
    router = moe.router_weight.shape[1]
    return [
        Part("token-level routers", sum(sizes) * router, _pair(size * router for size in sizes)),
        Part("routed experts", sum(sizes) * one, _pair([moe.top_k * one] * groups)),
        Part("shared experts", groups * moe.shared * one, _pair([moe.shared * one] * groups)),
    ]


def _pair(values) -> tuple[int, int]:
    first, second = values
    return first, second


def _sum(parts) -> Part:
    return Part(parts[0].name, sum(p.total for p in parts), _pair(map(sum, zip(*(p.used for p in parts)))))


def _count(module: nn.Module | nn.Parameter | None) -> int:
    if module is None:
        return 0
    if isinstance(module, nn.Parameter):
        return module.numel()
    return sum(parameter.numel() for parameter in module.parameters())


def table(parts: list[Part]) -> list[str]:
    """Lines of a Markdown table with its sum."""
    rows = [*parts, _sum([Part("all", 0, (0, 0)), *parts])]
    lines = [f"| part | parameters | {' | '.join(f'used by a {task} token' for task in TASKS)} |", "|---|---|---|---|"]
    return lines + [f"| {name} | {total:,} | {used[0]:,} | {used[1]:,} |" for name, total, used in rows]


def made_of(parts: list[Part]) -> str:
    """The table in three: the backbone as a model without experts has it, and what each level of experts adds."""
    sums = {"backbone": 0, "token-level experts": 0, "sequence-level experts": 0}
    for part in parts:
        sequence = part.name.startswith("sequence-level") or part.name.endswith("resampler")
        token = part.name in ("token-level routers", "routed experts", "shared experts")
        sums["sequence-level experts" if sequence else "token-level experts" if token else "backbone"] += part.total
    whole = sum(sums.values())
    return f"{whole / 1e9:.2f} B = " + " + ".join(f"{each / 1e9:.2f} B {name}" for name, each in sums.items())


def vocabulary(config: UniF2aceConfig) -> list[str]:
    """Which ids are what."""
    words = config.vocabulary
    first, stop = words.code_range
    return [
        f"vocabulary: {words.size} = {words.text} text [0, {words.text}) + 10 special [{words.text}, {first}) "
        f"+ {words.codes} image codes [{first}, {stop}) + mask {words.mask}"
    ]
