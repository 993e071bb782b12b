"""What a training run shows while it goes on: a log, a progress bar, TensorBoard and Weights & Biases where asked.

log.jsonl is the truth, and is written whatever happens; the others show it. Nothing here can stop a training.
"""

from __future__ import annotations

import importlib.util
import math
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from tqdm import tqdm

from unif2ace.errors import UserError
from unif2ace.files import read_json, write_json
from unif2ace.pictures import read_png
from unif2ace.training import journal
from unif2ace.training.load import loads

LOG, TENSORBOARD, WANDB = "log.jsonl", "tensorboard", "wandb.json"


@dataclass(frozen=True)
class WatchConfig:
    """Attributes:
    every: steps between what costs something to know: loads of the experts, norms of the gradients by part.
    tensorboard: events for TensorBoard, in the run's folder.
    wandb: the project at Weights & Biases to send the run to; None: none.
    progress: a progress bar on stderr.
    samples_every: steps between sample paintings and answers; 0: none.
    profile: steps whose profile is written, by every rank.
    prompts: what is painted. questions: what is asked about the faces.
    """

    every: int = 10
    tensorboard: bool = False
    wandb: str | None = None
    progress: bool = True
    samples_every: int = 0
    profile: tuple[int, ...] = ()
    prompts: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()

    def check(self, where: str = "watch") -> WatchConfig:
        """The config itself.

        Raises:
            UserError: a value that cannot be, or a package that is not installed; the key is named.
        """
        for name, least in (("every", 1), ("samples_every", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{where}.{name}: expected at least {least}, got {getattr(self, name)}")
        for index, step in enumerate(self.profile):
            if step < 0:
                raise UserError(f"{where}.profile[{index}]: expected a step, from 0, got {step}")
        if self.samples_every and not self.prompts and not self.questions:
            raise UserError(f"{where}.samples_every: there is nothing to sample; give {where}.prompts or .questions")
        for name in ("prompts", "questions"):
            for index, text in enumerate(getattr(self, name)):
                if not text.strip():
                    raise UserError(f"{where}.{name}[{index}]: expected a text, got {text!r}")
        if self.wandb is not None and not self.wandb.strip():
            raise UserError(f"{where}.wandb: expected the name of a project, got {self.wandb!r}")
        for name, asked in (("tensorboard", self.tensorboard), ("wandb", self.wandb is not None)):
            if asked and importlib.util.find_spec(name) is None:
                raise UserError(f"{where}.{name}: {name} is not installed: pip install 'unif2ace[watch]'")
        return self

    def costly(self, step: int) -> bool:
        """Whether the record of `step` has what costs something to know."""
        return step % self.every == 0

    def samples_after(self, done: int) -> bool:
        """Whether samples are due after `done` steps."""
        return self.samples_every > 0 and done % self.samples_every == 0


class View(Protocol):
    """Something that shows the log."""

    def step(self, record: dict[str, Any]) -> None: ...

    def picture(self, step: int, path: Path) -> None: ...

    def close(self) -> None: ...


class Watch:
    """The record of one run, kept by its first rank alone; a context that says how the run ended.

    Lines that a killed run wrote after its last saved state are left out of the log when it goes on: their steps are
    done again. What befell the run (`started`, `resumed`, `checkpoint`, ...) stays.

    Args:
        folder: of the run.
        total_steps: of the whole run.
        start_step: the step that comes next; 0 for a new run.
        described: what stands in the first event: parameters, ranks, device, ...

    Raises:
        UserError: the log cannot be opened, or a package is not installed.
    """

    def __init__(
        self, folder: Path, config: WatchConfig, total_steps: int, start_step: int, described: dict[str, Any]
    ) -> None:
        config.check()
        folder, path = Path(folder), Path(folder) / LOG
        self._total, self._next = total_steps, start_step
        try:
            folder.mkdir(parents=True, exist_ok=True)
            again = path.exists() and path.stat().st_size > 0
            dropped = journal.take_up(path, start_step) if again else 0
            self._journal = journal.Journal(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from error
        self._views: list[View] = []
        if config.progress:
            self._views.append(Bar(total_steps, start_step))
        if config.tensorboard:
            self._views.append(TensorBoard(folder / TENSORBOARD, start_step if again else None))
        if config.wandb is not None:
            self._views.append(WandB(folder, config.wandb, described))
        first = {"dropped": dropped, **described} if again else described
        self.event("resumed" if again else "started", start_step, total_steps=total_steps, **first)
        if again:
            undone = f", {dropped} lines of its log are left out" if dropped else ""
            left = start_step < total_steps
            goes = f"goes on with step {start_step} of {total_steps}" if left else f"has all its {total_steps} steps"
            journal.tell(f"{folder} {goes}{undone}")

    @property
    def failures(self) -> int:
        """Writes of the log that failed so far; their lines wait in memory."""
        return self._journal.failures

    def step(self, record: dict[str, Any]) -> None:
        """Log a step and show it."""
        self._journal.append(record)
        self._next = record["step"] + 1
        self._show("step", record)

    def event(self, name: str, step: int, **values: Any) -> None:
        """Log something with the time of day; it is on the disk after this.

        Args:
            name: one of `journal.OF_STEPS` for what a step does, and does again when it is done again.
            step: that step; for anything else how many steps were done.
        """
        self._journal.append({"event": name, "step": step, "time": round(time.time(), 1), **values})
        self._journal.sync()

    def samples(self, step: int, folder: Path) -> None:
        """Show what `samples.write_samples` wrote into `folder` after `step` steps."""
        for path in sorted(folder.glob("*.png")):
            self._show("picture", step, path)

    def _show(self, what: str, *values: Any) -> None:
        for view in list(self._views):
            try:
                getattr(view, what)(*values)
            except Exception as error:  # other people's code, disks and networks; the log has it all
                name = type(view).__name__
                journal.tell(f"{name} failed ({error}) and is left out from here on; {self._journal.path} goes on")
                self._views.remove(view)
                self.event("view_failed", self._next, view=name, error=str(error))

    def __enter__(self) -> Watch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.event("stopped", self._next, reason=reason)
        else:
            self.event("finished" if self._next >= self._total else "stopped", self._next)
        self._show("close")
        self._journal.close()


def scalars(record: dict[str, Any]) -> dict[str, float]:
    """A step's record as names and numbers, the loads of experts as what tells of trouble; what is not finite is not
    there."""
    values: dict[str, Any] = {key: record.get(key) for key in ("loss", "lr", "grad_norm")}
    values |= {f"loss/{name}": value for name, value in (record.get("terms") or {}).items()}
    values |= {f"grad_norm/{part}": value for part, value in (record.get("grad_norms") or {}).items()}
    values |= {f"data/{key}": record.get(key) for key in ("skipped", "corrupt", "tokens")}
    values |= {f"data/rows_{task}": count for task, count in (record.get("rows") or {}).items()}
    values |= {f"speed/{key}": record.get(key) for key in ("tokens_per_second", "mfu", "step_seconds")}
    if data_wait(record) is not None:
        values["speed/data_wait"] = data_wait(record)
    if record.get("memory_bytes") is not None:
        values["speed/memory_gib"] = record["memory_bytes"] / 2**30
    for load in loads(record.get("experts")):
        name = f"experts_{load.level}_{load.group}/layer_{load.layer}"
        values |= {f"{name}_entropy": load.entropy, f"{name}_empty": len(load.empty), f"{name}_most": max(load.share)}
    return {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}


def data_wait(record: dict[str, Any]) -> float | None:
    """Share of a step's time that it waited for data."""
    whole, waited = record.get("step_seconds"), record.get("data_seconds")
    return min(1.0, waited / whole) if whole and waited is not None else None


class Bar:
    """Loss and its terms, speed, memory and waiting, on one line of the terminal."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        often = 0.5 if sys.stderr.isatty() else 15.0  # where each is a line of a file, fewer
        self._bar = tqdm(
            total=total_steps, initial=start_step, desc="train", unit="step", mininterval=often, dynamic_ncols=True
        )

    def step(self, record: dict[str, Any]) -> None:
        self._bar.set_postfix_str(line(record), refresh=False)
        self._bar.update(record["step"] + 1 - self._bar.n)

    def picture(self, step: int, path: Path) -> None:
        pass  # a terminal shows none

    def close(self) -> None:
        self._bar.close()


def line(record: dict[str, Any]) -> str:
    """A step's record in a few words."""
    terms = {"loss": record.get("loss"), **(record.get("terms") or {})}
    words = [f"{name} {value:.3g}" for name, value in terms.items() if value is not None and "accuracy" not in name]
    if record.get("tokens_per_second") is not None:
        words.append(f"{record['tokens_per_second']:,.0f} tok/s")
    for name, share in (("MFU", record.get("mfu")), ("data", data_wait(record))):
        if share is not None:
            words.append(f"{name} {share:.0%}")
    if record.get("memory_bytes") is not None:
        words.append(f"{record['memory_bytes'] / 2**30:.1f} GiB")
    words += [f"{record[name]} {name}" for name in ("skipped", "corrupt") if record.get(name)]
    return ", ".join(words)


class TensorBoard:
    """Events for TensorBoard; a run that goes on takes back what it had shown of the steps that it does again."""

    def __init__(self, folder: Path, purge_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=purge_step, flush_secs=30)

    def step(self, record: dict[str, Any]) -> None:
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record["step"])

    def picture(self, step: int, path: Path) -> None:
        self._writer.add_image(path.stem, read_png(path), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandB:
    """A run at Weights & Biases that stays the same one when training goes on: its id is kept in the run's folder.

    Steps are a value of their own there, since its own counter never goes back: a step that is done again stands twice,
    with the same values.
    """

    def __init__(self, folder: Path, project: str, described: dict[str, Any]) -> None:
        import wandb

        path = folder / WANDB
        if not path.exists():
            write_json(path, {"project": project, "id": secrets.token_hex(4)})
        kept = read_json(path)
        self._image = wandb.Image
        self._run = wandb.init(
            project=kept["project"], id=kept["id"], resume="allow", name=folder.name, dir=str(folder), config=described
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def step(self, record: dict[str, Any]) -> None:
        self._run.log({"step": record["step"], **scalars(record)})

    def picture(self, step: int, path: Path) -> None:
        self._run.log({"step": step, path.stem: self._image(str(path))})

    def close(self) -> None:
        self._run.finish()
