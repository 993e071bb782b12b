"""Launch choices against the one that the package makes: what a kernel's tiles, warps and stages should be.

    python -m benchmarks.sweep [--knob moe] [--shape paper] [--device cuda] [--seconds 5] [--json OUT.jsonl] [--list]

A knob is one choice in a room's configs.py. Each candidate is a contender of an ordinary benchmark case, checked
against float64 and timed in turns with the package's own choice (see run.py); one that does not fit the device is
recorded as missing, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from .case import TRAINING, Baseline, Case, Run, Work
from .run import failures, run_all

BFLOAT16 = torch.bfloat16


@dataclass(frozen=True)
class Knob:
    """A choice of the package, and what else it could be.

    Attributes:
        name: the op and what is chosen, ``"moe.layer rows"``.
        op, mode, dtype, shapes: the cases on which it shows; `shapes` is in the name of each one's shape.
        module, attribute: where the choice is made.
        candidates: name -> from what stands at `attribute` to what is tried there.
        device: where it has an effect.
    """

    name: str
    op: str
    mode: str
    dtype: torch.dtype
    module: str
    attribute: str
    candidates: Mapping[str, Callable[[object], object]]
    shapes: str = ""
    device: str = "cuda"

    def applies(self, case: Case) -> bool:
        is_of_it = (case.op, case.mode, case.dtype) == (self.op, self.mode, self.dtype)
        return is_of_it and self.shapes in case.shape and self.device in case.devices and not case.smoke

    def case(self, case: Case) -> Case:
        """`case` with the candidates in place of the other contenders."""

        def build(device: torch.device) -> Work:
            work = case.build(device)
            tried = {name: Baseline(self._with(work.ours, change)) for name, change in self.candidates.items()}
            return dataclasses.replace(work, baselines=tried)

        return dataclasses.replace(case, op=self.name, build=build)

    def _with(self, run: Run, change: Callable[[object], object]) -> Run:
        module = importlib.import_module(self.module)

        def changed() -> Sequence[torch.Tensor]:
            with mock.patch.object(module, self.attribute, change(getattr(module, self.attribute))):
                return run()

        return changed


def _experts(kernel: str) -> dict[str, Callable]:
    """Launches of one of the experts' kernels; the others keep theirs."""
    tiles = [
        (128, 256, 64, 8, 3), (128, 256, 64, 8, 4), (256, 128, 64, 8, 3), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4),
        (128, 128, 64, 4, 3), (128, 128, 64, 4, 4), (64, 256, 64, 8, 4), (64, 128, 64, 4, 4), (128, 64, 64, 4, 4),
    ]  # fmt: skip

    def launch(m: int, n: int, k: int, group: int, warps: int, stages: int) -> Callable:
        def change(of_arch):
            chosen = importlib.import_module("unif2ace_kernels.moe.configs").Launch(m, n, k, group, warps, stages)
            return lambda name, *rest: chosen if name == kernel else of_arch(name, *rest)

        return change

    grouped = [(m, n, k, 8, warps, stages) for m, n, k, warps, stages in tiles]
    grouped += [(128, 128, 64, group, 8, 3) for group in (4, 16)]
    return {f"{m}x{n}x{k} group {g} warps {w} stages {s}": launch(m, n, k, g, w, s) for m, n, k, g, w, s in grouped}


def _changed(**fields: object) -> Callable:
    """A function that returns a dataclass, made to return it with these fields."""
    return lambda choose: lambda *arguments: dataclasses.replace(choose(*arguments), **fields)


def _products() -> dict[str, Callable]:
    tiles = [
        (128, 256, 64, 8, 3),
        (128, 128, 64, 8, 3),
        (128, 128, 64, 8, 4),
        (128, 128, 64, 4, 4),
        (256, 128, 64, 8, 3),
    ]
    return {
        f"{m}x{n}x{k} warps {w} stages {s}{' persistent' * p}{' descriptors' * d}": _changed(
            block_m=m, block_n=n, block_k=k, warps=w, stages=s, persistent=p, descriptors=d
        )
        for m, n, k, w, s in tiles
        for d, p in ((False, False), (True, False), (True, True))
    }


