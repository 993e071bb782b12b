"""The 1.8B shape: a block forward and backward, a whole forward, and on a GPU training steps.

The truth of the block and of the whole forward is the same model on plain PyTorch ops (`benchmarks.plain`) in float32,
made a layer at a time, so that no float32 copy of all weights is ever held.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unif2ace.configs import TokenMoEConfig, UniF2aceConfig, VocabularyConfig
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.model.sequences import Batch
from unif2ace.planning.activations import Step
from unif2ace.planning.plan import counts, forward_flops

from .. import plain
from ..batches import training_batch
from ..case import FORWARD, TRAINING, Baseline, Case, Outputs, Run, Work, compiled, relative_error
from ..parts import model_parts, shares

CPU, GPU = ("cpu",), ("cuda",)
BF16 = torch.bfloat16
# Of the data sheets, without sparsity; MFU is the model's FLOPs a second over these.
DENSE_BF16_FLOPS = {"H200": 989.4e12, "H100": 989.4e12, "A100": 312e12, "B200": 2250e12}
_FILL = 1 << 20  # different values in a weight of the whole model
_STD = 0.02

_BASE = UniF2aceConfig.base()
_SMOKE = _BASE.replace(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_tokens=16, text_slots=9,
    identity=8, semantic=12, vocabulary=VocabularyConfig(text=80, codes=32),
    token_moe=TokenMoEConfig(experts=(4, 4), top_k=2, width=16, shared_width=0, dense=True),
)  # fmt: skip


@dataclass(frozen=True)
class Rows:
    """Rows of each task, of full length."""

    t2i: int
    mmu: int

    def step(self, config: UniF2aceConfig) -> Step:
        length = -(-(config.text_slots + config.image_tokens + 2) // 8) * 8
        return Step(self.t2i, self.mmu, 0, length)


@torch.no_grad()
def cheap_model(config: UniF2aceConfig, device: torch.device) -> UniF2aceForConditionalGeneration:
    """A bfloat16 model whose weights repeat a million normal numbers: made without float32 copies, in seconds."""
    with torch.device("meta"):
        model = UniF2aceForConditionalGeneration(config).to(BF16)
    model = model.to_empty(device=device)
    numbers = (torch.randn(_FILL, generator=torch.Generator().manual_seed(0)) * _STD).to(device, BF16)
    for module in model.modules():
        if hasattr(module, "fill_buffers"):
            module.fill_buffers()
    for name, parameter in model.named_parameters():
        flat = parameter.view(-1)
        if "norm" in name and name.endswith("weight"):
            flat.fill_(1.0)
        elif name.endswith("bias") or "experts_b_" in name or name.endswith("gate"):
            flat.zero_()
        else:
            for part in flat.split(_FILL):
                part.copy_(numbers[: len(part)])
    return model


def _batch(config: UniF2aceConfig, rows: Rows, device: torch.device) -> Batch:
    batch = training_batch(config, rows.t2i, rows.mmu)
    features = {"identity": batch.identity.to(BF16), "semantic": batch.semantic.to(BF16)}
    return dataclasses.replace(batch, **features).to(device)


def on_plain(run: Run, experts: str = plain.GROUPED) -> Run:
    """`run` on the ops of `benchmarks.plain`."""

    def inside() -> Outputs:
        with plain.plain_ops(experts):
            return run()

    return inside


def _in_float32(block: nn.Module) -> nn.Module:
    return copy.deepcopy(block).float()


def _floats(context: tuple) -> tuple:
    """A block's context with its tensors in float32."""
    return type(context)(*(each.float() if torch.is_tensor(each) and each.dtype == BF16 else each for each in context))


