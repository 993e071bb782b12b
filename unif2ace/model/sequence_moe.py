"""Grouped sequence-level mixture of experts over one sample's image tokens.

    t2i   {copy, zero, noise, copy}        mmu   {CLIP, face, copy, copy}

    E_copy(x) = x     E_zero(x) = 0     E_s(x) = w_s x + (1 - w_s) S(F_s)     for s in noise, CLIP, face

F is a frozen encoder's output (for noise: the embedded noise level) and S a resampler to the image's length. A router
reads the mean of the sample's image tokens and takes top-K of its task's four experts. The chosen experts' sum is
linear in x and in the resampled features, so it is one pass, y = a x + sum_k c_k S_k: `unif2ace_kernels.moe.mix`.
S depends on the sample alone, so it is computed once a forward pass and shared by the layers; routers and gates w are
each layer's own.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from unif2ace.configs import UniF2aceConfig
from unif2ace.model.attention import attend
from unif2ace.model.sequences import Layout
from unif2ace_kernels import moe

EXPERTS = (("copy", "zero", "noise", "copy"), ("clip", "face", "copy", "copy"))
NOISE, CLIP, FACE = range(3)
_INJECTED = {"noise": NOISE, "clip": CLIP, "face": FACE}


class Resampler(nn.Module):
    """Features [B, S, C] to [B, length, hidden]: learned queries attend to the projected features (Perceiver style).

    A single feature vector (S = 1: an identity embedding, a noise level) first becomes `latents` key/value tokens.
    """

    def __init__(self, channels: int, hidden: int, heads: int, length: int, latents: int, *, single: bool) -> None:
        super().__init__()
        self.heads, self.latents = heads, latents if single else 1
        self.project = nn.Linear(channels, self.latents * hidden)
        self.norm = nn.LayerNorm(hidden)
        self.queries = nn.Parameter(torch.randn(length, hidden) * 0.02)
        self.key_value = nn.Linear(hidden, 2 * hidden)
        self.out = nn.Linear(hidden, hidden)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        rows, hidden = features.shape[0], self.queries.shape[1]
        features = features.to(self.project.weight.dtype)
        tokens = self.norm(self.project(features).view(rows, features.shape[1] * self.latents, hidden))
        k, v = (
            self.key_value(tokens).view(*tokens.shape[:2], 2, self.heads, hidden // self.heads).permute(2, 0, 3, 1, 4)
        )
        q = self.queries.to(k.dtype).view(-1, self.heads, hidden // self.heads).transpose(0, 1).expand(rows, -1, -1, -1)
        return self.out(attend(q, k, v).transpose(1, 2).flatten(2))


class NoiseLevel(nn.Module):
    """Sinusoidal embedding of the masked share m in (0, 1], [B] to [B, 1, channels], float32."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, mask_prob: torch.Tensor) -> torch.Tensor:
        exponent = torch.linspace(0.0, math.log(1000.0), self.channels // 2, device=mask_prob.device)
        angle = mask_prob[:, None].float() * exponent.exp()
        return torch.cat([angle.sin(), angle.cos()], dim=-1)[:, None]


class Injection(nn.Module):
    """S(F) of the noise, CLIP and face experts for all rows with an image: [R, 3, N, D], zeros where a task has none.

    Only the rows of a task run through its resamplers.
    """

    def __init__(self, config: UniF2aceConfig) -> None:
        super().__init__()
        moe_config = config.sequence_moe
        if moe_config is None:
            raise ValueError("config.sequence_moe: expected a SequenceMoEConfig, got None")

        def resampler(channels: int, single: bool) -> Resampler:
            return Resampler(
                channels,
                config.hidden_size,
                config.num_attention_heads,
                config.image_tokens,
                moe_config.latents,
                single=single,
            )

        self.level = NoiseLevel()
        self.noise = resampler(self.level.channels, True)
        self.clip = resampler(config.semantic, False) if moe_config.clip else None
        self.face = resampler(config.identity, True) if moe_config.face else None

    def forward(
        self, layout: Layout, mask_prob: torch.Tensor, identity: torch.Tensor, semantic: torch.Tensor
    ) -> torch.Tensor:
        """mask_prob [R], identity [R, C_id] and semantic [R, S, C_sem] of the rows with an image."""
        t2i, mmu = layout.t2i, layout.mmu
        parts = [(NOISE, t2i, self.noise, self.level(mask_prob[t2i]))]
        if self.clip is not None:
            parts.append((CLIP, mmu, self.clip, semantic[mmu]))
        if self.face is not None:
            parts.append((FACE, mmu, self.face, identity[mmu, None]))
        done = [(slot, rows, resample(features)) for slot, rows, resample, features in parts]
        like = done[0][2]
        out = like.new_zeros(len(mask_prob), 3, *like.shape[1:])
        for slot, rows, resampled in done:
            out = out.index_put((rows, torch.full_like(rows, slot)), resampled.to(out.dtype))
        return out


class SequenceMoE(nn.Module):
    """One layer's router and gates; see the module's text."""

    keeps: torch.Tensor
    injects: torch.Tensor

    def __init__(self, config: UniF2aceConfig) -> None:
        super().__init__()
        moe_config = config.sequence_moe
        if moe_config is None:
            raise ValueError("config.sequence_moe: expected a SequenceMoEConfig, got None")
        self.top_k, self.balance = moe_config.top_k, moe_config.balance
        missing = {name for name in ("clip", "face") if not getattr(moe_config, name)}
        names = [["copy" if name in missing else name for name in group] for group in EXPERTS]
        self.group_sizes = tuple(len(group) for group in names)
        flat = [name for group in names for name in group]
        self.names = flat
        self.norm = nn.LayerNorm(config.hidden_size)
        self.router = nn.Linear(config.hidden_size, len(flat))
        self.gate = nn.Parameter(torch.zeros(3))  # w_s = sigmoid(gate_s)
        self.register_buffer("keeps", torch.empty(len(flat)), persistent=False)  # [E] whether the expert copies
        self.register_buffer("injects", torch.empty(len(flat), 3), persistent=False)  # [E, 3] what it brings in
        self.fill_buffers()

    @torch.no_grad()
    def fill_buffers(self) -> None:
        """Write what the experts' names say; they may have been made without memory."""
        rows = [[float(_INJECTED.get(name) == slot) for slot in range(3)] for name in self.names]
        self.keeps.copy_(torch.tensor([float(name == "copy") for name in self.names]))
        self.injects.copy_(torch.tensor(rows))

    @torch.no_grad()
    def start_as_identity(self) -> None:
        """Become y = x, exactly, to train on from there: every sample is routed to its task's copies, in equal parts.

        The router's weight is zero and its bias puts the copies 1 above the other experts. Among copies the
        task's loss cannot tell, so it is the balance loss that lowers their share until the others are chosen too.

        Raises:
            ValueError: top_k is larger than the number of copies, so that others would be chosen.
        """
        copies = int(self.keeps.view(len(self.group_sizes), -1).sum(1).min())
        if self.top_k > copies:
            raise ValueError(f"top_k: expected at most {copies}, the copies of each task, got {self.top_k}")
        self.router.weight.zero_()
        self.router.bias.copy_(self.keeps)

    def forward(self, x: torch.Tensor, task: torch.Tensor, injected: torch.Tensor) -> tuple[torch.Tensor, moe.Routing]:
        """x [B, N, D] image tokens, task [B], injected [B, 3, N, D] -> ([B, N, D], the layer's routing)."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        with torch.autocast(x.device.type, enabled=False):  # a choice between experts is made in full precision
            mean = self.norm(x.mean(dim=1, dtype=dtype).to(self.norm.weight.dtype))
            logits = self.router(mean).to(dtype)
        routing = moe.route(logits, task, self.group_sizes, self.top_k, balance_coef=self.balance)
        weight = torch.zeros_like(logits).scatter(1, routing.expert, routing.weight)
        gate = torch.sigmoid(self.gate.to(dtype))
        # Products and sums, since autocast would round a matrix product's coefficients: two copies must make one x.
        each = torch.cat([(self.keeps + (self.injects * gate).sum(1))[:, None], self.injects * (1 - gate)], dim=1)
        coef = (weight[:, :, None] * each).sum(1)
        return moe.mix(x, coef, injected.to(x.dtype)), routing
