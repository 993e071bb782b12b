"""A model over the ranks: FSDP2 for all of it, but for the experts where these are spread over ranks by themselves.

    parameters           sharded over all ranks (`fully_shard`, a layer at a time), gathered where they are used; or
                         over sets of `sharded` ranks, which hold copies of one another (HSDP)
    experts, spread      rank r of each group of `experts` ranks holds the r-th slice of every layer's experts, and the
                         tokens come to them; groups hold copies of one another
    image tokenizer      whole on every rank: training does not run it

Losses are parts of the step's, so gradients are added up and never averaged.

What is exchanged is asked for before it is needed: a layer's weights while the layer before computes, forward and
backward; the sum of spread experts' gradients as soon as a layer's backward has them.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from unif2ace.errors import UserError
from unif2ace.model.modeling import UniF2aceForConditionalGeneration
from unif2ace.training.config import ParallelConfig
from unif2ace.training.world import World
from unif2ace_kernels import moe

_COPIES = "copies"  # the dimension of a mesh along which spread experts are repeated
_EXPERTS = ("experts_w_in", "experts_b_in", "experts_w_out", "experts_b_out")


def shard(model: UniF2aceForConditionalGeneration, world: World, config: ParallelConfig) -> None:
    """Spread `model`, which is the same on all ranks, over them, and have it balance over all of their batches.

    One rank alone computes as a plain module.

    Raises:
        UserError: the experts cannot be spread over so many ranks.
    """
    if world.ranks == 1:
        model.to(world.device)  # type: ignore[arg-type]
    else:
        spread(model, world, config)


def spread(model: UniF2aceForConditionalGeneration, world: World, config: ParallelConfig) -> None:
    """As `shard`, over one rank too."""
    kind = world.device.type
    own = spread_experts(model, world, config.experts) if config.experts > 1 else set()
    mesh = init_device_mesh(kind, (world.ranks,))
    if config.sharded not in (0, world.ranks):
        sizes = (world.ranks // config.sharded, config.sharded)
        mesh = init_device_mesh(kind, sizes, mesh_dim_names=("sets", "shards"))
    images = set() if model.image_tokenizer is None else set(model.image_tokenizer.parameters())
    if model.image_tokenizer is not None:
        model.image_tokenizer.to(world.device)
    bf16 = torch.bfloat16 if config.precision == "bf16" else None
    policy = MixedPrecisionPolicy(param_dtype=bf16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=own | images)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)
    # FSDP does this backward by itself. Forward it counts on a host that runs ahead of its device: ours waits, for
    # the number of tokens that spread experts get, or, on a CPU, for everything.
    for module, following in zip((model, *model.blocks), model.blocks):
        module.set_modules_to_forward_prefetch([following])
    if kind == "cpu":  # without streams: another thread exchanges
        model._set_unshard_async_op(True)  # type: ignore[operator]
    model.to(world.device)  # type: ignore[arg-type]
    model.balance_group = dist.group.WORLD


def spread_experts(model: nn.Module, world: World, ranks: int) -> set[nn.Parameter]:
    """Keep this rank's slice of each mixture's experts; the parameters that are left."""
    mesh = init_device_mesh(world.device.type, (world.ranks // ranks, ranks), mesh_dim_names=(_COPIES, "experts"))
    mine = mesh.get_local_rank("experts")
    kept: set[nn.Parameter] = set()
    for module in model.modules():
        if not isinstance(module, moe.GroupedMoE):
            continue
        if len(module.experts_w_in) < ranks:
            raise UserError(
                f"parallel.experts: expected at most the {len(module.experts_w_in)} experts of a layer, got {ranks}"
            )
        module.group = mesh.get_group("experts")
        for name in _EXPERTS:
            whole = getattr(module, name)
            if whole is not None:
                part = whole.detach().chunk(ranks)
                here = (part[mine] if mine < len(part) else whole.detach()[:0]).clone()  # the rest is let go
                spread = DTensor.from_local(
                    here.to(world.device), mesh, [Replicate(), Shard(0)],
                    run_check=False, shape=whole.shape, stride=whole.stride(),
                )  # fmt: skip
                setattr(module, name, nn.Parameter(spread, whole.requires_grad))
                kept.add(getattr(module, name))
    return kept


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of it, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def copies(parameter: torch.Tensor) -> int:
    """Ranks that hold the same part of it."""
    if not isinstance(parameter, DTensor):
        return 1
    sizes = zip(parameter.device_mesh.shape, parameter.placements)
    return next((size for size, placement in sizes if placement.is_replicate()), 1)


class CopiesSum:
    """Gives each copy of the spread experts the sum of all copies' gradients, while the backward goes on."""

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self._spread = [each for each in parameters if _is_spread(each) and copies(each) > 1]
        self._under_way: dict[nn.Parameter, dist.Work] = {}
        self._last = False
        for each in self._spread:
            each.register_post_accumulate_grad_hook(self._begin)

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """`loss.backward()`; after the last one of a step the sums are there."""
        self._last = last
        loss.backward()
        if last:
            for each in self._spread:
                self._under_way.pop(each).wait()

    def _begin(self, parameter: nn.Parameter) -> None:
        if self._last:
            group = parameter.device_mesh.get_group(_COPIES)  # type: ignore[attr-defined]
            self._under_way[parameter] = dist.all_reduce(local(parameter.grad), group=group, async_op=True)  # type: ignore[arg-type]


def _is_spread(parameter: torch.Tensor) -> bool:
    """Of experts that are not FSDP's, which sums the gradients of its own copies."""
    return isinstance(parameter, DTensor) and _COPIES in (parameter.device_mesh.mesh_dim_names or ())
