"""What goes wrong in a rank, on purpose: called in its process before the command starts."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import time
from pathlib import Path
from unittest import mock

import torch
from torch import distributed as dist

from unif2ace.data.stream import Stream
from unif2ace.model import modeling
from unif2ace.training import engine, sharding, stage, states
from unif2ace.training.stage import Stage


def keys_told() -> None:
    """The samples of every step, redone ones too, go to RUN/keys.RANK.jsonl."""
    step = Stage.step

    def told(self, work):
        with open(self.config.folder / f"keys.{self.world.rank}.jsonl", "a") as file:
            file.write(json.dumps([work.step, work.keys]) + "\n")
        return step(self, work)

    Stage.step = told


def killed_in_write() -> None:
    """Dies after a state's tensors are on the disk and before it is one, the second time."""
    write, calls = states.write_json, []

    def dies(path, value):
        calls.append(path)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        write(path, value)

    states.write_json = dies


def no_space() -> None:
    """No file can be longer than 60 kB: a real refusal of the file system, which a full disk's is like."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def nan_twice() -> None:
    """The losses of the second and third batch are not numbers."""
    loss, calls = modeling.training_loss, []

    def poisoned(*arguments):
        calls.append(1)
        total, terms = loss(*arguments)
        return (total * float("nan"), terms) if len(calls) in (2, 3) else (total, terms)

    modeling.training_loss = poisoned


def folder_of_its_own() -> None:
    """Rank 1's machine has other storage where the run's folder is named."""
    engine._SEEN = 0.5
    if os.environ["RANK"] == "1":
        os.makedirs("other")
        os.chdir("other")


def no_memory() -> None:
    """The last rank's device is full in the fourth step."""
    step = Stage.step

    def full(self, work):
        if work.step == 3 and self.world.rank == self.world.ranks - 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return step(self, work)

    Stage.step = full


def slow_steps() -> None:
    """A step takes a tenth of a second, so that a signal meets the run in the middle."""
    import threading

    step, waiting = Stage.step, threading.Event()

    def slow(self, work):
        waiting.wait(0.1)
        return step(self, work)

    Stage.step = slow


def late_rows() -> None:
    """Rank 1 makes the rows of the fourth step half a second late."""
    make = Stream.make

    def late(self, step):
        if self.rank == 1 and step == 3:
            time.sleep(0.5)
        return make(self, step)

    Stream.make = late


def sharded_alone() -> None:
    """One rank, sharded as many are."""
    stage.shard = sharding.spread
    Stage._autocast = lambda self: contextlib.nullcontext()


def weights_not_of_the_file() -> None:
    """Fails where whole weights have memory of their own when they are to be spread."""
    spread = stage.shard

    def looked_at(model, *given):
        maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
        pages = [[int(end, 16) for end in each[0].split("-")] for each in maps if each[-1].endswith(".safetensors")]
        for name, weight in model.named_parameters():
            assert any(first <= weight.data_ptr() < stop for first, stop in pages), name
        spread(model, *given)

    stage.shard = looked_at


def second_layer_late() -> None:
    """Rank 1 has the second layer's weights gathered only when rank 0, which asked for them, has computed the first."""
    step, name = Stage.step, "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    gather = getattr(dist, name)

    def late(self, work):
        computed, asked = self.config.folder / f"computed-{work.step}", []

        def gathered(*given, **named):
            asked.append(1)
            if len(asked) == 3 and self.world.rank == 1:  # after those of the root and of the first layer
                wait_for(computed)
            return gather(*given, **named)

        def tell(*_):
            if self.world.rank == 0 and len(asked) == 3:
                computed.touch()

        with mock.patch.object(dist, name, gathered):
            told = self.model.blocks[0].register_forward_hook(tell)
            done = step(self, work)
            told.remove()
        return done

    Stage.step = late


def wait_for(path, seconds: float = 20.0) -> None:
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until, f"{path.name} never came"
        time.sleep(0.01)
