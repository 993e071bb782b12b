"""The memory plan against training steps that were run: bytes that autograd keeps, by part, and the step's peak.

    python -m benchmarks.planned [--json OUT.jsonl] [--only NAME]

Kept bytes are counted where autograd saves a tensor, each storage once, weights and the batch left out. The peak is
the allocator's: what a step (forward, backward, AdamW) takes at most, on top of weights and optimizer state.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from unif2ace.configs import TokenMoEConfig, UniF2aceConfig, VocabularyConfig
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.sequences import Batch
from unif2ace.planning import activations
from unif2ace.planning.plan import MATH, Training, memory
from unif2ace.training.gradients import recompute

from .batches import training_batch
from .environment import describe
from .results import write_records

PARTS = {
    "attention": "attention", "ffn": "FFN", "experts": "experts", "sequence": "sequence experts",
    "injection": "injection",
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A training step: the model, rows of each task, caption and question tokens (None: full rows, no padding)."""

    name: str
    config: UniF2aceConfig
    precision: str
    t2i: int
    mmu: int
    words: int | None = None
    text: int | None = None
    checkpointing: str = "none"


_DEMO = UniF2aceConfig.tiny(VocabularyConfig(text=404, codes=1024))
_SHOWO = UniF2aceConfig.base(
    hidden_size=256, num_hidden_layers=4, num_attention_heads=4, intermediate_size=1024, image_tokens=64, text_slots=31,
    semantic=64, vocabulary=VocabularyConfig(text=2000, codes=1024),
    token_moe=TokenMoEConfig(experts=(4, 4), top_k=2, width=48, shared_width=0, dense=True),
)  # fmt: skip
_MEDIUM = _SHOWO.replace(
    hidden_size=512, num_attention_heads=8, intermediate_size=2048, image_tokens=256, text_slots=129,
    vocabulary=VocabularyConfig(text=6000, codes=8192),
    token_moe=TokenMoEConfig(experts=(4, 4), top_k=2, width=96, shared_width=0, dense=True),
)  # fmt: skip
_DENSE = _SHOWO.replace(token_moe=None, sequence_moe=None, parallel_block=False)
POINTS = [
    Point("demo", _DEMO, "float32", 6, 5, 20, 20),
    Point("demo", _DEMO, "autocast", 24, 20, 20, 20),
    Point("small", _SHOWO, "float32", 5, 3),
    Point("small", _SHOWO, "bf16", 5, 3),
    Point("small", _SHOWO, "autocast", 5, 3, 12, 12),
    Point("small, checkpointing", _SHOWO, "float32", 5, 3, checkpointing="block"),
    Point("dense", _DENSE, "float32", 4, 4),
    Point("medium", _MEDIUM, "float32", 2, 2),
    Point("medium", _MEDIUM, "bf16", 5, 3),
    Point("medium", _MEDIUM, "autocast", 5, 3, 27, 60),
]


def training_of(point: Point, batch: Batch) -> Training:
    """What the plan is asked."""
    rows, length = batch.input_ids.shape
    real = int(batch.attention_mask.sum())
    step = activations.Step(point.t2i, point.mmu, 0, length, real if real < rows * length else None)
    return Training(
        point.config, step, point.precision, checkpointing=point.checkpointing, sharding="ddp", attention=MATH,
        device="cpu",
    )  # fmt: skip


