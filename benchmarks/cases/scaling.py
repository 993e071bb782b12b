"""How cost grows: each op along one axis at a time, against plain code; every axis is one on which the work is linear.

python -m benchmarks.run --shape scaling [--op moe.layer] --json OUT.jsonl
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from ..case import FORWARD, TRAINING, Case, Work
from .d3diff import Head, loss_case, noise_case
from .moe import layer_case, route_case
from .moe_layer import Layer
from .moe_mix import mix_case
from .random import gumbel_case
from .sampling import Grid, sampling_case

SOURCE = "one axis of the op, the others at a middle point"
# Beside ours, the plain code that everybody can run: an axis has many points.
CONTENDERS = (
    "loop over experts", "sort + grouped_mm", "softmax, top-k, sort", "sum of products", "full float32 logits, CE",
    "masked rows, sliced logits", "rand, argsort (Show-o)", "full logits, multinomial (Show-o)", "Show-o's procedure",
    "Gumbel noise, sort (Show-o)", "rand, log, log",
)  # fmt: skip
Make = Callable[[str, int], Case]  # (shape, value on the axis) -> case


def _along(axis: str, values: Sequence[int], make: Make) -> Iterator[Case]:
    for value in values:
        case = make(f"scaling {axis}{value}", value)
        if "cpu" not in case.devices:
            case = replace(case, shape=f"gpu-{case.shape}")

        def build(device: torch.device, case: Case = case) -> Work:
            work = case.build(device)
            few = {name: each for name, each in work.baselines.items() if name in CONTENDERS}
            return dataclasses.replace(work, baselines=few)

        yield replace(case, build=build, axis=axis, at=value)


def _head(B: int, N: int, D: int, V: int) -> Head:
    return Head(B, N, D, V, V // 2 - 1, V // 2)


def _grid(B: int, N: int, D: int, V: int) -> Grid:
    return Grid(B, N, round(0.65 * N), D, V, V // 2 - 1, V // 2)


def _powers(first: int, last: int, factor: int = 2) -> list[int]:
    return [first] if first >= last else [first, *_powers(first * factor, last, factor)]


def _cases(device: str, dtype: torch.dtype, wide: int, more: int) -> Iterator[Case]:
    """Hidden sizes are 128 `wide`; a GPU has `more` tokens, faces and codes at every point."""
    on = (SOURCE, (device,))
    D = 128 * wide
    layer = Layer(2048 * more, D, D, 8, 2, 0, compiles=False)
    router = Layer(8192 * more, 1, 1, 16, 4, 0)
    head, grid = {"B": 8, "N": 64 * more, "D": D, "V": 2048 * more}, {"B": 4, "N": 64 * more, "D": D, "V": 2048 * more}

    def layers(axis: str, values: Sequence[int]) -> Iterator[Case]:
        field = "N" if axis == "E" else axis
        return _along(
            axis, values, lambda shape, n: layer_case(shape, replace(layer, **{field: n}), *on, TRAINING, dtype)
        )

    def routers(axis: str, values: Sequence[int]) -> Iterator[Case]:
        field = "N" if axis == "E" else axis
        return _along(axis, values, lambda shape, n: route_case(shape, replace(router, **{field: n}), *on, TRAINING))

    def losses(axis: str, values: Sequence[int]) -> Iterator[Case]:
        return _along(
            axis, values, lambda shape, n: loss_case(shape, _head(**{**head, axis: n}), *on, TRAINING, dtype, True)
        )

    def draws(op: str, axis: str, values: Sequence[int]) -> Iterator[Case]:
        kind = torch.float32 if op == "remask" else dtype
        return _along(axis, values, lambda shape, n: sampling_case(op, shape, _grid(**{**grid, axis: n}), *on, kind))

    yield from layers("T", _powers(512 * more, 8192 * more))
    yield from layers("E", _powers(4, 64))
    yield from layers("K", _powers(2, 8))
    yield from routers("T", _powers(1024 * more, 65536 * more, 4))
    yield from routers("E", _powers(8, 128))
    yield from losses("B", _powers(2, 32))
    yield from losses("N", _powers(16 * more, 256 * more))
    yield from losses("V", _powers(512 * more, 8192 * more))
    yield from draws("sample_from_hidden", "B", _powers(1, 16))
    yield from draws("sample_from_hidden", "N", _powers(16 * more, 256 * more))
    yield from draws("sample_from_hidden", "V", _powers(512 * more, 8192 * more))
    yield from draws("remask", "N", _powers(256, 65536, 4))
    yield from _along(
        "T", _powers(2, 32), lambda shape, n: sampling_case("run", shape, _grid(4, 64, D, 512), *on, dtype, n)
    )
    yield from _along("N", _powers(256, 65536, 4), lambda shape, n: noise_case(shape, _head(8, n, 1, 2048), *on))
    yield from _along("L", _powers(64, 1024), lambda shape, n: mix_case(shape, (8, n, 2, D), *on, FORWARD, dtype))
    yield from _along("rows", _powers(64, 16384, 4), lambda shape, n: gumbel_case(shape, n, 1024, *on))


CASES = [*_cases("cpu", torch.float32, 1, 1), *_cases("cuda", torch.bfloat16, 8, 8)]
