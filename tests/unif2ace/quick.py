"""A quick image tokenizer and encoder and a job with them, in a module that a new process imports quickly."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unif2ace.data.config import SetConfig
from unif2ace.data.encode import Encoding, square_frame
from unif2ace.data.precompute import PrecomputeConfig
from unif2ace.errors import UserError

SIDE, CODES, CODE_BITS = 8, 4, 4


class QuickTokenizer(torch.nn.Module):
    """Codes from the mean light of each quarter; [B, 3, 8, 8] -> [B, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(7.5))

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = torch.nn.functional.avg_pool2d(images, SIDE // 2).flatten(2).transpose(1, 2)
        light = features.mean(-1)
        return ((light * 8 + 1) * self.scale).long() % 2**CODE_BITS, torch.cat([features, features[..., :2]], -1)


class QuickIdentity:
    """Six numbers of a picture."""

    fingerprint = "quick"

    def __call__(self, images) -> torch.Tensor:
        return (
            torch.stack([torch.from_numpy(image[::50, 0].astype(np.float32))[:2].flatten() for image in images]) / 255
        )


@dataclass(frozen=True)
class QuickEncoding:
    """In place of an EncodingConfig; `seconds` a picture, to be killed in."""

    seconds: float = 0.0
    name: str = "quick"

    def check(self, where: str) -> QuickEncoding:
        return self

    def of_process(self, number: int) -> QuickEncoding:
        return self

    def describe(self) -> dict[str, Any]:
        return QuickEncoding.build(self).describe()

    def build(self) -> Encoding:
        def framed(picture: np.ndarray, side: int) -> np.ndarray:
            time.sleep(self.seconds)
            return square_frame(picture, side)

        return Encoding(QuickTokenizer(), SIDE, self.name, QuickIdentity(), latents=True, frame=framed)


@dataclass(frozen=True)
class DyingEncoding(QuickEncoding):
    """Every process but its parent dies of it."""

    parent: int = 0

    def build(self) -> Encoding:
        def framed(picture: np.ndarray, side: int) -> np.ndarray:
            if os.getpid() != self.parent:
                os.kill(os.getpid(), signal.SIGKILL)
            return square_frame(picture, side)

        return dataclasses.replace(super().build(), frame=framed)


@dataclass(frozen=True)
class CountedEncoding(QuickEncoding):
    """Leaves a file in `folder` for every process that builds it, named by the process's number."""

    folder: str = ""
    number: int | None = None

    def of_process(self, number: int) -> CountedEncoding:
        return dataclasses.replace(self, number=number)

    def build(self) -> Encoding:
        Path(self.folder, str(self.number)).touch(exist_ok=False)
        return super().build()


class PickyIdentity(QuickIdentity):
    """Finds a face in some pictures only."""

    def __call__(self, images) -> torch.Tensor:
        if any(image[0, 0, 0] < 80 for image in images):
            raise UserError("no face is found")
        return super().__call__(images)


@dataclass(frozen=True)
class PickyEncoding(QuickEncoding):
    def build(self) -> Encoding:
        return dataclasses.replace(super().build(), identity=PickyIdentity())


QUICK = QuickEncoding()


def job(path: Path, out: Path, encoding: QuickEncoding = QUICK, **changes) -> PrecomputeConfig:
    values = {"shard": 5, "batch": 2, **changes}
    return PrecomputeConfig(SetConfig(str(path)), encoding, str(out), **values)  # type: ignore[arg-type]
