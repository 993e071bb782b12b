"""A picture to what the model reads of it: its face in the frame, its codes, its identity and semantic features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from torch import nn

from unif2ace.data.samples import Sample, SampleError
from unif2ace.encoders import LATENTS
from unif2ace.errors import UserError, first_line
from unif2ace.files import digest, read_json
from unif2ace.model.image_tokenizer import to_images
from unif2ace.parsing import reading
from unif2ace.pictures import resized

FRAMES = ("face", "square")
FEATURES_SIDE = 256  # pixels a side of what encoders see, more where the image tokenizer sees more
_OLD = "tokenizer"  # as manifests call them, whose shards hang on every word


class Features(Protocol):
    """What is asked of an encoder, see `unif2ace.encoders`."""

    fingerprint: str

    def __call__(self, images: Sequence[np.ndarray]) -> torch.Tensor: ...


@dataclass(frozen=True)
class EncodingConfig:
    """Attributes:
    tokenizer: folder of a checkpoint or of an imported image tokenizer.
    identity: name of an encoder of `unif2ace.encoders`, or none.
    semantic: likewise; or `image_tokenizer`, its latents.
    frame: `face`: the largest face is found and brought into the model's frame; `square`: the middle of the picture.
    device: where networks compute; where several processes do, `cuda` spreads them over the GPUs.
    """

    tokenizer: str
    identity: str | None = None
    semantic: str | None = None
    frame: str = "face"
    device: str = "cpu"

    def check(self, where: str) -> EncodingConfig:
        """The config itself; UserError names a key that is wrong."""
        if self.semantic == _OLD:
            raise UserError(f"{where}.semantic: expected {LATENTS}, as checkpoints call its latents, got {_OLD!r}")
        if self.frame not in FRAMES:
            raise UserError(f"{where}.frame: expected one of {', '.join(FRAMES)}, got {self.frame!r}")
        return self

    def of_process(self, number: int) -> EncodingConfig:
        """The config that process `number` of several is to build: a device "cuda" is one GPU after another of them."""
        device = torch.device(self.device)
        if device.type != "cuda" or device.index is not None:
            return self
        return dataclasses.replace(self, device=f"cuda:{number % torch.cuda.device_count()}")

    def describe(self) -> dict[str, Any]:
        """What `build` will give says of itself; for a process that is to compute nothing: no GPU is touched.

        Raises:
            UserError: as of `build`.
        """
        check_device(self.device, "encoding.device")
        return dataclasses.replace(self, device="cpu").build().describe()

    def build(self) -> Encoding:
        """Load the networks.

        Raises:
            UserError: one is missing or damaged, or there is no such device.
        """
        from unif2ace.data.identity import FRAME
        from unif2ace.encoders import encoder

        check_device(self.device, "encoding.device")
        tokenizer, fingerprint = load_image_tokenizer(Path(self.tokenizer))
        known: dict[str, Any] = {"frame": FRAME} if self.frame == "face" else {"largest": True}
        return Encoding(
            tokenizer.to(self.device),
            tokenizer.config.side,
            fingerprint,
            identity=encoder(self.identity, **known) if self.identity else None,
            semantic=encoder(self.semantic, device=self.device) if self.semantic not in (None, LATENTS) else None,
            latents=self.semantic == LATENTS,
            frame=face_frame if self.frame == "face" else square_frame,
        )


@dataclass
class Encoding:
    """Samples with pictures to samples with codes and features.

    Attributes:
        tokenizer: `encode` takes float [B, 3, side, side] in [-1, 1] and gives codes [B, N] and features [B, N, C].
        side: of its pictures, in pixels.
        fingerprint_of_tokenizer: of its weights.
        identity, semantic: encoders of framed pictures.
        latents: whether the tokenizer's features are the semantic ones.
        frame: picture [H, W, 3] uint8, side -> [side, side, 3]; ValueError where there is nothing to frame.
    """

    tokenizer: nn.Module
    side: int
    fingerprint_of_tokenizer: str
    identity: Features | None = None
    semantic: Features | None = None
    latents: bool = False
    frame: Callable[[np.ndarray, int], np.ndarray] | None = None

    def describe(self) -> dict[str, Any]:
        """What the results hang on, as plain values."""
        return {
            "tokenizer": self.fingerprint_of_tokenizer,
            "side": self.side,
            "identity": self.identity.fingerprint if self.identity else None,
            "semantic": _OLD if self.latents else self.semantic.fingerprint if self.semantic else None,
            "frame": (self.frame or square_frame).__name__,
        }

    def __call__(self, sample: Sample) -> Sample:
        """One sample; SampleError where its picture cannot be read or framed."""
        made = self.batch([sample])[0]
        if isinstance(made, SampleError):
            raise made
        return made

    def batch(self, samples: Sequence[Sample]) -> list[Sample | SampleError]:
        """Each sample with its codes and features and without its picture, or why there are none."""
        made: list[Sample | SampleError] = []
        faces: list[np.ndarray] = []  # what the tokenizer sees
        views: list[np.ndarray] = []  # what the encoders see
        for sample in samples:
            try:
                content = sample.image_bytes()
                picture = sample.pixels(content)
                # One that has the frame's size already stands in it: a painting, or a face that was framed before.
                frame = square_frame if picture.shape[:2] == (self.side, self.side) else self.frame or square_frame
                faces.append(frame(picture, self.side))
                views.append(frame(picture, max(self.side, FEATURES_SIDE)))
                made.append(dataclasses.replace(sample, image=content))
            except SampleError as error:
                made.append(error)
            except ValueError as error:
                made.append(SampleError(sample.where, str(error), corrupt=False))
        rows = [row for row, each in enumerate(made) if isinstance(each, Sample)]
        if not rows:
            return made
        images = to_images(torch.from_numpy(np.stack(faces)))
        codes, latents = self.tokenizer.encode(images.to(next(self.tokenizer.parameters()).device))  # type: ignore[operator]
        found: dict[str, list[np.ndarray | SampleError]] = {"codes": [*codes.cpu().numpy()]}
        if self.latents:
            found["semantic"] = [*latents.float().cpu().numpy()]
        for name, encoder in (("identity", self.identity), ("semantic", self.semantic)):
            if encoder is not None:
                found[name] = _features(encoder, views, [samples[row].where for row in rows])
        for place, row in enumerate(rows):
            values = {name: each[place] for name, each in found.items()}
            wrong = next((each for each in values.values() if isinstance(each, SampleError)), None)
            made[row] = wrong or dataclasses.replace(made[row], **values)  # type: ignore[type-var]
        return made


def _features(encoder: Features, views: list[np.ndarray], wheres: list[str]) -> list[np.ndarray | SampleError]:
    """Of each picture, or why an encoder has none."""
    try:
        return [*encoder(views).float().cpu().numpy()]
    except UserError as error:
        if len(views) == 1:
            return [SampleError(wheres[0], str(error), corrupt=False)]
    return [_features(encoder, [view], [where])[0] for view, where in zip(views, wheres)]


def check_device(name: str, where: str) -> None:
    """UserError, with the config's key `where`, for a device that torch does not have; the device is not touched."""
    try:
        device = torch.device(name)
        there = (device.index or 0) < torch.get_device_module(device).device_count()
    except RuntimeError:  # torch knows none of that name
        there = False
    if not there:
        raise UserError(f"{where}: expected a device that torch has here, such as cpu, got {name!r}")