class Stepper:
    """A model, its optimizer and a batch, ready to take steps."""

    def __init__(self, point: Point) -> None:
        torch.manual_seed(0)
        self.precision = point.precision
        self.model = UniF2aceForConditionalGeneration(point.config)
        self.batch = training_batch(point.config, point.t2i, point.mmu, words=point.words, text=point.text)
        self.parameters = list(self.model.parameters())  # the optimizer's
        if point.precision == "bf16":
            self.model, self.parameters = self.model.bfloat16(), [each.detach().float() for each in self.parameters]
            for name in ("identity", "semantic"):
                setattr(self.batch, name, getattr(self.batch, name).bfloat16())
            for parameter, master in zip(self.model.parameters(), self.parameters):
                parameter.register_post_accumulate_grad_hook(_to_master(master))
        if point.checkpointing == "block":
            recompute(self.model)
        self.model.train()
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True)

    @property
    def held_bytes(self) -> int:
        """Of weights, masters and optimizer state."""
        state = [each for of_one in self.optimizer.state.values() for each in of_one.values() if each.dim()]
        tensors = {id(each): each for each in [*self.model.parameters(), *self.parameters, *state]}
        return sum(each.numel() * each.element_size() for each in tensors.values())

    def loss(self) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.precision == "autocast"):
            return self.model(**vars(self.batch)).loss

    def step(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.loss().backward()
        self.optimizer.step()
        if self.precision == "bf16":
            with torch.no_grad():
                torch._foreach_copy_(list(self.model.parameters()), self.parameters)


def _to_master(master: torch.Tensor) -> Callable[[torch.Tensor], None]:
    """A hook that hands a weight's gradient to its float32 master as soon as it is there."""

    def hand_over(weight: torch.Tensor) -> None:
        master.grad, weight.grad = weight.grad.float(), None

    return hand_over


def kept_bytes(model: nn.Module, batch: Batch, loss: Callable[[], torch.Tensor]) -> dict[str, int]:
    """Bytes that the backward of `loss` will need, by the part of the model that saved them first."""
    given = [*model.parameters(), *model.buffers(), *(each for each in vars(batch).values() if torch.is_tensor(each))]
    own = {each.untyped_storage().data_ptr() for each in given}
    seen: dict[int, tuple[str, torch.UntypedStorage]] = {}  # holding the storage keeps its address from being reused
    with _scopes(model) as scope:

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen.setdefault(storage.data_ptr(), (_part(scope[-1]) if scope else "head", storage))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss()
    total: Counter[str] = Counter()
    for part, storage in seen.values():
        total[part] += storage.nbytes()
    return dict(total)


@contextlib.contextmanager
def _scopes(model: nn.Module) -> Iterator[list[str]]:
    """The names of the modules whose forward runs, innermost last."""
    scope: list[str] = []

    def enter(name: str) -> Callable[..., None]:
        return lambda *_: scope.append(name)

    def leave(*_: Any) -> None:
        scope.pop()

    handles = []
    for name, module in model.named_modules():
        if name:
            handles += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
    yield scope
    for handle in handles:
        handle.remove()


def _part(name: str) -> str:
    for word in name.split("."):
        if word in PARTS:
            return PARTS[word]
    return "norms" if name.endswith("norm") else "between"


def peak_of(run: Callable[[], None]) -> int:
    """Bytes of the allocator's highest mark during `run`, above where it began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    stack = list(seen.profiler.kineto_results.experimental_event_tree())
    changes = []
    while stack:
        event = stack.pop()
        stack += event.children
        if event.tag == _EventType.Allocation:
            changes.append((event.start_time_ns, event.extra_fields.alloc_size))
    level = highest = 0
    for _, change in sorted(changes, key=lambda each: each[0]):
        level += change
        highest = max(highest, level)
    return highest


def compare(point: Point) -> dict[str, Any]:
    """Kept bytes and peak of a point, measured and planned."""
    stepper = Stepper(point)
    training = training_of(point, stepper.batch)
    kept = kept_bytes(stepper.model, stepper.batch, stepper.loss)
    planned = planned_kept(training)
    stepper.step()  # makes the optimizer's state
    stepper.optimizer.zero_grad(set_to_none=True)
    held = stepper.held_bytes
    peak = held + peak_of(stepper.step)
    foreseen = memory(training)
    return {
        "op": "plan", "size": point.name, "precision": point.precision, "checkpointing": point.checkpointing,
        "step": training.step._asdict(),
        "kept": kept, "kept_planned": planned, "kept_ratio": sum(planned.values()) / sum(kept.values()),
        "peak": peak, "peak_planned": foreseen.peak, "peak_ratio": foreseen.peak / peak, "moment": foreseen.moment,
        "states": held, "states_planned": sum(foreseen.states.values()),
    }  # fmt: skip


def planned_kept(training: Training) -> dict[str, int]:
    """The plan's activations by part."""
    config, size = training.config, training.bytes
    block = activations.of_block(config, training.step, size, training.attention)
    total = Counter({part: each * config.num_hidden_layers for part, each in block.items()})
    if training.checkpointing == "block":
        total = Counter(
            {"between": size.residual * training.step.tokens * config.hidden_size * config.num_hidden_layers}
        )
    total.update(activations.outside(config, training.step, size, training.attention))
    total["casts of weights"] = activations.weight_copies(config, size)
    return {part: each for part, each in total.items() if each}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.planned", description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="points whose name begins so")
    parser.add_argument("--json", type=Path, help="write the results to this file, a line each")
    options = parser.parse_args(arguments)
    environment = describe("cpu", "planned")
    records = []
    for point in POINTS:
        if not point.name.startswith(options.only):
            continue
        found = compare(point)
        records.append(found | environment)
        kept, peak = (each / 2**20 for each in (sum(found["kept"].values()), found["peak"]))
        print(
            f"{point.name:<22}{point.precision:<10} MiB kept {kept:8.1f}, plan / measured {found['kept_ratio']:.3f}"
            f"    MiB at peak {peak:8.1f}, plan / measured {found['peak_ratio']:.3f} ({found['moment']})",
            flush=True,
        )
    if options.json is not None:
        write_records(options.json, records)
    return 0


if __name__ == "__main__":
    sys.exit(main())
