"""Gumbel numbers by counter, against torch's own generators (other bits, the same law)."""

from __future__ import annotations

import math

import torch

from unif2ace_kernels import random

from ..case import FORWARD, Baseline, Case, Outputs, Work

SHAPES = [
    ("smoke", 64, 1024, "made up, tiny", ("cpu", "cuda")),
    ("demo", 16 * 64, 1024, "one step of the demo, 16 faces of 64 tokens", ("cpu", "cuda")),
    ("paper-16x256", 16 * 256, 8192, "one step at 16 images of 256 tokens", ("cuda",)),
    ("paper-2x256", 2 * 256, 8192, "one step at 2 images of 256 tokens", ("cpu", "cuda")),
]


def _work(rows: int, columns: int, device: torch.device) -> Work:
    seed, step = torch.tensor(5, device=device), torch.tensor(0, device=device)
    like = torch.empty(rows, columns, device=device)

    def ours() -> Outputs:
        return (random.gumbel(seed, step, rows, columns),)

    def exponential() -> Outputs:
        return (-torch.empty_like(like).exponential_().log(),)

    def rand() -> Outputs:
        return (-torch.log(-torch.log1p(-torch.rand_like(like))),)

    def error(outputs: Outputs) -> float:
        """Distance of mean and variance from Gumbel's, Euler's constant and pi^2 / 6."""
        x = outputs[0].double()
        return max(abs(x.mean().item() - 0.5772156649), abs(x.var().item() - math.pi**2 / 6))

    return Work(
        ours=ours,
        baselines={"exponential_, log": Baseline(exponential), "rand, log, log": Baseline(rand)},
        error=error,
        tolerance=0.1,
    )


def gumbel_case(shape: str, rows: int, columns: int, source: str, devices: tuple[str, ...]) -> Case:
    return Case(
        "random.gumbel", shape, {"rows": rows, "columns": columns}, source, FORWARD, torch.float32, 0,
        4.0 * rows * columns, lambda device: _work(rows, columns, device), devices, shape == "smoke",
    )  # fmt: skip


CASES = [gumbel_case(*named) for named in SHAPES]
