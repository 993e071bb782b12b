"""Frozen features that attribute heads stand on: an encoder's, or the latents of a checkpoint's image tokenizer.

    sface, arcface-mbf, antelopev2:PATH   one vector of identity
    clip:PATH, open-clip:PATH             the class token and the mean of the others
    tokens:CHECKPOINT                     the latents before quantisation, at every place

Identity vectors are made to forget expression and dress: take CLIP's, or the tokenizer's, for those.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from unif2ace.encoders import IDENTITY, KINDS, FaceCountError, FeatureCache, encoder
from unif2ace.errors import UserError
from unif2ace.files import digest
from unif2ace.pictures import resized

TOKENS = "tokens"
_BATCH = 64
_PART = 16  # pictures that are encoded again where one of them shows no face


class Features:
    """Pictures to one vector each.

    Args:
        kind: as in the module's text.
        device: where it computes; vectors come to the CPU.
        cache: folder where an encoder's features are kept; those of a tokenizer are quick and are not.
        framed: pictures stand in the frame of this project's synthetic faces: identity encoders then search for none.

    Attributes:
        fingerprint: of weights and preparation. A head that was trained on other ones is refused.
    """

    def __init__(
        self, kind: str, device: str | torch.device = "cpu", cache: Path | None = None, framed: bool = False
    ) -> None:
        self.kind, self._device = kind, torch.device(device)
        name, _, path = kind.partition(":")
        if name == TOKENS and path:
            self._tokenizer, self.fingerprint = _tokenizer(Path(path), self._device)
            return
        if name not in KINDS:
            known = ", ".join((*KINDS, f"{TOKENS}:CHECKPOINT"))
            raise UserError(f"features: expected one of {known}, got {kind!r}")
        options: dict = {}
        if name in IDENTITY:
            from unif2ace.data.identity import FRAME

            options = {"frame": FRAME} if framed else {"largest": True}
        self._tokenizer = None
        self._encoder = encoder(kind, device=self._device, **options)
        self._cache = FeatureCache(cache) if cache else None
        self.fingerprint = self._encoder.fingerprint

    def __call__(self, images: Sequence[np.ndarray]) -> tuple[torch.Tensor, list[int]]:
        """Vectors of pictures [H, W, 3] uint8 RGB.

        Returns:
            [M, D] float32 and the M <= N indices of the pictures they are of: without those where no face is found.
        """
        if self._tokenizer is not None:
            return self._latents(images), list(range(len(images)))
        parts, kept = [], []
        for start in range(0, len(images), _PART):
            found, rows = self._encoded(images[start : start + _PART])
            parts += [found] if rows else []
            kept += [start + row for row in rows]
        return torch.cat(parts) if parts else torch.empty(0, 0), kept

    def _encoded(self, images: Sequence[np.ndarray]) -> tuple[torch.Tensor, list[int]]:
        rows = list(range(len(images)))
        while rows:
            given = [images[row] for row in rows]
            try:
                found = self._cache(self._encoder, given) if self._cache else self._encoder(given)
            except FaceCountError as error:
                del rows[error.index]
                continue
            found = found.float().cpu()
            return found if found.ndim == 2 else torch.cat([found[:, 0], found[:, 1:].mean(1)], 1), rows
        return torch.empty(0, 0), rows

    @torch.no_grad()
    def _latents(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        from unif2ace.model.image_tokenizer import to_images

        side, parts = self._tokenizer.config.side, []
        for start in range(0, len(images), _BATCH):
            batch = torch.from_numpy(np.stack([resized(each, side) for each in images[start : start + _BATCH]]))
            parts.append(self._tokenizer.encode(to_images(batch.to(self._device)))[1].flatten(1).float().cpu())
        return torch.cat(parts) if parts else torch.empty(0, 0)


def _tokenizer(folder: Path, device: torch.device):
    """A checkpoint's image tokenizer and a fingerprint of its weights."""
    from unif2ace.checkpoint import Checkpoint

    tokenizer = Checkpoint.load(folder).image_tokenizer.float().to(device).eval()
    weights = b"".join(value.cpu().numpy().tobytes() for _, value in sorted(tokenizer.state_dict().items()))
    return tokenizer, digest(weights, type(tokenizer).__name__.encode())
