"""Expert parallelism: the experts lie in slices on the ranks of a process group, and tokens travel to them and back.

A token's slots that go to one rank travel as one row, however many they are, and come back as one row, their weighted
sum. A row arrives with its pairs, one (expert, weight) for each of those slots:

    rank 0, S = 2, two experts a rank        sent to rank 1
    token 0: experts 0, 1                    rows   [token 1, token 2]
    token 1: experts 2, 3                    pairs  [(expert 2, begins a row), (expert 3, same row),
    token 2: experts 1, 2                            (expert 2, begins a row)]

Forward and backward are made of two linear maps and their transposes: `_Fan` (copy rows, sum copies) and `_Exchange`
(parts to ranks, parts back). Sums run in one order and nothing is added atomically, so all bits repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from .functions import Routing, arrange, expect_routing, experts, fit_experts

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Split = tuple[list[int], list[int]]  # rows for each rank, rows from each rank


def local_experts(total: int, group: ProcessGroup) -> slice:
    """This rank's slice of `total` experts, as DTensor's Shard(0) and torch.chunk cut it: the last may be empty."""
    share = -(-total // dist.get_world_size(group))
    start = min(dist.get_rank(group) * share, total)
    return slice(start, min(start + share, total))


def parallel_experts(
    x: Tensor,
    routing: Routing,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    activation: str,
    group: ProcessGroup,
) -> Tensor:
    """`experts` of this rank's tokens, where every rank of `group` has a slice of the experts and tokens of its own.

    A token goes at most once to each rank, and one row comes back; the partial sums are added in the order of the
    ranks. Gradients of x, of the routing's weights and of the experts are exact; those of a slice of the experts are
    of the sum of all ranks' losses (divide by the ranks where the loss is the ranks' mean). Same bits on every run.

    Five collectives forward, three backward, all all_to_all. Every rank has to call it, in the same order among the
    group's collectives and with the same arguments requiring gradients, and to run the backward if one does: a rank
    without tokens or without experts as well. The host reads the device once: how many rows and slots go to and come
    from each rank.

    Args:
        x: [T, D] float; T may differ from rank to rank and be 0.
        routing: of this rank's T tokens, over all A = len(routing.counts) experts, from `route` or `arrange`.
        w_in, b_in, w_out, b_out: see `experts`, for this rank's experts `local_experts(A, group)` alone.
        activation: see `experts`.
        group: of the ranks.

    Returns:
        y [T, D] of x's dtype; under autocast of its dtype, in which the rows travel too.

    Raises:
        ValueError: naming the argument, before anything is sent.
    """
    expect_routing(routing)
    total, ranks, own = len(routing.counts), dist.get_world_size(group), local_experts(len(routing.counts), group)
    held = own.stop - own.start
    x, w_in, b_in, w_out, b_out = fit_experts(x, routing, w_in, b_in, w_out, b_out, activation, held)
    (tokens, slots), share = routing.expert.shape, -(-total // ranks)

    # The slots, sorted by the rank that has their expert. A slot begins a row where the rank or the token changes.
    expert = routing.expert.flatten().clamp(0, total - 1)  # as `arrange` takes one out of range on CUDA
    home, slot = (expert // share).sort(stable=True)
    token = slot // slots
    place = home * tokens + token
    begins = place.diff(prepend=place.new_full((1,), -1)) != 0
    row = begins.cumsum(0) - 1

    bounds = torch.searchsorted(home, torch.arange(ranks + 1, device=x.device))
    leaving = torch.stack([F.pad(row + 1, (1, 0))[bounds].diff(), bounds.diff()], 1)  # [ranks, rows and slots]
    arriving = _all_to_all(leaving, ([1] * ranks, [1] * ranks), group)
    rows_out, slots_out, rows_in, slots_in = torch.cat([leaving, arriving], 1).t().tolist()

    sent = _Fan.of(token[torch.searchsorted(row, torch.arange(sum(rows_out), device=x.device))], tokens)
    code = _all_to_all((2 * (expert[slot] - home * share) + begins).int(), (slots_out, slots_in), group)
    rows, weight = _exchange(
        group, ((rows_out, rows_in), (slots_out, slots_in)),
        sent.copy(x), _Fan.of(slot, len(slot)).copy(routing.weight.reshape(-1, 1)),
    )  # fmt: skip
    pairs = _Fan.of((code % 2).cumsum(0) - 1, len(rows))
    copies = pairs.copy(rows)
    if held:
        local = arrange(code[:, None] // 2, weight, held)
        y = experts(copies, local, w_in, b_in, w_out, b_out, activation=activation)
    else:  # no rows either, but the parameters get gradients, and the backward reaches its collectives
        y = copies * weight.to(x.dtype) + sum(each.sum() for each in (w_in, b_in, w_out, b_out) if each is not None)
    (back,) = _exchange(group, ((rows_in, rows_out),), pairs.sum(y))
    return sent.sum(back)


class _Fan(NamedTuple):
    """Copies of rows: copy i is of row source[i]; those of row j are order[offsets[j] : offsets[j + 1]]."""

    source: Tensor
    order: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, source: Tensor, rows: int) -> _Fan:
        ascending, order = source.sort(stable=True)
        return cls(source, order, torch.searchsorted(ascending, torch.arange(rows, device=source.device)))

    def copy(self, rows: Tensor) -> Tensor:
        return _copy(rows, *self)

    def sum(self, copies: Tensor) -> Tensor:
        """Of each row's copies, in their order."""
        return _sum(copies, *self)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, *fan: Tensor) -> Tensor:
        ctx.save_for_backward(*fan)
        return rows.index_select(0, fan[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _sum(grad, *ctx.saved_tensors), None, None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, copies: Tensor, *fan: Tensor) -> Tensor:
        ctx.save_for_backward(*fan)
        _, order, offsets = fan
        if len(order) == 0:  # nothing says that every device's embedding_bag takes no rows at all
            return copies.new_zeros(len(offsets), copies.shape[1])
        return F.embedding_bag(order, copies, offsets, mode="sum")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _copy(grad, *ctx.saved_tensors), None, None, None


class _Exchange(torch.autograd.Function):
    """Tensors' parts to the ranks. One node for all tensors, so that no rank's backward sends them in another order."""

    @staticmethod
    def forward(ctx: Any, group: ProcessGroup, splits: Sequence[Split], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.group, ctx.splits = group, splits
        return tuple(_all_to_all(tensor, split, group) for tensor, split in zip(tensors, splits))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        splits = [(arrived, left) for left, arrived in ctx.splits]
        return None, None, *_exchange(ctx.group, splits, *grads)


_copy: Callable[..., Tensor] = _Copy.apply
_sum: Callable[..., Tensor] = _Sum.apply
_exchange: Callable[..., tuple[Tensor, ...]] = _Exchange.apply


def _all_to_all(rows: Tensor, split: Split, group: ProcessGroup) -> Tensor:
    leaving, arriving = split
    received = rows.new_empty(sum(arriving), *rows.shape[1:])
    dist.all_to_all_single(received, rows.contiguous(), arriving, leaving, group=group)
    return received
