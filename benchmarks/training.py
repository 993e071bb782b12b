"""A training step on one and on two processes of a CPU: tokens a second, bytes sent, and what waits for them.

    python -m benchmarks.training [--steps N] [--json OUT.jsonl]

Every process has one thread; the step's rows are the same in all, so two have half of them each. Runs take turns and
ratios are of neighbours. Bytes are what a rank receives of the others' in the collectives of a step, counted where
they are called. The least is what sharded training cannot do without: each layer's weights gathered for the forward
and again for the backward, since they are let go between, the others' once; each gradient summed into its shard. Where
experts are spread, what tokens send hangs on the routing (dispatch.py). One more step is profiled: how long collectives
are under way, waiting for the other process included, and the share of that in which rank 0 computes. "Nothing ahead"
asks for a layer's weights when the layer begins, as FSDP2 does by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule

from unif2ace.checkpoint import Checkpoint
from unif2ace.configs import UniF2aceConfig, VocabularyConfig
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.training import engine, feed, stage
from unif2ace.training.config import read_config
from unif2ace.training.profile import Spans, Timeline, length, path_of, union

from .cases.data import Rows
from .environment import describe
from .results import write_records

WARM = 3  # steps before the first that counts
JOINED = 1e-3  # seconds between what a picture shows as one
OURS, NOT_AHEAD = "two, sharded", "two, sharded, nothing ahead"
VARIANTS = {"one process": (1, 1), NOT_AHEAD: (2, 1), OURS: (2, 1), "two, experts spread": (2, 2)}  # processes, experts
SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "D512": {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8},
}
_GATHERS = ("all_gather_into_tensor", "all_gather_single")
_SCATTERS = ("reduce_scatter_tensor", "reduce_scatter_single")


def _received(name: str, *arguments: Any, **options: Any) -> float:
    """Bytes that a rank gets from the others, or at least as many as it sends: of the parts that are not its own."""
    first, *rest = [*arguments, *options.values()]
    if name == "all_reduce":
        return 2 * first.nbytes * (dist.get_world_size() - 1) / dist.get_world_size()
    second, *rest = rest
    if name == "all_to_all_single":
        return first.nbytes * (1 - rest[0][dist.get_rank()] / max(1, sum(rest[0])))
    whole, part = (first, second) if name in _GATHERS else (second, first)
    return whole.nbytes - part.nbytes


@contextlib.contextmanager
def counted() -> Iterator[dict[str, float]]:
    """Bytes received in the collectives of tensors, and how many there were."""
    told = {"bytes": 0.0, "calls": 0.0}

    def counting(name: str, real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            told["calls"] += 1
            told["bytes"] += _received(name, *arguments, **options)
            return real(*arguments, **options)

        return call

    names = [name for name in (*_GATHERS, *_SCATTERS, "all_to_all_single", "all_reduce") if hasattr(dist, name)]
    patches = [mock.patch.object(dist, name, counting(name, getattr(dist, name))) for name in names]
    for patch in patches:
        patch.start()
    try:
        yield told
    finally:
        for patch in patches:
            patch.stop()


def prepare(root: Path, size: str, steps: int) -> tuple[Rows, dict[str, Any]]:
    """A start of random weights, rows of random codes (there as long as they are held), a run's config."""
    config = UniF2aceConfig.tiny(VocabularyConfig(text=512, codes=1024), **SIZES[size])
    rows = Rows(config, 44, 256, False)
    torch.manual_seed(0)
    Checkpoint.of(UniF2aceForConditionalGeneration(config), rows.tokenizer, rows.text).save(root / "start")
    data = dataclasses.asdict(rows.data) | {"sets": [{"path": str(rows.root)}]}
    return rows, {
        "checkpoint": str(root / "start"), "data": data,
        "stages": [{"name": "measured", "steps": steps, "lr": 1e-4}], "save": {"every": 10**6, "minutes": 0},
        "watch": {"progress": False, "every": 10**6, "profile": [steps - 1]},
    }  # fmt: skip


