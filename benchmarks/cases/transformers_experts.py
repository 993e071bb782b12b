"""transformers' experts module as its models call it: our implementation against its own, over the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.func import functional_call
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import unif2ace_kernels.transformers

from ..case import FORWARD, TOLERANCE, TRAINING, Baseline, Case, Outputs, Work, bind, error_against, truth_of

CPU, GPU = ("cpu",), ("cuda",)
THEIRS = ("eager", "grouped_mm", "batched_mm")
COPIES_AT_MOST = 4 << 30  # bytes of weights that batched_mm gathers, one expert's for every slot


@dataclass(frozen=True)
class Size:
    """T tokens, D hidden, F width, E experts, K of them a token."""

    T: int
    D: int
    F: int
    E: int
    K: int

    def flops(self, mode: str) -> float:
        return 6.0 * self.T * self.K * self.D * self.F * (1 if mode == FORWARD else 3)

    def bytes(self, mode: str, itemsize: int) -> float:
        used = min(self.E, self.T * self.K)
        weights, tokens = 3 * used * self.D * self.F * itemsize, self.T * self.D * itemsize
        return weights + 2 * tokens + (0 if mode == FORWARD else 2 * weights + 3 * tokens)


SIZES = [
    ("smoke", Size(24, 16, 12, 5, 2), "made up, tiny", CPU + GPU),
    ("olmoe-quarter", Size(1024, 512, 256, 64, 8), "OLMoE-1B-7B, a quarter as wide, 1,024 tokens", CPU),
    ("mixtral-eighth", Size(512, 512, 1792, 8, 2), "Mixtral-8x7B, an eighth as wide, 512 tokens", CPU),
    ("olmoe-quarter-decode", Size(4, 512, 256, 64, 8), "the same OLMoE, a token of each of 4 samples", CPU),
    ("olmoe", Size(4096, 2048, 1024, 64, 8), "OLMoE-1B-7B, 4,096 tokens", GPU),
    ("qwen3-30b-a3b", Size(4096, 2048, 768, 128, 8), "Qwen3-30B-A3B, 4,096 tokens", GPU),
]


def _work(size: Size, dtype: torch.dtype, mode: str, device: torch.device) -> Work:
    def module_of(implementation: str) -> MixtralExperts:
        config = SimpleNamespace(
            num_local_experts=size.E, hidden_size=size.D, intermediate_size=size.F, hidden_act="silu",
            _experts_implementation=implementation,
        )  # fmt: skip
        with torch.device("meta"):
            return MixtralExperts(config)

    logits = torch.randn(size.T, size.E, device=device)
    weight, expert = logits.softmax(-1).topk(size.K)
    inputs = [
        torch.randn(size.T, size.D, device=device),
        weight / weight.sum(-1, keepdim=True),
        torch.randn(size.E, 2 * size.F, size.D, device=device) * size.D**-0.5,
        torch.randn(size.E, size.D, size.F, device=device) * size.F**-0.5,
    ]
    inputs = [each.to(dtype) for each in inputs]
    seeds = [torch.randn(size.T, size.D, device=device)]

    def run(module: MixtralExperts, x: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Outputs:
        return (functional_call(module, {"gate_up_proj": gate_up, "down_proj": down}, (x, expert, weight)),)

    def contender(implementation: str) -> Baseline:
        copies = 3.0 * size.T * size.K * size.D * size.F * dtype.itemsize
        if implementation == "batched_mm" and copies > COPIES_AT_MOST:
            return Baseline(None, missing=f"copies the weights of every slot's expert, {copies / 2**30:.0f} GiB here")
        return Baseline(bind(partial(run, module_of(implementation)), inputs, mode, seeds))

    ours = contender(unif2ace_kernels.transformers.NAME).run
    assert ours is not None
    return Work(
        ours=ours,
        baselines={f"transformers, {each}": contender(each) for each in THEIRS},
        error=error_against(truth_of(partial(run, module_of("eager")), inputs, mode, seeds)),
        tolerance=TOLERANCE[dtype],
    )


def _cases() -> Iterator[Case]:
    for shape, size, source, devices in SIZES:
        smoke = shape == "smoke"
        for mode in (FORWARD,) if shape.endswith("decode") else (FORWARD, TRAINING):
            for dtype in (torch.float32,) if smoke else (torch.float32, torch.bfloat16):
                if devices == GPU and dtype == torch.float32:
                    continue
                yield Case(
                    "transformers.experts", shape, asdict(size), source, mode, dtype, size.flops(mode),
                    size.bytes(mode, dtype.itemsize),
                    lambda device, size=size, dtype=dtype, mode=mode: _work(size, dtype, mode, device),
                    devices, smoke,
                )  # fmt: skip


CASES = list(_cases())
