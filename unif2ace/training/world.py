"""The ranks of a run: processes that torchrun started, or this one alone."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import TypeVar

import torch
from torch import distributed as dist

from unif2ace.errors import UserError
from unif2ace.training.config import ParallelConfig

T = TypeVar("T")


class RankLost(UserError):
    """Another rank is gone; this one cannot go on without it."""

    speakers = 2  # the first one may be who is gone, and tells nothing


class OutOfMemory(UserError):
    """This rank's device has no memory left."""

    speakers = sys.maxsize  # no other rank knows


@dataclass(frozen=True)
class World:
    """This rank among all.

    Attributes:
        rank, ranks, device: of this process.
        host: group of all ranks on their CPUs: what is said on it waits for no device.
        writing: another one, for states that are written in the background.
    """

    rank: int
    ranks: int
    device: torch.device
    host: dist.ProcessGroup
    writing: dist.ProcessGroup

    def together(self, what: Callable[[], T], first: bool = False) -> T:
        """`what()` on every rank; a failure of one is every rank's.

        Args:
            first: rank 0 does it before the others, who then find its files.

        Raises:
            UserError: what some rank could not do, with its number where others could.
        """
        result: T | None = None
        said: str | None = None
        if first and self.rank:
            dist.barrier(self.host)
        try:
            result = what()
        except UserError as error:
            said = str(error)
        if first and not self.rank:
            dist.barrier(self.host)
        self.share_failure(said)
        return result  # type: ignore[return-value]

    def share_failure(self, said: str | None) -> None:
        """Tell the others what this rank could not do, None for nothing; every rank calls this.

        Raises:
            UserError: some rank said something.
        """
        everyone: list[str | None] = [None] * self.ranks
        dist.all_gather_object(everyone, said, group=self.host)
        failed = [(rank, each) for rank, each in enumerate(everyone) if each is not None]
        if failed:
            rank, words = failed[0]
            raise UserError(words if len(failed) == self.ranks else f"rank {rank}: {words}")


@contextlib.contextmanager
def join(config: ParallelConfig) -> Iterator[World]:
    """The ranks, joined for the time of a run.

    Raises:
        UserError: there is no such device, or the others cannot be reached.
        RankLost: another rank was lost on the way. OutOfMemory: this one's device is full.
    """
    cuda = config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available())
    if cuda and not torch.cuda.is_available():
        raise UserError("parallel.device: expected cpu or auto, as torch finds no CUDA here, got 'cuda'")
    local = int(os.environ.get("LOCAL_RANK", 0))
    if cuda and local >= torch.cuda.device_count():
        raise UserError(f"local rank {local} has no GPU of its own: there are {torch.cuda.device_count()}")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if config.threads:
        torch.set_num_threads(config.threads)
    backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
    waiting = timedelta(minutes=config.timeout)
    try:
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=waiting)
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=waiting)
        groups = [dist.new_group(backend="gloo", timeout=waiting) for _ in range(2)]
    except (RuntimeError, ValueError) as error:
        raise UserError(f"the ranks cannot be joined: {str(error).splitlines()[0]}") from error
    rank = dist.get_rank()
    try:
        yield World(rank, dist.get_world_size(), device, *groups)
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"rank {rank}: {device} has no memory left; start it again with a larger parallel.micro, or with "
            "parallel.checkpointing=block"
        ) from error
    except RuntimeError as error:
        if not _lost(error):
            raise
        raise RankLost(
            f"rank {rank}: another rank was lost; start the same command again to go on from the last state"
        ) from error
    else:
        dist.destroy_process_group()
    finally:
        # After an error nothing is torn down: that would wait for ranks that may be gone, and the process ends anyway.
        # Gloo's threads let go of a collective's tensors after it is done, and abort the process when Python is ending
        # by then (pytorch/pytorch#190489): give them the time.
        time.sleep(0.2)


def _lost(error: RuntimeError) -> bool:
    words = str(error)
    return isinstance(error, dist.DistError) or "gloo" in words or "Connection closed by peer" in words


class Signals:
    """SIGTERM and Ctrl-C, collected so that no step is cut in two; a second Ctrl-C raises at once."""

    def __init__(self) -> None:
        self.received = 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number

    def __enter__(self) -> Signals:
        self._before = {each: signal.signal(each, self._note) for each in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error: object) -> None:
        for each, handler in self._before.items():
            signal.signal(each, handler)
