"""CLIP's vision tower as semantic features: every token of its last layer but one.

The last layer but one, because that is what LLaVA and Show-o's CLIP variant read: the last is bent towards the one
vector that is compared with text. The class token stays (those two drop it): the resampler reads a set of any length,
and it costs one of 577 for ViT-L/14 at 336 pixels.

transformers runs it by default. open_clip needs torchvision, which must match torch's build: the extra `[clip]`.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from unif2ace import checksums
from unif2ace.encoders import base
from unif2ace.encoders.base import Encoder
from unif2ace.errors import UserError
from unif2ace.files import digest, read_json
from unif2ace.importers.weights import Weights
from unif2ace.parsing import parsing

LICENCE = "MIT (as published at openai/clip-vit-large-patch14-336)"
OPEN_LICENCE = "MIT (as OpenCLIP's are published; other collections have their own)"
# OpenAI's, for a folder that does not say
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class _VisionTower(Encoder):
    """What both backends share: files checked first, pictures prepared alike, one layer's tokens.

    Args:
        path: the folder of the weights and their config.
        layer: which layer's output, from the end: -2 is the last but one.
        dtype: of the computation.
        batch: pictures computed at once.
        sha256: file name to sum; see `checksums.check`.
        allow_pickle: read a .bin file, which is a pickle, where there is no .safetensors.

    Raises:
        UserError: the folder or a file is missing or damaged, or holds another model.
    """

    config_name: str
    published: str
    layers: int
    _processor: Any
    _model: Any

    def __init__(
        self,
        path: Path,
        device: str | torch.device = "cpu",
        *,
        layer: int = -2,
        dtype: torch.dtype = torch.float32,
        batch: int = 16,
        sha256: Mapping[str, str] | None = None,
        allow_pickle: bool = False,
    ) -> None:
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"{self.name}: there is no folder {path}; weights are read from your own copy")
        weights = Weights(path, allow_pickle=allow_pickle)
        if not (path / self.config_name).is_file():
            raise UserError(f"{path / self.config_name} is missing: copy the whole folder")
        files = [*weights.files, path / self.config_name]
        files += [each for each in [path / "preprocessor_config.json"] if each.is_file()]
        self.checked = checksums.check(files, sha256)
        self.licence = weights.licence(self.published)
        self.device, self.dtype, self.layer, self.batch = torch.device(device), dtype, layer, batch
        self._model = self._load(path, weights).to(self.device, dtype).requires_grad_(False).eval()
        if not -self.layers <= layer <= -1:
            raise ValueError(f"layer: expected -{self.layers} to -1, got {layer}")
        sums = " ".join(map(checksums.sha256, files)).encode()
        self.fingerprint = digest(sums, f"{layer} {dtype}".encode(), sys.modules[__name__], base)

    @abstractmethod
    def _load(self, path: Path, weights: Weights) -> torch.nn.Module:
        """The tower; sets `layers`, `tokens`, `channels` and `_processor`."""

    @abstractmethod
    def _tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        """[B, S, C] of prepared pictures [B, 3, side, side]."""

    def _encode(self, images: Sequence[np.ndarray] | np.ndarray, first: int) -> torch.Tensor:
        pixels = self._processor(images=list(images), return_tensors="pt", input_data_format="channels_last")
        return self._tokens(pixels["pixel_values"].to(self.device, self.dtype))

    def _sizes(self, side: int, patch: int, layers: int, channels: int) -> None:
        self.layers, self.channels, self.tokens = layers, channels, (side // patch) ** 2 + 1


class Clip(_VisionTower):
    """Through transformers: a folder of a CLIPModel or CLIPVisionModel."""

    name, config_name, published = "clip", "config.json", LICENCE

    def _load(self, path: Path, weights: Weights) -> torch.nn.Module:
        with _quiet():
            from transformers import CLIPVisionConfig, CLIPVisionModel
            from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

            described = read_json(path / self.config_name)
            if not isinstance(described, dict) or not str(described.get("model_type", "")).startswith("clip"):
                raise UserError(f"{path / self.config_name} is not of a CLIP: expected model_type clip")
            with parsing(lambda why: UserError(f"{path} cannot be read as a CLIP ({why})")):
                config: Any = CLIPVisionConfig.from_pretrained(path, local_files_only=True)
                model, found = cast(Any, CLIPVisionModel).from_pretrained(
                    path,
                    config=config,
                    local_files_only=True,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # they are told below
                    use_safetensors=weights.files[0].suffix == ".safetensors",
                    dtype=torch.float32,
                )
                self._processor = (
                    CLIPImageProcessorPil.from_pretrained(path, local_files_only=True)
                    if (path / "preprocessor_config.json").is_file()
                    else _processor(config.image_size)
                )
        wrong = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
        if wrong:
            raise UserError(
                f"{path} is not the CLIP that its config describes: {len(wrong)} tensors missing or of another shape "
                f"({', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''})"
            )
        self._sizes(config.image_size, config.patch_size, config.num_hidden_layers, config.hidden_size)
        return model

    def _tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        return self._model(pixels, output_hidden_states=True).hidden_states[self.layer]


class OpenClip(_VisionTower):
    """Through open_clip: a folder with open_clip_config.json and open_clip_model.safetensors."""

    name, config_name, published = "open-clip", "open_clip_config.json", OPEN_LICENCE

    def _load(self, path: Path, weights: Weights) -> torch.nn.Module:
        try:
            import open_clip
        except (ImportError, RuntimeError) as error:  # a torchvision of another torch's build raises RuntimeError
            raise UserError(
                f"open-clip cannot be used ({error}): it imports torchvision, which must be of this torch's build; "
                "pip install 'unif2ace[clip]' torchvision, or take the encoder clip"
            ) from error
        described = read_json(path / self.config_name)
        model: Any
        with parsing(lambda why: UserError(f"{path} cannot be read as an OpenCLIP ({why})")):
            model = open_clip.create_model(f"local-dir:{path}", load_weights=False, precision="fp32").visual
            side, preparation = described["model_cfg"]["vision_cfg"]["image_size"], described.get("preprocess_cfg", {})
        if not hasattr(model, "forward_intermediates") or not hasattr(model, "patch_size"):
            raise UserError(f"{path} has a vision tower that is no plain transformer: {type(model).__name__}")
        wanted = {f"visual.{name}": tuple(value.shape) for name, value in model.state_dict().items()}
        weights.check(wanted, "the OpenCLIP that its config describes", ("transformer.", *_TEXT))
        model.load_state_dict({name: weights[f"visual.{name}"].float() for name in model.state_dict()})
        self._processor = _processor(side, preparation.get("mean", MEAN), preparation.get("std", STD))
        self._sizes(side, model.patch_size[0], model.transformer.layers, model.conv1.out_channels)
        return model

    def _tokens(self, pixels: torch.Tensor) -> torch.Tensor:
        found = self._model.forward_intermediates(
            pixels, indices=[self.layers + self.layer], intermediates_only=True, output_fmt="NLC",
            output_extra_tokens=True,
        )  # fmt: skip
        return torch.cat([found["image_intermediates_prefix"][0], found["image_intermediates"][0]], dim=1)


# an OpenCLIP's tensors that are not its vision tower's
_TEXT = ("text.", "token_embedding.", "positional_embedding", "text_projection", "ln_final.", "logit_", "attn_mask")


def _processor(side: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD):
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    square = {"height": side, "width": side}
    return CLIPImageProcessorPil(
        size={"shortest_edge": side}, crop_size=square, image_mean=list(mean), image_std=list(std)
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws a bar over its loading and lists the text tower's tensors: neither is news here."""
    from transformers.utils import logging as transformers_logging

    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
