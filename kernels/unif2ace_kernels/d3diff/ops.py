"""Registration of the room's ops: schema, implementations by device, fake, autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from .._dtypes import accumulation_dtype
from .._library import Implementation, compiled, register
from .._triton import triton_implementation
from .head import HeadLoss, HeadOutputs, head_torch
from .logits import logits_backward_torch, logits_torch
from .noise_torch import noise_torch
from .weights_torch import row_weights_torch, statistics_torch


def _noise_fake(tokens: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return tokens.new_empty(tokens.shape), tokens.new_empty(tokens.shape, dtype=torch.bool)


noise_op = register(
    "d3diff_noise(Tensor tokens, Tensor mask_prob, int mask_id, bool exact_count, SymInt seed, SymInt offset,"
    " SymInt first_row) -> (Tensor noised, Tensor mask)",
    implementations=[
        # Whatever the dtype of mask_prob, which is compared in float64.
        triton_implementation(f"{__package__}.noise_triton", "noise_triton", dtypes=None),
        compiled("d3diff_noise", "cpu"),
        Implementation("torch", ("cpu", "cuda"), noise_torch),
    ],
    fake=_noise_fake,
    serves=["d3diff.noise"],
)


def _head_fake(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *arguments: Any) -> HeadOutputs:
    asked = HeadLoss(*arguments)
    dtype, columns = asked.dtype, asked.columns
    ce, lse, mass = (hidden.new_empty(hidden.shape[0], dtype=dtype) for _ in range(3))
    rows, features = hidden.shape
    return HeadOutputs(
        hidden.new_empty((), dtype=dtype),
        ce,
        lse,
        mass,
        hidden.new_empty(rows, dtype=torch.bool),
        hidden.new_empty(hidden.shape) if asked.grad_hidden else hidden.new_empty(0),
        weight.new_empty((columns, features) if asked.grad_weight else 0),
        hidden.new_empty(columns if asked.grad_bias else 0, dtype=dtype if bias is None else bias.dtype),
    )


def _head_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    asked = HeadLoss(*inputs[3:])
    # Without this, backward would be handed zeros for every output: as much memory and traffic as the gradients.
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:5])
    ctx.save_for_backward(*output[-3:])
    ctx.vocabulary, ctx.first, ctx.asked = inputs[1].shape[0], asked.first, asked.gradients


def _head_backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    asked, nothing = ctx.asked, (None,) * len(HeadLoss._fields)
    if grad_loss is None:
        return None, None, None, *nothing
    if any(needed and not ask for needed, ask in zip(ctx.needs_input_grad[:3], asked, strict=True)):
        raise RuntimeError("unif2ace::d3diff_head was called without the gradients that backward now needs")
    gradients = head_backward_op(grad_loss, *ctx.saved_tensors, ctx.vocabulary, ctx.first)
    return *(gradient if ask else None for gradient, ask in zip(gradients, asked, strict=True)), *nothing


head_op = register(
    "d3diff_head(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? group, Tensor ce_weight,"
    " Tensor? penalty_weight, Tensor? shift, Tensor? mass_weight, int[] starts, int[] ends, int[] codes,"
    " int ignore_index, ScalarType compute_dtype, bool grad_hidden, bool grad_weight, bool grad_bias)"
    " -> (Tensor loss, Tensor ce, Tensor lse, Tensor mass, Tensor hit, Tensor grad_hidden, Tensor grad_weight,"
    " Tensor grad_bias)",
    implementations=[
        triton_implementation(f"{__package__}.head_triton", "head_triton"),
        compiled("d3diff_head", "cpu"),
        Implementation("torch", ("cpu", "cuda"), head_torch),
    ],
    fake=_head_fake,
    setup_context=_head_setup_context,
    backward=_head_backward,
    serves=["d3diff.loss", "d3diff.joint_loss", "d3diff.next_token_loss"],
)


def _no_second_derivative(ctx: Any, *_: Any) -> NoReturn:
    # Without this formula autograd would record what the backward does inside, and take saved terms for constants.
    raise RuntimeError("unif2ace::d3diff_head_backward and d3diff_logits_backward cannot be differentiated")


def _head_backward_torch(
    grad_loss: torch.Tensor,
    grad_hidden: torch.Tensor,
    grad_weight: torch.Tensor,
    grad_bias: torch.Tensor,
    vocabulary: int,
    first: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The forward's gradients times the loss's, those of weight and bias put into their range of the vocabulary."""

    def placed(gradient: torch.Tensor) -> torch.Tensor:
        if gradient.numel() == 0:
            return gradient.new_empty(0)
        last = first + gradient.shape[0]
        full = gradient.new_empty(vocabulary, *gradient.shape[1:])
        full[:first].zero_()
        full[last:].zero_()
        torch.mul(gradient, grad_loss, out=full[first:last])
        return full

    return grad_hidden * grad_loss, placed(grad_weight), placed(grad_bias)


