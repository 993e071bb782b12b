"""The loop of masked-diffusion sampling: predict every masked token, keep some, mask the rest again.

Design choices
- Draws are functions of (seed, step, global row, code), never of the batch: a sample alone, in a batch or in a part
  of one is the same sample.
- The defaults do what MaskGIT's paper says. Where public code departs from it, the departure has a name, a field of
  `MaskedDiffusionSampler`; `MaskedDiffusionSampler.showo` sets them all, which reproduces Show-o step for step.
- Tokens that are given are never changed, unless `known="showo"` asks for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .._checks import expect, expect_choice, expect_tensor
from .._philox import REMASK_STREAM, uniform, words_at
from .ops import remask, sample_from_hidden, sample_from_logits

Tensor = torch.Tensor

# The share of tokens that stays masked when a share r of the steps is done; 1 at r = 0, 0 at r = 1.
SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda r: math.cos(math.pi / 2 * r),
    "linear": lambda r: 1 - r,
    "square": lambda r: 1 - r * r,
    "cubic": lambda r: 1 - r**3,
}
POLICIES = {"confidence": "log_prob", "entropy": "neg_entropy", "margin": "margin", "random": "log_prob"}
SHOWO_QUIRKS = dict.fromkeys(("temperature_mode", "ties", "known", "counts", "last_step", "confidence_floor"), "showo")
_SHOWO_KNOWN_CONFIDENCE = math.log(torch.finfo(torch.float32).max)
_SHOWO_FLOOR = math.log(1e-20)


@dataclass(frozen=True)
class Step:
    """What a callback is shown after a step.

    Attributes:
        index: 0, 1, ... of `steps`.
        ids: [B, N] as the next step will see them, masked positions at mask_id.
        sample: [B, N] the step's whole prediction: a code at every position.
        confidence: [B, N] of the prediction; +inf where the token was known before the step. (Under the policy
            "random" only the tokens that the step keeps are drawn: `sample` is `ids`.)
    """

    index: int
    steps: int
    ids: Tensor
    sample: Tensor
    confidence: Tensor


@dataclass(frozen=True)
class MaskedDiffusionSampler:
    """Sample image tokens from a masked-diffusion model.

    Attributes:
        step_fn: ``step_fn(ids [B, N], step)`` gives the two branches ``(cond, uncond)``, or one tensor: hidden
            states [B, N, D] where `head` is given, else logits [B, N, V]. uncond may be None at guidance 0.
        steps: T, the number of model calls at most (the loop ends early when no token is left to draw).
        mask_id: the id of a masked position.
        head: (weight [V, D], bias [V] or None) of the linear head, or None when `step_fn` gives logits.
        code_range: (first, stop), the head's columns that are image codes; all of them when None.
        schedule: a name of `SCHEDULES`, or a function from the share of steps done to the share still masked.
        policy: which tokens a step keeps.
            "confidence": MaskGIT, the highest log-probability of the drawn code.
            "entropy": the lowest entropy of the guided law. "margin": the largest lead of the first code over the
            second. "random": each masked token stays masked with probability m(next) / m(now), independently of its
            value: the reverse process of absorbing diffusion under the schedule m, exactly; only the tokens that
            are kept get drawn.
        guidance, temperature, top_k, top_p: of the draw, as in `sample_from_logits`.
        remask_temperature: tau, of the Gumbel noise on the confidence (not used by "random").
        temperature_mode: at step s of T, "maskgit": tau (1 - (s+1)/T); "showo": compounds, the product of
            (1 - (i+1)/T) over i <= s.
        ties: "index" masks the exact count; "showo" under-masks when confidences are equal.
        known: "keep" never masks a known token; "showo" ranks it at log(float32 max) = 88.7 plus noise among the
            others, so it can be masked, and then redrawn.
        counts: "exact": floor(M m((s+1)/T)) of the M tokens that a sample had masked at the start, at most one less
            than it has now, at least zero; "showo": of all N tokens, in float32 (its cos(pi/3) is below 1/2), at
            most one less than it has now, at least one.
        last_step: "finish" masks none after the last step; "showo" masks again, then returns the whole prediction.
        confidence_floor: "none", or "showo": log p is not below log(1e-20).
    """

    step_fn: Callable[[Tensor, int], Any] = field(repr=False)
    steps: int
    mask_id: int
    head: tuple[Tensor, Tensor | None] | None = field(default=None, repr=False)
    code_range: tuple[int, int] | None = None
    schedule: str | Callable[[float], float] = "cosine"
    policy: str = "confidence"
    guidance: float = 0.0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    remask_temperature: float = 1.0
    temperature_mode: str = "maskgit"
    ties: str = "index"
    known: str = "keep"
    counts: str = "exact"
    last_step: str = "finish"
    confidence_floor: str = "none"

    def __post_init__(self) -> None:
        expect(isinstance(self.steps, int) and self.steps >= 1, "steps", "an int >= 1", repr(self.steps))
        if not callable(self.schedule):
            expect_choice(self.schedule, "schedule", tuple(SCHEDULES))
        for name, choices in (
            ("policy", tuple(POLICIES)), ("temperature_mode", ("maskgit", "showo")), ("ties", ("index", "showo")),
            ("known", ("keep", "showo")), ("counts", ("exact", "showo")), ("last_step", ("finish", "showo")),
            ("confidence_floor", ("none", "showo")),
        ):
            expect_choice(getattr(self, name), name, choices)
        temperature = self.remask_temperature
        expect(0 <= temperature < math.inf, "remask_temperature", "a finite number >= 0", temperature)

    @classmethod
    def showo(cls, step_fn: Callable[[Tensor, int], Any], steps: int, mask_id: int, **fields) -> MaskedDiffusionSampler:
        """Show-o's public sampler, every quirk on: the same ids and masks at every step for the same random numbers.

        Its one trait that is left out is outside the sample: it edits the caller's ids in place.
        """
        return cls(step_fn, steps, mask_id, **{**SHOWO_QUIRKS, **fields})

    def masked_share(self, done: int) -> float:
        """m: the share of tokens still masked when `done` of the steps are done; 1 at 0, 0 at the end."""
        if done in (0, self.steps):
            return 1.0 - done / self.steps
        schedule = SCHEDULES[self.schedule] if isinstance(self.schedule, str) else self.schedule
        return float(schedule(done / self.steps))

    def noise_temperature(self, step: int) -> float:
        """The temperature of the noise on the confidences at `step`."""
        if self.temperature_mode == "maskgit":
            return self.remask_temperature * (1 - (step + 1) / self.steps)
        return self.remask_temperature * math.prod(1 - (i + 1) / self.steps for i in range(step + 1))

    def masked_counts(self, step: int, unknown: Tensor, at_start: Tensor) -> Tensor:
        """How many tokens [B] to mask after `step`: of [B, N] now unknown, and [B] unknown at the start."""
        now = unknown.sum(-1)
        if self.counts == "exact":
            # In float64 and 1e-9 up, so that a share such as 1 - 1/3 does not lose a token to its last bit.
            wanted = (at_start.double() * self.masked_share(step + 1) + 1e-9).floor().long()
            return torch.minimum(wanted, now - 1).clamp(min=0)
        ratio = torch.tensor((step + 1) / self.steps, dtype=torch.float32)
        if self.schedule == "cosine":
            share = torch.cos(ratio * math.pi * 0.5)
        else:
            share = torch.tensor(self.masked_share(step + 1), dtype=torch.float32)
        wanted = (unknown.shape[-1] * share).floor().long()
        return (now - 1).clamp(max=wanted.to(now.device)).clamp(min=1)

    @torch.no_grad()
    def __call__(
        self, ids: Tensor, *, seed: Tensor | int = 0, offset: Tensor | int = 0, rows: Tensor | None = None,
        callback: Callable[[Step], None] | None = None,
    ) -> Tensor:
        """Fill the masked positions of `ids`.

        Args:
            ids: [B, N] int64, `mask_id` where a token is to be drawn. Any other id is known: a token to keep
                (in-painting), or padding, in a batch of samples of several lengths. Not changed.
            seed: names the sample. offset: of the first step; step s uses offset + s.
            rows: [B, N] global row indices where `ids` is a part of a larger batch (see `sample_from_logits`).
            callback: called with a `Step` after each step.

        Returns:
            [B, N] int64 with every masked position drawn.

        Raises:
            ValueError: names the argument; also when `step_fn` gave a position no finite distribution to draw from.
        """
        expect_tensor(ids, "ids", shape=("B", "N"), dtypes=[torch.int64])
        if rows is None:
            rows = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        at_start = (ids == self.mask_id).sum(-1)
        sample = ids
        for step in range(self.steps):
            unknown = ids == self.mask_id
            if not unknown.any() and self.known == "keep":
                break
            if self.policy == "random":
                ids, sample, confidence = self._random_step(step, ids, unknown, seed, offset + step, rows)
            else:
                sample, confidence = self._predict(step, ids, unknown, seed, offset + step, rows)
                masked = self._masked(step, unknown, at_start, confidence, seed, offset + step, rows)
                ids = torch.where(masked, self.mask_id, sample)
            if callback is not None:
                callback(Step(step, self.steps, ids, sample, confidence))
        left = int((sample == self.mask_id).sum())
        expect(left == 0, "step_fn", "logits with a finite largest at every position", f"{left} positions without")
        return sample.clone()

    def _predict(self, step, ids, unknown, seed, offset, rows) -> tuple[Tensor, Tensor]:
        """A code at every unknown position, and the policy's confidence in it."""
        out = self.step_fn(ids, step)
        cond, uncond = (out, None) if isinstance(out, Tensor) else out
        draw = {
            "code_range": self.code_range, "guidance": self.guidance, "temperature": self.temperature,
            "top_k": self.top_k, "top_p": self.top_p, "seed": seed, "offset": offset, "rows": rows,
            "unknown": unknown, "confidence": POLICIES[self.policy],
        }
        if self.head is None:
            return sample_from_logits(cond, uncond, ids, self.mask_id, **draw)
        return sample_from_hidden(cond, uncond, *self.head, ids, self.mask_id, **draw)

    def _masked(self, step, unknown, at_start, confidence, seed, offset, rows) -> Tensor:
        """The positions that the next step draws again."""
        if step == self.steps - 1 and self.last_step == "finish":
            return torch.zeros_like(unknown)
        if self.confidence_floor == "showo":
            confidence = confidence.clamp(min=_SHOWO_FLOOR)
        candidates = unknown
        if self.known == "showo":
            confidence = confidence.masked_fill(~unknown, _SHOWO_KNOWN_CONFIDENCE)
            candidates = torch.ones_like(unknown)
        count = self.masked_counts(step, unknown, at_start)
        return remask(
            confidence, candidates, count, self.noise_temperature(step), seed=seed, offset=offset, ties=self.ties,
            rows=rows,
        )

    def _random_step(self, step, ids, unknown, seed, offset, rows) -> tuple[Tensor, Tensor, Tensor]:
        """One step of the reverse process: (ids, sample, confidence). The model is called only if a token is kept."""
        stays = self.masked_share(step + 1) / self.masked_share(step)
        kept = unknown & (uniform(words_at(seed, offset, rows, 0, REMASK_STREAM)) >= stays)
        if not kept.any():
            return ids, ids, torch.full(ids.shape, math.inf, device=ids.device).masked_fill_(unknown, -math.inf)
        ids, confidence = self._predict(step, ids, kept, seed, offset, rows)
        return ids, ids, confidence.masked_fill(unknown & ~kept, -math.inf)
