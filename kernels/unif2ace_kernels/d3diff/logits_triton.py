"""Triton implementation of the loss of ready logits, forward and backward, and of the head's backward.

The forward reads a row's columns once and keeps a running maximum; the backward reads them once more and writes the
gradient of the whole row, so that nothing is cleared beforehand. Rows without a label are not read.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from . import configs
from .rows_torch import code_columns
from .rows_triton import row_loss, slopes, weights_at


@triton.jit
def logits_kernel(
    p_z, p_targets, p_ce_weight, p_penalty_weight, p_shift, p_mass_weight, p_loss, p_ce, p_lse, p_mass, p_hit,
    columns, start, code_start, code_end, ignore_index, z_stride, HAS_PENALTY: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Terms of a row of logits [T, V], over `columns` of them from `start`; grid (T,). Codes count from `start`."""
    i_row = tl.program_id(0).to(tl.int64)
    token = tl.load(p_targets + i_row)
    if token == ignore_index:
        tl.store(p_loss + i_row, 0.0)
        tl.store(p_ce + i_row, 0.0)
        tl.store(p_lse + i_row, 0.0)
        tl.store(p_mass + i_row, 0.0)
        tl.store(p_hit + i_row, 0)
    else:
        p_z += i_row * z_stride + start
        target = token - start
        m_target = (target >= 0) & (target < columns)  # a target outside its range makes NaN, not a wild read
        at_target = tl.load(p_z + target, mask=m_target, other=float("nan")).to(tl.float32)
        a, b, shift, c = weights_at(
            i_row, p_ce_weight, p_penalty_weight, p_shift, p_mass_weight, HAS_PENALTY, HAS_SHIFT, HAS_MASS
        )
        top, total, in_codes = float("-inf"), 0.0, 0.0
        for i_column in range(0, columns, BLOCK):
            o_column = i_column + tl.arange(0, BLOCK)
            # [BLOCK]
            b_z = tl.load(p_z + o_column, mask=o_column < columns, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(b_z, 0))
            origin = tl.where(higher == float("-inf"), 0.0, higher)  # -inf - -inf is no number
            scale = tl.exp(top - origin)
            b_e = tl.exp(b_z - origin)
            total = total * scale + tl.sum(b_e, 0)
            if HAS_MASS:
                m_code = (o_column >= code_start) & (o_column < code_end)
                in_codes = in_codes * scale + tl.sum(tl.where(m_code, b_e, 0.0), 0)
            top = higher
        log_sum = tl.log(total)
        mass = in_codes / total
        ce, lse = (top - at_target) + log_sum, top + log_sum
        tl.store(p_loss + i_row, row_loss(ce, lse, mass, a, b, shift, c, HAS_PENALTY, HAS_MASS))
        tl.store(p_ce + i_row, ce)
        tl.store(p_lse + i_row, lse)
        tl.store(p_mass + i_row, mass)
        tl.store(p_hit + i_row, (at_target >= top).to(p_hit.dtype.element_ty))


