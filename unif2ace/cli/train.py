"""`unif2ace train` and `unif2ace export`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import torch
import yaml

from unif2ace.checkpoint import read_config as read_model_config
from unif2ace.configs import UniF2aceConfig
from unif2ace.errors import UserError
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.planning.activations import Step
from unif2ace.planning.plan import GIB, Training, counts, memory, step_flops
from unif2ace.settings import read_settings
from unif2ace.training.config import StageConfig, TrainConfig, plain, read_config


def train(parsed: argparse.Namespace) -> None:
    """Train, or go on; with --dry-run say what would be done."""
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", parsed.ranks)))
    try:
        config = read_config(read_settings(parsed.config, parsed.overrides))
        if parsed.dry_run:
            config.check_ranks(ranks)
            if rank == 0:
                print("\n".join(described(config, ranks)))
        else:
            _train(config, rank)
    except UserError as error:
        if rank >= getattr(error, "speakers", 1):  # what one rank cannot do all are told, and one speaks
            sys.exit(1)
        raise


def _train(config: TrainConfig, rank: int) -> None:
    from unif2ace.training import engine  # torch's distributed part, only where it is needed

    try:
        engine.train(config)
    except engine.Stopped as stopped:
        if rank == 0:
            print(f"unif2ace: {stopped}", file=sys.stderr)
        sys.exit(128 + stopped.number)
    if rank == 0:
        print(f"{config.folder / 'checkpoint'}: the trained model; unif2ace report {config.run} draws how it went")


def export(parsed: argparse.Namespace) -> None:
    """Write a state of a run as a checkpoint."""
    from unif2ace.training.engine import CONFIG
    from unif2ace.training.export import export as write

    path = Path(parsed.run_folder) / CONFIG
    if not path.is_file():
        raise UserError(f"{path} is missing: name the folder of a run of unif2ace train")
    config = read_config(read_settings(path, [f"--run={parsed.run_folder}"]))
    print(write(config, config.folder / "states", parsed.step, parsed.out))


def described(config: TrainConfig, ranks: int) -> list[str]:
    """What a run is: its config, parameters, and by stage the steps, rows, memory and work."""
    model = read_model_config(Path(config.checkpoint))
    number = counts(model)
    lines = [
        yaml.safe_dump(plain(config), sort_keys=False),
        f"{number.all:,} parameters: {number.blocks:,} in {model.num_hidden_layers} layers, "
        f"{number.embedding:,} embedding, {number.head:,} head, {number.apart:,} others",
        f"{config.steps:,} steps on {ranks} {'rank' if ranks == 1 else 'ranks'}",
    ]
    for index, stage in enumerate(config.stages):
        planned, trained = _planned(config, stage, ranks), _trained(model, stage, index)
        rows, all_of = stage.data.counts, ", as if all were trained"
        parts = {part: each for part, each in memory(planned, ranks).parts.items() if each}
        lines += [
            "",
            f"{stage.name}: {stage.steps:,} steps of {stage.data.batch} rows "
            f"({', '.join(f'{count} {task}' for task, count in rows.items())}), learning rate {stage.lr:g}",
            f"  {trained:,} parameters that are trained",
            f"  {step_flops(planned)[0] * ranks * config.parallel.micro / 1e12:,.3f} TFLOPs a step",
            f"  {sum(parts.values()) / GIB:.3f} GiB a rank, by plan{all_of * (trained < number.all)}:",
            *(f"    {each / GIB:8.3f}  {part}" for part, each in sorted(parts.items(), key=lambda item: -item[1])),
        ]
    return lines


def _trained(model: UniF2aceConfig, stage: StageConfig, index: int) -> int:
    """Parameters that the stage leaves unfrozen."""
    from unif2ace.training.gradients import freeze

    with torch.device("meta"):
        parts = UniF2aceForConditionalGeneration(model.replace(image_tokenizer=None))
    freeze(parts, stage.freeze, f"stages[{index}]")
    return sum(each.numel() for each in parts.parameters() if each.requires_grad)


def _planned(config: TrainConfig, stage: StageConfig, ranks: int) -> Training:
    """One micro-batch of a rank at the length of a t2i row, rounded up."""
    model = read_model_config(Path(config.checkpoint))
    length = -(-(model.text_slots + model.image_tokens + 2) // 8) * 8
    t2i, mmu, lm = (-(-count // (ranks * config.parallel.micro)) for count in stage.data.counts.values())
    one = ranks == 1 and config.parallel.precision == "bf16"
    cuda = config.parallel.device != "cpu"
    return Training(
        model, Step(t2i, mmu, lm, length), "autocast" if one else config.parallel.precision, "adamw", config.ema > 0,
        config.parallel.checkpointing, "fsdp", "fused" if cuda else "math", "cuda" if cuda else "cpu",
    )  # fmt: skip
