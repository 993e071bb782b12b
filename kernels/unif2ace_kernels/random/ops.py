"""The op `unif2ace::gumbel`: schema, implementations, fake, public function."""

from __future__ import annotations

import torch

from .. import _philox
from .._checks import expect, expect_choice, expect_tensor
from .._library import Implementation, compiled, register
from .._philox import NOISE_STREAM, REMASK_STREAM, TOKEN_STREAM
from .._triton import triton_implementation


def _gumbel_torch(seed: torch.Tensor, offset: torch.Tensor, rows: int, columns: int, stream: int) -> torch.Tensor:
    return _philox.gumbel(_philox.random_words(seed, offset, rows, columns, stream))


def _gumbel_fake(seed: torch.Tensor, offset: torch.Tensor, rows: int, columns: int, stream: int) -> torch.Tensor:
    return seed.new_empty((rows, columns), dtype=torch.float32)


_gumbel = register(
    "gumbel(Tensor seed, Tensor offset, SymInt rows, SymInt columns, int stream) -> Tensor",
    implementations=[
        # Triton before CUDA C++ because it needs no build; the two were not yet measured against each other on a GPU.
        triton_implementation(f"{__package__}.gumbel_triton", "gumbel", None),
        compiled("gumbel", "cuda"),
        compiled("gumbel", "cpu"),
        Implementation("torch", ("cpu", "cuda"), _gumbel_torch),
    ],
    fake=_gumbel_fake,
    serves=["random.gumbel"],
)


def gumbel(
    seed: torch.Tensor, offset: torch.Tensor, rows: int, columns: int, *, stream: int = NOISE_STREAM
) -> torch.Tensor:
    """Standard Gumbel noise -log(-log1p(-u)) that has the same bits on every device and in every implementation.

    The value at (row, column) depends on seed, offset, row, column and stream alone. Seed and offset are tensors so
    that a captured graph reads their current values. Philox: Salmon et al., SC 2011; counter layout in README.md.

    Args:
        seed: int64 tensor of one element.
        offset: int64 tensor of one element on the seed's device, the step; its low 32 bits count.
        rows, columns: shape of the result, each in [0, 2**32).
        stream: `TOKEN_STREAM`, `REMASK_STREAM` or `NOISE_STREAM`.

    Returns:
        float32 [rows, columns] on the seed's device, within 3e-7 * max(1, |gumbel|) of the exact value.

    Raises:
        ValueError: names the argument, what was expected and what came.
    """
    expect_tensor(seed, "seed", dtypes=(torch.int64,))
    expect(seed.numel() == 1, "seed", "one element", f"shape {list(seed.shape)}")
    expect_tensor(offset, "offset", dtypes=(torch.int64,), device_of=("seed", seed))
    expect(offset.numel() == 1, "offset", "one element", f"shape {list(offset.shape)}")
    expect(0 <= rows < 2**32, "rows", "an int in [0, 2**32)", rows)
    expect(0 <= columns < 2**32, "columns", "an int in [0, 2**32)", columns)
    expect_choice(stream, "stream", (TOKEN_STREAM, REMASK_STREAM, NOISE_STREAM))
    noise: torch.Tensor = _gumbel(seed, offset, rows, columns, stream)
    return noise
