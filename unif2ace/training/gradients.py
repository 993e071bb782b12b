"""AdamW's groups, the norms of a step's gradients by part of the model, clipping, the average of the weights."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from unif2ace.errors import UserError
from unif2ace.training.config import AdamWConfig
from unif2ace.training.sharding import copies, local

PARTS = ("embedding", "attention", "ffn", "experts", "routers", "sequence", "injection", "norms", "head")
_DECAYS = ("weight", "w_in", "w_out")


def part_of(name: str) -> str:
    """Which of PARTS a parameter is in."""
    pieces = name.split(".")
    if "router" in name:
        return "routers"
    if any("norm" in piece for piece in pieces):
        return "norms"
    if pieces[0] == "blocks":
        return pieces[2]
    return {"image_position": "embedding"}.get(pieces[0], pieces[0])


def freeze(model: nn.Module, patterns: Sequence[str], where: str) -> None:
    """Train no parameter whose name fits one of `patterns`.

    Raises:
        UserError: a pattern fits none, or nothing is left to train.
    """
    names = dict(model.named_parameters())
    for index, pattern in enumerate(patterns):
        found = fnmatch.filter(names, pattern)
        if not found:
            raise UserError(
                f"{where}.freeze[{index}]: no parameter is named like {pattern!r}; one is {next(iter(names))}"
            )
        for name in found:
            names[name].requires_grad_(False)
    if not any(each.requires_grad for each in names.values()):
        raise UserError(f"{where}.freeze: nothing is left to train")


def recompute(model: PreTrainedModel) -> None:
    """Keep a layer's input alone, and run it again in the backward."""
    # Newer versions of transformers call it so, and warn of the other name; older ones know that one alone.
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def adamw(parameters: Mapping[str, nn.Parameter], config: AdamWConfig) -> torch.optim.AdamW:
    """Fused AdamW over named parameters, with a state from the start, so that it can be filled from a saved one."""
    groups: dict[tuple, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        decays = name.endswith(_DECAYS) and "norm" not in name and part_of(name) != "embedding"
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None  # one fused call takes one mesh
        groups.setdefault((decays, mesh), []).append(parameter)
    decay = config.weight_decay
    optimizer = torch.optim.AdamW(
        [{"params": each, "weight_decay": decay if decays else 0.0} for (decays, _), each in groups.items()],
        lr=0.0, betas=(config.beta1, config.beta2), eps=config.eps, fused=True,
    )  # fmt: skip
    for parameter in parameters.values():
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer


class Norms:
    """Squared norms of the gradients by part of the model."""

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        of = {part: [p for name, p in parameters.items() if part_of(name) == part] for part in PARTS}
        self.parts = [part for part, members in of.items() if members]
        self._members = [of[part] for part in self.parts]

    def own(self) -> torch.Tensor:
        """[parts], float32, of this rank's shards: added up over the ranks they are the whole gradient's."""
        squares = []
        for members in self._members:
            used = [(local(each.grad), copies(each)) for each in members if each.grad is not None]
            norms = torch._foreach_norm([gradient for gradient, _ in used]) if used else ()
            parts = [norm.float().square() / count for norm, (_, count) in zip(norms, used)]
            squares.append(torch.stack(parts).sum() if parts else torch.zeros((), device=members[0].device))
        return torch.stack(squares)


def scale(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiply every gradient by `factor`."""
    torch._foreach_mul_([local(each.grad) for each in parameters if each.grad is not None], factor)


@torch.no_grad()
def average(ema: Mapping[str, torch.Tensor], parameters: Mapping[str, nn.Parameter], decay: float) -> None:
    """ema = decay * ema + (1 - decay) * parameters, in place."""
    torch._foreach_lerp_([local(each) for each in ema.values()], [local(parameters[name]) for name in ema], 1 - decay)
