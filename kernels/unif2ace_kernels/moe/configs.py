"""How the experts' Triton kernels are launched: tiles, warps and stages as data, by kernel, architecture, dtype, size.

None of these was measured on a GPU yet: each is what fits without spilling, and the reason stands beside it. A sweep
passes a function of its own in place of `choose` to `experts_triton.forward` and `backward`.

A stage holds one tile of either operand, (BLOCK_M + BLOCK_N) * BLOCK_K elements. A block may have 163 KiB of shared
memory on sm_80, 99 on sm_86, sm_89 and sm_120, 227 on sm_90 and sm_100, and a thread 255 registers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .._triton import float32_precision

ROWS, UP, UP_GATED = "rows", "up", "up gated"
UP_BACKWARD, UP_BACKWARD_GATED, OUTER = "up backward", "up backward gated", "outer"


class Launch(NamedTuple):
    """A tile of BLOCK_M x BLOCK_N of the output in steps of BLOCK_K, GROUP row tiles visited together, and options."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP: int
    num_warps: int
    num_stages: int

    @property
    def piece(self) -> int:
        """Columns that an epilogue with an activation handles at once: 16 values a thread, and many of each kind."""
        return max(512 * self.num_warps // self.BLOCK_M, 16)


def of_arch(
    kernel: str, arch: int, dtype: torch.dtype, tf32: bool, rows: int, experts: int, columns: int, depth: int
) -> Launch:
    """The launch for a compute capability (80, 89, 90, ...).

    Args:
        kernel: `ROWS`, rows times an expert's matrix; `UP`, the same with an activation after it, `UP_GATED` with gate
            and value, two accumulators; `UP_BACKWARD` and `UP_BACKWARD_GATED`, with the activation's backward after
            it; `OUTER`, rows^T times rows.
        arch: 10 * major + minor.
        dtype: of the operands.
        tf32: whether float32 products may round their operands to TF32.
        rows: rows of all experts together.
        experts: number of experts.
        columns: of the output (of the activation, for a gated kernel).
        depth: columns of either operand, D or F; for `OUTER`, rows of the output.
    """
    large = arch // 10 in (9, 10)
    gated = kernel in (UP_GATED, UP_BACKWARD_GATED)
    each = rows // max(experts, 1)
    # Rows of a tile past the expert's last are wasted; three variants, so that a new batch seldom compiles.
    block_m = _fit(128, depth) if kernel == OUTER else 128 if each > 64 else 64 if each > 16 else 32
    if dtype == torch.float32 and not tf32:
        # On CUDA cores, operands in registers: small tiles, several blocks an SM.
        return Launch(min(block_m, 32 if gated else 64), _fit(64, columns), 32, 8, 4, 3)
    if dtype == torch.float32:
        return Launch(block_m, _fit(64, columns), 32, 8, 4, 3)
    if block_m < 128:
        # Few rows: the time is that of reading the weights once, and more blocks read more at a time.
        return Launch(block_m, _fit(64 if gated else 128, columns), 64 if large else 32, 8, 4, 4)
    if not large:
        # mma.sync; 32-deep steps keep the stages within sm_89's 99 KiB. The gated forward has two accumulators.
        return Launch(128, _fit(64 if kernel == UP_GATED else 128, columns), 32, 8, 8, 4)
    # sm_90's tensor cores want 128 x 256: a 128 x 128 tile asks L2 for 67 bytes a clock and SM, which gives 64.
    if kernel == OUTER:
        # A gathered operand waits for its row numbers, which takes a stage; 5 are 146 KiB.
        return Launch(128, _fit(256, columns), 64, 8, 8, 5)
    if gated or kernel == UP_BACKWARD:
        # Two accumulators, or an epilogue that spills beside 128 x 256.
        return Launch(128, _fit(128, columns), 64, 8, 8, 4)
    if kernel == ROWS and depth < 1024:
        # Few steps between prologue and epilogue: two blocks an SM, each of which covers for the other.
        return Launch(128, _fit(128, columns), 64, 8, 4, 3)
    return Launch(128, _fit(256, columns), 64, 8, 8, 4)


def _fit(block: int, size: int) -> int:
    """The block, or the power of two from 32 on that covers a smaller size."""
    return min(block, max(1 << (size - 1).bit_length(), 32)) if size else block


def choose(kernel: str, x: torch.Tensor, rows: int, experts: int, columns: int, depth: int) -> Launch:
    """The launch for products of x's dtype on its device; sizes as in `of_arch`."""
    major, minor = torch.cuda.get_device_capability(x.device)
    arch, tf32 = 10 * major + minor, float32_precision() == "tf32"
    return of_arch(kernel, arch, x.dtype, tf32, rows, experts, columns, depth)
