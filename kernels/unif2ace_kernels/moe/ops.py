"""Registration of the room's ops, route, arrange, experts, mix: schema, implementations by device, fake, autograd.

Each is a coarse forward op and a coarse backward op, so autograd, torch.compile and CUDA graphs see two calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from .._library import KERNEL_DTYPES, Implementation, compiled, register
from .._triton import triton_implementation
from . import arrange_torch, experts_torch, mix_torch, route_torch


def _torch(function: Callable[..., Any]) -> Implementation:
    return Implementation("torch", ("cpu", "cuda"), function)


def _once_differentiable(op: str) -> Callable[..., NoReturn]:
    """The autograd formula of a backward op: says that there is none, where silence would give a wrong number."""

    def refuse(ctx: Any, *_: Any) -> NoReturn:
        raise RuntimeError(f"unif2ace::{op} cannot be differentiated")

    return refuse


def _with_value_errors(native: Implementation, check: Callable[..., None]) -> Implementation:
    """`native`, which can raise no ValueError, with that of `check`, the torch path's, for values out of range."""
    function = native.function
    if function is None:
        return native

    def forward(*arguments: Any) -> Any:
        try:
            return function(*arguments)
        except RuntimeError:
            check(*arguments)
            raise

    return replace(native, function=forward)


# ---------------------------------------------------------------------------------------------------------- route


def _route_fake(
    logits: Tensor, group_ids: Tensor, group_sizes: Sequence[int], top_k: int, shared: int, *_: Any
) -> tuple[Tensor, ...]:
    tokens, routed, slots = logits.shape[0], sum(group_sizes), top_k + shared
    experts_total = routed + shared * len(group_sizes)
    statistics = logits.new_empty(routed, dtype=torch.promote_types(logits.dtype, torch.float32))
    index = group_ids.new_empty(0, dtype=torch.int64)
    return (
        statistics.new_empty(tokens, slots), index.new_empty(tokens, slots), index.new_empty(experts_total),
        index.new_empty(experts_total + 1), index.new_empty(tokens * slots), statistics, torch.empty_like(statistics),
        statistics.new_empty(()), statistics.new_empty(()),
    )  # fmt: skip


def _route_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, group_ids, ctx.group_sizes, ctx.top_k, _, ctx.balance_coef, ctx.normalize, ctx.scoring, _, ctx.z_coef = (
        inputs
    )
    _, expert, counts, offsets, order, frequency = output[:6]
    ctx.mark_non_differentiable(expert, counts, offsets, order, frequency)
    ctx.set_materialize_grads(False)  # an output that nothing reads costs no zeros
    ctx.save_for_backward(logits, group_ids, expert, counts)


def _route_autograd(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    weight, _, _, _, _, _, probability, balance_loss, z_loss = grads  # of the outputs in order
    grad_logits = route_backward_op(
        weight, probability, balance_loss, z_loss, *ctx.saved_tensors,
        ctx.group_sizes, ctx.top_k, ctx.balance_coef, ctx.normalize, ctx.scoring, ctx.z_coef,
    )  # fmt: skip
    return grad_logits, *[None] * 9


route_backward_op = register(
    "moe_route_backward(Tensor? grad_weight, Tensor? grad_probability, Tensor? grad_balance_loss, Tensor? grad_z_loss,"
    " Tensor logits, Tensor group_ids, Tensor expert, Tensor counts, int[] group_sizes, int top_k,"
    " float[] balance_coef, bool normalize, str scoring, float z_coef) -> Tensor",
    implementations=[
        triton_implementation(f"{__package__}.route_triton", "backward"),
        compiled("moe_route_backward", "cuda", KERNEL_DTYPES),
        compiled("moe_route_backward", "cpu"),
        _torch(route_torch.backward),
    ],
    fake=lambda grad_weight, p, b, z, logits, *_: torch.empty_like(logits, memory_format=torch.contiguous_format),
    backward=_once_differentiable("moe_route_backward"),
)
route_op = register(
    "moe_route(Tensor logits, Tensor group_ids, int[] group_sizes, int top_k, int shared, float[] balance_coef,"
    " bool normalize, str scoring, Tensor? selection_bias, float z_coef)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementations=[
        # Triton before CUDA C++ because it needs no build; the two were not yet measured against each other on a GPU.
        triton_implementation(f"{__package__}.route_triton", "forward"),
        compiled("moe_route", "cuda", KERNEL_DTYPES),
        _with_value_errors(
            compiled("moe_route", "cpu"),
            lambda logits, group_ids, group_sizes, *_: route_torch.check_group_ids(group_ids, len(group_sizes)),
        ),
        _torch(route_torch.forward),
    ],
    fake=_route_fake,
    setup_context=_route_setup,
    backward=_route_autograd,
    serves=["moe.route"],
)


