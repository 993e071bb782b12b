"""The sequence-level mixture."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from unif2ace_kernels import moe

from ..case import FORWARD, TOLERANCE, TRAINING, Baseline, Case, Outputs, Work, bind, compiled, error_against, truth_of

MIXES = [  # B, L, M, D
    ("smoke", (2, 4, 2, 16), "made up, tiny", ("cpu", "cuda")),
    ("demo", (44, 64, 3, 192), "the demo's model, 44 faces a step", ("cpu", "cuda")),
    ("paper-16", (16, 256, 2, 2048), "UniF2aceConfig.base(), 16 images of 256 tokens", ("cpu", "cuda")),
    ("paper-16x1024", (16, 1024, 2, 2048), "UniF2aceConfig.base(), 16 images of 1,024 tokens", ("cuda",)),
]


def _mix_work(size: tuple[int, int, int, int], dtype: torch.dtype, mode: str, device: torch.device) -> Work:
    B, L, M, D = size
    x, injected = (torch.randn(shape, device=device).to(dtype) for shape in ((B, L, D), (B, M, L, D)))
    inputs = [x, torch.rand(B, 1 + M, device=device), injected]
    seeds = [torch.randn(B, L, D, device=device)]

    def ours(x, coef, injected) -> Outputs:
        return (moe.mix(x, coef, injected),)

    def plain(x, coef, injected) -> Outputs:
        coef = coef.to(x.dtype)[:, :, None, None]
        y = coef[:, 0] * x
        for m in range(M):
            y = y + coef[:, 1 + m] * injected[:, m]
        return (y,)

    def einsum(x, coef, injected) -> Outputs:
        return (torch.einsum("bm,bmld->bld", coef.to(x.dtype), torch.cat([x[:, None], injected], 1)),)

    return Work(
        ours=bind(ours, inputs, mode, seeds),
        baselines={
            "sum of products": Baseline(bind(plain, inputs, mode, seeds)),
            "concatenate, einsum": Baseline(bind(einsum, inputs, mode, seeds)),
            "torch.compile": Baseline(bind(compiled(plain), inputs, mode, seeds), compiles=True),
        },
        error=error_against(truth_of(plain, inputs, mode, seeds)),
        tolerance=TOLERANCE[dtype],
    )


def mix_case(
    shape: str, size: tuple[int, int, int, int], source: str, devices: tuple[str, ...], mode: str, dtype: torch.dtype
) -> Case:
    B, L, M, D = size
    moved = float(B * L * D * dtype.itemsize * (M + 2))
    moved *= 1 if mode == FORWARD else 1 + (2 * M + 3) / (M + 2)  # backward: dy, x and S in, dx and dS out
    return Case(
        "moe.mix", shape, {"B": B, "L": L, "M": M, "D": D}, source, mode, dtype, 0, moved,
        lambda device: _mix_work(size, dtype, mode, device), devices, shape == "smoke",
    )  # fmt: skip


def _cases() -> Iterator[Case]:
    for named in MIXES:
        for mode in (FORWARD, TRAINING):
            for dtype in (torch.float32, torch.bfloat16):
                yield mix_case(*named, mode, dtype)


CASES = list(_cases())
