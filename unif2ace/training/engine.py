"""Training: one CPU, one GPU or many, from one config; killed at any instant it goes on as if nothing had happened.

A step's rows, its learning rate and its generator are functions of (config, step), so what a state holds is weights,
moments, averages and a few numbers. A stage begins as a resumed run does: from the state that the one before it left.
"""

from __future__ import annotations

import contextlib
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from torch import distributed as dist

from unif2ace.checkpoint import Checkpoint
from unif2ace.errors import UserError
from unif2ace.files import LOCK, alone_in, replacing, write_json
from unif2ace.parsing import reading
from unif2ace.training import samples, states
from unif2ace.training.config import TrainConfig, changes, plain
from unif2ace.training.export import export, exported
from unif2ace.training.feed import Work, feed
from unif2ace.training.journal import tell
from unif2ace.training.profile import path_of, profiled
from unif2ace.training.readings import readings
from unif2ace.training.stage import Stage
from unif2ace.training.states import States
from unif2ace.training.watch import Watch
from unif2ace.training.world import Signals, World, join

if TYPE_CHECKING:
    from unif2ace.generation.reading import Faces

CONFIG, SKIPPED = "config.yaml", "skipped.json"
_ASKED = 4  # faces that samples ask about
_TOLD = 6  # settings that changed, in one line
_SEEN = 30.0  # seconds until a file is there for all machines, which may keep listings of folders for so long


class Stopped(Exception):
    """The run was asked to stop, and its state is saved. `number` is the signal's."""

    def __init__(self, step: int, number: int) -> None:
        super().__init__(f"stopped before step {step}, its state is saved; the same command goes on")
        self.number = number


def train(config: TrainConfig) -> None:
    """Run every stage that the run's folder does not hold yet, then export what RUN/checkpoint is not of yet.

    Under torchrun every rank calls this.

    Raises:
        UserError: what the user can mend; the same on all ranks.
        RankLost: another rank is gone.
        Stopped: SIGTERM or Ctrl-C.
    """
    with join(config.parallel) as world, Signals() as signals, contextlib.ExitStack() as stack:
        world.together(lambda: config.check_ranks(world.ranks))
        run = Run(config, world, signals)
        step = run.start(stack)
        while step < config.steps:
            step = run.stage(config.stage_at(step)[0])
        if world.rank == 0 and run.state is not None and not exported(config, run.state):
            export(config, run.saved.folder)