class _Block:
    """The first block of a model, the context of a batch, and x that comes into it."""

    def __init__(self, config: UniF2aceConfig, rows: Rows, device: torch.device) -> None:
        model = cheap_model(config.replace(num_hidden_layers=1), device)
        batch = _batch(config, rows, device)
        seen: list[tuple] = []
        handle = model.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given))
        with torch.no_grad():
            model(**vars(batch))
        handle.remove()
        self.model, self.block, (self.x, self.context) = model, model.blocks[0], seen[0][:2]
        self.x = torch.randn(self.x.shape, device=device).to(BF16)
        self.seed = torch.randn(self.x.shape, device=device).to(BF16)

    def run(self, block: nn.Module | None = None, context: tuple | None = None, x: Tensor | None = None) -> Outputs:
        """y, and the gradients of x and of the block's weights."""
        block, context = block or self.block, context or self.context
        x = (self.x if x is None else x).detach().requires_grad_()
        y = block(x, context)[0]
        weights = [each for each in block.parameters() if each.requires_grad]
        gradients = torch.autograd.grad(y, [x, *weights], self.seed.to(y.dtype), allow_unused=True)
        return [y.detach(), *(each for each in gradients if each is not None)]

    def truth(self) -> Outputs:
        return on_plain(lambda: self.run(_in_float32(self.block), _floats(self.context), self.x.float()))()


def _block_work(config: UniF2aceConfig, rows: Rows, device: torch.device) -> Work:
    problem = _Block(config, rows, device)
    truth = problem.truth()

    def error(outputs: Outputs) -> float:
        """Of y and of x's gradient: the router's choice flips where scores are close, which moves single weights."""
        return max(relative_error(given, true) for given, true in zip(outputs[:2], truth[:2]))

    baselines = {f"plain, {experts}": Baseline(on_plain(problem.run, experts)) for experts in plain.EXPERTS}
    return Work(problem.run, baselines, error, 5e-2, _notes(problem.run, problem.model, device))


def _forward_work(config: UniF2aceConfig, rows: Rows, device: torch.device) -> Work:
    model = cheap_model(config, device).eval()
    batch = _batch(config, rows, device)

    @torch.no_grad()
    def run() -> Outputs:
        return [model(**vars(batch)).loss]

    truth = on_plain(lambda: _by_layer(model, batch))()

    def error(outputs: Outputs) -> float:
        return relative_error(outputs[0].reshape(()), truth.reshape(()))

    ways = [plain.GROUPED] if device.type == "cpu" else plain.EXPERTS  # seconds a call; the block has both
    baselines = {f"plain, {experts}": Baseline(on_plain(run, experts)) for experts in ways}
    return Work(run, baselines, error, 2e-2, _notes(run, model, device))


def _notes(
    run: Run, model: UniF2aceForConditionalGeneration, device: torch.device
) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """On a CPU the milliseconds of each part, forward and backward, in a profiled call; on a known GPU the MFU."""

    def notes(record: Mapping[str, Any]) -> dict[str, Any]:
        if device.type == "cpu":
            found = shares(run, model_parts(model))
            return {"parts_ms": {part: [1e3 * each for each in both] for part, both in found.items()}}
        name = torch.cuda.get_device_name(device)
        rate = next((rate for gpu, rate in DENSE_BF16_FLOPS.items() if gpu in name), None)
        if rate is None or "median_ms" not in record:
            return {}
        return {"mfu": record["flops"] / (record["median_ms"] * 1e-3) / rate}

    return notes


@torch.no_grad()
def _by_layer(model: UniF2aceForConditionalGeneration, batch: Batch) -> Tensor:
    """The loss in float32, every module turned to float32 while it runs."""
    handles = []

    def widen(module: nn.Module, given: tuple, named: dict) -> tuple[tuple, dict]:
        def wide(value):
            if torch.is_tensor(value) and value.dtype == BF16:
                return value.float()
            return _floats(value) if isinstance(value, tuple) and hasattr(value, "_fields") else value

        module.float()
        return tuple(map(wide, given)), {name: wide(value) for name, value in named.items()}

    def narrow(module: nn.Module, *_: object) -> None:
        module.to(BF16)

    tops = [model.injection, *model.blocks, model.norm]
    for module in filter(None, tops):
        handles += [
            module.register_forward_pre_hook(widen, with_kwargs=True),
            module.register_forward_hook(narrow),
        ]
    model.head.float()
    try:
        return model(**vars(batch)).loss
    finally:
        model.head.to(BF16)
        for handle in handles:
            handle.remove()


