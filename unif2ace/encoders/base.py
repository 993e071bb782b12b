"""What every encoder is: pictures in, frozen features out, in batches; it never shows what it computed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch

from unif2ace.errors import UserError


class FaceCountError(UserError):
    """A picture has another number of faces than one.

    Attributes:
        index: of the picture in the call. count: of the faces found.
    """

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count
        found = f"{count} faces" if count else "no face"
        super().__init__(f"images[{index}]: {found} found, expected one: give a picture of one clear, upright face")


class Encoder(ABC):
    """A frozen network over pictures.

    Attributes:
        name: as users name it.
        channels: C, numbers of one feature vector.
        tokens: S, vectors of one picture; None where a picture has one vector.
        licence: of the weights.
        fingerprint: of weights and preparation; features of equal fingerprints are interchangeable.
        device: where features come to lie.
        batch: pictures computed at once.
    """

    name: str
    channels: int
    tokens: int | None = None
    licence: str
    fingerprint: str
    device = torch.device("cpu")
    batch = 16

    def __call__(
        self, images: Sequence[np.ndarray] | np.ndarray, step: Callable[[int], object] = lambda count: None
    ) -> torch.Tensor:
        """Features of B pictures.

        Args:
            images: B pictures [H, W, 3] uint8 RGB, of any sizes.
            step: called after each batch with its number of pictures.

        Returns:
            [B, S, C] float32, or [B, C] where `tokens` is None.

        Raises:
            ValueError: a picture is of another shape or dtype.
            UserError: what the encoder looks for is not in a picture.
        """
        for number, image in enumerate(images):
            shape, dtype = list(np.shape(image)), getattr(image, "dtype", type(image).__name__)
            if not isinstance(image, np.ndarray) or dtype != np.uint8 or image.ndim != 3 or shape[2] != 3 or 0 in shape:
                raise ValueError(f"images[{number}]: expected uint8 [H, W, 3], got {dtype} {shape}")
        parts: list[torch.Tensor] = []
        with torch.no_grad():
            for start in range(0, len(images), self.batch):
                part = images[start : start + self.batch]
                parts.append(self._encode(part, start).to(self.device, torch.float32))
                step(len(part))
        sizes = [0, self.channels] if self.tokens is None else [0, self.tokens, self.channels]
        return torch.cat(parts) if parts else torch.empty(sizes, device=self.device)

    @abstractmethod
    def _encode(self, images: Sequence[np.ndarray] | np.ndarray, first: int) -> torch.Tensor:
        """Features of one batch, whose first picture is number `first` of the call."""

    def __repr__(self) -> str:
        sizes = "" if self.tokens is None else f"{self.tokens} x "
        return f"{type(self).__name__}({self.name}, {sizes}{self.channels}, {self.fingerprint}, {self.device})"
