"""Runs checks on the ranks of a gloo process group, all in one start of its processes."""

from __future__ import annotations

import multiprocessing
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Check = Callable[[dist.ProcessGroup], None]


def _work(rank: int, ranks: int, store: str, checks: list[tuple[str, Check]], results: Any) -> None:
    """`checks` in order, up to the first that fails: the ranks are out of step then."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)  # also fills torch.empty with NaN
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    found: dict[str, str] = {}
    for name, check in checks:
        torch.manual_seed(0)
        try:
            check(dist.group.WORLD)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc()
            break
    results.put((rank, found))
    dist.destroy_process_group()


def run(ranks: int, checks: list[tuple[str, Check]], imports: Sequence[str] = ()) -> dict[str, str]:
    """What went wrong in each check on any of `ranks` processes, by its name; "" for nothing.

    Args:
        checks: names, and functions of the process group; picklable.
        imports: modules that they need and that take long to import, which is done once.
    """
    start = multiprocessing.get_context("forkserver")
    start.set_forkserver_preload(["torch", "torch.distributed.fsdp", "unif2ace_kernels", *imports])
    results = start.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        workers = [start.Process(target=_work, args=(rank, ranks, store, checks, results)) for rank in range(ranks)]
        for worker in workers:
            worker.start()
        found = [results.get(timeout=300)[1] for _ in workers]
        for worker in workers:
            worker.join()
        assert [worker.exitcode for worker in workers] == [0] * ranks
    missing = "did not run: an earlier check failed"
    return {name: "".join(each.get(name, missing) for each in found) for name, _ in checks}
