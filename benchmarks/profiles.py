"""One training step and one generation by part, on our ops and on plain PyTorch, same weights, in one run.

    python -m benchmarks.profiles [--only NAME] [--seconds S] [--json OUT.jsonl]
    python -m benchmarks.profiles --table benchmarks/results/cpu-amx/profiles.jsonl

Contenders of a training step (forward, backward, AdamW):

    ours
    plain      the model as people write it today: its experts by a loop or by grouped products, whichever is faster
               here; float32 logits of every row over the vocabulary, `F.cross_entropy`; torch's choice of attention
               (`benchmarks.plain`)
    careful    likewise, but logits of the labelled rows alone, over the columns that they need, and our attention

and of a generation: ours, and Show-o's published loop on the plain model. Losses and gradients are compared before
anything is timed. Whole steps are timed without a profiler, in turns; the parts come from one profiled call each.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from unif2ace.configs import TokenMoEConfig, UniF2aceConfig, VocabularyConfig
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace_kernels.sampling import sampler

from . import plain, tables
from .batches import training_batch
from .cases.generation import Loops
from .environment import describe
from .measure import Spread, interleaved
from .parts import Places, model_parts, shares
from .results import read_records, write_records

OURS, PLAIN, CAREFUL, SHOWO = "ours", "plain", "careful", "Show-o's loop, plain"
CPU = torch.device("cpu")
DRAW: list[tuple[object, str]] = [(Loops, "choose"), (sampler, "sample_from_hidden"), (sampler, "remask")]
MAX_ROUNDS = 15
TOLERANCE = 1e-4  # of loss and gradients in float32


@dataclass(frozen=True)
class Size:
    """A model and what it is given.

    Attributes:
        t2i, mmu, words, text: rows of a training step and tokens of their texts, see `training_batch`.
        faces, steps: of the generation.
    """

    name: str
    config: UniF2aceConfig
    t2i: int
    mmu: int
    words: int
    text: int
    faces: int
    steps: int


def _showo(hidden: int, layers: int, width: int, text: int) -> UniF2aceConfig:
    """Base, narrower and less deep: 129 text slots, 256 image tokens of 8,192 codes."""
    experts = TokenMoEConfig(experts=(4, 4), top_k=2, width=width, shared_width=0, dense=True)
    return UniF2aceConfig.base(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64, intermediate_size=4 * hidden,
        token_moe=experts, vocabulary=VocabularyConfig(text=text),
    )  # fmt: skip


SIZES = [
    Size("tiny", UniF2aceConfig.tiny(VocabularyConfig(text=404, codes=1024)), 24, 20, 20, 20, 16, 16),
    Size("medium 512", _showo(512, 4, 96, 8000), 1, 1, 27, 60, 1, 6),
    Size("medium 768", _showo(768, 3, 144, 24000), 1, 1, 27, 60, 1, 4),
]


class Step:
    """A training step of a size; `precision` "autocast" is how the demo trains on a CPU."""

    def __init__(self, size: Size) -> None:
        torch.manual_seed(0)
        self.model = UniF2aceForConditionalGeneration(size.config).train()
        self.batch = training_batch(size.config, size.t2i, size.mmu, words=size.words, text=size.text)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, fused=True)  # no step changes the weights

    def loss(self, autocast: bool = True) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return self.model(**vars(self.batch)).loss

    def run(self) -> list[torch.Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return [loss.detach()]

    def result(self) -> list[torch.Tensor]:
        """Loss and gradients in float32."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.loss(autocast=False)
        loss.backward()
        gradients = [each.grad.clone() for each in self.model.parameters() if each.grad is not None]
        return [loss.detach(), *gradients]


def on_plain(run: Callable[[], Any], experts: str, loss: str) -> Callable[[], Any]:
    """`run` with the ops of `benchmarks.plain`; with its attention too where the loss is Show-o's."""

    def inside() -> Any:
        with plain.plain_ops(experts, loss, attention=loss == plain.FULL):
            return run()

    return inside


def difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """The largest of ||a - b|| / ||b|| over outputs and gradients, of those that are not about zero."""
    if len(ours) != len(theirs):
        return float("inf")
    scale = max(each.norm().item() for each in theirs)
    return max((a - b).norm().item() / max(b.norm().item(), 1e-3 * scale) for a, b in zip(ours, theirs))


def faster_experts(step: Step) -> str:
    """The way of the plain experts that is faster here."""
    took = {}
    for experts in plain.EXPERTS:
        run = on_plain(step.run, experts, plain.LABELLED)
        run()
        began = time.perf_counter()
        run()
        took[experts] = time.perf_counter() - began
    return min(took, key=lambda name: took[name])


def train(size: Size, seconds: float) -> list[dict[str, Any]]:
    """Records of the training step's contenders."""
    step = Step(size)
    experts = faster_experts(step)
    wrong = difference(step.result(), on_plain(step.result, experts, plain.FULL)())
    if not wrong <= TOLERANCE:
        raise RuntimeError(f"{size.name}: loss and gradients differ by {wrong:.1e} from the plain model's")
    contenders = {
        OURS: step.run,
        PLAIN: on_plain(step.run, experts, plain.FULL),
        CAREFUL: on_plain(step.run, experts, plain.LABELLED),
    }
    about = {"mode": "training", "experts": experts, "difference": wrong}
    return _records(size, contenders, model_parts(step.model), seconds, about)


def generate(size: Size, seconds: float, experts: str) -> list[dict[str, Any]]:
    """Records of the generation's contenders."""
    torch.manual_seed(0)
    loops = Loops(size.config, size.faces, size.steps, torch.float32, CPU)
    contenders = {
        OURS: loops.ours,
        SHOWO: on_plain(lambda: loops.showo(loops.choose), experts, plain.FULL),
    }
    for name, run in contenders.items():
        if loops.error(run()):
            raise RuntimeError(f"{size.name}: {name} gave no codes")
    return _records(
        size,
        contenders,
        model_parts(loops.model) | {"head and draw": DRAW + [(loops.model.head, "forward")]},
        seconds,
        {"mode": "generation", "experts": experts},
    )


def _records(
    size: Size, contenders: Mapping[str, Callable], places: dict[str, Places], seconds: float, about: dict[str, Any]
) -> list[dict[str, Any]]:
    for run in contenders.values():
        run()
    samples = interleaved(contenders, CPU, seconds, MAX_ROUNDS)
    records = []
    for name, run in contenders.items():
        took = Spread.of(samples[name])
        ratio = Spread.of([theirs / ours for theirs, ours in zip(samples[name], samples[OURS])])
        records.append({
            "op": "profile", "size": size.name, **about, "contender": name, "median_ms": took.median * 1e3,
            "quartiles_ms": [took.q1 * 1e3, took.q3 * 1e3], "rounds": len(samples[name]), "times_ours": ratio.median,
            "times_ours_quartiles": [ratio.q1, ratio.q3],
            "parts_ms": {part: [1e3 * each for each in both] for part, both in shares(run, places).items()},
        })  # fmt: skip
    return records


def main(arguments: Sequence[str] | None = None, sizes: Sequence[Size] = tuple(SIZES)) -> int:
    """Command line; `sizes` replaces the list (tests)."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profiles", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="sizes whose name begins so")
    parser.add_argument("--seconds", type=float, default=8.0, help="time spent on timing each step and generation")
    parser.add_argument("--json", type=Path, help="write the results to this file, a line each")
    parser.add_argument("--table", type=Path, help="print this file of results as Markdown, measure nothing")
    options = parser.parse_args(arguments)
    if options.table is not None:
        print(tables.profiles(read_records(options.table)))
        return 0
    environment = describe("cpu", "profiles")
    records: list[dict[str, Any]] = []
    for size in sizes:
        if size.name.startswith(options.only):
            found = train(size, options.seconds)
            found += generate(size, options.seconds, found[0]["experts"])
            records += [each | environment for each in found]
    print(tables.profiles(records))
    if options.json is not None:
        write_records(options.json, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
