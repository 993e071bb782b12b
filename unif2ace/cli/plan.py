"""`unif2ace plan`: what training a model takes of each GPU, before it is started."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from unif2ace.configs import UniF2aceConfig, VocabularyConfig
from unif2ace.errors import UserError
from unif2ace.importers.parts import model_config
from unif2ace.planning import activations
from unif2ace.planning.cluster import (
    EXCHANGE,
    GATHER,
    REDUCE,
    SCATTER,
    Cluster,
    efficiency,
    layouts,
    step_cost,
)
from unif2ace.planning.plan import (
    GB,
    GIB,
    MASKED_SHARE,
    SPARE,
    Memory,
    Training,
    counts,
    largest_batch,
    memory,
    scaled,
    step_flops,
    usable,
)

SHARES = activations.Step(5, 2, 1, 0)  # rows of t2i, mmu and plain text in Show-o's training
_DEMO_WORDS = VocabularyConfig(text=404, codes=1024)
_DTYPES = {"fp32": "float32", "bf16": "bf16", "autocast": "autocast"}


def plan(parsed: argparse.Namespace) -> None:
    """Print a table of memory by part, a column a number of GPUs, and what it assumes."""
    for name in ("gpus", "batch", "length", "gpu_memory", "cluster"):
        given = getattr(parsed, name)
        values = given if isinstance(given, list) else [] if given is None else [given]
        if min(values, default=1) <= 0:
            raise UserError(f"--{name.replace('_', '-')}: expected a number above 0, got {given}")
    print("\n".join(report(parsed)))


def report(parsed: argparse.Namespace) -> list[str]:
    """The lines that the command prints."""
    config = _config(parsed.config)
    least = config.text_slots + config.image_tokens + 2
    length = parsed.length or -(-least // 8) * 8
    if length < least:
        raise UserError(f"--length: a t2i row has {least} tokens, got {length}")
    asked = Training(
        config, scaled(SHARES._replace(length=length), parsed.batch or SHARES.rows), _DTYPES[parsed.dtype],
        parsed.optimizer, parsed.ema, parsed.checkpointing, parsed.sharding, parsed.attention,
    )  # fmt: skip
    space = parsed.gpu_memory * GB
    most = {gpus: largest_batch(asked, gpus, space) for gpus in parsed.gpus}
    columns = {}
    for gpus in parsed.gpus:
        rows = parsed.batch or max(1, most[gpus])
        columns[gpus] = replace(asked, step=scaled(asked.step, rows))
    memories = {gpus: memory(training, gpus) for gpus, training in columns.items()}
    number = counts(config)
    return [
        f"{number.all:,} parameters that are trained: {number.blocks:,} in {config.num_hidden_layers} layers, "
        f"{number.embedding:,} embedding, {number.head:,} head, {number.apart:,} others", "",
        *_memory_table(memories, space), "", *_step_table(columns, most), "", *assumptions(asked, space),
        *_clusters(replace(asked, step=scaled(asked.step, parsed.batch or max(1, min(most.values())))), parsed.cluster),
    ]  # fmt: skip


def _config(name: str) -> UniF2aceConfig:
    if name == "base":
        return UniF2aceConfig.base()
    if name == "tiny":
        return UniF2aceConfig.tiny(_DEMO_WORDS)
    return model_config(Path(name))


def _memory_table(memories: dict[int, Memory], space: float) -> list[str]:
    """GiB by part at each plan's highest moment."""
    parts = list(dict.fromkeys(part for each in memories.values() for part in each.parts))
    lines = [f"| GiB a GPU | {' | '.join(_gpus(gpus) for gpus in memories)} |", "|---|" + "--:|" * len(memories)]
    for part in parts:
        lines.append(f"| {part} | {' | '.join(f'{m.parts.get(part, 0) / GIB:.2f}' for m in memories.values())} |")
    lines.append(f"| all | {' | '.join(f'{m.peak / GIB:.2f}' for m in memories.values())} |")
    left = [(usable(space) - m.peak) / GIB for m in memories.values()]
    lines.append(f"| left | {' | '.join(f'{each:.2f}' if each >= 0 else 'does not fit' for each in left)} |")
    lines.append(f"| at its highest | {' | '.join(m.moment for m in memories.values())} |")
    return lines