def _head_backward_fake(
    grad_loss: torch.Tensor, grad_hidden: torch.Tensor, grad_weight: torch.Tensor, grad_bias: torch.Tensor,
    vocabulary: int, first: int,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    def placed(gradient: torch.Tensor) -> torch.Tensor:
        size: Sequence[int] = (0,) if gradient.numel() == 0 else (vocabulary, *gradient.shape[1:])
        return gradient.new_empty(size)

    return torch.empty_like(grad_hidden), placed(grad_weight), placed(grad_bias)


head_backward_op = register(
    "d3diff_head_backward(Tensor grad_loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias,"
    " SymInt vocabulary, int first) -> (Tensor, Tensor, Tensor)",
    implementations=[
        triton_implementation(f"{__package__}.logits_triton", "head_backward_triton"),
        compiled("d3diff_head_backward", "cpu"),
        Implementation("torch", ("cpu", "cuda"), _head_backward_torch),
    ],
    fake=_head_backward_fake,
    backward=_no_second_derivative,
)


def _logits_fake(logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    rows, dtype = logits.shape[0], accumulation_dtype(logits.dtype)
    floats = (logits.new_empty(rows, dtype=dtype) for _ in range(3))
    return logits.new_empty((), dtype=dtype), *floats, logits.new_empty(rows, dtype=torch.bool)


def _logits_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, targets, *weights = inputs[:6]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits, targets, *weights, output[2], output[3])
    ctx.integers = inputs[6:]


def _logits_backward(ctx: Any, grad_loss: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 10
    return logits_backward_op(grad_loss, *ctx.saved_tensors, *ctx.integers), *(None,) * 9


logits_op = register(
    "d3diff_logits(Tensor logits, Tensor targets, Tensor ce_weight, Tensor? penalty_weight, Tensor? shift,"
    " Tensor? mass_weight, int start, int end, int[] codes, int ignore_index)"
    " -> (Tensor loss, Tensor ce, Tensor lse, Tensor mass, Tensor hit)",
    implementations=[
        triton_implementation(f"{__package__}.logits_triton", "logits_triton"),
        compiled("d3diff_logits", "cpu"),
        Implementation("torch", ("cpu", "cuda"), logits_torch),
    ],
    fake=_logits_fake,
    setup_context=_logits_setup_context,
    backward=_logits_backward,
    serves=["d3diff.loss_from_logits"],
)


logits_backward_op = register(
    "d3diff_logits_backward(Tensor grad_loss, Tensor logits, Tensor targets, Tensor ce_weight, Tensor? penalty_weight,"
    " Tensor? shift, Tensor? mass_weight, Tensor lse, Tensor mass, int start, int end, int[] codes, int ignore_index)"
    " -> Tensor",
    implementations=[
        triton_implementation(f"{__package__}.logits_triton", "logits_backward_triton"),
        compiled("d3diff_logits_backward", "cpu"),
        Implementation("torch", ("cpu", "cuda"), logits_backward_torch),
    ],
    fake=lambda grad_loss, logits, *_: logits.new_empty(logits.shape),
    backward=_no_second_derivative,
)


def _row_weights_fake(
    valid: torch.Tensor, weight: torch.Tensor | None, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    score = valid.new_empty(0 if weight is None else valid.shape, dtype=torch.float64)
    return valid.new_empty((), dtype=torch.int64), score.new_empty(()), score


row_weights_op = register(
    "d3diff_row_weights(Tensor valid, Tensor? weight, Tensor? sample_id, bool token_mean)"
    " -> (Tensor number, Tensor share, Tensor score)",
    implementations=[
        compiled("d3diff_row_weights", "cpu"),
        Implementation("torch", ("cpu", "cuda"), row_weights_torch),
    ],
    fake=_row_weights_fake,
)


statistics_op = register(
    "d3diff_statistics(Tensor valid, Tensor share, Tensor? score, Tensor? penalty_weight, Tensor? shift,"
    " Tensor? mass_weight, Tensor? constant, Tensor ce, Tensor lse, Tensor mass, Tensor hit, bool one_of_two)"
    " -> Tensor",
    implementations=[
        compiled("d3diff_statistics", "cpu"),
        Implementation("torch", ("cpu", "cuda"), statistics_torch),
    ],
    fake=lambda *arguments: arguments[7].new_empty(5),
)