class Run:
    """A run on this rank, over its stages."""

    def __init__(self, config: TrainConfig, world: World, signals: Signals) -> None:
        self.config, self.world, self.signals = config, world, signals
        self.watch: Watch | None = None
        self.saved = States(config.folder / "states", config.save, world.host, world.writing, self._event)
        self.state: Path | None = None
        self.faces: Faces | None = None
        self.settled = False

    def start(self, stack: contextlib.ExitStack) -> int:
        """The step that comes next."""

        def hold() -> None:
            if self.world.rank == 0:
                stack.enter_context(alone_in(self.config.folder))

        self.world.together(hold)
        self.world.together(self._see)
        self.state = self.saved.latest()
        step = states.number(self.state) if self.state else 0

        def open_watch() -> None:
            if self.world.rank == 0:
                described = {"ranks": self.world.ranks, "device": str(self.world.device)}
                self.watch = Watch(self.config.folder, self.config.watch, self.config.steps, step, described)
                stack.enter_context(self.watch)

        self.world.together(open_watch)
        return step

    def _see(self) -> None:
        """Hold the folder against rank 0's: each rank writes its part of a state to what must be one place."""
        until = time.monotonic() + _SEEN
        while not (self.config.folder / LOCK).exists():
            if time.monotonic() > until:
                raise UserError(f"{self.config.folder} is not rank 0's folder: it must be one that all machines see")
            time.sleep(0.1)

    def stage(self, index: int) -> int:
        """Train a stage to its end, from its state or its beginning; the step after it.

        Raises:
            Stopped: before that.
        """
        start = self.world.together(lambda: Checkpoint.load(Path(self.config.checkpoint)))
        stage = Stage(self.config, index, self.world, start)
        if self.state is not None:
            self.world.together(lambda: stage.restore(self.saved, self.state))  # type: ignore[arg-type]
        watch = self.config.watch
        self.world.together(
            lambda: samples.check(watch.prompts, watch.questions, start.text_tokenizer, stage.model.config, "watch")
        )
        self.world.together(lambda: self._settle(stage.stream.step))
        until = stage.first + stage.stage.steps
        self._event("stage", stage.stream.step, stage=stage.stage.name, steps=stage.stage.steps)
        began = saved_at = time.monotonic()

        def due() -> bool:
            return 0 < 60 * self.config.save.minutes < time.monotonic() - saved_at

        step = stage.stream.step
        try:
            for work in feed(stage.stream, self.world, until, lambda: bool(self.signals.received), due):
                step = work.step
                if work.stop:
                    break
                if step > stage.first and (work.save or step % self.config.save.every == 0) and step != self._at():
                    stage.save(self.saved, step)
                    saved_at = time.monotonic()
                with self._profiled(step):
                    done = stage.step(work)
                now = time.monotonic()
                seconds, began = now - began, now
                stage.seconds += seconds
                step += 1
                self._record(stage, work, done, seconds)
                self._sample(stage, start, step)
                self.saved.poll()
        except UserError:
            if step != self._at() and not self.saved.failed:
                stage.save(self.saved, step, wait=True)  # what was learned until the data failed
            raise
        stage.save(self.saved, step, wait=True)
        if step < until:
            raise Stopped(step, self.signals.received or signal.SIGTERM)  # another rank may have got it
        self.state = self.saved.latest()
        return step

    def _profiled(self, step: int) -> contextlib.AbstractContextManager[None]:
        if step not in self.config.watch.profile:
            return contextlib.nullcontext()
        return profiled(path_of(self.config.folder, step, self.world.rank))

    def _settle(self, step: int) -> None:
        """Write RUN/config.yaml, now that the run goes on with it; tell what of it is other than it was."""
        if self.settled or self.watch is None:
            return
        self.settled, path, before = True, self.config.folder / CONFIG, None
        with contextlib.suppress(UserError), reading(path, "YAML"):  # none yet, or one that is of no use
            before = yaml.safe_load(path.read_text(encoding="utf-8"))
        values = plain(self.config)
        with replacing(path) as partial:
            partial.write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        if self.state is None or not isinstance(before, dict):
            return
        left_out = {"run": None, "data": None}  # where the folder lies; what each stage has of its own
        if found := changes(before | left_out, values | left_out):
            self._event("changed", step, settings=found)
            said = [f"{key} {old!r:.40} -> {new!r:.40}" for key, (old, new) in found.items()]
            more = f" and {len(said) - _TOLD} more, see {path}" if len(said) > _TOLD else ""
            tell(f"{self.config.run} goes on with other settings: {', '.join(said[:_TOLD])}{more}")

    def _at(self) -> int:
        return states.number(self.state) if self.state is not None else -1

    def _event(self, name: str, step: int, **values: Any) -> None:
        if self.watch is not None:
            self.watch.event(name, step, **values)

    def _record(self, stage: Stage, work: Work, done: dict[str, Any], seconds: float) -> None:
        if not done.pop("finite"):
            self._skipped(stage, work, done)
        if self.watch is None:
            return
        record = {
            "step": work.step,
            "stage": stage.stage.name,
            "seconds": round(stage.seconds, 3),
            **{key: value for key, value in done.items() if value is not None},
            "lr": stage.optimizer.param_groups[0]["lr"],
            "skipped": stage.skipped,
            **readings(stage.model.config, stage.stream.counts, work, seconds, self.world),
        }
        self.watch.step(record)

    def _skipped(self, stage: Stage, work: Work, done: dict[str, Any]) -> None:
        """Tell of a step without a finite gradient.

        Raises:
            UserError: there were too many of them.
        """
        keys: list[list[list[str]]] = [[]] * self.world.ranks
        dist.all_gather_object(keys, work.keys, group=self.world.host)
        self._event("skipped", work.step, loss=done["loss"], terms=done["terms"], grad_norm=done["grad_norm"])
        if stage.skipped > self.config.max_skipped:
            path = self.config.folder / SKIPPED
            if self.world.rank == 0:
                write_json(path, {"step": work.step, "samples": keys, **done})
            raise UserError(
                f"{stage.skipped} steps had no finite gradient, max_skipped allows {self.config.max_skipped}; the "
                f"last, step {work.step}, is described in {path}; a lower learning rate may help"
            )

    def _sample(self, stage: Stage, start: Checkpoint, done: int) -> None:
        watch = self.config.watch
        if not watch.samples_after(done):
            return
        if self.faces is None:
            first = stage.stream.make(stage.first).batches[0]  # whenever the run is gone on with, the same faces
            found: list[Faces | None] = [samples.faces_of(first, stage.model.config, _ASKED)]
            dist.broadcast_object_list(found, src=0, group=self.world.host)
            self.faces = found[0]
        folder = samples.folder_of(self.config.folder, done)
        samples.write_samples(
            stage.model, start.text_tokenizer, folder, done, watch.prompts, watch.questions, self.faces,
            write=self.world.rank == 0,
        )  # fmt: skip
        if self.watch is not None:
            self.watch.samples(done, folder)