def _step_work(config: UniF2aceConfig, rows: Rows, device: torch.device) -> Work:
    """A training step without the optimizer; ours, and the plain model compiled."""
    model = cheap_model(config, device).train()
    batch = _batch(config, rows, device)

    def run() -> Outputs:
        model.zero_grad(set_to_none=True)
        loss = model(**vars(batch)).loss
        loss.backward()
        return [loss.detach()]

    truth = on_plain(lambda: [model(**vars(batch)).loss.detach()])()

    def error(outputs: Outputs) -> float:
        return relative_error(outputs[0].reshape(()), truth[0].reshape(()))

    whole = compiled(lambda: model(**vars(batch)).loss)

    def run_compiled() -> Outputs:
        model.zero_grad(set_to_none=True)
        loss = whole()
        loss.backward()
        return [loss.detach()]

    baselines: Mapping[str, Baseline] = {
        f"plain, {plain.GROUPED}": Baseline(on_plain(run)),
        f"plain, {plain.GROUPED}, torch.compile": Baseline(on_plain(run_compiled), compiles=True),
    }
    return Work(run, baselines, error, 2e-2, _notes(run, model, device))


def _weights(config: UniF2aceConfig) -> float:
    return BF16.itemsize * counts(config).all


Build = Callable[[UniF2aceConfig, Rows, torch.device], Work]
# op, shape, config, rows, mode, devices, build
_POINTS: list[tuple[str, str, UniF2aceConfig, Rows, str, tuple[str, ...], Build]] = [
    ("model.block", "smoke", _SMOKE, Rows(1, 1), TRAINING, CPU + GPU, _block_work),
    ("model.forward", "smoke", _SMOKE, Rows(1, 1), FORWARD, CPU + GPU, _forward_work),
    ("model.step", "smoke", _SMOKE, Rows(1, 1), TRAINING, CPU + GPU, _step_work),
    ("model.block", "base-2x392", _BASE, Rows(1, 1), TRAINING, CPU + GPU, _block_work),
    ("model.forward", "base-1x392", _BASE, Rows(1, 0), FORWARD, CPU, _forward_work),
    ("model.forward", "base-16x392", _BASE, Rows(10, 6), FORWARD, GPU, _forward_work),
    ("model.step", "base-48x392", _BASE, Rows(30, 18), TRAINING, GPU, _step_work),
]  # fmt: skip


def _cases() -> Iterator[Case]:
    for op, shape, config, rows, mode, devices, build in _POINTS:
        used = config.replace(num_hidden_layers=1) if op == "model.block" else config
        step = rows.step(used)
        parts = forward_flops(used, step)
        if op == "model.block":
            parts = {part: each for part, each in parts.items() if part not in ("head", "injection")}
        flops = sum(parts.values()) * (1 if mode == FORWARD else 3)
        sizes = {
            "t2i": rows.t2i, "mmu": rows.mmu, "L": step.length, "D": config.hidden_size,
            "layers": used.num_hidden_layers, "V": config.vocabulary.size,
        }  # fmt: skip
        source = "made up, tiny" if shape == "smoke" else "UniF2aceConfig.base()"
        yield Case(
            op, shape, sizes, source, mode, BF16, flops, _weights(used) * (1 if mode == FORWARD else 2),
            lambda device, config=config, rows=rows, build=build: build(config, rows, device), devices,
            shape == "smoke",
        )  # fmt: skip


CASES = list(_cases())
