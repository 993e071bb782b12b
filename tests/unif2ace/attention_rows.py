"""Rows that attention is tested on, and who sees whom in them by the prose of the layouts."""

from __future__ import annotations

import dataclasses

import torch

from unif2ace.configs import MMU, T2I
from unif2ace.model.visibility import Visibility

N = 4  # image tokens


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows by what a person would say of them: task, pads before, tokens, pads after, image start (-1: none)."""

    rows: list[tuple[int, int, int, int, int]]
    image_tokens: int = N

    @property
    def facts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
        """What `Visibility` is told."""
        mask = [[False] * before + [True] * tokens + [False] * after for _, before, tokens, after, _ in self.rows]
        task, image_start = (torch.tensor([each[at] for each in self.rows]) for at in (0, 4))
        return torch.tensor(mask), task, image_start, self.image_tokens

    def visibility(self, **options) -> Visibility:
        return Visibility(*self.facts, **options)

    @property
    def length(self) -> int:
        return sum(self.rows[0][1:4])

    def seen(self, row: int, query: int) -> list[int]:
        """The keys that a query sees, by the prose of the layouts; none for padding."""
        task, before, tokens, _, image = self.rows[row]
        real = range(before, before + tokens)
        if query not in real:
            return []
        if image >= 0 and task == T2I and image - 1 <= query <= image + self.image_tokens:
            return [*real]
        if image >= 0 and task == MMU:
            return [key for key in real if key <= query or key <= image + self.image_tokens]
        return [key for key in real if key <= query]

    def qkv(self, queries: int | None = None, dtype=torch.float64, grad: bool = False) -> list[torch.Tensor]:
        lengths = (queries or self.length, self.length, self.length)
        return [torch.randn(len(self.rows), 2, n, 16, dtype=dtype, requires_grad=grad) for n in lengths]


BATCHES = {
    # Rows of 14 positions; an image with its <soi> and <eoi> takes 6 of them, in t2i the last tokens. The last row of
    # the first two ends within its image, as nobody should ask; what is not there is not read.
    "t2i": Rows([(T2I, 0, 14, 0, 9), (T2I, 3, 11, 0, 9), (T2I, 6, 6, 2, 7), (T2I, 0, 8, 6, 3), (T2I, 0, 9, 5, 6)]),
    "mmu, pads after": Rows([(MMU, 0, 14, 0, 2), (MMU, 0, 9, 5, 2), (MMU, 0, 7, 7, 2), (MMU, 0, 5, 9, 2)]),
    "mmu, pads before": Rows([(MMU, 0, 14, 0, 2), (MMU, 5, 9, 0, 7), (MMU, 7, 7, 0, 9)]),
    "text": Rows(
        [(MMU, 0, 14, 0, -1), (MMU, 4, 10, 0, -1), (MMU, 0, 1, 13, -1), (T2I, 3, 8, 3, -1), (MMU, 14, 0, 0, -1)]
    ),
    "mixed": Rows([(T2I, 3, 11, 0, 9), (MMU, 0, 12, 2, 2), (MMU, 2, 9, 3, -1), (T2I, 0, 11, 3, 6), (MMU, 4, 10, 0, 6)]),
}


def assert_close(given: torch.Tensor, expected: torch.Tensor) -> None:
    """As close as float64 is, or as bfloat16 is after a rounding or two."""
    tolerance = 1e-12 if given.dtype == torch.float64 else 2**-7
    torch.testing.assert_close(given.double(), expected.double(), rtol=tolerance, atol=tolerance)
