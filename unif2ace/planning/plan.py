"""The memory of a training step by part and by GPU, its FLOPs, and the largest batch that fits.

A step's memory peaks at one of these moments, and the plan takes the highest:

    head, forward    all activations; the head's gradients are being made, a chunk of logits at a time
    head, backward   all activations; the head's gradients are scaled into new memory
    last layer       its backward begins: all activations, the head's gradient, what the layer's backward passes around
    first layer      its backward begins: the gradients of the layers after it, what it and the embedding keep
    gradients        all of them are there

What holds at all of them: parameters, optimizer state, EMA. Assumptions are listed by `assumptions`.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from unif2ace.configs import UniF2aceConfig
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.planning import activations
from unif2ace.planning.activations import FLOAT32, FUSED, MATH, PRECISIONS, Precision, Step

GIB, GB = 2**30, 10**9
MASKED_SHARE = 2 / math.pi  # of the image tokens, the mean of the cosine schedule
OPTIMIZERS = {"adamw": 2, "muon": 1, "sgd": 0}  # float32 numbers a parameter
CHECKPOINTING = ("none", "block")
SHARDINGS = ("fsdp", "ddp")
CONTEXT = 2 * GIB  # of a process on a GPU: CUDA, cuBLAS, NCCL
SPARE = 0.06  # of the memory, lost between the allocator's blocks
_DDP_BUCKET = 25 * 2**20
_CPU_CHUNK = 8 << 20  # `unif2ace_kernels.d3diff.head`
_GPU_CHUNK, _GPU_ROWS = 128 << 20, 4096  # `unif2ace_kernels.d3diff.configs`


@dataclass(frozen=True)
class Training:
    """What is planned.

    Attributes:
        config: of the model. step: the rows of one GPU in one step.
        precision: of `activations.PRECISIONS`: "bf16" computes with bfloat16 copies of float32 masters, "autocast"
            with casts at each product, "float32" without any.
        optimizer: of `OPTIMIZERS`. ema: whether an average of the weights is kept.
        checkpointing: "block" keeps the input of each layer alone and runs it again in the backward.
        sharding: "fsdp" shards masters, gradients, optimizer and EMA; "ddp" repeats them.
        attention: "fused" or "math", which keeps the probabilities.
        device: "cuda" or "cpu": whose workspace the head has.
    """

    config: UniF2aceConfig
    step: Step
    precision: str = "bf16"
    optimizer: str = "adamw"
    ema: bool = False
    checkpointing: str = "none"
    sharding: str = "fsdp"
    attention: str = FUSED
    device: str = "cuda"

    def __post_init__(self) -> None:
        for name, choices in (
            ("precision", PRECISIONS), ("optimizer", OPTIMIZERS), ("checkpointing", CHECKPOINTING),
            ("sharding", SHARDINGS), ("attention", (FUSED, MATH)), ("device", ("cuda", "cpu")),
        ):  # fmt: skip
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if self.step.rows < 1:
            raise ValueError(f"step: expected at least one row, got {self.step.rows}")

    @property
    def bytes(self) -> Precision:
        return PRECISIONS[self.precision]


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU.

    Attributes:
        states: what a step finds and leaves, by part. moments: what comes on top, by moment and part.
    """

    states: dict[str, int]
    moments: dict[str, dict[str, int]]

    @property
    def moment(self) -> str:
        """The name of the highest moment."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def parts(self) -> dict[str, int]:
        """At the highest moment."""
        return {**self.states, **self.moments[self.moment]}

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Counts:
    """Parameters of a model that are trained: of one layer, of all layers, and of the rest."""

    block: int
    blocks: int
    head: int
    embedding: int
    apart: int

    @property
    def root(self) -> int:
        """Outside the layers."""
        return self.head + self.embedding + self.apart

    @property
    def all(self) -> int:
        return self.blocks + self.root


def counts(config: UniF2aceConfig) -> Counts:
    """Counted on a model without memory."""
    return _counts(json.dumps(config.to_dict(), sort_keys=True))


@functools.lru_cache(maxsize=8)
def _counts(described: str) -> Counts:
    with torch.device("meta"):
        model = UniF2aceForConditionalGeneration(UniF2aceConfig.from_dict(json.loads(described)))

    def of(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)

    blocks, head, embedding = of(model.blocks), of(model.head), of(model.embedding)
    return Counts(of(model.blocks[0]), blocks, head, embedding, of(model) - blocks - head - embedding)


def memory(training: Training, gpus: int = 1) -> Memory:
    """What one of `gpus` GPUs holds in a step."""
    config, size = training.config, training.bytes
    number = counts(config)
    shards = gpus if training.sharding == "fsdp" else 1
    states = {
        "parameters, float32": FLOAT32 * number.all // shards,
        f"optimizer, {training.optimizer}": FLOAT32 * OPTIMIZERS[training.optimizer] * number.all // shards,
        "EMA": FLOAT32 * number.all // shards if training.ema else 0,
    }
    copies = size.weight != FLOAT32  # the model computes with copies in a smaller type
    if training.sharding == "fsdp" and (shards > 1 or copies):
        # The root's stay, two layers' are there at a time: the one that runs and the next.
        states["gathered weights"] = size.weight * (number.root + 2 * number.block)
    elif copies:
        states["weights computed with"] = size.weight * number.all
    states["communication buffers"] = _communication(training, number, gpus)
    return Memory({part: each for part, each in states.items() if each}, _moments(training, number, shards))


def _communication(training: Training, number: Counts, gpus: int) -> int:
    if gpus == 1:
        return 0
    if training.sharding == "ddp":
        return 2 * _DDP_BUCKET
    return FLOAT32 * max(
        2 * number.block, number.root
    )  # gradients are summed in float32: those of a layer, or the root's


def _moments(training: Training, number: Counts, shards: int) -> dict[str, dict[str, int]]:
    config, step, size = training.config, training.step, training.bytes
    block = activations.of_block(config, step, size, training.attention)
    kept = {part: each * config.num_hidden_layers for part, each in block.items()}
    again: dict[str, int] = {}
    if training.checkpointing == "block":
        kept = {"inputs of layers": size.residual * step.tokens * config.hidden_size * config.num_hidden_layers}
        again = {"one layer, run again": sum(block.values())}
    outside = activations.outside(config, step, size, training.attention)
    head = outside.pop("head")
    for part, each in outside.items():
        kept[part] = kept.get(part, 0) + each
    kept["casts of weights"] = activations.weight_copies(config, size)
    kept = {f"activations: {part}": each for part, each in kept.items() if each}
    held = FLOAT32 if training.sharding == "fsdp" and shards > 1 else size.weight
    if training.precision == "bf16":
        held = FLOAT32  # what the optimizer of float32 masters reads

    def gradients(parameters: int) -> int:
        return held * parameters // shards

    first = dict(outside)  # what the first layer and the embedding find
    for part, each in ({} if again else block).items():
        first[part] = first.get(part, 0) + each
    first = {f"activations: {part}": each for part, each in first.items()}
    back = {"gradients passed back": _passed_around(training)}
    return {
        "head, forward": kept | {"head: gradients": head, "head: workspace": _head_workspace(training)},
        "head, backward": kept | {"head: gradients": head + size.weight * number.head + _states(training)},
        "last layer": kept | again | back | {"gradients": gradients(number.head)},
        "first layer": first | again | back | {"gradients": gradients(number.all - number.block - number.embedding)},
        "gradients": {"gradients": gradients(number.all), "gradients passed back": 2 * _states(training)},
    }


def _states(training: Training) -> int:
    return training.bytes.norm * training.step.tokens * training.config.hidden_size


def _passed_around(training: Training) -> int:
    """The most that the backward of a layer holds beside what was kept: gradients of its own intermediates."""
    config, step, size = training.config, training.step, training.bytes
    D, T, c = config.hidden_size, step.tokens, size.compute
    stream = 2 * size.residual * T * D
    inside = [6 * c * T * D]  # of q, k, v and what they were made of
    if training.attention == MATH:
        inside.append(2 * c * step.rows * config.num_attention_heads * step.length**2 + 3 * c * T * D)
    if config.token_moe is None or config.token_moe.dense:
        inside.append(2 * c * T * config.intermediate_size)
    if config.token_moe is not None:
        slots = config.token_moe.top_k + config.token_moe.shared_width // config.token_moe.width
        inside.append(c * step.routed * slots * (2 * config.token_moe.width + D))
    return stream + max(inside)


def labelled(config: UniF2aceConfig, step: Step) -> tuple[int, int]:
    """Rows of the head, (over the image codes, over the vocabulary): masked image tokens, and text after the image."""
    image = round(MASKED_SHARE * config.image_tokens * step.t2i)
    text = max(0, step.length - config.image_tokens - 3) * step.mmu + (step.length - 1) * step.lm
    return image, text


def _head_workspace(training: Training) -> int:
    """What the head's forward needs beside its results: a chunk of logits and of states, and sums in float32."""
    config, size = training.config, training.bytes
    D, V, c = config.hidden_size, config.vocabulary.size, size.compute
    most = 0
    for rows, columns in zip(labelled(config, training.step), (config.vocabulary.codes, V)):
        if training.device == "cpu":
            wanted = max(_CPU_CHUNK, columns * D * 2) // (c * columns)
        else:
            wanted = max(_GPU_ROWS, _GPU_CHUNK // (c * columns))
        chunk = min(rows, wanted) * (columns + D) * c
        cast = columns * D * c if c != size.weight else 0
        product = columns * D * c if training.device == "cpu" and c != FLOAT32 else 0
        most = max(most, chunk + cast + product)
    if training.device == "cpu":
        return most + (FLOAT32 * V * D if size.weight != FLOAT32 else 0)
    return most + (size.weight * V * D if size.weight != FLOAT32 else 0)  # what rounding left of the sums


def forward_flops(config: UniF2aceConfig, step: Step) -> dict[str, float]:
    """Of the matrix products of one forward, by part; attention counts every pair of positions, masked or not."""
    D, T, L = config.hidden_size, step.tokens, config.num_hidden_layers
    found = {"attention": L * (2.0 * T * 4 * D**2 + 4.0 * step.rows * step.length**2 * D)}
    moe = config.token_moe
    if moe is None or moe.dense:
        found["FFN"] = L * 4.0 * T * D * config.intermediate_size
    if moe is not None:
        slots = moe.top_k + moe.shared_width // moe.width
        found["experts"] = L * 2.0 * step.routed * D * (2 * slots * moe.width + sum(moe.experts))
    injection = 0.0
    for _, rows, vectors, channels, latents in activations.resamplers(config, step):
        tokens = rows * vectors * latents
        injection += 2.0 * tokens * (channels * D + 2 * D**2) + 2.0 * rows * config.image_tokens * D**2
        injection += 4.0 * config.image_tokens * tokens * D
    if injection:
        found["injection"] = injection
    image, text = labelled(config, step)
    found["head"] = 2.0 * D * (image * config.vocabulary.codes + text * config.vocabulary.size)
    return found


def step_flops(training: Training) -> tuple[float, float]:
    """Of one GPU's step: the model's own, forward and twice that for the backward; and those that are run, with what
    checkpointing runs again."""
    parts = forward_flops(training.config, training.step)
    own = 3 * sum(parts.values())
    again = sum(each for part, each in parts.items() if part not in ("head", "injection"))
    return own, own + (again if training.checkpointing == "block" else 0.0)


def scaled(step: Step, rows: int) -> Step:
    """`rows` rows in the step's proportions; at least one t2i row where it has some."""
    whole = step.rows
    mmu, lm = rows * step.mmu // whole, rows * step.lm // whole
    real = None if step.real is None else step.real * rows // whole
    return Step(rows - mmu - lm, mmu, lm, step.length, real)


def usable(gpu_memory: float) -> float:
    """Bytes that a step may take of a GPU of `gpu_memory` bytes."""
    return gpu_memory * (1 - SPARE) - CONTEXT


def largest_batch(training: Training, gpus: int, gpu_memory: float) -> int:
    """Rows a GPU that fit, 0 for none, in the proportions of the step's tasks."""

    def fits(rows: int) -> bool:
        return memory(replace(training, step=scaled(training.step, rows)), gpus).peak <= usable(gpu_memory)

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
