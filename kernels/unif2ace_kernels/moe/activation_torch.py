"""The experts' activation and its backward in plain torch: what the compiled ones stand in for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_APPROXIMATE = {"gelu": "none", "gelu_tanh": "tanh", "geglu": "tanh"}
GATED = ("swiglu", "geglu")
ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "silu", *GATED)


def _pointwise(h: Tensor, activation: str) -> Tensor:
    if activation in _APPROXIMATE:
        return F.gelu(h, approximate=_APPROXIMATE[activation])
    return F.relu(h) if activation == "relu" else F.silu(h)


def _pointwise_backward(grad: Tensor, h: Tensor, activation: str) -> Tensor:
    if activation in _APPROXIMATE:
        out: Tensor = torch.ops.aten.gelu_backward(grad, h, approximate=_APPROXIMATE[activation])
    elif activation == "relu":
        out = torch.ops.aten.threshold_backward(grad, h, 0)
    else:
        out = torch.ops.aten.silu_backward(grad, h)
    return out


def forward(h: Tensor, activation: str) -> Tensor:
    """h [m, F], or gate | value [m, 2F] for a gated activation -> a [m, F]."""
    if activation not in GATED:
        return _pointwise(h, activation)
    gate, value = h.chunk(2, -1)
    return _pointwise(gate, activation).mul_(value)


def backward(grad_a: Tensor, h: Tensor, weight: Tensor, activation: str) -> tuple[Tensor, Tensor, Tensor]:
    """weight * a, the gradient of h and <grad_a, a>, where the row's output is weight * a w_out.

    Args:
        grad_a: [m', F], m' >= m; rows from m on are padding.
        h: [m, F or 2F].
        weight: [m] float32 or float64.

    Returns:
        scaled a [m', F] and grad_h [m', F or 2F], zero in the padding, and the gradient of the weight [m].
    """
    padding = grad_a.shape[0] - h.shape[0]
    grad_a, scale = grad_a[: h.shape[0]], weight[:, None].to(h.dtype)
    a = forward(h, activation)
    grad_weight = (grad_a * a).sum(-1, dtype=weight.dtype)
    grad_a = grad_a * scale
    if activation in GATED:
        gate, value = h.chunk(2, -1)
        grad_gate = _pointwise_backward(grad_a * value, gate, activation)
        grad_h = torch.cat([grad_gate, grad_a * _pointwise(gate, activation)], -1)
    else:
        grad_h = _pointwise_backward(grad_a, h, activation)
    return F.pad(a.mul_(scale), (0, 0, 0, padding)), F.pad(grad_h, (0, 0, 0, padding)), grad_weight
