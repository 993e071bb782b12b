"""What expert parallelism sends, counted over two processes: ours, the least there is, a row for each token and expert.

    python -m benchmarks.dispatch [--json OUT.jsonl]

Every process has its own tokens and half of the experts; a call is forward and backward. Bytes are those of the parts
that all_to_all_single takes to the other process. The least: each row once to a process that needs it, once back, and
both again for the gradients; and of each slot there its weight and the weight's gradient.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unif2ace_kernels import moe
from unif2ace_kernels.moe.parallel import _exchange

from .environment import describe
from .results import write_records

RANKS = 2
OURS, NAIVE = "ours", "a row for each token and expert"


@dataclass(frozen=True)
class Point:
    """A mixture: groups of experts, slots of a token, and where the shape comes from; tokens of each process."""

    name: str
    source: str
    experts: tuple[int, ...]
    top_k: int
    tokens: int = 1024
    hidden: int = 512
    width: int = 128


POINTS = [
    Point("4 + 4, K 2", "`UniF2aceConfig.base`, a quarter of its width", (4, 4), 2),
    Point("8 + 8, K 4", "K of the paper's method figure, two groups", (8, 8), 4),
    Point("8, K 2", "Mixtral 8x7B's routing", (8,), 2),
    Point("64, K 8", "OLMoE's routing", (64,), 8),
]


def naive(
    x: Tensor, routing: moe.Routing, w_in: Tensor, b_in: Tensor, w_out: Tensor, b_out: Tensor, *, activation: str,
    group: dist.ProcessGroup,
) -> Tensor:  # fmt: skip
    """The usual dispatch: slots sorted by expert, a row for each to the rank of its expert, weights stay at home."""
    share, slots = len(w_in), routing.expert.shape[1]
    leaving = routing.counts.view(RANKS, share)
    arriving = torch.empty_like(leaving)
    dist.all_to_all_single(arriving, leaving.contiguous(), [1] * RANKS, [1] * RANKS, group=group)
    out, back = leaving.sum(1).tolist(), arriving.sum(1).tolist()
    rows = x[routing.order // slots]
    (received,) = _exchange(group, ((out, back),), rows)
    expert = torch.arange(share).repeat(RANKS).repeat_interleave(arriving.flatten())
    local = moe.arrange(expert[:, None], x.new_ones(len(expert), 1), share)
    y = moe.experts(received, local, w_in, b_in, w_out, b_out, activation=activation)
    (home,) = _exchange(group, ((back, out),), y)
    weighted = home * routing.weight.flatten()[routing.order, None].to(x.dtype)
    return torch.zeros_like(x).index_add(0, routing.order // slots, weighted)


@contextmanager
def counted() -> Iterator[list[tuple[int, int]]]:
    """(rows to the other process, bytes of them) of every all_to_all_single."""
    sent: list[tuple[int, int]] = []
    real = dist.all_to_all_single

    def count(output: Tensor, given: Tensor, arriving: Any = None, leaving: Any = None, **options: Any) -> Any:
        arriving, leaving = (options.pop(name, each) for name, each in
                             (("output_split_sizes", arriving), ("input_split_sizes", leaving)))  # fmt: skip
        rows = len(given) - leaving[dist.get_rank()]
        sent.append((rows, rows * given[:1].numel() * given.element_size()))
        return real(output, given, arriving, leaving, **options)

    dist.all_to_all_single = count
    try:
        yield sent
    finally:
        dist.all_to_all_single = real


def _problem(point: Point) -> tuple[Tensor, moe.Routing, list[Tensor], Tensor]:
    """This process' tokens, their routing, its experts, and a gradient of y; the experts are parts of one model's."""
    rank, total, D, F = dist.get_rank(), sum(point.experts), point.hidden, point.width
    torch.manual_seed(0)
    w_in, w_out = torch.randn(total, D, F) / D**0.5, torch.randn(total, F, D) / F**0.5
    own = moe.local_experts(total, dist.group.WORLD)
    parameters = [w_in[own], torch.randn(total, F)[own], w_out[own], torch.randn(total, D)[own]]
    torch.manual_seed(1 + rank)
    x, grad = torch.randn(point.tokens, D), torch.randn(point.tokens, D)
    task = torch.arange(point.tokens) % len(point.experts)
    routing = moe.route(torch.randn(point.tokens, total), task, point.experts, point.top_k, balance_coef=0.0)
    return x, routing, parameters, grad


def _call(ours: bool, problem: tuple[Tensor, moe.Routing, list[Tensor], Tensor]) -> list[Tensor]:
    x, routing, parameters, grad = problem
    leaves = [each.detach().requires_grad_() for each in (x, routing.weight, *parameters)]
    function = moe.parallel_experts if ours else naive
    y = function(
        leaves[0], routing._replace(weight=leaves[1]), *leaves[2:], activation="gelu_tanh", group=dist.group.WORLD
    )
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


def _compare(point: Point, rounds: int) -> dict[str, Any]:
    problem, bytes_sent, rows_sent, results = _problem(point), {}, {}, {}
    for name in (OURS, NAIVE):
        with counted() as sent:
            results[name] = _call(name == OURS, problem)
        wide = [rows for rows, size in sent if rows and size >= rows * 4 * point.hidden]
        totals = torch.tensor([sum(size for _, size in sent), sum(wide)])
        dist.all_reduce(totals)
        bytes_sent[name], rows_sent[name] = totals.tolist()
    for one, other in zip(*results.values()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    elsewhere = problem[1].expert // (sum(point.experts) // RANKS) != dist.get_rank()
    needed = torch.stack([elsewhere.any(1).sum(), elsewhere.sum()])
    dist.all_reduce(needed)
    rows, slots = needed.tolist()
    times: dict[str, list[float]] = {OURS: [], NAIVE: []}
    for _ in range(rounds):
        for name in times:
            dist.barrier()
            start = time.perf_counter()
            _call(name == OURS, problem)
            dist.barrier()
            times[name].append(time.perf_counter() - start)
    return {
        "op": "dispatch", "point": asdict(point), "processes": RANKS, "rows": rows_sent,
        "rows_least": 4 * rows, "bytes": bytes_sent, "bytes_least": 4 * rows * 4 * point.hidden + 2 * 4 * slots,
        "naive_time_over_ours": statistics.median(b / a for a, b in zip(times[OURS], times[NAIVE])),
        "ours_ms": 1e3 * statistics.median(times[OURS]), "rounds": rounds,
    }  # fmt: skip


def _work(rank: int, store: str, rounds: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    found = [_compare(point, rounds) for point in POINTS]
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dispatch", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="timed calls of each")
    parser.add_argument("--json", type=Path, help="write the results to this file, a line each")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    environment = describe("cpu", "dispatch")
    with tempfile.TemporaryDirectory() as folder:
        out = str(Path(folder) / "found.json")
        given = (_work, (str(Path(folder) / "store"), options.rounds, out), RANKS)
        # Such processes end at once; where Python ends first, gloo may abort it (pytorch/pytorch#190489).
        torch.multiprocessing.start_processes(*given, start_method="forkserver")
        found = json.loads(Path(out).read_text())
    for each in found:
        ours, naive_bytes, least = each["bytes"][OURS], each["bytes"][NAIVE], each["bytes_least"]
        print(
            f"{each['point']['name']:<14} least {least / 1e6:7.2f} MB   ours {ours / least:6.4f} of it, a row for each "
            f"token and expert {naive_bytes / least:5.2f}   its time over ours {each['naive_time_over_ours']:.2f}"
        )
    if options.json is not None:
        write_records(options.json, (each | environment for each in found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
