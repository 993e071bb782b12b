"""Whole generation from captions: the loop with its model, against Show-o's published loop on the same weights.

The reference runs captions and images of both branches through all layers in every step, takes logits of every
position over the whole vocabulary, and then softmax, multinomial and sort. Ours reads the captions once
(`unif2ace.model.prefix`) and draws from the hidden states. That both have one law is shown in tests, where both give
the same codes for the same random numbers; here the results are only checked to be codes.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from unif2ace.configs import TokenMoEConfig, UniF2aceConfig, VocabularyConfig
from unif2ace.generation.image import PaintSettings, paint_codes
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.prefix import TextPrefix
from unif2ace.model.sequences import t2i_batch, t2i_prompts

from ..case import FORWARD, Baseline, Case, Outputs, Work, compiled

END, WORDS = 0, 27  # the demo's captions have 14 to 27 tokens

_BASE = UniF2aceConfig.base()
_SMALL = UniF2aceConfig.base(
    hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=2048,
    token_moe=TokenMoEConfig(experts=(4, 4), top_k=2, width=96, shared_width=0, dense=True),
)  # fmt: skip
_DEMO = UniF2aceConfig.tiny(VocabularyConfig(text=404, codes=1024))
_TINY = UniF2aceConfig.tiny(
    VocabularyConfig(text=40, codes=16), hidden_size=48, num_hidden_layers=1, image_tokens=8
)  # fmt: skip
# shape, model, faces, steps, source, devices
MODELS = [
    ("smoke", _TINY, 2, 2, "made up, tiny", ("cpu", "cuda")),
    ("demo", _DEMO, 16, 16, "the demo's model and steps, 16 faces", ("cpu", "cuda")),
    ("small-1x256", _SMALL, 1, 6, "base, a quarter as wide and deep: 129 text slots, 256 image tokens", ("cpu",)),
    ("base-16x256", _BASE, 16, 16, "the 1.8B shape, 256 px, 16 faces", ("cuda",)),
]


class Loops:
    """The model, its captions and both loops."""

    def __init__(
        self, config: UniF2aceConfig, faces: int, steps: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config, self.faces = config, faces
        with torch.device(device):
            self.model = UniF2aceForConditionalGeneration(config).to(dtype).eval()
        words = min(WORDS, config.text_slots - 3)
        texts = torch.randint(1, config.vocabulary.text, (faces, words)).tolist()
        self.captions = texts
        self.settings = PaintSettings(steps=steps, guidance=2.5, top_p=1.0)
        self.prompts = t2i_prompts([*texts, *[[]] * faces], END, config).to(device)
        self.start = torch.full((faces, config.image_tokens), config.vocabulary.mask, device=device)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Of both branches, every position and the whole vocabulary, float32."""
        batch = t2i_batch(self.prompts, ids.repeat(2, 1), self.config)
        dtype = self.model.head.weight.dtype
        features = {"semantic": batch.semantic.to(dtype), "identity": batch.identity.to(dtype)}
        return self.model(**vars(dataclasses.replace(batch, labels=None, **features))).logits.float()

    @torch.no_grad()
    def choose(self, logits: Tensor, ids: Tensor, ratio: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """Show-o's choice: (the whole prediction, the ids of the next step)."""
        vocabulary, length = self.config.vocabulary, self.config.image_tokens
        first, stop = vocabulary.code_range
        cond, uncond = logits.chunk(2)
        guidance = self.settings.guidance
        p = ((1 + guidance) * cond - guidance * uncond)[:, -(length + 1) : -1, first:stop].softmax(-1)
        drawn = torch.multinomial(p.flatten(0, 1), 1).view(ids.shape)
        unknown = ids == vocabulary.mask
        sample = torch.where(unknown, drawn + first, ids)
        chosen = p.gather(-1, drawn[..., None])[..., 0].masked_fill(~unknown, torch.finfo(torch.float32).max)
        count = torch.minimum(unknown.sum(-1, keepdim=True) - 1, (ratio * length).floor().long()).clamp(min=1)
        noise = -torch.log(-torch.log(torch.rand_like(chosen).clamp(1e-20, 1 - 2**-24)))
        confidence = chosen.clamp(min=1e-20).log() + temperature * noise
        mask = confidence < confidence.sort(-1).values.gather(1, count)
        return sample, torch.where(mask, vocabulary.mask, sample)

    def showo(self, choose) -> Outputs:
        """The published loop."""
        steps, ids, sample = self.settings.steps, self.start, self.start
        ratios = torch.cos(torch.arange(1, steps + 1, device=ids.device) / steps * math.pi * 0.5)
        temperature = 1.0
        for step in range(steps):
            temperature *= 1 - (step + 1) / steps
            sample, ids = choose(self.logits(ids), ids, ratios[step], temperature)
        return (sample - self.config.vocabulary.code_range[0],)

    def ours(self, **changes: bool) -> Outputs:
        settings = dataclasses.replace(self.settings, **changes)
        return (paint_codes(self.model, self.captions, END, settings),)

    def backbone(self) -> Outputs:
        """The captions and the model's steps of ours, nothing drawn."""
        prefix = TextPrefix(self.model, self.prompts)
        return [prefix.image_hidden(self.start) for _ in range(self.settings.steps)][-1:]

    def error(self, outputs: Outputs) -> float:
        (codes,) = outputs
        right = codes.shape == self.start.shape and codes.min() >= 0 and codes.max() < self.config.vocabulary.codes
        return 0.0 if right else math.inf


def _work(config: UniF2aceConfig, faces: int, steps: int, dtype: torch.dtype, device: torch.device) -> Work:
    loops = Loops(config, faces, steps, dtype, device)
    choose = compiled(loops.choose)
    baselines = {
        "Show-o's loop": Baseline(lambda: loops.showo(loops.choose)),
        "Show-o's loop, torch.compile": Baseline(lambda: loops.showo(choose), compiles=True)
        if device.type == "cuda"
        else Baseline(None, missing="the model takes the time, which is not compiled: see sampling.step"),
        "of ours, the model alone": Baseline(loops.backbone, rate_only=True),
    }
    if device.type == "cuda":
        baselines["ours, a CUDA graph a step"] = Baseline(lambda: loops.ours(cuda_graph=True))
    return Work(ours=loops.ours, baselines=baselines, error=loops.error, tolerance=0.0)


def _weights_of_a_token(config: UniF2aceConfig) -> float:
    """Of the layers: attention and the experts that a token uses."""
    moe = config.token_moe
    width = (config.intermediate_size if moe is None or moe.dense else 0) + (
        0 if moe is None else moe.top_k * moe.width + moe.shared_width
    )
    return config.num_hidden_layers * (4.0 * config.hidden_size**2 + 2.0 * config.hidden_size * width)


def _cases() -> Iterator[Case]:
    for shape, config, faces, steps, source, devices in MODELS:
        tokens = 2.0 * faces * (config.image_tokens + 2) * steps
        masked = sum(math.cos(math.pi * step / (2 * steps)) for step in range(steps)) * faces * config.image_tokens
        head = masked * config.hidden_size * config.vocabulary.codes
        weights = _weights_of_a_token(config)
        sizes = {
            "B": faces, "N": config.image_tokens, "text": config.text_slots, "T": steps, "D": config.hidden_size,
            "layers": config.num_hidden_layers, "V": config.vocabulary.size, "codes": config.vocabulary.codes,
        }  # fmt: skip
        for dtype in (torch.float32, torch.bfloat16) if shape == "smoke" else (torch.float32,):
            if shape.startswith("base"):
                dtype = torch.bfloat16
            yield Case(
                "sampling.generate", shape, sizes, source, FORWARD, dtype, 2.0 * (tokens * weights + head),
                steps * (weights + config.hidden_size * config.vocabulary.codes) * dtype.itemsize,
                lambda device, config=config, faces=faces, steps=steps, dtype=dtype: _work(
                    config, faces, steps, dtype, device
                ),
                devices, shape == "smoke",
            )  # fmt: skip


CASES = list(_cases())