@triton.jit
def logits_backward_kernel(
    p_grad_loss, p_z, p_targets, p_ce_weight, p_penalty_weight, p_shift, p_mass_weight, p_lse, p_mass, p_out,
    width, start, end, code_start, code_end, ignore_index, z_stride, HAS_PENALTY: tl.constexpr,
    HAS_SHIFT: tl.constexpr, HAS_MASS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [T, V] = grad_loss * dl/dz, 0 without a label and outside [start, end); grid (T, cdiv(V, BLOCK))."""
    i_row = tl.program_id(0).to(tl.int64)
    o_column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(p_targets + i_row)
    # [BLOCK]
    b_g = tl.zeros((BLOCK,), tl.float32)
    if token != ignore_index:
        a, b, shift, c = weights_at(
            i_row, p_ce_weight, p_penalty_weight, p_shift, p_mass_weight, HAS_PENALTY, HAS_SHIFT, HAS_MASS
        )
        lse = tl.load(p_lse + i_row)
        inside, outside = slopes(lse, tl.load(p_mass + i_row), a, b, shift, c, HAS_PENALTY, HAS_MASS)
        m_softmax = (o_column >= start) & (o_column < end)
        b_z = tl.load(p_z + i_row * z_stride + o_column, mask=m_softmax, other=float("-inf")).to(tl.float32)
        b_slope = tl.where((o_column >= code_start) & (o_column < code_end), inside, outside)
        b_g = tl.exp(b_z - lse) * b_slope - tl.where(o_column == token, a, 0.0)
        b_g = tl.where(a == 0, 0.0, b_g)  # a row of weight 0 is 0, also where e^z is not finite
        b_g = tl.where(m_softmax, b_g * tl.load(p_grad_loss).to(tl.float32), 0.0)
    tl.store(p_out + i_row * width + o_column, b_g.to(p_out.dtype.element_ty), mask=o_column < width)


@triton.jit
def place_kernel(p_grad_loss, p_gradient, p_out, size, begin, end, BLOCK: tl.constexpr):
    """out [size] = grad_loss * gradient in [begin, end), where gradient begins at `begin`, 0 elsewhere."""
    o_out = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_in = (o_out >= begin) & (o_out < end)
    # [BLOCK]
    b_gradient = tl.load(p_gradient + (o_out - begin), mask=m_in, other=0.0).to(tl.float32)
    b_out = tl.where(m_in, b_gradient * tl.load(p_grad_loss).to(tl.float32), 0.0)
    tl.store(p_out + o_out, b_out.to(p_out.dtype.element_ty), mask=o_out < size)


def logits_triton(
    logits: torch.Tensor,
    targets: torch.Tensor,
    ce_weight: torch.Tensor,
    penalty_weight: torch.Tensor | None,
    shift: torch.Tensor | None,
    mass_weight: torch.Tensor | None,
    start: int,
    end: int,
    codes: Sequence[int],
    ignore_index: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triton implementation of `unif2ace::d3diff_logits`: loss, and ce, lse, mass, hit of each row of logits [T, V]."""
    rows, columns = logits.shape[0], end - start
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    loss, ce, lse, mass = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(4))
    hit = torch.empty(rows, dtype=torch.bool, device=logits.device)
    if rows:
        with torch.cuda.device_of(logits):
            logits_kernel[(rows,)](
                logits, targets.contiguous(), *_contiguous(ce_weight, penalty_weight, shift, mass_weight),
                loss, ce, lse, mass, hit.view(torch.uint8), columns, start, *code_columns(codes, start, mass_weight),
                ignore_index, logits.stride(0), HAS_PENALTY=penalty_weight is not None, HAS_SHIFT=shift is not None,
                HAS_MASS=mass_weight is not None, BLOCK=configs.row_block(columns), num_warps=configs.ROW_WARPS,
            )  # fmt: skip
    return loss.sum(dtype=torch.float64).to(torch.float32), ce, lse, mass, hit


def logits_backward_triton(
    grad_loss: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    ce_weight: torch.Tensor,
    penalty_weight: torch.Tensor | None,
    shift: torch.Tensor | None,
    mass_weight: torch.Tensor | None,
    lse: torch.Tensor,
    mass: torch.Tensor,
    start: int,
    end: int,
    codes: Sequence[int],
    ignore_index: int,
) -> torch.Tensor:
    """Triton implementation of `unif2ace::d3diff_logits_backward`: the gradient of the logits [T, V]."""
    rows, width = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    out = torch.empty((rows, width), dtype=logits.dtype, device=logits.device)
    if rows:
        block = configs.row_block(width)
        with torch.cuda.device_of(logits):
            logits_backward_kernel[(rows, triton.cdiv(width, block))](
                grad_loss, logits, targets.contiguous(), *_contiguous(ce_weight, penalty_weight, shift, mass_weight),
                lse, mass, out, width, start, end, *code_columns(codes, 0, mass_weight), ignore_index,
                logits.stride(0), HAS_PENALTY=penalty_weight is not None, HAS_SHIFT=shift is not None,
                HAS_MASS=mass_weight is not None, BLOCK=block, num_warps=configs.ROW_WARPS,
            )  # fmt: skip
    return out


def head_backward_triton(
    grad_loss: torch.Tensor,
    grad_hidden: torch.Tensor,
    grad_weight: torch.Tensor,
    grad_bias: torch.Tensor,
    vocabulary: int,
    first: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Triton implementation of `unif2ace::d3diff_head_backward`; each element is written once, the zeros too."""

    def placed(gradient: torch.Tensor, rows: int, at: int) -> torch.Tensor:
        if gradient.numel() == 0:
            return torch.empty(gradient.shape, dtype=gradient.dtype, device=gradient.device)
        out = torch.empty((rows, *gradient.shape[1:]), dtype=gradient.dtype, device=gradient.device)
        begin = at * out[0].numel()
        place_kernel[(triton.cdiv(out.numel(), configs.PLACE_BLOCK),)](
            grad_loss, gradient.contiguous(), out, out.numel(), begin, begin + gradient.numel(),
            BLOCK=configs.PLACE_BLOCK, num_warps=configs.ROW_WARPS,
        )  # fmt: skip
        return out

    with torch.cuda.device_of(grad_hidden):
        d_hidden = placed(grad_hidden, grad_hidden.shape[0], 0)
        return d_hidden, placed(grad_weight, vocabulary, first), placed(grad_bias, vocabulary, first)


def _contiguous(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [None if each is None else each.contiguous() for each in tensors]
