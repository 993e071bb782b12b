"""Masked-diffusion sampling: draw, re-mask, and the loop. See README.md beside this file."""

from .ops import remask, sample_from_hidden, sample_from_logits
from .sampler import MaskedDiffusionSampler, Step

__all__ = ["MaskedDiffusionSampler", "Step", "remask", "sample_from_hidden", "sample_from_logits"]
