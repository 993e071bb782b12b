"""The experts' feed-forward in plain torch: one product per expert over its own rows, forward and backward.

Rows are the slots sorted by expert, R = T * S of them; rows offsets[e] : offsets[e + 1] are expert e's. An expert's
rows are gathered, multiplied and activated while they are in the cache; only the pre-activation h is kept.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from . import activation_torch


def _row_step(x: Tensor) -> int:
    """Products take a multiple of this many rows.

    oneDNN, which multiplies bfloat16 and float16 on the CPU, builds a kernel for each new number of rows, which can
    take as long as the product itself, and routing brings new numbers at every step.
    """
    return 32 if x.device.type == "cpu" and x.dtype in (torch.bfloat16, torch.float16) else 1


def _ceil(rows: int, step: int) -> int:
    return -(-rows // step) * step


def _gather(x: Tensor, tokens: Tensor, step: int) -> Tensor:
    """Rows x[tokens], and zero rows up to a multiple of `step`."""
    m = len(tokens)
    if m % step == 0:
        return x.index_select(0, tokens)
    rows = x.new_empty(_ceil(m, step), x.shape[1])
    torch.index_select(x, 0, tokens, out=rows[:m])
    rows[m:].zero_()
    return rows


def is_flipped(weight: Tensor) -> bool:
    """Whether [A, M, N] lies as [A, N, M] does, as the layers of torch and transformers keep their weights."""
    return not weight.is_contiguous() and weight.transpose(1, 2).is_contiguous()


def empty_gradient(weight: Tensor) -> Tensor:
    """Memory for the gradient of `weight` [A, M, N] in its layout: autograd would copy another."""
    if is_flipped(weight):
        return weight.new_empty(weight.transpose(1, 2).shape).transpose(1, 2)
    return weight.new_empty(weight.shape)


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def _position(order: Tensor, slots: int) -> Tensor:
    """Row of each slot [T, S]: the inverse of `order`."""
    position = torch.empty_like(order)
    position[order] = torch.arange(len(order), device=order.device)
    return position.view(-1, slots)


def _combine(rows: Tensor, position: Tensor, weight: Tensor | None) -> Tensor:
    """[T, D]: the (weighted) sum of each token's rows, in the order of its slots."""
    if position.numel() == 0:
        return rows.new_zeros(len(position), rows.shape[1])
    weight = None if weight is None else weight.to(rows.dtype)
    return F.embedding_bag(position, rows, mode="sum", per_sample_weights=weight)


def forward(
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    offsets: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    keep_h: bool = True,
) -> tuple[Tensor, Tensor]:
    """See `functions.experts`; returns y [T, D] and the pre-activations h [R, F or 2F] in the order of the rows.

    Without `keep_h` h is that of no row.
    """
    slots, bounds, step = weight.shape[1], offsets.tolist(), _row_step(x)
    x = x.contiguous()
    tokens = order // slots
    # `step` rows too many: a product may write past its expert's rows, where the next expert writes after it.
    longest = max((stop - start for start, stop in pairwise(bounds)), default=0)
    h = x.new_empty((len(order) if keep_h else longest) + step, w_in.shape[2])
    y_rows = x.new_empty(len(order) + step, x.shape[1])
    for e, (start, stop) in enumerate(pairwise(bounds)):
        if start == stop:
            continue
        x_e = _gather(x, tokens[start:stop], step)
        own = slice(start, start + len(x_e))
        h_own = h[own] if keep_h else h[: len(x_e)]
        h_e = _product(x_e, w_in[e], None if b_in is None else b_in[e], h_own)
        a_e = activation_torch.forward(h_e, activation)
        _product(a_e, w_out[e], None if b_out is None else b_out[e], y_rows[own])
    return _combine(y_rows, _position(order, slots), weight), h[: len(order) if keep_h else 0]


def backward(
    grad_y: Tensor,
    x: Tensor,
    h: Tensor,
    weight: Tensor,
    order: Tensor,
    offsets: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    has_b_in: bool,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, w_in, b_in, w_out, b_out; zero for the parameters of an expert without rows.

    Without b_in or b_out (b_out is None) their gradients have no experts, [0, ...].

    The experts' outputs are not kept: with y = a w_out + b_out, the gradient of a slot's weight is
    <grad_y, y> = <grad_y w_out^T, a> + <grad_y, b_out>, and grad_y w_out^T is needed anyway.
    """
    slots, bounds, step = weight.shape[1], offsets.tolist(), _row_step(x)
    x, grad_y = x.contiguous(), grad_y.contiguous()
    tokens = order // slots
    weight_rows = weight.flatten().index_select(0, order)
    grad_weight_rows = torch.empty_like(weight_rows)
    grad_x_rows = x.new_empty(len(order) + step, x.shape[1])
    grad_w_in, grad_w_out = empty_gradient(w_in), empty_gradient(w_out)
    grad_b_in = w_in.new_empty(len(w_in) if has_b_in else 0, w_in.shape[2])
    grad_b_out = w_out.new_empty(0 if b_out is None else len(w_out), x.shape[1])
    for e, (start, stop) in enumerate(pairwise(bounds)):
        if start == stop:
            for grad in (grad_w_in, grad_b_in, grad_w_out, grad_b_out):
                grad[e : e + 1].zero_()
            continue
        x_e, grad_y_e = _gather(x, tokens[start:stop], step), _gather(grad_y, tokens[start:stop], step)
        scale = weight_rows[start:stop]
        scaled_a, grad_h, grad_weight = activation_torch.backward(
            grad_y_e @ w_out[e].t(), h[start:stop], scale, activation
        )
        if b_out is not None:
            grad_weight += torch.mm(grad_y_e[: stop - start], b_out[e, :, None])[:, 0]
            torch.mm(scale[None].to(x.dtype), grad_y_e[: stop - start], out=grad_b_out[e, None])
        grad_weight_rows[start:stop] = grad_weight
        torch.mm(scaled_a.t(), grad_y_e, out=grad_w_out[e])
        torch.mm(x_e.t(), grad_h, out=grad_w_in[e])
        if has_b_in:
            torch.sum(grad_h, 0, out=grad_b_in[e])
        torch.mm(grad_h, w_in[e].t(), out=grad_x_rows[start : start + len(x_e)])
    position = _position(order, slots)
    grad_weight = grad_weight_rows[position]
    return _combine(grad_x_rows, position, None), grad_weight, grad_w_in, grad_b_in, grad_w_out, grad_b_out