def _head_tiles() -> dict[str, Callable]:
    tiles = [(128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4), (64, 256, 64, 8, 3), (128, 64, 64, 4, 4)]
    return {
        f"{m}x{n}x{k} warps {w} stages {s}": _changed(rows=m, columns=n, hidden=k, num_warps=w, num_stages=s)
        for m, n, k, w, s in tiles
    }


def _value(value: object) -> Callable:
    return lambda _: value


_ROOMS = "unif2ace_kernels"
# Kernel, and the one point of the grid that tells; the gated kernels run for gated activations alone.
_EXPERT_KERNELS = {
    "rows": "gpu-core T16384 D2048 F512 N8 gelu_tanh uniform",
    "up": "gpu-core T16384 D2048 F512 N8 gelu_tanh uniform",
    "up backward": "gpu-core T16384 D2048 F512 N8 gelu_tanh uniform",
    "outer": "gpu-core T16384 D2048 F512 N8 gelu_tanh uniform",
    "up gated": "gpu-core T16384 D2048 F512 N8 swiglu uniform",
    "up backward gated": "gpu-core T16384 D2048 F512 N8 swiglu uniform",
}
KNOBS = [
    *(
        Knob(f"moe.layer {k}", "moe.layer", TRAINING, BFLOAT16, f"{_ROOMS}.moe.configs", "of_arch", _experts(k), shapes)
        for k, shapes in _EXPERT_KERNELS.items()
    ),
    Knob("d3diff.loss product", "d3diff.loss", TRAINING, BFLOAT16, f"{_ROOMS}.d3diff.configs", "product", _products(),
         "paper-16x256 slice"),
    Knob(
        "d3diff.loss chunk", "d3diff.loss", TRAINING, BFLOAT16, f"{_ROOMS}.d3diff.configs", "CHUNK_BYTES",
        {f"{size} MiB": _value(size << 20) for size in (64, 256, 512)}, "paper-16x1024 slice",
    ),
    Knob(
        "sampling.sample_from_hidden tile", "sampling.sample_from_hidden", "forward", BFLOAT16,
        f"{_ROOMS}.sampling.configs", "head_tile", _head_tiles(), "paper-64x256",
    ),
]  # fmt: skip


def cases(knob: str, shape: str, device: str, known: Sequence[Case], knobs: Sequence[Knob]) -> Iterator[Case]:
    """The cases of every knob whose name begins with `knob`, at the shapes whose name contains `shape`."""
    for each in knobs:
        if each.name.startswith(knob) and each.device == device:
            yield from (each.case(case) for case in known if each.applies(case) and shape in case.shape)


def main(
    arguments: Sequence[str] | None = None, known: Sequence[Case] | None = None, knobs: Sequence[Knob] = KNOBS
) -> int:
    """Command line; `known` and `knobs` replace the registries (tests)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--knob", default="", help="only knobs whose name begins so")
    parser.add_argument("--shape", default="", help="only shapes whose name contains this")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--seconds", type=float, default=5.0, help="time spent on timing each case")
    parser.add_argument("--json", type=Path, help="append the results to this file, a line each")
    parser.add_argument("--list", action="store_true", help="list the knobs' cases and stop")
    options = parser.parse_args(arguments)
    if known is None:
        from .cases import cases_of

        known = cases_of(options.knob)
    chosen = list(cases(options.knob, options.shape, options.device, known, knobs))
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    if not chosen:
        parser.error("no case matches; see --list")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device")
    with contextlib.ExitStack() as stack:
        out = stack.enter_context(options.json.open("a")) if options.json is not None else None
        records = run_all(chosen, torch.device(options.device), out, seconds=options.seconds)
    return 1 if failures(records) else 0


if __name__ == "__main__":
    sys.exit(main())
