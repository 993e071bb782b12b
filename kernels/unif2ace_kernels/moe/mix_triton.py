"""The sequence-level mixture in Triton: one pass over x, its injected tensors and their gradients.

Forward reads x and M injected tensors and writes y: (M + 2) B L D elements. Backward reads grad_y, x and the injected
tensors and writes the gradients of the last two: (2 M + 3) B L D. The gradient of coef is a sum over L and D: float32
parts, one a block, summed in order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements a program: 8 a thread at 4 warps, 16 bytes of bfloat16


@triton.jit
def mix_kernel(p_x, p_coef, p_injected, p_y, size, stride_x, stride_b, stride_m, M: tl.constexpr, BLOCK: tl.constexpr):
    """y[b] = coef[b, 0] x[b] + sum_m coef[b, 1 + m] injected[b, m], each of `size` = L * D elements in a row."""
    blocks = tl.cdiv(size, BLOCK)
    i_batch = (tl.program_id(0) // blocks).to(tl.int64)
    o = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_o = o < size
    p_c = p_coef + i_batch * (1 + M)
    # [BLOCK]
    b_y = tl.load(p_x + i_batch * stride_x + o, mask=m_o, other=0.0).to(tl.float32) * tl.load(p_c).to(tl.float32)
    p_injected += i_batch * stride_b
    for m in tl.static_range(M):
        b_injected = tl.load(p_injected + o, mask=m_o, other=0.0).to(tl.float32)
        b_y += b_injected * tl.load(p_c + 1 + m).to(tl.float32)
        p_injected += stride_m  # one at a time: m * stride_m may pass 2**31
    tl.store(p_y + i_batch * size + o, b_y.to(p_y.dtype.element_ty), mask=m_o)


@triton.jit
def mix_backward_kernel(
    p_grad_y,
    p_x,
    p_coef,
    p_injected,
    p_grad_x,
    p_grad_injected,
    p_parts,
    size,
    stride_y,
    stride_x,
    stride_b,
    stride_m,
    M: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_x = coef_0 grad_y, grad_injected_m = coef_(1+m) grad_y; parts [B, 1 + M, blocks]: <grad_y, x or S_m>."""
    blocks = tl.cdiv(size, BLOCK)
    i_block = tl.program_id(0) % blocks
    i_batch = (tl.program_id(0) // blocks).to(tl.int64)
    o = i_block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_o = o < size
    p_c = p_coef + i_batch * (1 + M)
    p_part = p_parts + i_batch * (1 + M) * blocks + i_block
    # [BLOCK]
    b_grad_y = tl.load(p_grad_y + i_batch * stride_y + o, mask=m_o, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + i_batch * stride_x + o, mask=m_o, other=0.0).to(tl.float32)
    b_grad_x = b_grad_y * tl.load(p_c).to(tl.float32)
    tl.store(p_grad_x + i_batch * size + o, b_grad_x.to(p_grad_x.dtype.element_ty), mask=m_o)
    tl.store(p_part, tl.sum(b_grad_y * b_x, 0))
    p_injected += i_batch * stride_b
    for m in tl.static_range(M):
        b_injected = tl.load(p_injected + o, mask=m_o, other=0.0).to(tl.float32)
        p_injected += stride_m
        b_grad = b_grad_y * tl.load(p_c + 1 + m).to(tl.float32)
        p_grad = p_grad_injected + (i_batch * M + m) * size + o
        tl.store(p_grad, b_grad.to(p_grad_injected.dtype.element_ty), mask=m_o)
        tl.store(p_part + (1 + m) * blocks, tl.sum(b_grad_y * b_injected, 0))


def _rows(tensor: Tensor) -> Tensor:
    """[..., L, D] with L * D elements in a row; a slice along L of a longer sequence is one already."""
    length, hidden = tensor.shape[-2:]
    dense = (hidden == 1 or tensor.stride(-1) == 1) and (length == 1 or tensor.stride(-2) == hidden)
    return tensor if dense else tensor.contiguous()


def _strides(tensor: Tensor, axes: int) -> tuple[int, ...]:
    """Strides of the first axes, 0 where there is no element to reach with them."""
    return tensor.stride()[:axes] if tensor.numel() else (0,) * axes


def forward(x: Tensor, coef: Tensor, injected: Tensor) -> Tensor:
    """See `functions.mix`."""
    x, injected, coef = _rows(x), _rows(injected), coef.contiguous()
    y, size = x.new_empty(x.shape), x.shape[1] * x.shape[2]
    if y.numel():
        grid = (len(x) * triton.cdiv(size, BLOCK),)
        with torch.cuda.device_of(x):
            mix_kernel[grid](x, coef, injected, y, size, x.stride(0), *_strides(injected, 2),
                             injected.shape[1], BLOCK)  # fmt: skip
    return y


def backward(grad_y: Tensor, x: Tensor, coef: Tensor, injected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, coef and injected."""
    grad_y, x, injected, coef = _rows(grad_y), _rows(x), _rows(injected), coef.contiguous()
    size = x.shape[1] * x.shape[2]
    blocks = triton.cdiv(size, BLOCK)
    grad_x, grad_injected = x.new_empty(x.shape), injected.new_empty(injected.shape)
    parts = x.new_empty(*coef.shape, blocks, dtype=torch.float32)
    if x.numel():
        with torch.cuda.device_of(x):
            mix_backward_kernel[(len(x) * blocks,)](
                grad_y, x, coef, injected, grad_x, grad_injected, parts, size, grad_y.stride(0), x.stride(0),
                *_strides(injected, 2), injected.shape[1], BLOCK,
            )  # fmt: skip
    return grad_x, parts.sum(-1).to(coef.dtype), grad_injected
