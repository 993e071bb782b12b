"""The loop of masked-diffusion sampling: predict every masked token, keep some, mask the rest again.

Design choices
- Draws are functions of (seed, step, global row, code), never of the batch: a sample alone, in a batch or in a part
  of one is the same sample.
- The defaults do what MaskGIT's paper says. Where public code departs from it, the departure has a name, a field of
  `MaskedDiffusionSampler`; `MaskedDiffusionSampler.showo` sets them all, which reproduces Show-o step for step.
- Tokens that are given are never changed, unless `known="showo"` asks for it.
- On a GPU the host never waits inside the loop: what changes from step to step is looked up on the device, in tables
  that are made before it. So one captured step can be replayed for all (`cuda_graph`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .._checks import expect, expect_choice, expect_int, expect_tensor
from .._philox import REMASK_STREAM, uniform, words_at
from .graph import StepGraph
from .ops import remask, sample_from_hidden, sample_from_logits, word

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


class Run(NamedTuple):
    """What every step of one call shares, tensors on the device of the ids.

    Attributes:
        rows: [B, N] global row indices. seed, offset: int64, no dimensions; offset is the first step's.
        at_start: [B] masked tokens before the first step.
        temperature: [T] float32 of the noise on the confidences at each step.
        share: [T + 1] float64 of the tokens masked when that many steps are done. stays: [T], the chance that a
            masked token stays masked at each step of the policy "random".
        wanted: [T] int64, tokens to mask after each step by Show-o's count.
        again: [T] int64, 0 where a step is the last and masks none.
    """

    rows: Tensor
    seed: Tensor
    offset: Tensor
    at_start: Tensor
    temperature: Tensor
    share: Tensor
    stays: Tensor
    wanted: Tensor
    again: Tensor


def _at(table: Tensor, step: Tensor | int) -> Tensor:
    """table[step] without dimensions; a step on the device is not read by the host."""
    return table[step] if isinstance(step, int) else table.index_select(0, step.reshape(1))[0]


@dataclass(frozen=True)
class MaskedDiffusionSampler:
    """Sample the masked tokens of images, or of texts, from a masked-diffusion model.

    Attributes:
        step_fn: ``step_fn(ids [B, N], step)`` gives the two branches ``(cond, uncond)``, or one tensor: hidden
            states [B, N, D] where `head` is given, else logits [B, N, V]. uncond may be None at guidance 0. `step`
            is an int, or with `cuda_graph` an int64 tensor without dimensions.
        steps: T, the number of model calls at most (the loop ends early when no token can be left to draw; on the
            CPU, where looking at the ids costs nothing, when none is).
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
        cuda_graph: capture a step as a CUDA graph when a shape of ids comes for the first time, and replay it for
            every step of every call. `step_fn` is then called in capture alone: it must not wait for the device, and
            the tensors that it closes over are read where they lie, so new prompts are copied into them.
    """

    step_fn: Callable[[Tensor, Any], Any] = field(repr=False)
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
    cuda_graph: bool = False
    _graphs: dict[tuple[torch.Size, torch.device], StepGraph] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        expect_int(self.steps, "steps", 1)
        if not callable(self.schedule):
            expect_choice(self.schedule, "schedule", tuple(SCHEDULES))
        for name, choices in (
            ("policy", tuple(POLICIES)),
            ("temperature_mode", ("maskgit", "showo")),
            ("ties", ("index", "showo")),
            ("known", ("keep", "showo")),
            ("counts", ("exact", "showo")),
            ("last_step", ("finish", "showo")),
            ("confidence_floor", ("none", "showo")),
        ):
            expect_choice(getattr(self, name), name, choices)
        temperature = self.remask_temperature
        expect(0 <= temperature < math.inf, "remask_temperature", "a finite number >= 0", temperature)

    @classmethod
    def showo(
        cls, step_fn: Callable[[Tensor, Any], Any], steps: int, mask_id: int, **fields: Any
    ) -> MaskedDiffusionSampler:
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

    def masked_counts(self, step: Tensor | int, unknown: Tensor, run: Run) -> Tensor:
        """How many tokens [B] to mask after `step`, of [B, N] now unknown."""
        now = unknown.sum(-1)
        if self.counts == "exact":
            # In float64 and 1e-9 up, so that a share such as 1 - 1/3 does not lose a token to its last bit.
            wanted = (run.at_start.double() * _at(run.share, step + 1) + 1e-9).floor().long()
            count = torch.minimum(wanted, now - 1).clamp(min=0)
        else:
            count = torch.minimum(now - 1, _at(run.wanted, step)).clamp(min=1)
        return count * _at(run.again, step)

    def _showo_count(self, step: int, length: int) -> int:
        """Show-o's count in its own float32, where cos(pi / 3) is below 1/2."""
        if self.schedule == "cosine":
            share = torch.cos(torch.tensor((step + 1) / self.steps) * math.pi * 0.5)
        else:
            share = torch.tensor(self.masked_share(step + 1), dtype=torch.float32)
        return int((length * share).floor())

    def most_masked(self, step: int, length: int) -> int:
        """The most tokens of `length` that can be masked before `step`, however many were at the start."""
        if self.counts != "exact" or self.known != "keep" or self.policy == "random":
            return length
        left = length
        for done in range(1, step + 1):
            left = max(0, min(math.floor(length * self.masked_share(done) + 1e-9), left - 1))
        return left

    def steps_at_most(self, length: int) -> int:
        """Steps after which no token of `length` can be left."""
        return next((step for step in range(1, self.steps) if self.most_masked(step, length) == 0), self.steps)

    def begin(self, ids: Tensor, rows: Tensor | None, seed: Tensor | int, offset: Tensor | int) -> Run:
        """The tables of a call on `ids` [B, N]; arguments as in `__call__`."""
        device, steps = ids.device, range(self.steps)
        if rows is None:
            rows = torch.arange(ids.numel(), device=device).view(ids.shape)
        share = [self.masked_share(step) for step in range(self.steps + 1)]
        stays = [after / before if before else 0.0 for before, after in zip(share, share[1:])]
        return Run(
            rows=rows,
            seed=word(seed, "seed", device),
            offset=word(offset, "offset", device),
            at_start=(ids == self.mask_id).sum(-1),
            temperature=torch.tensor([self.noise_temperature(step) for step in steps], dtype=torch.float32).to(device),
            share=torch.tensor(share, dtype=torch.float64).to(device),
            stays=torch.tensor(stays, dtype=torch.float64).to(device),
            wanted=torch.tensor([self._showo_count(step, ids.shape[1]) for step in steps]).to(device),
            again=torch.tensor([int(step + 1 < self.steps or self.last_step == "showo") for step in steps]).to(device),
        )

    @torch.no_grad()
    def __call__(
        self, ids: Tensor, *, seed: Tensor | int = 0, offset: Tensor | int = 0, rows: Tensor | None = None,
        callback: Callable[[Step], None] | None = None,
    ) -> Tensor:  # fmt: skip
        """Fill the masked positions of `ids`.

        Args:
            ids: [B, N] int64, `mask_id` where a token is to be drawn. Any other id is known: a token to keep
                (in-painting, a prompt), or padding, in a batch of samples of several lengths. Not changed.
            seed: names the sample. offset: of the first step; step s uses offset + s.
            rows: [B, N] global row indices where `ids` is a part of a larger batch (see `sample_from_logits`).
            callback: called with a `Step` after each step.

        Returns:
            [B, N] int64 with every masked position drawn.

        Raises:
            ValueError: names the argument; also when `step_fn` gave a position no finite distribution to draw from
                (found out at the end), or cannot be captured.
        """
        expect_tensor(ids, "ids", shape=("B", "N"), dtypes=[torch.int64])
        if rows is not None:
            expect_tensor(rows, "rows", shape=ids.shape, dtypes=[torch.int64], device_of=("ids", ids))
        run = self.begin(ids, rows, seed, offset)
        advance = self._replay(ids, run) if self.cuda_graph else self.advance
        looks = ids.device.type == "cpu" and self.known == "keep"
        sample = ids
        for step in range(self.steps_at_most(ids.shape[1])):
            if looks and not (ids == self.mask_id).any():
                break
            ids, sample, confidence = advance(ids, step, run)
            if callback is not None:
                if self.cuda_graph:  # the next replay writes over them
                    ids, sample, confidence = ids.clone(), sample.clone(), confidence.clone()
                callback(Step(step, self.steps, ids, sample, confidence))
        left = int((sample == self.mask_id).sum())
        expect(left == 0, "step_fn", "logits with a finite largest at every position", f"{left} positions without")
        return sample.clone()

    def advance(self, ids: Tensor, step: Tensor | int, run: Run) -> tuple[Tensor, Tensor, Tensor]:
        """One step: (ids as the next step sees them, the whole prediction, its confidence), each [B, N].

        `step` may be on the device; then nothing here is read by the host.
        """
        unknown = ids == self.mask_id
        if self.policy == "random":
            return self._random_step(step, ids, unknown, run)
        sample, confidence = self._predict(step, ids, unknown, run)
        masked = self._masked(step, unknown, confidence, run)
        return sample.masked_fill(masked, self.mask_id), sample, confidence

    def _replay(self, ids: Tensor, run: Run) -> Callable[[Tensor, int, Run], tuple[Tensor, Tensor, Tensor]]:
        """`advance` as a graph that is captured for this shape of ids, or was before."""
        device = ids.device
        expect(device.type == "cuda", "cuda_graph", "False for ids that are not on a CUDA device", f"True on {device}")
        key = (ids.shape, device)
        if key not in self._graphs:
            self._graphs[key] = StepGraph(self.advance, ids, run)
        self._graphs[key].begin(ids, run)
        return self._graphs[key].replay

    def _predict(self, step: Tensor | int, ids: Tensor, unknown: Tensor, run: Run) -> tuple[Tensor, Tensor]:
        """A code at every unknown position, and the policy's confidence in it."""
        out = self.step_fn(ids, step)
        cond, uncond = (out, None) if isinstance(out, Tensor) else out
        draw: dict[str, Any] = {
            "code_range": self.code_range, "guidance": self.guidance, "temperature": self.temperature,
            "top_k": self.top_k, "top_p": self.top_p, "seed": run.seed, "offset": run.offset + step,
            "rows": run.rows, "unknown": unknown, "confidence": POLICIES[self.policy],
        }  # fmt: skip
        if self.head is None:
            return sample_from_logits(cond, uncond, ids, self.mask_id, **draw)
        return sample_from_hidden(cond, uncond, *self.head, ids, self.mask_id, **draw)

    def _masked(self, step: Tensor | int, unknown: Tensor, confidence: Tensor, run: Run) -> Tensor:
        """The positions that the next step draws again."""
        if self.confidence_floor == "showo":
            confidence = confidence.clamp(min=_SHOWO_FLOOR)
        candidates = unknown
        if self.known == "showo":
            confidence = confidence.masked_fill(~unknown, _SHOWO_KNOWN_CONFIDENCE)
            candidates = torch.ones_like(unknown)
        count = self.masked_counts(step, unknown, run)
        return remask(
            confidence, candidates, count, _at(run.temperature, step), seed=run.seed, offset=run.offset + step,
            ties=self.ties, rows=run.rows,
        )  # fmt: skip

    def _random_step(self, step: Tensor | int, ids: Tensor, unknown: Tensor, run: Run) -> tuple[Tensor, Tensor, Tensor]:
        """One step of the reverse process. On the CPU a step that keeps no token does not call the model."""
        words = words_at(run.seed, run.offset + step, run.rows, 0, REMASK_STREAM)
        kept = unknown & (uniform(words) >= _at(run.stays, step))
        if ids.device.type == "cpu" and not kept.any():
            return ids, ids, torch.full(ids.shape, math.inf).masked_fill_(unknown, -math.inf)
        ids, confidence = self._predict(step, ids, kept, run)
        return ids, ids, confidence.masked_fill(unknown & ~kept, -math.inf)