def _step_table(columns: dict[int, Training], most: dict[int, int]) -> list[str]:
    rows: list[tuple[str, list[str]]] = [
        ("rows a GPU that fit", [f"{most[gpus]:,}" for gpus in columns]),
        ("rows a GPU (t2i + mmu + text)", [
            f"{t.step.rows:,} ({t.step.t2i} + {t.step.mmu} + {t.step.lm})" for t in columns.values()]),
        ("rows a step", [f"{gpus * t.step.rows:,}" for gpus, t in columns.items()]),
        ("tokens a step", [f"{gpus * t.step.tokens:,}" for gpus, t in columns.items()]),
        ("PFLOPs a step", [f"{gpus * step_flops(t)[0] / 1e15:,.3f}" for gpus, t in columns.items()]),
        ("PFLOPs a step, run", [f"{gpus * step_flops(t)[1] / 1e15:,.3f}" for gpus, t in columns.items()]),
    ]  # fmt: skip
    head = [f"| a step | {' | '.join(map(_gpus, columns))} |", "|---|" + "--:|" * len(columns)]
    return head + [f"| {name} | {' | '.join(values)} |" for name, values in rows]


def _clusters(training: Training, sizes: list[int]) -> list[str]:
    """The cost model of a step on so many GPUs, and what it assumes."""
    if not sizes:
        return []
    cluster = Cluster()
    try:
        return ["", f"A model of a step of {training.step.rows} rows a GPU, not a measurement:", "",
                *cluster_table(cluster, training, sizes), "", *cluster_assumptions(cluster)]  # fmt: skip
    except ValueError as wrong:
        raise UserError(f"--cluster: {wrong}") from wrong


def cluster_table(cluster: Cluster, training: Training, sizes: list[int]) -> list[str]:
    """A row a layout: GB that a GPU sends in a step by kind, milliseconds, and the efficiency."""
    kinds = (GATHER, SCATTER, REDUCE, EXCHANGE)
    head = ["GPUs", "layout", *(f"{kind}, GB" for kind in kinds), "compute, ms", "sending, ms", "not hidden, ms",
            "efficiency"]  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "|--:|---|" + "--:|" * (len(head) - 2)]
    for gpus in sizes:
        for layout in layouts(gpus, cluster, training.config):
            cost = step_cost(cluster, training, layout)
            sent = [f"{cost.collectives[kind].sent / GB:.2f}" for kind in kinds]
            times = [cost.compute, sum(each.seconds for each in cost.collectives.values()), cost.exposed]
            share = efficiency(cluster, training, layout)
            cells = [f"{gpus:,}", str(layout), *sent, *(f"{1e3 * each:.1f}" for each in times), f"{share:.0%}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def cluster_assumptions(cluster: Cluster) -> list[str]:
    """What the model rests on, a line each."""
    return [
        "Assumed of the cluster, none of it measured here:",
        *(f"- {each}" for each in cluster.words),
        "- FSDP gathers a layer's weights for the forward and again for the backward and sums its gradients in "
        "float32; HSDP shards within a node and sums the shards across nodes",
        "- experts over a node's GPUs: tokens choose among their group's experts evenly, all wait for the GPU with the "
        "most of them, and computing hides none of what is sent; nodes sum the gradients of their copies as FSDP does",
        "- efficiency: a GPU's rate in the cluster over its rate alone, with the same rows and share of the peak",
        "- left out: stragglers, data, the optimizer, checkpoints, failures",
    ]


def _gpus(number: int) -> str:
    return "1 GPU" if number == 1 else f"{number} GPUs"


def assumptions(training: Training, space: float) -> list[str]:
    """What the numbers rest on, a line each."""
    number = {"bf16": "bfloat16 copies of float32 masters; gradients are kept in float32",
              "autocast": "float32 weights, cast to bfloat16 at each product",
              "float32": "float32 throughout"}[training.precision]  # fmt: skip
    sharding = {
        "fsdp": "masters, gradients, optimizer, EMA in equal parts; gathered: all outside the layers, and two layers",
        "ddp": "every GPU has masters, gradients, optimizer, EMA; two buckets of 25 MiB on the way",
    }[training.sharding]
    return [
        "Assumed:",
        f"- {number}",
        f"- sharding: {sharding}",
        f"- rows of {training.step.length} tokens without padding, t2i : mmu : text = 5 : 2 : 1 (Show-o's)",
        f"- {MASKED_SHARE:.0%} of the image tokens are masked, the mean of the cosine schedule; "
        "text after the image is all predicted",
        f"- attention keeps {'no' if training.attention == activations.FUSED else 'its'} probabilities; "
        "the head makes logits a chunk of rows at a time and keeps none",
        f"- usable: {usable(space) / GIB:.1f} GiB, {space / GB:.0f} GB less {SPARE:.0%} for the allocator "
        "and 2 GiB for CUDA and NCCL",
        "- FLOPs of matrix products, the backward as twice the forward; attention counts all pairs of positions",
        "- frozen encoders and the image tokenizer are not in it: their features and codes come precomputed",
        "Kept bytes and peaks were checked against steps run on a CPU; not yet measured on GPU.",
    ]
