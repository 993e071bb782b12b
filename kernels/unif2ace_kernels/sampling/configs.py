"""How the Triton kernels of this room are launched, as data: a function of the head and the dtype, never of the batch.

A choice that hung on the number of rows could change the order of a sum, and with it a sample. None of these numbers
is measured on a GPU yet; each has its reason, and the compiler's report (tests/kernels/aot_sampling.py) bounds them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

Tensor = torch.Tensor
LARGEST_ROW = 8192  # positions a sample that the re-mask holds in registers: 8 a thread at 32 warps


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << max(0, n - 1).bit_length()


def contiguous_rows(x: Tensor) -> Tensor:
    """`x` [R, V], copied only if its rows are not contiguous."""
    return x if x.shape[1] == 1 or x.stride(1) == 1 else x.contiguous()


@dataclass(frozen=True)
class RowTile:
    """block: values of a row that a program holds at once; num_warps: of the program; max_registers: of a thread."""

    block: int
    num_warps: int
    max_registers: int | None = None


def draw_tile(codes: int, is_filtered: bool) -> RowTile:
    """A row of up to 8192 codes is held in registers, 32 values a thread at 8 warps: it is read once.

    With at most 128 registers a thread two programs share an SM, and one draws while the other waits. A filter's
    searches need more registers than that: its rows, like those wider than 8192, come in tiles that each pass reads
    again, from the caches.
    """
    width = _power_of_two(codes)
    if is_filtered:
        return RowTile(min(max(128, width), 2048), 8 if width >= 2048 else 4)
    return RowTile(min(max(128, width), 8192), 8 if width >= 4096 else 4, 128)


def remask_tile(length: int) -> RowTile:
    """Eight keys a thread: the 32 rounds of the search are reductions, which want few warps."""
    block = max(32, _power_of_two(length))
    return RowTile(block, max(1, block // 256))


@dataclass(frozen=True)
class HeadTile:
    """A tile of rows x columns x hidden of the head's product, and how it is launched."""

    rows: int
    columns: int
    hidden: int
    num_warps: int
    num_stages: int


def head_tile(dtype: torch.dtype, is_filtered: bool) -> HeadTile:
    """64 accumulators a thread leave registers for the noise of the epilogue; 96 KiB of operands fit sm_89.

    Tiles that are stored for a filter take half the rows, because the 64-bit addresses take the registers.
    """
    if dtype == torch.float32:
        return HeadTile(64, 128, 32, 8, 3)
    return HeadTile(64 if is_filtered else 128, 128, 64, 8, 3)


# Rows and hidden values a step of the guidance fold: 32 rows of 256 bytes (bfloat16), 16 values a thread.
FOLD = HeadTile(rows=32, columns=0, hidden=128, num_warps=8, num_stages=3)
