"""What `unif2ace train` is told, as dataclasses that name the key that is wrong.

    run: runs/faces                       # folder of the run; a run that is there is gone on with
    checkpoint: runs/start                # model, tokenizers and image tokenizer to start from
    data: {sets: [{path: shards}], batch: 64, mix: {t2i: 24, mmu: 19, lm: 1}}
    stages:                               # one after another; `data` and `loss` of a stage are put over the run's
      - {name: pretraining, steps: 20000, lr: 1e-4, freeze: ["blocks.*.sequence.*"]}
      - {name: joint, steps: 20000, lr: 1e-4, loss: {lm: 0.1}}
      - {name: fine, steps: 5000, lr: 2e-5, data: {mix: {t2i: 1, mmu: 1}}}

Learning rates, warm-up, weight decay and betas are Show-o's, from which UniF2ace starts; the paper gives none.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from unif2ace import settings
from unif2ace.configs import LossConfig
from unif2ace.data.config import DataConfig
from unif2ace.data.encode import EncodingConfig
from unif2ace.errors import UserError
from unif2ace.settings import merged, parse
from unif2ace.training.loop import Schedule
from unif2ace.training.watch import WatchConfig

PRECISIONS = ("float32", "bf16")
CHECKPOINTING = ("none", "block")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class LossOverrides:
    """Coefficients of `unif2ace.configs.LossConfig` that a stage changes; None leaves the checkpoint's."""

    alpha: float | None = None
    mask: float | None = None
    t2i: float | None = None
    mmu: float | None = None
    lm: float | None = None

    def over(self, loss: LossConfig) -> LossConfig:
        """`loss` with what is given here."""
        return dataclasses.replace(loss, **{k: v for k, v in vars(self).items() if v is not None})


@dataclass(frozen=True)
class StageConfig:
    """A part of the run with a learning rate of its own: linear warm-up, then a cosine.

    Attributes:
        name: in logs. steps: how many.
        lr: at its highest. warmup: steps until then. floor: at the end, as a share of `lr`.
        freeze: patterns (`blocks.0.*`) of the parameters' names that are not trained.
        loss: see `LossOverrides`.
        data: the run's `data`, with this stage's keys put over it.
    """

    name: str
    steps: int
    lr: float = 1e-4
    warmup: int = 100
    floor: float = 0.0
    freeze: tuple[str, ...] = ()
    loss: LossOverrides = LossOverrides()
    data: DataConfig = DataConfig()

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.steps, min(self.warmup, self.steps), self.floor)


@dataclass(frozen=True)
class AdamWConfig:
    """Attributes:
    beta1, beta2, eps, weight_decay: of AdamW; biases, norms and embeddings do not decay.
    clip: largest norm of a step's gradient.
    """

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01
    clip: float = 1.0


@dataclass(frozen=True)
class ParallelConfig:
    """How a step is spread and computed.

    Attributes:
        device: auto takes CUDA where there is some.
        precision: bf16 computes with bfloat16 copies of float32 masters; gradients are added up in float32.
        micro: batches of a step that a rank computes one after another, to need less memory.
        sharded: ranks over which weights, moments and gradients are sharded, where sets of so many hold copies of one
            another; 0: all. Best the GPUs of one machine, where there are hundreds.
        experts: ranks over which the token-level experts are spread; 1: every rank has all of them.
        checkpointing: block keeps a layer's input alone and runs it again in the backward.
        threads: of a rank on a CPU; 0: torch's own choice.
        timeout: minutes that ranks wait for one another.
    """

    device: str = "auto"
    precision: str = "bf16"
    micro: int = 1
    sharded: int = 0
    experts: int = 1
    checkpointing: str = "none"
    threads: int = 0
    timeout: float = 30.0


@dataclass(frozen=True)
class SaveConfig:
    """States that a run goes on from.

    Attributes:
        every: steps between them. minutes: at most so long between them; 0: by steps alone.
        keep: the last so many are kept. keep_every: of older ones those at multiples of so many steps; 0: none.
        wait: write while training stands still, instead of beside it.
    """

    every: int = 1000
    minutes: float = 15.0
    keep: int = 2
    keep_every: int = 0
    wait: bool = False