def _work(rank: int, port: int, ranks: int, values: dict[str, Any], ahead: bool, out: str) -> None:
    at = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
    os.environ.update({name: str(value) for name, value in at.items()})
    steps: list[dict[str, float]] = []
    real = stage.Stage.step

    def measured(self: stage.Stage, work: feed.Work) -> dict[str, Any]:
        with counted() as told:
            began = time.perf_counter()
            done = real(self, work)
            told["step"] = time.perf_counter() - began
        sizes = {name: 4 * each.numel() for name, each in self.trained.items()}
        layers = sum(size for name, size in sizes.items() if name.startswith("blocks."))
        steps.append(told | {"tokens": work.tokens, "layers": layers, "root": sum(sizes.values()) - layers})
        return done

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(stage.Stage, "step", measured))
        patches.enter_context(mock.patch.object(engine, "export"))
        for name in () if ahead else ("set_modules_to_forward_prefetch", "_set_unshard_async_op"):
            patches.enter_context(mock.patch.object(FSDPModule, name))
        engine.train(read_config(values))
    if rank == 0:
        Path(out).write_text(json.dumps(steps[WARM:-1]))  # the last is profiled


def run(root: Path, values: dict[str, Any], name: str) -> tuple[dict[str, float], Timeline]:
    """Medians over a run's steps, and a step of rank 0."""
    ranks, experts = VARIANTS[name]
    folder = Path(tempfile.mkdtemp(dir=root))
    parallel = {"device": "cpu", "precision": "float32", "threads": 1, "experts": experts}
    values = values | {"run": str(folder), "parallel": parallel}
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    given = (port, ranks, values, name != NOT_AHEAD, str(folder / "steps.json"))
    torch.multiprocessing.spawn(_work, given, nprocs=ranks)
    steps = json.loads((folder / "steps.json").read_text())
    (profiled,) = values["watch"]["profile"]
    timeline = Timeline.read(path_of(folder, profiled, 0))
    return {key: statistics.median(step[key] for step in steps) for key in steps[0]}, timeline


def compare(size: str, steps: int, rounds: int) -> list[dict[str, Any]]:
    """A record a variant; efficiency is one process's time over that of so many, times their number."""
    with tempfile.TemporaryDirectory() as folder:
        held, values = prepare(Path(folder), size, WARM + steps + 1)
        found: dict[str, list[tuple[dict[str, float], Timeline]]] = {name: [] for name in VARIANTS}
        for _ in range(rounds):
            for name, each in found.items():
                each.append(run(Path(folder), values, name))
        del held
    alone, records = [each for each, _ in found["one process"]], []
    for name, measured in found.items():
        (ranks, experts), runs, timelines = VARIANTS[name], *map(list, zip(*measured))
        one, middle = runs[0], sorted(timelines, key=lambda each: each.hidden)[len(timelines) // 2]
        least = (ranks - 1) / ranks * (3 * one["layers"] + 2 * one["root"]) if experts == 1 else None
        records.append({
            "op": "training", "size": size, "variant": name, "processes": ranks, "rounds": rounds, "steps": steps,
            "step_ms": 1e3 * statistics.median(each["step"] for each in runs),
            "tokens_per_second": statistics.median(each["tokens"] / each["step"] for each in runs),
            "efficiency": statistics.median(a["step"] / b["step"] / ranks for a, b in zip(alone, runs)),
            "bytes": one["bytes"], "bytes_least": least, "collectives": one["calls"],
            "exchanging_ms": 1e3 * statistics.median(length(each.exchanging) for each in timelines),
            "hidden": statistics.median(each.hidden for each in timelines),
            "timeline_ms": {"computing": _drawn(middle.computing), "exchanging": _drawn(middle.exchanging)},
        })  # fmt: skip
    return records


def _drawn(spans: Spans) -> list[list[float]]:
    """As fine as a picture of it, in milliseconds."""
    wider = union((start - JOINED / 2, end + JOINED / 2) for start, end in spans)
    return [[round(1e3 * (start + JOINED / 2), 2), round(1e3 * (end - JOINED / 2), 2)] for start, end in wider]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny"], help="models (default: tiny)")
    parser.add_argument("--steps", type=int, default=6, help="counted steps of a run")
    parser.add_argument("--rounds", type=int, default=2, help="runs of each variant")
    parser.add_argument("--json", type=Path, help="write the results to this file, a line each")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    environment = describe("cpu", "training")
    records = [record for size in options.sizes for record in compare(size, options.steps, options.rounds)]
    for each in records:
        of_least = f" ({each['bytes'] / each['bytes_least']:.2f} of the least)" if each["bytes_least"] else ""
        print(
            f"{each['size']:<5} {each['variant']:<28} {each['step_ms']:8.1f} ms   efficiency {each['efficiency']:.2f}"
            f"   {each['bytes'] / 1e6:7.2f} MB{of_least}   {each['exchanging_ms']:.0f} ms under way, "
            f"{each['hidden']:.0%} of it behind computing"
        )
    if options.json is not None:
        write_records(options.json, (each | environment for each in records))
    return 0


if __name__ == "__main__":
    sys.exit(main())
