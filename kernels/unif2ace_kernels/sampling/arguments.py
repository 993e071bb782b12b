"""What both samplers are asked: the arguments that their ops share, from `ids` on."""

from __future__ import annotations

from typing import NamedTuple

import torch

Tensor = torch.Tensor


class Draw(NamedTuple):
    """In the order of the ops' schemas, so that an implementation takes ``*arguments`` and makes ``Draw(*arguments)``.

    Attributes:
        ids: int64 [R]. unknown: bool [R], the rows to draw. rows: int64 [R], their global indices.
        seed, offset: int64 without dimensions, on the device.
        first_code, codes: which of the head's columns are codes.
        guidance, temperature, top_k, top_p, confidence, compact: as in `sample_from_logits`.
    """

    ids: Tensor
    unknown: Tensor
    rows: Tensor
    seed: Tensor
    offset: Tensor
    first_code: int
    codes: int
    guidance: float
    temperature: float
    top_k: int
    top_p: float
    confidence: str
    compact: bool

    @property
    def window(self) -> slice:
        """The code columns."""
        return slice(self.first_code, self.first_code + self.codes)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0

    @property
    def inverse(self) -> float:
        """What shifted logits are multiplied by: a quotient does not round alike on every device."""
        return 1.0 if self.is_greedy else 1 / self.temperature

    @property
    def filters(self) -> tuple[bool, bool]:
        """Whether top-k and top-p leave anything out; at temperature 0 the largest is in any filter."""
        return not self.is_greedy and 0 < self.top_k < self.codes, not self.is_greedy and self.top_p < 1

    def guided_by(self, uncond: Tensor | None) -> Tensor | None:
        """The unconditional branch, where it is read."""
        return None if self.guidance == 0 else uncond