@dataclass(frozen=True)
class TrainConfig:
    """A run.

    Attributes:
        run: its folder. checkpoint: folder of what it starts from.
        stages: one after another.
        data, encoding: rows of a step; how pictures without codes are read (shards need none).
        optimizer, parallel, save, watch: see their classes.
        ema: decay of the average of the weights that is exported; 0: none is kept.
        max_skipped: steps without a finite gradient that are passed over before the run stops with a report.
        seed: of what a rank draws besides the data, whose own seed is in `data`.
    """

    run: str
    checkpoint: str
    stages: tuple[StageConfig, ...]
    data: DataConfig
    encoding: EncodingConfig | None = None
    optimizer: AdamWConfig = AdamWConfig()
    parallel: ParallelConfig = ParallelConfig()
    save: SaveConfig = SaveConfig()
    watch: WatchConfig = field(default_factory=WatchConfig)
    ema: float = 0.0
    max_skipped: int = 10
    seed: int = 0

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[int, int]:
        """Index of the stage that `step` is in, and the stage's first step; the last stage's at the end of the run."""
        first = 0
        for index, stage in enumerate(self.stages):
            if step < first + stage.steps or index == len(self.stages) - 1:
                return index, first
            first += stage.steps
        raise AssertionError("a run has stages")

    @property
    def folder(self) -> Path:
        return Path(self.run)

    def check(self) -> TrainConfig:
        """The config itself.

        Raises:
            UserError: a value is not possible; the message names its key.
        """
        need = partial(settings.need, self)
        need(len(self.stages) > 0, "stages", "at least one stage")
        names = [stage.name for stage in self.stages]
        for index, stage in enumerate(self.stages):
            at = f"stages[{index}]"
            need(bool(stage.name) and names.count(stage.name) == 1, f"{at}.name", "a name of its own")
            need(stage.steps >= 1, f"{at}.steps", "at least 1")
            need(0 < stage.lr < math.inf, f"{at}.lr", "a learning rate above 0")
            need(stage.warmup >= 1, f"{at}.warmup", "at least 1")
            need(0 <= stage.floor <= 1, f"{at}.floor", "a share from 0 to 1")
            for name, value in vars(stage.loss).items():
                need(value is None or 0 <= value < math.inf, f"{at}.loss.{name}", "a coefficient of at least 0")
            stage.data.check(f"{at}.data")
        for name in ("beta1", "beta2"):
            need(0 <= getattr(self.optimizer, name) < 1, f"optimizer.{name}", "at least 0 and below 1")
        need(0 < self.optimizer.eps < math.inf, "optimizer.eps", "above 0")
        need(0 <= self.optimizer.weight_decay < math.inf, "optimizer.weight_decay", "at least 0")
        need(self.optimizer.clip > 0, "optimizer.clip", "above 0")
        for key, choices in (("device", DEVICES), ("precision", PRECISIONS), ("checkpointing", CHECKPOINTING)):
            need(getattr(self.parallel, key) in choices, f"parallel.{key}", f"one of {', '.join(choices)}")
        for key in ("micro", "experts"):
            need(getattr(self.parallel, key) >= 1, f"parallel.{key}", "at least 1")
        for key in ("threads", "sharded"):
            need(getattr(self.parallel, key) >= 0, f"parallel.{key}", "at least 0")
        need(0 < self.parallel.timeout <= 1e6, "parallel.timeout", "minutes above 0, a million at most")
        need(self.save.every >= 1, "save.every", "at least 1")
        need(self.save.minutes >= 0, "save.minutes", "at least 0")
        need(self.save.keep >= 1, "save.keep", "at least 1")
        need(self.save.keep_every >= 0, "save.keep_every", "at least 0")
        need(0 <= self.ema < 1, "ema", "at least 0 and below 1")
        need(self.max_skipped >= 0, "max_skipped", "at least 0")
        need(0 <= self.seed < 2**63, "seed", "0 to 2**63 - 1")
        if self.encoding is not None:
            self.encoding.check("encoding")
        self.watch.check("watch")
        return self

    def check_ranks(self, ranks: int) -> None:
        """Whether so many ranks can share each step.

        Raises:
            UserError: the message names the key.
        """
        if ranks < 1:
            raise UserError(f"--ranks: expected at least 1, got {ranks}")
        for key, value in (("experts", self.parallel.experts), ("sharded", self.parallel.sharded or ranks)):
            if ranks % value:
                raise UserError(f"parallel.{key}: expected a divisor of the {ranks} ranks, got {value}")
        for index, stage in enumerate(self.stages):
            counts, parts = stage.data.counts, ranks * self.parallel.micro
            if 0 < counts["t2i"] + counts["mmu"] and max(counts["t2i"], counts["mmu"]) < parts:
                raise UserError(
                    f"stages[{index}].data.batch: {stage.data.batch} rows are {counts} a step, too few for {ranks} "
                    f"ranks with {self.parallel.micro} micro-batches each: every one needs a row with a face"
                )


def read_config(values: dict[str, Any]) -> TrainConfig:
    """The config of plain values, each stage's `data` put over the run's.

    Raises:
        UserError: naming the key.
    """
    values = copy.deepcopy(values)
    stages = values.get("stages")
    common = values.get("data")
    if isinstance(stages, list) and isinstance(common, dict):
        for stage in stages:
            if isinstance(stage, dict) and isinstance(stage.get("data", {}), dict):
                stage["data"] = merged(common, stage.get("data", {}))
    return parse(TrainConfig, values, "").check()


def changes(before: Any, after: Any, key: str = "") -> dict[str, list[Any]]:
    """[before, after] by key, of plain values that are not the same."""
    if isinstance(before, list) and isinstance(after, list):
        before, after = ({f"[{i}]": each for i, each in enumerate(values)} for values in (before, after))
    elif isinstance(before, dict) and isinstance(after, dict):
        before, after = ({f".{name}": each for name, each in values.items()} for values in (before, after))
    else:
        return {} if before == after else {key.removeprefix("."): [before, after]}
    found: dict[str, list[Any]] = {}
    for name in [*before, *after]:
        found |= changes(before.get(name), after.get(name), key + name)
    return found


def plain(config: TrainConfig) -> dict[str, Any]:
    """Values that `read_config` reads back as the same config."""

    def listed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: listed(each) for key, each in value.items()}
        return [listed(each) for each in value] if isinstance(value, (list, tuple)) else value

    return listed(dataclasses.asdict(config))
