"""The points at which token-level mixtures are compared, on a CPU and on a GPU, the telling ones first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .moe_layer import Layer


def cpu_points() -> Iterator[tuple[str, Layer]]:
    """Two groups, K = 2; every value of T, D, F and N, both kinds of experts, and skewed loads."""
    gelu = Layer(0, 0, 0, 0, 2, 0, compiles=False)
    swiglu = replace(gelu, activation="swiglu", bias=False)
    for kind, T, D, F, N, load, first in [
        (gelu, 512, 256, 256, 4, "uniform", 0.5),
        (swiglu, 512, 256, 256, 16, "zipf", 0.5),
        (gelu, 512, 512, 512, 8, "zipf", 0.9),
        (gelu, 2048, 256, 512, 8, "uniform", 0.9),
        (gelu, 2048, 512, 512, 8, "uniform", 0.5),
        (swiglu, 2048, 512, 256, 16, "zipf", 0.5),
        (swiglu, 2048, 512, 1024, 4, "uniform", 0.5),
        (gelu, 2048, 1024, 512, 8, "zipf", 0.5),
        (gelu, 4096, 512, 256, 4, "uniform", 1.0),
        (swiglu, 4096, 512, 512, 8, "zipf", 0.9),
        (gelu, 4096, 1024, 256, 16, "uniform", 0.5),
    ]:
        yield "cpu-grid", replace(kind, T=T, D=D, F=F, N=N, load=load, first=first, compiles=T * D == 512 * 256)


def gpu_points() -> Iterator[tuple[str, Layer]]:
    """d = 2048, K = 4, two groups: from a middle point one axis at a time, for both kinds of experts.

    "gpu-core" is for a run of a few minutes: the middle, more tokens, wider experts, skewed loads and mixes.
    """
    core: list[list[Layer]] = []
    rest: list[Layer] = []
    for activation in ("gelu_tanh", "swiglu"):
        middle = Layer(16384, 2048, 512, 8, 4, 0, activation, bias=activation == "gelu_tanh", compiles=False)
        core.append([middle, replace(middle, T=4096), replace(middle, F=1024), replace(middle, load="zipf", first=0.9)])
        rest += [
            *(replace(middle, T=T) for T in (1024, 32768)),
            *(replace(middle, F=F) for F in (256, 2048)),
            *(replace(middle, N=N) for N in (4, 16)),
            *(replace(middle, load=load) for load in ("zipf", "one-hot")),
            *(replace(middle, first=first) for first in (1.0, 0.9)),
        ]
    yield from (("gpu-core", point) for both in zip(*core) for point in both)
    yield from (("gpu-grid", point) for point in rest)


def name_of(prefix: str, size: Layer) -> str:
    """ "cpu-grid T512 D256 F256 N4 gelu_tanh uniform 50/50"."""
    share = f"{100 * size.first:.0f}/{100 - 100 * size.first:.0f}"
    return f"{prefix} T{size.T} D{size.D} F{size.F} N{size.N} {size.activation} {size.load} {share}"


def router_points() -> Iterator[tuple[Layer, tuple[str, ...]]]:
    """Tokens and experts of a router, on the devices where it fits; the layer's width is as good as none."""
    for T in (4096, 16384):
        for N, K in ((4, 2), (16, 4), (32, 4)):
            yield Layer(T, 1, 1, N, K, 1), ("cpu", "cuda")
    yield Layer(16384, 1, 1, 256, 8, 1, groups=1), ("cuda",)
    yield Layer(1 << 20, 1, 1, 64, 8, 1), ("cuda",)


def name_of_router(size: Layer) -> str:
    """ "router T4096 E2x32 K4"."""
    return f"router T{size.T} E{size.groups}x{size.N} K{size.K}"
