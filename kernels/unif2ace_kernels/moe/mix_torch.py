"""The sequence-level mixture in plain torch: sums in float32 (float64 for float64), rounds once."""

from __future__ import annotations

import torch
from torch import Tensor


def forward(x: Tensor, coef: Tensor, injected: Tensor) -> Tensor:
    """See `functions.mix`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    scale = coef.to(dtype)[:, :, None, None]
    y = x.to(dtype) * scale[:, 0]
    for m in range(injected.shape[1]):
        y.addcmul_(injected[:, m].to(dtype), scale[:, 1 + m])
    return y.to(x.dtype)


def backward(grad_y: Tensor, x: Tensor, coef: Tensor, injected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, coef and injected."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    grad_y, scale = grad_y.to(dtype), coef.to(dtype)[:, :, None, None]
    grad_x = (grad_y * scale[:, 0]).to(x.dtype)
    grad_injected = (grad_y[:, None] * scale[:, 1:]).to(injected.dtype)
    grad_x_coef = (grad_y * x.to(dtype)).sum((1, 2))[:, None]
    grad_injected_coef = (grad_y[:, None] * injected.to(dtype)).sum((2, 3))
    return grad_x, torch.cat([grad_x_coef, grad_injected_coef], 1).to(coef.dtype), grad_injected
