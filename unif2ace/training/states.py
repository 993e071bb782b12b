"""States that a run goes on from: PyTorch's distributed checkpoints, whole or not there.

    states/step-00000100/             a rank's shards, their index, run.json: what is not a tensor
    states/.step-00000200.partial/    being written or removed, or left so by a run that was killed: it goes when the
                                      run goes on

A state is copied when it is taken and written beside the training. It becomes one by a rename, after every rank's part
is on the disk. Tensors are stored by name and place in the whole, so that any number of ranks can read them.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import distributed as dist
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException, FileSystemReader

from unif2ace.errors import UserError
from unif2ace.files import read_json, write_json
from unif2ace.parsing import Whole, parsing
from unif2ace.training.config import SaveConfig
from unif2ace.training.journal import tell

RUN = "run.json"
IN_A_ROW = 3  # failed writes until the run stops: a disk that is full for so long will not empty itself


def name(step: int) -> str:
    """Of the state before `step`."""
    return f"step-{step:08d}"


def number(state: Path) -> int:
    return int(state.name.removeprefix("step-"))


def listed(folder: Path) -> list[Path]:
    """States of a run, the oldest first."""
    return sorted(each for each in folder.glob("step-*") if (each / RUN).is_file())


@contextlib.contextmanager
def reading(folder: Path, step: int | None = None) -> Iterator[Path]:
    """The state before `step`, or the newest one; a training that goes on beside does not let it go meanwhile.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    held: BinaryIO | None = None
    while held is None:  # again where it was let go since it was listed
        found = {number(each): each for each in listed(folder)}
        if not found or (step is not None and step not in found):
            there, which = ", ".join(map(str, found)) or "none", "" if step is None else f"before step {step}"
            raise UserError(f"{folder} has no state {which}; there are: {there}")
        state = found[max(found) if step is None else step]
        held = _hold(state)
    with held:
        yield state


def _hold(state: Path) -> BinaryIO | None:
    """Its run.json, open and locked; None where there is none any more."""
    try:
        held = (state / RUN).open("rb")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"cannot read {state / RUN}: {error.strerror}") from error
    with contextlib.suppress(OSError):  # of a file system that knows no locks
        fcntl.flock(held, fcntl.LOCK_SH)
    if (state / RUN).is_file():
        return held
    held.close()
    return None


def let_go(state: Path) -> None:
    """Remove a state; one that is being read stays, until the next time that states are let go."""
    aside = state.with_name(f".{state.name}.old.partial")
    with contextlib.suppress(OSError), (state / RUN).open("r+b") as held:  # what cannot be removed stays
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        except OSError:  # a file system that knows no locks
            pass
        state.rename(aside)  # at once: a run that is killed leaves none in half
        shutil.rmtree(aside, ignore_errors=True)


