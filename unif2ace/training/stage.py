"""One stage of a run on one rank: the training step, and what has to be kept to go on with it."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from unif2ace.checkpoint import Checkpoint
from unif2ace.data.stream import Stream
from unif2ace.errors import UserError
from unif2ace.model.modeling import UniF2aceOutput
from unif2ace.training import gradients, states
from unif2ace.training.config import TrainConfig
from unif2ace.training.feed import Work
from unif2ace.training.sharding import CopiesSum, shard
from unif2ace.training.states import States
from unif2ace.training.world import World

TERMS = ("mask", "score", "mmu", "lm", "balance", "mask_accuracy", "mmu_accuracy")


class Stage:
    """The model as it is spread over the ranks, its optimizer, its rows.

    Args:
        index: of the stage in `config.stages`.
        start: what the run starts from; the model in it becomes this stage's.
    """

    def __init__(self, config: TrainConfig, index: int, world: World, start: Checkpoint) -> None:
        self.config, self.world, self.stage = config, world, config.stages[index]
        self.first = sum(stage.steps for stage in config.stages[:index])
        self.skipped, self.seconds = 0, 0.0
        self.model = start.model.train()
        self.model.config.loss = self.stage.loss.over(self.model.config.loss)
        if config.parallel.checkpointing == "block":
            gradients.recompute(self.model)
        world.together(lambda: gradients.freeze(self.model, self.stage.freeze, f"stages[{index}]"))
        world.together(lambda: shard(self.model, world, config.parallel))
        self.model.float()  # its shards: whole, weights are the file's pages, which the ranks of a machine share
        parameters = {n: p for n, p in self.model.named_parameters() if not n.startswith("image_tokenizer.")}
        self.trained = {name: each for name, each in parameters.items() if each.requires_grad}
        self.optimizer = gradients.adamw(self.trained, config.optimizer)
        self.norms = gradients.Norms(self.trained)
        self.copies = CopiesSum(self.trained.values())
        self.ema = {name: each.detach().clone() for name, each in parameters.items()} if config.ema else {}
        encode = world.together(lambda: config.encoding.build() if config.encoding is not None else None)
        self.stream = world.together(
            lambda: Stream(
                self.stage.data, self.model.config, start.text_tokenizer, rank=world.rank, ranks=world.ranks,
                micro=config.parallel.micro, encode=encode, progress=world.rank == 0, where=f"stages[{index}].data",
            ),
            first=True,
        )  # fmt: skip

    def step(self, work: Work) -> dict[str, Any]:
        """Forward, backward and update over the step's batches; what came of it, the same on every rank."""
        torch.manual_seed(self.config.seed + work.step * self.world.ranks + self.world.rank)
        costly = self.config.watch.costly(work.step)
        told = torch.zeros(1 + len(TERMS), device=self.world.device)
        loads = []
        for batch in work.batches:
            with self._autocast():
                output = self.model(**vars(batch))
            self.copies.backward(output.loss, last=batch is work.batches[-1])
            terms = [output.terms.get(name, told.new_zeros(())) for name in TERMS]
            told += torch.stack([output.loss.detach(), *terms])
            if costly:
                loads.append(self._named(output))
        told = torch.cat([told, self.norms.own()])
        if self.world.ranks > 1:
            dist.all_reduce(told)
        loss, *values = told.tolist()  # the one time that a step waits for the device
        squares = dict(zip(self.norms.parts, values[len(TERMS) :]))
        norm = math.sqrt(sum(squares.values()))
        if finite := math.isfinite(loss) and math.isfinite(norm):
            self._update(norm, self.stage.schedule.at(work.step - self.first), work.step)
        self.skipped += not finite
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "finite": finite,
            "loss": loss,
            "terms": dict(zip(TERMS, values)),
            "grad_norm": norm,
            "grad_norms": {part: math.sqrt(each) for part, each in squares.items()} if costly else None,
            "experts": self._loads(loads) if costly else None,
        }

    def _autocast(self) -> contextlib.AbstractContextManager:
        """bf16 on one rank; over several it is FSDP that computes with copies of the weights."""
        if self.config.parallel.precision == "bf16" and self.world.ranks == 1:
            return torch.autocast(self.world.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def _update(self, norm: float, factor: float, step: int) -> None:
        if norm > self.config.optimizer.clip:
            gradients.scale(self.trained.values(), self.config.optimizer.clip / norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.stage.lr * factor
        self.optimizer.step()
        if self.ema:
            decay = min(self.config.ema, (1 + step) / (10 + step))
            gradients.average(self.ema, dict(self.model.named_parameters()), decay)

    def _named(self, output: UniF2aceOutput) -> dict[tuple[str, int, tuple[int, ...]], torch.Tensor]:
        """Slots of each routed expert by level, layer and sizes of groups."""
        levels = [("token", output.token_routings), ("sequence", output.sequence_routings)]
        found = {}
        for kind, (level, routings) in zip(self.model.routers(output), levels):
            for layer, routing in enumerate(routings or ()):
                found[level, layer, tuple(kind.group_sizes)] = routing.counts[: sum(kind.group_sizes)]
        return found

    def _loads(self, batches: list[dict]) -> list[dict[str, Any]]:
        """What each expert of each layer was given, by all ranks: tokens, or samples at the level of the sequence."""
        if not batches[0]:
            return []
        counts = {key: torch.stack([each[key] for each in batches]).sum(0) for key in batches[0]}
        flat = torch.cat(list(counts.values()))
        if self.world.ranks > 1:
            dist.all_reduce(flat)
        found = []
        for (level, layer, groups), own in zip(counts, flat.split([len(each) for each in counts.values()])):
            sums = [group.sum() for group in own.split(groups)]
            share = [group * len(group) / max(int(total), 1) for group, total in zip(own.split(groups), sums)]
            found.append({
                "level": level, "layer": layer, "counts": own.tolist(), "groups": list(groups),
                "frequency": torch.cat(share).tolist(),
            })  # fmt: skip
        return found

    # ------------------------------------------------------------------------------------------ what is kept of it

    def tensors(self) -> dict[str, torch.Tensor]:
        """Weights, moments and averages by name; the image tokenizer is not trained and stays where it came from."""
        held = {f"model.{name}": each.detach() for name, each in self.model.named_parameters()}
        for name, parameter in self.trained.items():
            held |= {f"optimizer.{name}.{key}": each for key, each in self.optimizer.state[parameter].items()}
        held |= {f"ema.{name}": each for name, each in self.ema.items()}
        return {name: each for name, each in held.items() if ".image_tokenizer." not in name}

    def save(self, saved: States, step: int, wait: bool = False) -> None:
        """Take the state before `step`."""
        corrupt: list[dict[str, str]] = [{}] * self.world.ranks
        dist.all_gather_object(corrupt, self.stream.corrupt, group=self.world.host)
        stream = self.stream.state_dict(step) | {"corrupt": {k: v for each in corrupt for k, v in each.items()}}
        plain = {"stage": self.stage.name, "seconds": self.seconds, "skipped": self.skipped, "stream": stream}
        saved.save(step, self.tensors(), plain, wait)

    def restore(self, saved: States, state: Path) -> None:
        """Go on from a state. A stage that begins may train what the one before did not: its moments start at zero.

        Raises:
            UserError: the state is damaged, or of another model or other data.
        """
        wanted = self.tensors()
        if states.number(state) == self.first:
            there = states.names(state)
            wanted = {name: each for name, each in wanted.items() if name in there or not name.startswith("optimizer.")}
        plain = saved.load(state, wanted)
        self.skipped, self.seconds = plain["skipped"], plain["seconds"]
        same_data = plain["stage"] == self.stage.name
        try:
            self.stream.load_state_dict(plain["stream"], same_data)
        except UserError as error:
            raise UserError(f"{state}: {error}") from error
