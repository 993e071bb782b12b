"""Small training runs: a checkpoint to start from, shards, a config, and the command in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import sets
import tiny
import torch

from unif2ace.checkpoint import Checkpoint
from unif2ace.model.modeling import UniF2aceForConditionalGeneration

ROOT = Path(__file__).resolve().parents[2]


def prepare(folder: Path, samples: int = 23) -> dict[str, Any]:
    """A start and shards in `folder`; the plain values of a config that trains 6 steps on them."""
    folder.mkdir(parents=True, exist_ok=True)
    words = tiny.text_tokenizer()
    _, images = sets.saved_tokenizer(folder)
    torch.manual_seed(3)
    model = UniF2aceForConditionalGeneration(sets.model(words))
    Checkpoint.of(model, images, words).save(folder / "start")
    shards = sets.shards(folder, samples)
    return {
        "run": str(folder / "run"),
        "checkpoint": str(folder / "start"),
        "data": {"sets": [{"path": str(shards)}], "batch": 8, "mix": {"t2i": 4, "mmu": 4, "lm": 0}},
        "stages": [{"name": "joint", "steps": 6, "lr": 1e-2, "warmup": 2}],
        "parallel": {"precision": "float32", "device": "cpu", "threads": 1},
        "save": {"every": 100, "minutes": 0},
        "watch": {"progress": False, "every": 2},
    }


def command(config: Path, *given: str, ranks: int = 1) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d",
                "--rdzv-endpoint=localhost:0"] if ranks > 1 else []  # fmt: skip
    return [sys.executable, *torchrun, "-m", "unif2ace", "train", str(config), *given]


def environment() -> dict[str, str]:
    paths = [str(ROOT / "kernels"), str(ROOT), str(Path(__file__).parent)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def run(config: Path, *given: str, ranks: int = 1, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(config, *given, ranks=ranks), capture_output=True, text=True, timeout=timeout, env=environment()
    )


def write(values: dict[str, Any], path: Path) -> Path:
    path.write_text(json.dumps(values))
    return path


def records(run: Path) -> list[dict[str, Any]]:
    """Lines of the log that are steps."""
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "event" not in line]


def events(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "event" in line]
