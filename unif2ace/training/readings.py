"""What a step took: seconds, tokens a second, share of the device's peak, memory."""

from __future__ import annotations

import resource
import sys
from typing import Any

import torch

from unif2ace.configs import UniF2aceConfig
from unif2ace.planning.activations import Step
from unif2ace.planning.plan import Training, step_flops
from unif2ace.training.feed import Work
from unif2ace.training.world import World

# Dense bfloat16 products, FLOP/s, from NVIDIA's data sheets (SXM where there are several).
PEAKS = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "B200": 2250e12,
    "L40S": 362e12,
    "4090": 165e12,
}


def peak(device: torch.device) -> float | None:
    """FLOP/s that MFU is a share of; None where it is not known, as on CPUs."""
    if device.type != "cuda":
        return None
    named = torch.cuda.get_device_name(device)
    return next((value for name, value in PEAKS.items() if name in named), None)


def memory_bytes(device: torch.device) -> int:
    """The most that this process held so far: of the GPU's memory, else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024


def readings(
    config: UniF2aceConfig, counts: dict[str, int], work: Work, seconds: float, world: World
) -> dict[str, Any]:
    """Of one step of all ranks.

    Args:
        counts: rows of each task. seconds: that the step took, the wait for its rows included.
    """
    most = peak(world.device)
    planned = Training(config, Step(counts["t2i"], counts["mmu"], counts["lm"], work.longest, work.tokens))
    flops = step_flops(planned)[0]
    return {
        "step_seconds": round(seconds, 5),
        "data_seconds": round(work.waited(), 5),
        "rows": counts,
        "tokens": work.tokens,
        "tokens_per_second": round(work.tokens / seconds, 1),
        "mfu": None if most is None else flops / (seconds * most * world.ranks),
        "memory_bytes": memory_bytes(world.device),
        "corrupt": work.corrupt,
    }
