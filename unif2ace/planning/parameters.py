"""A model's parameters by part: all of them, and those that a token of each task goes through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, cast

import torch
from torch import nn

from unif2ace.configs import UniF2aceConfig
from unif2ace.model.blocks import Block
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace_kernels.moe import GroupedMoE


class Part(NamedTuple):
    """Parameters of one part: all of them, and those that a token of each task goes through."""

    name: str
    total: int
    used: tuple[int, int]


def parameters(config: UniF2aceConfig) -> list[Part]:
    """Every part of the model of `config`, counted on a model without memory.

    Used by a token: all of what it passes through. Embedding and head count whole; of routed experts its top-k, of the
    shared ones and of the routers' rows its own task's; of the sequence-level resamplers its task's.
    """
    with torch.device("meta"):
        model = UniF2aceForConditionalGeneration(config)
    return [part for part in _parts(model) if part.total]


def added(name: str, parts: Sequence[Part]) -> Part:
    """Several parts as one."""
    return Part(name, sum(each.total for each in parts), _pair(map(sum, zip(*(each.used for each in parts)))))


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
        yield added(kinds[0].name, kinds)
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


def _pair(values: Iterable[int]) -> tuple[int, int]:
    first, second = values
    return first, second


def _count(module: nn.Module | nn.Parameter | None) -> int:
    if module is None:
        return 0
    if isinstance(module, nn.Parameter):
        return module.numel()
    return sum(parameter.numel() for parameter in module.parameters())
