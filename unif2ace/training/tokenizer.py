"""How an image tokenizer is trained on pictures, the demo's and those of `unif2ace init`."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from unif2ace.files import digest, replacing, write_json
from unif2ace.model import image_tokenizer
from unif2ace.model.image_tokenizer import ImageTokenizer, ImageTokenizerConfig, to_images, to_uint8
from unif2ace.model.magvit import Magvit
from unif2ace.parsing import reading
from unif2ace.training import loop
from unif2ace.training.loop import Schedule, fit
from unif2ace.training.recipe import TOKENIZER

LOG = "tokenizer_log.json"


@dataclass(frozen=True)
class TokenizerRecipe:
    """Attributes:
    steps: of training. batch: pictures of a step, half of them mirrored. lr: the peak of AdamW's learning rate.
    """

    steps: int = 1500
    batch: int = 16
    lr: float = 4e-3


def trained_image_tokenizer(
    pictures: Callable[[], np.ndarray],
    config: ImageTokenizerConfig,
    recipe: TokenizerRecipe,
    folder: Path,
    *,
    of: Any,
    seed: int,
    device: str = "cpu",
) -> tuple[ImageTokenizer, bool]:
    """The tokenizer that `folder` holds, or else one trained into it; and whether it was trained now.

    A training that was stopped goes on from the state that it left in the folder. The log lies in LOG.

    Args:
        pictures: gives [N, side, side, 3] uint8, asked for only if there is training to do.
        of: plain values that name the pictures: with the sizes, the recipe, the seed and this code, what a result in
            the folder is held against.

    Returns:
        The running average of the weights, on the CPU.

    Raises:
        UserError: a file of the folder is damaged or cannot be written, or the loss is no number.
        ValueError: sizes that cannot be.
    """
    torch.manual_seed(seed)
    tokenizer = ImageTokenizer(config)
    average = copy.deepcopy(tokenizer).eval()
    shaping = [dataclasses.asdict(config), dataclasses.asdict(recipe), seed, of]
    code: list[ModuleType | bytes] = [image_tokenizer, loop, Path(__file__).read_bytes()]
    name = digest(json.dumps(shaping, sort_keys=True).encode(), *code)
    path = folder / f"tokenizer-{name}.safetensors"
    if path.exists():
        with reading(path, "safetensors", "delete it to train it again"):
            weights = load_file(path)
        average.load_state_dict(weights)
        return average, False
    images = torch.from_numpy(pictures())
    tokenizer.to(device)
    average.to(device)

    def loss(step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rng = np.random.default_rng((seed, TOKENIZER, step))
        batch = to_images(images[rng.integers(len(images), size=recipe.batch)].to(device))
        if rng.random() < 0.5:
            batch = batch.flip(3)
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            return tokenizer.loss(batch)

    optimizer = torch.optim.AdamW(
        tokenizer.parameters(), lr=recipe.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    state = folder / "tokenizer_state.pt"
    log = fit(
        tokenizer, [optimizer], loss, Schedule(recipe.steps), state, name="tokenizer", fingerprint=name, ema=average
    )
    average.cpu()
    write_json(folder / LOG, log)
    for old in folder.glob("tokenizer-*.safetensors"):  # one tokenizer, the one that the log is of
        old.unlink()
    with replacing(path) as partial:
        partial.write_bytes(save(average.state_dict()))
    state.unlink()
    return average, True


def psnr(pictures: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Peak signal-to-noise ratio in dB, [N], of pictures [N, H, W, 3] uint8 against others."""
    error = ((pictures.astype(np.float64) - others) ** 2).mean((1, 2, 3))
    return 10 * np.log10(255**2 / error)


def reconstruction_psnr(tokenizer: ImageTokenizer | Magvit, pictures: np.ndarray, batch: int = 16) -> float:
    """Mean over pictures [N, side, side, 3] uint8 of their `psnr` through the codes."""
    found = []
    for start in range(0, len(pictures), batch):
        part = pictures[start : start + batch]
        again = to_uint8(tokenizer.decode(tokenizer.encode(to_images(torch.from_numpy(part)))[0]))
        found.append(psnr(part, again.numpy()))
    return float(np.concatenate(found).mean())