class States:
    """The states of one run. Every rank has one of these, and calls its methods in the same order.

    Args:
        folder: that they are in.
        host, writing: groups of all ranks on their CPUs; `writing` is used by the write in the background alone.
        on_event: told `state_saved`, `state_failed` with a step and values, on rank 0.
    """

    def __init__(
        self,
        folder: Path,
        config: SaveConfig,
        host: dist.ProcessGroup,
        writing: dist.ProcessGroup,
        on_event: Callable[..., None],
    ) -> None:
        self.folder, self.config, self.host, self.writing = folder, config, host, writing
        self.on_event = on_event
        self.rank = dist.get_rank(host)
        self.failed, self.reason = 0, ""
        self._plain: dict[str, Any] = {}
        self._future: Future | None = None
        self._step, self._began = 0, 0.0

    def latest(self) -> Path | None:
        """The newest state; what killed runs left is removed."""
        found: list[Path | None] = [None]
        if self.rank == 0:
            for partial in self.folder.glob(".step-*.partial"):
                shutil.rmtree(partial, ignore_errors=True)
            found = [*listed(self.folder)[-1:], None][:1]
        dist.broadcast_object_list(found, src=0, group=self.host)
        return found[0]

    def load(self, state: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Fill `tensors` in place; what `save` was given as `plain`.

        Raises:
            UserError: the state is damaged, or lacks one of them.
        """
        plain = read_json(state / RUN)
        if not isinstance(plain, dict) or "step" not in plain:
            raise damaged(state, f"{RUN} is not of a run")
        load(state, tensors, self.host)
        return plain

    def save(self, step: int, tensors: dict[str, torch.Tensor], plain: dict[str, Any], wait: bool = False) -> None:
        """Take the state before `step`; write it in the background, or `wait` until it is there.

        Raises:
            UserError: it was waited for and could not be written, or none could be for some time.
        """
        self.finish()
        partial = self.folder / f".{name(step)}.partial"
        self._step, self._began = step, time.monotonic()
        self._plain = {"step": step, **plain}
        try:
            self._future = dcp.async_save(tensors, checkpoint_id=partial, process_group=self.writing)  # type: ignore[assignment]
        except (CheckpointException, OSError) as error:
            self._fail(error)
        if wait or self.config.wait:
            before = self.failed
            self.finish()
            if wait and self.failed > before:
                raise UserError(f"the state before step {step} could not be written: {self.reason}; free space")

    def poll(self) -> None:
        """Complete a write that is done."""
        if self._future is not None and self._future.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the write in the background and complete it.

        Raises:
            UserError: so many in a row could not be written that the run should not go on.
        """
        future, self._future = self._future, None
        if future is None:
            return
        try:
            future.result()
            if self.rank == 0:
                self._complete()
            self.failed = 0
        except (CheckpointException, OSError, RuntimeError, UserError) as error:
            self._fail(error)

    def _complete(self) -> None:
        state, partial = self.folder / name(self._step), self.folder / f".{name(self._step)}.partial"
        write_json(partial / RUN, self._plain)
        shutil.rmtree(state, ignore_errors=True)  # of a run that was gone on with from before it
        os.rename(partial, state)
        _sync(self.folder)
        self.on_event("state_saved", self._step, seconds=round(time.monotonic() - self._began, 2))
        keep = self.config.keep_every
        for old in listed(self.folder)[: -self.config.keep]:
            if not keep or number(old) % keep:
                let_go(old)

    def _fail(self, error: BaseException) -> None:
        self.failed += 1
        self.reason = _reason(error)
        if self.rank == 0:
            shutil.rmtree(self.folder / f".{name(self._step)}.partial", ignore_errors=True)
            tell(f"the state before step {self._step} could not be written: {self.reason}; training goes on")
            self.on_event("state_failed", self._step, reason=self.reason)
        if self.failed >= IN_A_ROW:
            raise UserError(
                f"{self.failed} states in a row could not be written to {self.folder}, the last: {self.reason}; "
                "free space and start the run again"
            )


def load(state: Path, tensors: dict[str, torch.Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Fill `tensors` in place from a state, by name; without a group in this process alone.

    Raises:
        UserError: the state is damaged, or lacks one of them; the message names the config's key that asks for it.
    """
    held = names(state)
    missing = sorted(tensors.keys() - held)
    if missing:
        raise UserError(f"{state}: {_why_missing(missing, held)}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
            dcp.load(tensors, checkpoint_id=state, process_group=group, no_dist=group is None)
    except (CheckpointException, OSError, RuntimeError, ValueError, EOFError) as error:
        raise damaged(state, _reason(error)) from error


def _why_missing(missing: list[str], held: set[str]) -> str:
    """The key of the config that asks for tensors that the run has not kept."""
    for each in missing:
        kind, _, name = each.partition(".")
        if kind == "ema" and not any(other.startswith("ema.") for other in held):
            return "ema: expected 0, as the run so far kept no average of its weights"
        parameter = name.rpartition(".")[0]
        if kind == "optimizer" and f"model.{parameter}" in held:
            return f"freeze: {parameter} was not trained in this stage so far; a new stage can begin to"
    return f"checkpoint: the run so far is of another model, without {missing[0].partition('.')[2]}"


def names(state: Path) -> set[str]:
    """Of the tensors that a state holds.

    Raises:
        UserError: its index is damaged.
    """
    with parsing(lambda why: damaged(state, why)):
        reader = FileSystemReader(state)
        reader.fs.create_stream = lambda path, mode: Whole(path)  # type: ignore
        return set(reader.read_metadata().state_dict_metadata)


def damaged(state: Path, why: str) -> UserError:
    return UserError(f"{state} is damaged ({why}); remove it to go on from the state before it")


def _reason(error: BaseException) -> str:
    """One line of it: a distributed checkpoint says what went wrong on each rank, with traces."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
