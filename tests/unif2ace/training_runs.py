"""Small training runs: a checkpoint to start from, shards, a config; and ranks in processes of their own.

Processes are forked from a server that has imported everything, so that a rank starts in a fraction of a second.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import sets
import tiny
import torch

from unif2ace.checkpoint import Checkpoint
from unif2ace.configs import UniF2aceConfig
from unif2ace.data.samples import Sample
from unif2ace.data.shards import MANIFEST, write_shard
from unif2ace.model.image_tokenizer import ImageTokenizer, ImageTokenizerConfig
from unif2ace.model.modeling import UniF2aceForConditionalGeneration

_REST: dict[str, Any] = {
    "stages": [{"name": "joint", "steps": 6, "lr": 1e-2, "warmup": 2}],
    "parallel": {"precision": "float32", "device": "cpu", "threads": 1},
    "save": {"every": 100, "minutes": 0},
    "watch": {"progress": False, "every": 2},
}
_PROCESSES = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["unif2ace.training.engine", "unif2ace.cli.train"])


def prepare(folder: Path, samples: int = 23, text: bool = False, **sizes: Any) -> dict[str, Any]:
    """A start and shards in `folder`; the plain values of a config that trains 6 steps on them.

    Args:
        text: a row of plain text a step, too. sizes: of the model.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = tiny.text_tokenizer()
    _, images = sets.saved_tokenizer(folder)
    torch.manual_seed(3)
    model = UniF2aceForConditionalGeneration(sets.model(words, **sizes))
    Checkpoint.of(model, images, words).save(folder / "start")
    data: dict[str, Any] = {
        "sets": [{"path": str(sets.shards(folder, samples))}],
        "batch": 9 if text else 8,
        "mix": {"t2i": 4, "mmu": 4, "lm": int(text)},
        "max_corrupt": 3,
    }
    if text:
        lines = [json.dumps({"text": f"{words} and {words}"}) for words in sets.WORDS]
        (folder / "plain.jsonl").write_text("\n".join(lines))
        data["sets"].append({"path": str(folder / "plain.jsonl"), "tasks": ["lm"]})
    return {
        "run": str(folder / "run"),
        "checkpoint": str(folder / "start"),
        "data": data,
        **copy.deepcopy(_REST),
    }


def prepare_drawn(folder: Path, samples: int = 23) -> dict[str, Any]:
    """As `prepare`, with codes and features drawn at random: nothing of it needs OpenCV or a picture."""
    words = tiny.text_tokenizer()
    config = sets.model(words)
    torch.manual_seed(3)
    images = ImageTokenizer(ImageTokenizerConfig(side=16, bits=sets.CODE_BITS, fine=8, coarse=8, blocks=1))
    Checkpoint.of(UniF2aceForConditionalGeneration(config), images, words).save(folder / "start")
    (folder / "shards").mkdir(parents=True)
    index = write_shard(folder / "shards", 0, map(partial(_drawn, config), range(samples)), 0, [], "drawn")
    (folder / "shards" / MANIFEST).write_text(json.dumps({"shards": [index]}))
    return {
        "run": str(folder / "run"),
        "checkpoint": str(folder / "start"),
        "data": {"sets": [{"path": str(folder / "shards")}], "batch": 8, "mix": {"t2i": 4, "mmu": 4, "lm": 0}},
        **copy.deepcopy(_REST),
    }


def _drawn(config: UniF2aceConfig, number: int) -> Sample:
    rng = np.random.default_rng(number)
    asked = [{"question": "and the hair?", "answer": "dark hair"}, {"question": "who?", "answer": f"face {number}"}]
    return Sample(
        key=f"face-{number}",
        where=f"drawn {number}",
        captions=(f"{sets.WORDS[number % 5]} {number}",),
        conversations=(tuple((turn["question"], turn["answer"]) for turn in asked),),
        codes=rng.integers(0, config.vocabulary.codes, config.image_tokens),
        identity=rng.standard_normal(config.identity, dtype=np.float32),
        semantic=rng.standard_normal((4, config.semantic), dtype=np.float32),
    )


def write(values: dict[str, Any], path: Path) -> Path:
    path.write_text(json.dumps(values))
    return path


class Ranks:
    """`unif2ace train CONFIG ...` on some ranks; what they print goes to files beside the config."""

    def __init__(self, config: Path, *given: str, ranks: int = 1, hook: str | None = None) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.logs = [config.with_suffix(f".{rank}.log") for rank in range(ranks)]
        environments: list[dict[str, str]] = [{}]
        if ranks > 1:
            common = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
            environments = [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
        self.processes = [
            _PROCESSES.Process(target=_rank, args=([str(config), *given], environment, str(log), hook), daemon=True)
            for environment, log in zip(environments, self.logs)
        ]
        for process in self.processes:
            process.start()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *error: object) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def wait(self, timeout: float = 90.0) -> list[int | None]:
        """Exit codes, of signals negative; None of those that still run after `timeout` seconds."""
        until = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, until - time.monotonic()))
        return [process.exitcode for process in self.processes]

    def signal(self, number: int, rank: int | None = None) -> None:
        """To one rank or all; those that ended already get none."""
        for process in self.processes if rank is None else [self.processes[rank]]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid or 0, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    @property
    def said(self) -> str:
        """What all ranks printed."""
        return "".join(log.read_text() for log in self.logs)


def _rank(arguments: list[str], environment: dict[str, str], log: str, hook: str | None) -> None:
    os.environ.update(environment)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    if hook is not None:  # MODULE:FUNCTION that breaks something in this process
        module, _, name = hook.partition(":")
        getattr(importlib.import_module(module), name)()
    from unif2ace.cli import main

    sys.exit(main(["train", *arguments]))


def train(
    config: Path, *given: str, ranks: int = 1, hook: str | None = None, timeout: float = 300.0
) -> list[dict[str, Any]]:
    """A run to its end; its steps' records."""
    with Ranks(config, *given, ranks=ranks, hook=hook) as processes:
        codes = processes.wait(timeout)
        assert codes == [0] * ranks, f"{codes}: {processes.said[-2000:]}"
    return records(folder_of(config, *given))


def folder_of(config: Path, *given: str) -> Path:
    named = [each.removeprefix("--run=") for each in given if each.startswith("--run=")]
    return Path(named[0] if named else json.loads(config.read_text())["run"])


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def records(run: Path) -> list[dict[str, Any]]:
    """Of the steps."""
    return [line for line in lines(run) if "event" not in line]


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in lines(run) if line.get("event") == name]


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Of the exported model."""
    return Checkpoint.load(run / "checkpoint").model.state_dict()
