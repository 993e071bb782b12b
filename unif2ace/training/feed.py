"""Steps as every rank takes them: rows from the stream, and what all ranks must know of them, one step in advance."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import distributed as dist

from unif2ace.configs import T2I
from unif2ace.data.stream import Step, Stream
from unif2ace.errors import UserError
from unif2ace.model.sequences import IGNORE, Batch, Shares
from unif2ace.training.world import World

_SAID = ("mask", "mmu", "lm", "tokens", "corrupt", "failed", "stop", "save")


@dataclass
class Work:
    """One step of one rank.

    Attributes:
        step: its number. batches: on the device, each with its shares of the step. keys: names of its samples.
        tokens: that are not padding, of all ranks. corrupt: samples that could not be read, of all ranks so far.
        longest: tokens of this rank's longest row, padding included.
        waited: seconds of this step's time that the next one's rows were waited for, by the rank that did so longest.
            To be asked once the step is computed: all ranks have told it by then.
        stop, save: whether some rank was asked to stop, or rank 0 finds a state due: before this step.
    """

    step: int
    batches: list[Batch]
    keys: list[list[str]]
    tokens: int
    corrupt: int
    longest: int
    waited: Callable[[], float]
    stop: bool
    save: bool


def feed(
    stream: Stream, world: World, until: int, stop: Callable[[], bool], save: Callable[[], bool]
) -> Iterator[Work]:
    """The stream's steps up to `until`.

    Targets are counted where rows are made, and added up over the ranks while the step before is computed: each mean
    of the loss is over the step's targets, whichever rank has them.

    Args:
        stop, save: asked once a step on every rank.

    Raises:
        UserError: some rank's data failed, or more samples than `data.max_corrupt` are damaged on all ranks together.
    """
    source = iter(stream)
    known = len(stream.corrupt)  # found by every rank when the sets were opened
    ahead = _Ahead(source, stream, world, known, stop, save) if stream.step < until else None
    waits = [ahead]  # the first step's time has two of them
    while ahead is not None:
        now = ahead
        ahead = _Ahead(source, stream, world, known, stop, save) if now.step + 1 < until else None
        yield now.work([each for each in (*waits, ahead) if each is not None])
        waits = []


class _Ahead:
    """A step that is being agreed upon."""

    def __init__(
        self,
        source: Iterator[Step],
        stream: Stream,
        world: World,
        known: int,
        stop: Callable[[], bool],
        save: Callable[[], bool],
    ) -> None:
        self.stream, self.world, self.known = stream, world, known
        self.step, self.made, self.error = stream.step, None, None
        began = time.perf_counter()
        try:
            self.made = next(source)
        except UserError as error:
            self.error = str(error)
        except StopIteration:  # after an error, which is told when its step's turn comes; ranks go on in one order
            self.error = "the data ended"
        waited = time.perf_counter() - began
        batches = self.made.batches if self.made else []
        self.own = [_targets(batch) for batch in batches]
        said = {
            **{name: sum(own[name] for own in self.own) for name in ("mask", "mmu", "lm")},
            "tokens": sum(int(batch.attention_mask.sum()) for batch in batches),
            "corrupt": len(stream.corrupt) - known,
            "failed": self.error is not None,
            "stop": stop(),
            "save": world.rank == 0 and save(),
        }
        waits = [int(1e6 * waited) if rank == world.rank else 0 for rank in range(world.ranks)]
        # Added up over the ranks: each one's wait has a place of its own, so that the longest is known.
        self.said = torch.tensor([*(int(said[name]) for name in _SAID), *waits])
        self.agreed = dist.all_reduce(self.said, group=world.host, async_op=True)

    def waited(self) -> float:
        """Seconds, of the rank that waited longest."""
        self.agreed.wait()
        return max(self.said[len(_SAID) :].tolist()) / 1e6

    def work(self, waits: list[_Ahead]) -> Work:
        """The step; `waits` is what is waited for in its time."""
        self.agreed.wait()
        said = dict(zip(_SAID, self.said.tolist()))
        if said["failed"]:
            self.world.share_failure(self.error)
        corrupt = self.known + said["corrupt"]
        if corrupt > (allowed := self.stream.data.max_corrupt):
            mine = list(self.stream.corrupt.items())[self.known :]
            where = f"; the last: {mine[-1][0]}: {mine[-1][1]}" if mine else ""
            words = f"{corrupt} samples could not be read, data.max_corrupt allows {allowed}{where}"
            self.world.share_failure(words if mine else None)
        assert self.made is not None  # or some rank failed
        rows = max(self.stream.counts["t2i"], 1)
        batches = []
        for batch, own in zip(self.made.batches, self.own):
            of = {name: own[name] / max(said[name], 1) for name in ("mask", "mmu", "lm")}
            shares = Shares(score=own["rows"] / rows, balance=1 / len(self.own), **of)
            batches.append(dataclasses.replace(batch.to(self.world.device), shares=shares))
        return Work(
            self.step, batches, self.made.keys, said["tokens"], corrupt,
            max(batch.input_ids.shape[1] for batch in batches), lambda: sum(each.waited() for each in waits),
            said["stop"] > 0, said["save"] > 0,
        )  # fmt: skip


def _targets(batch: Batch) -> dict[str, int]:
    """Targets in a batch: masked codes, text on faces, plain text; and its t2i rows."""
    wanted, plain, generates = (batch.labels != IGNORE).sum(1), batch.image_start < 0, batch.task == T2I
    where = {"mask": generates, "mmu": ~generates & ~plain, "lm": plain}
    return {"rows": int(generates.sum()), **{name: int(wanted[rows].sum()) for name, rows in where.items()}}
