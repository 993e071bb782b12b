"""The batches of a training run, step by step: a function of (config, step) alone, so that it can be gone on with.

A step has `counts[task]` rows of each task. Row i of a task at step s stands at place s * counts + i of the task's
endless walk through its samples: epoch after epoch, each a permutation (`order.Order`) of all of them. Rank r of R
makes the rows r, r + R, ... of each task, so that any number of ranks sees the same steps; a worker makes whole steps,
which arrive in order, so that neither does the number of workers matter.

A sample that cannot be used leaves its place to a stand-in, whose index is drawn from the epoch and the place: others
stay where they are, whoever comes to the damage, and whenever. Which samples are damaged is counted by each rank.

What has to be remembered is a step and a place a task: `state_dict`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from unif2ace.configs import UniF2aceConfig
from unif2ace.data.base import Source
from unif2ace.data.config import TASKS, DataConfig
from unif2ace.data.order import Order
from unif2ace.data.rows import MmuRow, RowMaker, T2IRow
from unif2ace.data.samples import Sample, SampleError
from unif2ace.data.sources import open_source
from unif2ace.data.texts import TokenFile
from unif2ace.errors import UserError, first_line
from unif2ace.files import digest
from unif2ace.model.sequences import Batch
from unif2ace.model.text_tokenizer import TextTokenizer

log = logging.getLogger(__name__)

# What a random number is for, so that equal seeds and steps do not mean equal numbers (see training/recipe.py).
_ROW, _TIMES, _STAND_IN = 11, 12, 13
_LATEST = 1 << 40  # steps that no run reaches


@dataclass
class Step:
    """What one rank does in one step.

    Attributes:
        step: its number.
        batches: one for each micro-batch.
        keys: for each micro-batch the samples of its rows, as `task:key`.
        told: how many texts were `truncated` or `dropped`, and how many places had a `stand_in`.
        corrupt: where -> reason, of damaged samples that were met.
    """

    step: int
    batches: list[Batch] = field(default_factory=list)
    keys: list[list[str]] = field(default_factory=list)
    told: Counter = field(default_factory=Counter)
    corrupt: dict[str, str] = field(default_factory=dict)


class Walk:
    """A task's samples, out of all the sets that serve it, in every epoch's order."""

    def __init__(self, task: str, sets: list[tuple[Source | TokenFile, np.ndarray | None]], seed: int) -> None:
        self.task, self.sets, self.seed = task, sets, seed
        sizes = [len(source) if chosen is None else len(chosen) for source, chosen in sets]
        self._firsts = np.concatenate([[0], np.cumsum(sizes)]).tolist()
        self._orders: dict[int, Order] = {}

    def __len__(self) -> int:
        return self._firsts[-1]

    def read(self, index: int) -> Any:
        """Sample `index` of all sets together, or window of tokens.

        Raises:
            SampleError: it cannot be read.
        """
        number = int(np.searchsorted(self._firsts, index, side="right")) - 1
        source, chosen = self.sets[number]
        within = index - self._firsts[number]
        return source.read(within if chosen is None else int(chosen[within]), features=self.task == "mmu")

    def candidates(self, place: int) -> Iterator[int]:
        """Index of the sample at `place` of the walk, then of its stand-ins, without end."""
        epoch, within = divmod(place, len(self))
        if epoch not in self._orders:
            self._orders = {epoch: Order(len(self), self.task, self.seed, epoch)}
        yield self._orders[epoch][within]
        rng = np.random.default_rng((self.seed, _STAND_IN, TASKS.index(self.task), place))
        while True:
            yield int(rng.integers(len(self)))


class Stream:
    """Iterate it for `Step` after `Step`, without end. One rank's.

    Args:
        text: the model's text tokenizer.
        rank, ranks: whose rows to make. micro: micro-batches of a step on each rank.
        encode: makes codes and features of samples that have only an image (`encode.Encoding`).
        progress: show a bar while texts are tokenised.
        where: the config's key, for messages.

    Raises:
        UserError: the config is not possible, a set cannot be opened, or some rank would have no row.
    """

    def __init__(
        self,
        data: DataConfig,
        model: UniF2aceConfig,
        text: TextTokenizer,
        *,
        rank: int = 0,
        ranks: int = 1,
        micro: int = 1,
        encode: Callable[[Sample], Sample] | None = None,
        progress: bool = False,
        where: str = "data",
    ) -> None:
        self.data, self.counts, self.where = data.check(where), data.counts, where
        if not 0 <= rank < ranks:
            raise ValueError(f"rank: expected 0 to ranks - 1 = {ranks - 1}, got {rank}")
        if micro < 1:
            raise ValueError(f"micro: expected at least 1, got {micro}")
        if max(self.counts.values()) < ranks * micro:
            raise UserError(
                f"{where}.batch: {data.batch} rows are {self.counts} a step, too few for {ranks} ranks with {micro} "
                "micro-batches each"
            )
        self.rank, self.ranks, self.micro, self.encode = rank, ranks, micro, encode
        self.rows = RowMaker(data, model, text)
        sources = [open_source(each, f"{where}.sets[{index}]") for index, each in enumerate(data.sets)]
        self.walks: dict[str, Walk] = {}
        self.corrupt: dict[str, str] = {}  # where -> reason
        self.told: Counter = Counter()
        for task in (task for task in TASKS if self.counts[task]):
            sets: list[tuple[Source | TokenFile, np.ndarray | None]] = []
            for each, source in zip(data.sets, sources):
                if task not in each.tasks:
                    continue
                if task == "lm":
                    folder = Path(data.cache) if data.cache else source.path.parent
                    tokens = TokenFile(source, text, folder, self.rows.lengths.lm, progress)
                    self.corrupt |= dict(tokens.damaged)
                    sets.append((tokens, None))
                else:
                    sets.append((source, source.serving(task)))
            self.walks[task] = Walk(task, sets, data.seed)
            if not len(self.walks[task]):
                raise UserError(f"{where}.mix.{task}: no sample of its sets has the words for it")
        for source in sources:
            self.corrupt |= dict(source.damaged)
        self._stop_if_too_many(self.corrupt)
        parts = [f"{task} {len(walk)}" for task, walk in self.walks.items()]
        self.fingerprint = digest(*(each.fingerprint.encode() for each in sources), " ".join(parts).encode())
        self.step = 0
        self._base = (0, dict.fromkeys(TASKS, 0))  # a step, and the place of each task's walk where it begins

    def places(self, step: int) -> dict[str, int]:
        """Where each task's walk is when `step` begins."""
        first, places = self._base
        return {task: places[task] + (step - first) * self.counts[task] for task in TASKS}

    def epochs(self) -> dict[str, float]:
        """Epochs of each task's samples that the steps so far have walked."""
        places = self.places(self.step)
        return {task: places[task] / len(walk) for task, walk in self.walks.items()}

    def state_dict(self, step: int | None = None) -> dict[str, Any]:
        """Plain values, to go on with `step`; by default with the one after the last that was taken."""
        step = self.step if step is None else step
        return {
            "seed": self.data.seed,
            "step": step,
            "places": self.places(step),
            "fingerprint": self.fingerprint,
            "corrupt": dict(self.corrupt),
        }

    def load_state_dict(self, state: dict[str, Any], same_data: bool = True) -> None:
        """Go on from a state, of whatever number of ranks and workers; rows and mix may have changed.

        Args:
            same_data: whether other samples than the state's are an error; without it their walks begin anew.

        Raises:
            UserError: the state is of other samples or of another seed.
        """
        seed, same = state["seed"] == self.data.seed, state["fingerprint"] == self.fingerprint
        if same_data and not seed:
            raise UserError(f"{self.where}.seed: expected {state['seed']}, the run's so far, got {self.data.seed}")
        if same_data and not same:
            raise UserError(f"{self.where}.sets: other samples than the run's so far, so it cannot go on exactly")
        same = same and seed
        self.step = state["step"]
        self._base = (self.step, {task: state["places"][task] if same else 0 for task in TASKS})
        self.corrupt |= state["corrupt"] if same else {}

    def __iter__(self) -> Iterator[Step]:
        loader: DataLoader = DataLoader(
            _Steps(self),  # type: ignore[arg-type]
            batch_size=None,
            sampler=range(self.step, _LATEST),
            num_workers=self.data.workers,
            prefetch_factor=self.data.prefetch if self.data.workers else None,
            generator=torch.Generator(),  # workers are seeded from it, and not from the run's own
        )
        steps = iter(loader)
        while True:
            try:
                step = next(steps)
            except RuntimeError as error:
                if "DataLoader worker" not in str(error):
                    raise
                raise UserError(f"a data worker was lost, out of memory perhaps: {first_line(error)}") from error
            if isinstance(step, UserError):
                raise step
            for where, reason in step.corrupt.items():
                if where not in self.corrupt:
                    log.warning("sample passed over: %s: %s", where, reason)
            self.corrupt |= step.corrupt
            self._stop_if_too_many(self.corrupt)
            self.told += step.told
            self.step = step.step + 1
            yield step

    def make(self, step: int) -> Step:
        """This rank's part of `step`."""
        done = Step(step)
        places = self.places(step)
        rng = np.random.default_rng((self.data.seed, _TIMES, step))
        times = self.rows.mask_prob(rng, self.counts["t2i"]) if self.counts["t2i"] else None
        for micro in range(self.micro):
            made: dict[str, list] = {task: [] for task in TASKS}
            keys: list[str] = []
            for task in self.walks:
                for row in range(self.rank + micro * self.ranks, self.counts[task], self.ranks * self.micro):

                    def build(sample: Any, rng: np.random.Generator, task: str = task, row: int = row) -> Any:
                        if task == "lm":
                            return sample
                        sample = self._encoded(sample)
                        if task == "mmu":
                            return self.rows.mmu(sample, rng, done.told)
                        return self.rows.t2i(sample, rng, times[row], row, done.told)  # type: ignore[index]

                    sample, value = self._usable(task, places[task] + row, (step, row), build, done)
                    made[task].append(value)
                    keys.append(f"{task}:{sample.key if isinstance(sample, Sample) else places[task] + row}")
            t2i: list[T2IRow] = made["t2i"]
            mmu: list[MmuRow] = made["mmu"]
            done.batches.append(self.rows.collate(t2i, mmu, made["lm"], step))
            done.keys.append(keys)
        return done

    def _usable(self, task: str, place: int, row: tuple[int, int], build: Callable, done: Step) -> tuple[Any, Any]:
        """The sample at a place of the walk, or the first stand-in that can be used, and what `build` makes of it."""
        for attempt, index in enumerate(self.walks[task].candidates(place)):
            rng = np.random.default_rng((self.data.seed, _ROW, TASKS.index(task), *row, attempt))
            try:
                sample = self.walks[task].read(index)
                return sample, build(sample, rng)
            except SampleError as error:
                done.told["stand_in"] += 1
                if error.corrupt:
                    done.corrupt[error.where] = error.reason
                    self._stop_if_too_many(done.corrupt)
                if attempt > self.data.max_corrupt + 1000:
                    raise UserError(
                        f"{attempt} samples in a row are of no use for {task}; the last: {error}"
                    ) from error
        raise AssertionError("stand-ins have no end")

    def _encoded(self, sample: Sample) -> Sample:
        if sample.codes is not None:
            return sample
        if self.encode is None:
            raise UserError(f"{sample.where}: it has no codes; run `unif2ace precompute` on the set first")
        return self.encode(sample)

    def _stop_if_too_many(self, corrupt: dict[str, str]) -> None:
        if len(corrupt) > self.data.max_corrupt:
            where, reason = list(corrupt.items())[-1]
            raise UserError(
                f"{len(corrupt)} samples could not be read, data.max_corrupt allows {self.data.max_corrupt}; "
                f"the last: {where}: {reason}"
            )


class _Steps:
    """What a worker asks: steps by number. What a user can mend comes back as a value, whole and in one line."""

    def __init__(self, stream: Stream) -> None:
        self.stream = stream

    def __getitem__(self, step: int) -> Step | UserError:
        try:
            return self.stream.make(step)
        except UserError as error:
            return UserError(str(error))
