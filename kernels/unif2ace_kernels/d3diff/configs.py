"""Launch choice of the room's Triton kernels, as data.

What each choice needs is in kernels/RESOURCES.md; its speed is not yet measured on GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

# A chunk's logits, in the dtype of the products. Every chunk adds its part to the whole gradient of the weight, so
# that more rows a chunk mean less traffic, and 4,096 rows make tiles enough for every processor in each product.
CHUNK_BYTES = 128 << 20
MIN_CHUNK_ROWS = 4096
CHUNK_MULTIPLE = 256


@dataclass(frozen=True)
class Product:
    """Tiles of a matrix product.

    Attributes:
        block_m, block_n, block_k: of the result, and of what is summed over; group: rows of tiles taken together.
        warps, stages: of a program, and of its software pipeline.
        descriptors: tiles are copied by the tensor memory accelerator (compute capability 9 and 10).
        persistent: one program a processor takes tile after tile, and loads the next one while it ends the last.
        precision: of float32 products, "ieee" or "tf32".
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    descriptors: bool = False
    persistent: bool = False
    precision: str = "ieee"
    group: int = 8

    @property
    def constexprs(self) -> dict[str, object]:
        return {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k, "GROUP": self.group,
            "PRECISION": self.precision, "DESCRIPTORS": self.descriptors, "FLATTEN": self.persistent,
        }  # fmt: skip

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.warps, "num_stages": self.stages}


def product(arch: int, dtype: torch.dtype, tf32: bool, aligned: bool) -> Product:
    """For compute capability `arch` (90 is 9.0); aligned: rows of all operands begin at multiples of 16 bytes."""
    # On 9.0 the widest tile whose sums two warp groups hold: 128 x 128 would ask more of the L2 than it gives. On 10.x
    # the sums come from a memory of their own into registers that the rest of the kernel has in use.
    blackwell = arch // 10 == 10
    if dtype == torch.float32:
        # Exact float32 runs on the ordinary units: what limits its tile is registers.
        return (
            Product(128, 64 if blackwell else 128, 32, 8, 3, precision="tf32") if tf32 else Product(128, 64, 16, 8, 3)
        )
    if aligned and (blackwell or arch // 10 == 9):
        return Product(128, 128 if blackwell else 256, 64, 8, 4, descriptors=True, persistent=True)
    return Product(128, 128, 64, 8, 3)


def chunk_rows(rows: int, columns: int, dtype: torch.dtype) -> int:
    """R of a chunk, for at most `rows` labelled rows."""
    wanted = max(MIN_CHUNK_ROWS, CHUNK_BYTES // (columns * dtype.itemsize))
    return min(wanted // CHUNK_MULTIPLE, max(1, -(-rows // CHUNK_MULTIPLE))) * CHUNK_MULTIPLE


@functools.cache
def machine(device: torch.device) -> tuple[int, int]:
    """Compute capability (90 is 9.0) and number of processors."""
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


COMPACT_BLOCK = 1024  # rows a program when labelled rows are listed
COPY_BLOCK = 2048  # elements of a row at a time, when rows are copied or cleared
ROW_BLOCK = 8192  # logits of a row held at a time; the image codes of Show-o at once
ROW_WARPS = 8
SUM_ROWS, SUM_COLUMNS = 256, 32  # of the tile that sums a column: 64 bytes of 16-bit numbers a row
PLACE_BLOCK = 4096  # elements a program, when a gradient is scaled and placed
NOISE_LENGTH = 4096  # the longest row whose words a program holds in registers; longer ones are sorted by torch


def row_block(columns: int) -> int:
    """Columns of a row that a program takes at a time: all, or ROW_BLOCK."""
    return min(ROW_BLOCK, int(triton.next_power_of_2(columns)))


def noise_warps(block: int) -> int:
    """16 words a thread at most: their search keeps several numbers for each."""
    return max(1, block // 512)