# -------------------------------------------------------------------------------------------------------- arrange


arrange_op = register(
    "moe_arrange(Tensor expert, int experts) -> (Tensor, Tensor, Tensor)",
    implementations=[
        triton_implementation(f"{__package__}.arrange_triton", "forward"),
        _with_value_errors(compiled("moe_arrange", "cpu"), arrange_torch.check_range),
        _torch(arrange_torch.forward),
    ],
    fake=lambda expert, experts: tuple(expert.new_empty(size) for size in (experts, experts + 1, expert.numel())),
    serves=["moe.arrange"],
)


# -------------------------------------------------------------------------------------------------------- experts


def _experts_fake(
    x: Tensor, weight: Tensor, order: Tensor, offsets: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor,
    b_out: Tensor | None, activation: str, keep_h: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return x.new_empty(x.shape), x.new_empty(order.shape[0] if keep_h else 0, w_in.shape[2])


def _experts_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, order, offsets, w_in, b_in, w_out, b_out, ctx.activation, ctx.kept_h = inputs
    ctx.has_bias = b_in is not None, b_out is not None
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # else backward would be handed zeros of the size of h
    ctx.save_for_backward(x, output[1], weight, order, offsets, w_in, w_out, b_out)


def _experts_autograd(ctx: Any, grad_y: Tensor | None, _grad_h: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_y is None:
        return (None,) * 10
    if not ctx.kept_h:
        raise RuntimeError("moe_experts: expected keep_h=True where a backward follows, got False")
    has_in, has_out = ctx.has_bias
    x, weight, w_in, b_in, w_out, b_out = experts_backward_op(grad_y, *ctx.saved_tensors, has_in, ctx.activation)
    return x, weight, None, None, w_in, b_in if has_in else None, w_out, b_out if has_out else None, None, None


def _experts_backward_fake(
    grad_y: Tensor, x: Tensor, h: Tensor, weight: Tensor, order: Tensor, offsets: Tensor, w_in: Tensor, w_out: Tensor,
    b_out: Tensor | None, has_b_in: bool, activation: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    b_in = w_in.new_empty(w_in.shape[0] if has_b_in else 0, w_in.shape[2])
    b_out = w_out.new_empty(0 if b_out is None else w_out.shape[0], w_out.shape[2])
    grad_w_in, grad_w_out = experts_torch.empty_gradient(w_in), experts_torch.empty_gradient(w_out)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), grad_w_in, b_in, grad_w_out, b_out


experts_backward_op = register(
    "moe_experts_backward(Tensor grad_y, Tensor x, Tensor h, Tensor weight, Tensor order, Tensor offsets,"
    " Tensor w_in, Tensor w_out, Tensor? b_out, bool has_b_in, str activation)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    implementations=[
        triton_implementation(f"{__package__}.experts_triton", "backward"),
        compiled("moe_experts_backward", "cpu"),
        _torch(experts_torch.backward),
    ],
    fake=_experts_backward_fake,
    backward=_once_differentiable("moe_experts_backward"),
)
experts_op = register(
    "moe_experts(Tensor x, Tensor weight, Tensor order, Tensor offsets, Tensor w_in, Tensor? b_in, Tensor w_out,"
    " Tensor? b_out, str activation, bool keep_h=True) -> (Tensor, Tensor)",
    implementations=[
        triton_implementation(f"{__package__}.experts_triton", "forward"),
        compiled("moe_experts", "cpu"),
        _torch(experts_torch.forward),
    ],
    fake=_experts_fake,
    setup_context=_experts_setup,
    backward=_experts_autograd,
    serves=["moe.experts", "moe.parallel_experts"],
)


# ------------------------------------------------------------------------------------------------------------ mix


def _mix_setup(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _mix_autograd(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, coef, injected = mix_backward_op(grad_y, *ctx.saved_tensors)
    return x, coef, injected


mix_backward_op = register(
    "moe_mix_backward(Tensor grad_y, Tensor x, Tensor coef, Tensor injected) -> (Tensor, Tensor, Tensor)",
    implementations=[
        triton_implementation(f"{__package__}.mix_triton", "backward"),
        compiled("moe_mix_backward", "cpu"),
        _torch(mix_torch.backward),
    ],
    fake=lambda grad_y, *inputs: tuple(each.new_empty(each.shape) for each in inputs),
    backward=_once_differentiable("moe_mix_backward"),
)
mix_op = register(
    "moe_mix(Tensor x, Tensor coef, Tensor injected) -> Tensor",
    implementations=[
        triton_implementation(f"{__package__}.mix_triton", "forward"),
        compiled("moe_mix", "cpu"),
        _torch(mix_torch.forward),
    ],
    fake=lambda x, coef, injected: x.new_empty(x.shape),
    setup_context=_mix_setup,
    backward=_mix_autograd,
    serves=["moe.mix"],
)
