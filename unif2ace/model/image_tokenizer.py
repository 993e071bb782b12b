"""Faces to discrete codes and back: a small autoencoder with lookup-free quantisation (LFQ).

Each patch's latent has `bits` channels; the signs are the code, code = sum_i [z_i > 0] 2^i, so that there is no
codebook to look up (Yu et al., "Language model beats diffusion", 2023). Encoder and decoder are convolutions at two
scales. Faces are aligned, so both also learn what each position usually holds (the `*_position` maps). 64 px, patch 8:

    [B, 3, 64, 64] -> unshuffle 4 -> [B, c, 16, 16] -> unshuffle 2 -> [B, C, 8, 8] -> [B, bits, 8, 8] -> signs
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class ImageTokenizerConfig:
    """Sizes.

    Attributes:
        side: of an image in pixels.
        bits: of a code.
        fine, coarse: channels at two positions a patch's side, and at one.
        blocks: residual blocks at one position a patch.
        patch: side of what a code stands for, in pixels.
    """

    side: int = 64
    bits: int = 10
    fine: int = 32
    coarse: int = 128
    blocks: int = 2
    patch: int = 8

    @property
    def grid(self) -> int:
        """Codes a side."""
        return self.side // self.patch

    @property
    def codes(self) -> int:
        return 2**self.bits


class Residual(nn.Module):
    """Two 3 x 3 convolutions with a skip; starts as the identity."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.silu(self.first(F.silu(self.norm(x)))))


class ImageTokenizer(nn.Module):
    """See the module's text. Images are float [B, 3, side, side] in [-1, 1]."""

    def __init__(self, config: ImageTokenizerConfig) -> None:
        super().__init__()
        if config.patch < 4 or config.patch % 4:
            raise ValueError(f"patch: expected a multiple of 4, got {config.patch}")
        if config.side < config.patch or config.side % config.patch:
            raise ValueError(f"side: expected a multiple of the patch, {config.patch}, got {config.side}")
        for name in ("fine", "coarse"):
            if getattr(config, name) < 8 or getattr(config, name) % 8:
                raise ValueError(f"{name}: expected a multiple of 8, got {getattr(config, name)}")
        self.config = config
        fine, coarse, bits, grid = config.fine, config.coarse, config.bits, config.grid
        self.encode_fine = nn.Sequential(nn.Conv2d(3 * (config.patch // 2) ** 2, fine, 3, padding=1), Residual(fine))
        self.encode_down = nn.Conv2d(4 * fine, coarse, 1)
        self.encode_position = nn.Parameter(torch.randn(coarse, grid, grid) * 0.02)
        self.encode_coarse = nn.Sequential(*(Residual(coarse) for _ in range(config.blocks)))
        self.to_bits = nn.Conv2d(coarse, bits, 1)
        self.from_bits = nn.Conv2d(bits, coarse, 3, padding=1)
        self.decode_position = nn.Parameter(torch.randn(coarse, grid, grid) * 0.02)
        self.decode_coarse = nn.Sequential(*(Residual(coarse) for _ in range(config.blocks)))
        self.decode_up = nn.Conv2d(coarse, 4 * fine, 1)
        self.decode_fine = nn.Sequential(Residual(fine), nn.SiLU(), nn.Conv2d(fine, 4 * fine, 1))
        self.to_pixels = nn.Conv2d(fine, 3 * (config.patch // 4) ** 2, 3, padding=1)

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """[B, bits, grid, grid] before quantisation."""
        x = F.pixel_unshuffle(images.contiguous(memory_format=torch.channels_last), self.config.patch // 2)
        x = F.pixel_unshuffle(self.encode_fine(x), 2)
        return self.to_bits(self.encode_coarse(self.encode_down(x) + self.encode_position))

    def render(self, signs: torch.Tensor) -> torch.Tensor:
        """Images from [B, bits, grid, grid] of -1 and 1."""
        x = self.from_bits(signs.contiguous(memory_format=torch.channels_last)) + self.decode_position
        x = F.pixel_shuffle(self.decode_up(self.decode_coarse(x)), 2)
        x = F.pixel_shuffle(self.decode_fine(x), 2)
        return F.pixel_shuffle(self.to_pixels(x), self.config.patch // 4)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [B, grid^2] in [0, 2^bits), rows first, and the latents behind them as features [B, grid^2, bits]."""
        features = self.latents(images).flatten(2).transpose(1, 2)
        return ((features > 0) * self.powers).sum(-1), features

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, side, side] in [-1, 1] from codes [B, grid^2]."""
        grid = self.config.grid
        signs = self.code_signs(codes).transpose(1, 2).reshape(len(codes), -1, grid, grid)
        return self.render(signs).clamp(-1, 1)

    @property
    def powers(self) -> torch.Tensor:
        """[bits] what each sign adds to a code."""
        return 2 ** torch.arange(self.config.bits, device=self.encode_position.device)

    def code_signs(self, codes: torch.Tensor) -> torch.Tensor:
        """[..., bits] of -1 and 1 from codes [...]."""
        return ((codes[..., None] // self.powers) % 2 * 2 - 1).float()

    def loss(self, images: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Training loss of a batch and its terms.

        Squared error of pixels and of their differences (edges), commitment to the signs, and LFQ's entropy terms bit
        by bit: each latent certain of its sign, each bit of each position used both ways over the batch.
        """
        z = self.latents(images).float()
        signs = torch.where(z > 0, 1.0, -1.0)
        out = self.render(z + (signs - z).detach()).float()
        pixels = F.mse_loss(out, images)
        edges = torch.stack([F.mse_loss(out.diff(dim=axis), images.diff(dim=axis)) for axis in (2, 3)]).sum()
        commitment = F.mse_loss(z, signs)
        chance = torch.sigmoid(4 * z)
        unsure, used = _bit_entropy(chance).mean(), _bit_entropy(chance.mean(0)).mean()
        loss = pixels + 0.5 * edges + 0.01 * commitment + 0.02 * (unsure - used)
        return loss, {"pixels": pixels.detach(), "edges": edges.detach(), "bits used": used.detach() / 0.6931}


def _bit_entropy(p: torch.Tensor) -> torch.Tensor:
    return -(p * torch.log(p + 1e-8) + (1 - p) * torch.log(1 - p + 1e-8))


def to_images(faces: torch.Tensor) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float [B, 3, H, W] in [-1, 1]."""
    return faces.permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_images`, clamped and rounded."""
    return ((images.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)
