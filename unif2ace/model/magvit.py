"""MAGVIT-v2's image tokenizer as Show-o has it: 13 signs a 16 x 16 patch, no codebook to look up.

    [B, 3, 256, 256] -> residual blocks and 4 halvings -> attention -> [B, 13, 16, 16] -> signs -> and back

A code is the number whose binary digits are the signs, the first channel's the highest: sum_i [z_i > 0] 2^(bits-1-i).
(Yu et al., "Language model beats diffusion", arXiv 2310.05737; `image_tokenizer.ImageTokenizer`, which this can stand
in for, counts the first channel as the lowest digit.) Nothing in it knows the image's size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class MagvitConfig:
    """Sizes; the defaults are Show-o's.

    Attributes:
        side: of the image in pixels, a multiple of `patch`; the weights serve every side.
        bits: of a code. width: channels at full resolution.
        encoder, decoder: for each resolution, the full one first: multiple of `width`, residual blocks.
    """

    side: int = 256
    bits: int = 13
    width: int = 128
    encoder: tuple[tuple[int, int], ...] = ((1, 4), (2, 3), (2, 4), (4, 3), (4, 4))
    decoder: tuple[tuple[int, int], ...] = ((1, 4), (1, 4), (2, 3), (2, 4), (4, 3))

    @classmethod
    def from_dict(cls, values: dict) -> MagvitConfig:
        """The inverse of `dataclasses.asdict`; lists become tuples again."""
        levels = {name: tuple(map(tuple, values[name])) for name in ("encoder", "decoder") if name in values}
        return cls(**{**values, **levels})

    @property
    def patch(self) -> int:
        """Pixels a side that one code stands for."""
        return 2 ** (len(self.encoder) - 1)

    @property
    def grid(self) -> int:
        """Codes a side."""
        return self.side // self.patch

    @property
    def codes(self) -> int:
        return 2**self.bits


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


class Residual(nn.Module):
    """Two 3 x 3 convolutions with a skip, which is a 1 x 1 convolution where the channels change."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.first_norm, self.first = _norm(channels), nn.Conv2d(channels, out, 3, padding=1)
        self.second_norm, self.second = _norm(out), nn.Conv2d(out, out, 3, padding=1)
        self.skip = nn.Conv2d(channels, out, 1) if channels != out else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.first(F.silu(self.first_norm(x)))
        return self.skip(x) + self.second(F.silu(self.second_norm(y)))


class SelfAttention(nn.Module):
    """Single-head attention among all positions, with a skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = (
            _norm(channels),
            nn.Linear(channels, 3 * channels),
            nn.Linear(channels, channels),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(x).flatten(2).transpose(1, 2)).chunk(3, dim=-1)
        return x + self.out(F.scaled_dot_product_attention(q, k, v)).transpose(1, 2).view_as(x)


class Down(nn.Module):
    """Halve the resolution; padded on the right and below only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Double the resolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _middle(channels: int) -> list[nn.Module]:
    return [Residual(channels, channels), SelfAttention(channels), Residual(channels, channels)]


def _end(channels: int, out: int) -> list[nn.Module]:
    return [_norm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1)]


def _encoder(config: MagvitConfig) -> nn.Sequential:
    channels = config.width
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1)]
    for level, (multiple, blocks) in enumerate(config.encoder):
        if level:
            layers.append(Down(channels))
        for _ in range(blocks):
            layers.append(Residual(channels, multiple * config.width))
            channels = multiple * config.width
    layers += [*_middle(channels), *_end(channels, config.bits), nn.Conv2d(config.bits, config.bits, 1)]
    return nn.Sequential(*layers)


def _decoder(config: MagvitConfig) -> nn.Sequential:
    channels = config.decoder[-1][0] * config.width
    layers: list[nn.Module] = [nn.Conv2d(config.bits, config.bits, 1), nn.Conv2d(config.bits, channels, 3, padding=1)]
    layers += _middle(channels)
    for level, (multiple, blocks) in reversed(list(enumerate(config.decoder))):
        for _ in range(blocks):
            layers.append(Residual(channels, multiple * config.width))
            channels = multiple * config.width
        if level:
            layers.append(Up(channels))
    return nn.Sequential(*layers, *_end(channels, 3))


class Magvit(nn.Module):
    """See the module's text. Images are float [B, 3, side, side] in [-1, 1]."""

    def __init__(self, config: MagvitConfig) -> None:
        super().__init__()
        if len(config.encoder) != len(config.decoder):
            raise ValueError(f"decoder: expected {len(config.encoder)} levels as encoder, got {len(config.decoder)}")
        if config.side % config.patch:
            raise ValueError(f"side: expected a multiple of {config.patch}, got {config.side}")
        self.config = config
        self.encoder, self.decoder = _encoder(config), _decoder(config)

    def latents(self, images: torch.Tensor) -> torch.Tensor:
        """[B, bits, grid, grid] before quantisation.

        Raises:
            ValueError: images of another size.
        """
        side = self.config.side
        if images.dim() != 4 or images.shape[1:] != (3, side, side):
            raise ValueError(f"images: expected shape [B, 3, {side}, {side}], got {list(images.shape)}")
        return self.encoder(images)

    def render(self, signs: torch.Tensor) -> torch.Tensor:
        """Images from [B, bits, grid, grid] of -1 and 1; they may leave [-1, 1] a little."""
        return self.decoder(signs)

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes [B, grid^2] in [0, 2^bits), rows first, and the latents behind them as features [B, grid^2, bits]."""
        features = self.latents(images).flatten(2).transpose(1, 2)
        return ((features > 0) * self.powers).sum(-1), features

    @torch.no_grad()
    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """Images [B, 3, side, side] in [-1, 1] from codes [B, grid^2].

        Raises:
            ValueError: another number of codes.
        """
        grid = self.config.grid
        if codes.dim() != 2 or codes.shape[1] != grid * grid:
            raise ValueError(f"codes: expected shape [B, {grid * grid}], got {list(codes.shape)}")
        signs = self.code_signs(codes).transpose(1, 2).reshape(len(codes), -1, grid, grid)
        return self.render(signs).clamp(-1, 1)

    @property
    def powers(self) -> torch.Tensor:
        """[bits] what each sign adds to a code, the first channel's most."""
        return 2 ** torch.arange(self.config.bits, device=next(self.parameters()).device).flip(0)

    def code_signs(self, codes: torch.Tensor) -> torch.Tensor:
        """[..., bits] of -1 and 1 from codes [...]."""
        signs = (codes[..., None] // self.powers) % 2 * 2 - 1
        return signs.to(next(self.parameters()).dtype)