def face_frame(picture: np.ndarray, side: int) -> np.ndarray:
    """The largest face in the model's frame."""
    from unif2ace.data.identity import crop_face, find_face

    landmarks = find_face(picture)
    if landmarks is None:
        raise ValueError("no face is found in it")
    return crop_face(picture, landmarks, side)


def square_frame(picture: np.ndarray, side: int) -> np.ndarray:
    """The largest square in the middle."""
    height, width = picture.shape[:2]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    return resized(picture[top : top + edge, left : left + edge], side)


def load_image_tokenizer(folder: Path) -> tuple[Any, str]:
    """The image tokenizer of a checkpoint or an import, without the model beside it; and its fingerprint.

    Raises:
        UserError: it is missing or damaged.
    """
    from unif2ace.model.image_tokenizers import build_image_tokenizer

    config = read_json(folder / "config.json")
    described = config.get("image_tokenizer") if isinstance(config, dict) else None
    if not isinstance(described, dict) or not described:
        raise UserError(f"{folder} has no image tokenizer")
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with reading(path, "safetensors"), safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith("image_tokenizer.")]
            tensors |= {name.removeprefix("image_tokenizer."): file.get_tensor(name) for name in names}
    try:
        tokenizer = build_image_tokenizer(described)
        tokenizer.load_state_dict(tensors)
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{folder}: its image tokenizer cannot be read ({first_line(error)})") from error
    parts = [f"{name} {value.dtype}".encode() + value.contiguous().view(torch.uint8).numpy().tobytes()
             for name, value in sorted(tensors.items())]  # fmt: skip
    return tokenizer.float().eval().requires_grad_(False), digest(str(described).encode(), *parts)
