"""route in CUDA C++: on fibers over the edge grid, against float64 and the torch path; on a GPU, with Triton, below."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cuda_on_cpu import execute
from route_cases import CASES, RouteCase, check

from unif2ace_kernels.moe import route_torch

# The order of unif2ace::Number.
NUMBERS = (
    torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8
)  # fmt: skip
SEEDS = (0, 1)


def _bytes(tensor: torch.Tensor | None) -> tuple:
    """(bytes from the first element to the last, type, stride, stride) of a tensor, which may be None."""
    if tensor is None:
        tensor = torch.zeros(0)
    strides = (*tensor.stride(), 0, 0)[:2]
    reach = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    flat = tensor.as_strided((reach if tensor.numel() else 0,), (1,))
    return flat.contiguous().view(torch.uint8).numpy(), NUMBERS.index(tensor.dtype), *strides


def _on_fibers(seeds=SEEDS):
    def forward(logits, ids, sizes, top_k, shared, coefs, normalize, scoring, bias, z_coef):
        options = sizes, coefs, top_k, shared, normalize, scoring == "softmax", z_coef
        tensors = _bytes(logits), _bytes(ids), _bytes(bias)
        outputs = execute("route.cpp", "forward", *tensors, len(logits), *options, seeds=seeds)
        return tuple(map(torch.from_numpy, outputs))

    def backward(
        weight, probability, balance, z, logits, ids, expert, counts, sizes, top_k, coefs, normalize, scoring, z_coef
    ):
        scalars = ([] if each is None else [each.item()] for each in (balance, z if z_coef else None))
        options = sizes, coefs, top_k, expert.shape[1] - top_k, normalize, scoring == "softmax", z_coef
        flat = execute(
            "route.cpp", "backward", _bytes(weight), _bytes(probability), *scalars, _bytes(logits), _bytes(ids),
            expert.numpy(), counts.numpy(), len(logits), *options, logits.itemsize, seeds=seeds,
        )  # fmt: skip
        return torch.from_numpy(flat).view(logits.dtype).view(logits.shape)

    return forward, backward


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_on_fibers(case):
    if case.tokens == 60:  # more would only take longer: a block has 64, a warp 16
        case = replace(case, tokens=19)
    check(case, *_on_fibers(), alone=False)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_on_fibers_each_gradient_alone(scoring):
    check(RouteCase("alone", tokens=5, scoring=scoring), *_on_fibers(seeds=(1,)))


def test_on_fibers_ids_out_of_range_stay_in_bounds():
    logits, ids, *rest = RouteCase("bad ids").arguments()
    ids[3], ids[9], ids[20] = -1, 2, 2**62
    forward, backward = _on_fibers()
    outputs, clamped = forward(logits, ids, *rest), route_torch.forward(logits, ids.clamp(0, 1), *rest)
    for place in (1, 2, 3, 4):
        assert torch.equal(outputs[place], clamped[place])
    given = torch.ones(60, 3), None, torch.ones(()), None, logits, ids, *outputs[1:3]
    assert backward(*given, [3, 5], 2, [0.1, 0.1], True, "softmax", 0.0).isfinite().all()


def test_on_fibers_many_columns():
    """Eight columns a lane, and 32."""
    for size in (200, 300):
        case = RouteCase("wide", tokens=5, sizes=(size, 3), top_k=3, mix=(1, 0))
        check(case, *_on_fibers(seeds=(1,)))
