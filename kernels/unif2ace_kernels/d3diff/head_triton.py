"""Triton implementation of the fused head: loss and gradients of the labelled rows, on the device alone.

    list the labelled rows of each group (their number stays on the device)
    for each group and each chunk of R rows it may have:
        x  = hidden[rows]                              gathered
        z  = x w^T + bias                              product 1
        statistics of z; g = dl/dz in place of z       one pass over a chunk
        d hidden[rows] = g w                           product 2
        d weight      += g^T x                         product 3

Three products, where making logits again in place of keeping a chunk of them would take four: at D = 2048 a product
does 4,096 operations for each logit of 2 bytes, so that writing and reading it costs little beside making it again.
The chunks are launched for as many rows as there might be, and end at once where there are none.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from .._triton import float32_precision
from . import configs
from .head import HeadLoss, HeadOutputs
from .objective import Coefficients
from .products_triton import LINE, hidden_gradient_kernel, logits_kernel, weight_gradient_kernel
from .rows_torch import code_columns
from .rows_triton import (
    bias_gradient_kernel,
    clear_kernel,
    count_kernel,
    gather_kernel,
    list_kernel,
    row_terms_kernel,
)


def head_triton(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *arguments: Any) -> HeadOutputs:
    """Triton implementation of `unif2ace::d3diff_head`."""
    asked = HeadLoss(*arguments)
    total, spans = hidden.shape[0], list(zip(asked.starts, asked.ends, strict=True))
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    weights = asked.weights.map(torch.Tensor.contiguous)
    sizes = [configs.chunk_rows(total, end - start, asked.compute_dtype) for start, end in spans]
    with torch.cuda.device_of(hidden):
        rows = _Rows.of(asked.targets, asked.group, len(spans), asked.ignore_index)
        terms = rows.fill()
        several = sum(triton.cdiv(total, size) for size in sizes) != 1
        gradients = _Gradients.empty(hidden, weight, asked.columns, several, *asked.gradients)
        if gradients.hidden is not None:
            rows.clear_others(gradients.hidden)
        for index, ((start, end), size) in enumerate(zip(spans, sizes, strict=True)):
            chunk = _Chunk.empty(size, weight[start:end].to(asked.compute_dtype))
            part = gradients.columns(start - asked.first, end - asked.first)
            b = None if bias is None else bias[start:end].contiguous()
            local_codes = code_columns(asked.codes, start, asked.mass_weight)
            for at in range(0, total, size):
                source = _Source(rows.listed[index], rows.counts[index:], at, size)
                chunk.make_logits(source, hidden, b, rows.targets, start)
                chunk.make_terms(source, local_codes, weights, terms, gradients.any)
                chunk.add_gradients(source, part)
        loss = terms.loss.sum(dtype=torch.float64).to(torch.float32)
        d_hidden, d_weight = (hidden.new_empty(0) if each is None else each for each in gradients[:2])
        d_bias = loss.new_empty(0) if gradients.bias is None else gradients.bias
        return HeadOutputs(
            loss, *terms[1:], d_hidden, d_weight.to(weight.dtype), d_bias if bias is None else d_bias.to(bias.dtype)
        )


class _Terms(NamedTuple):
    """Of every row, float32 [T], hit bool [T]: 0 where there is no label."""

    loss: torch.Tensor
    ce: torch.Tensor
    lse: torch.Tensor
    mass: torch.Tensor
    hit: torch.Tensor


class _Rows(NamedTuple):
    """Rows and their groups; listed int32 [groups, T] are the labelled ones, counts int32 [groups] says how many."""

    targets: torch.Tensor
    group: torch.Tensor | None
    ignore_index: int
    listed: torch.Tensor
    counts: torch.Tensor

    @classmethod
    def of(cls, targets: torch.Tensor, group: torch.Tensor | None, groups: int, ignore_index: int) -> _Rows:
        listed = torch.empty((groups, targets.numel()), dtype=torch.int32, device=targets.device)
        counts = torch.empty(groups, dtype=torch.int32, device=targets.device)
        return cls(targets.contiguous(), None if group is None else group.contiguous(), ignore_index, listed, counts)

    def _asked(self) -> dict[str, object]:
        return {"GROUPS": self.counts.numel(), "HAS_GROUP": self.group is not None}

    def fill(self) -> _Terms:
        """Fill listed and counts; return terms that are 0 in the other rows."""
        total, device = self.targets.numel(), self.targets.device
        loss, ce, lse, mass = (torch.empty(total, dtype=torch.float32, device=device) for _ in range(4))
        terms = _Terms(loss, ce, lse, mass, torch.empty(total, dtype=torch.bool, device=device))
        blocks = triton.cdiv(total, configs.COMPACT_BLOCK)
        if blocks:
            options = {**self._asked(), "BLOCK": configs.COMPACT_BLOCK}
            in_block = torch.empty((self.counts.numel(), blocks), dtype=torch.int32, device=device)
            count_kernel[(blocks,)](self.targets, self.group, in_block, total, blocks, self.ignore_index, **options)
            list_kernel[(blocks,)](
                self.targets, self.group, in_block, self.listed, self.counts, *terms[:4], terms.hit.view(torch.uint8),
                total, blocks, self.ignore_index, **options,
            )  # fmt: skip
        return terms

    def clear_others(self, out: torch.Tensor) -> None:
        """out [T, D] = 0 in the rows that are not listed."""
        total, features = out.shape
        if out.numel():
            clear_kernel[(total,)](
                self.targets, self.group, out, total, features, self.ignore_index, **self._asked(),
                BLOCK=configs.COPY_BLOCK,
            )  # fmt: skip


class _Source(NamedTuple):
    """Where a chunk's rows are listed: the next `size` from `at` of a group's rows [T]; number [1] of them are real."""

    rows: torch.Tensor
    number: torch.Tensor
    at: int
    size: int

    @property
    def arguments(self) -> tuple[torch.Tensor, int, int]:
        """count, first_row and rows of a kernel."""
        return self.number, self.at, self.size


class _Gradients(NamedTuple):
    """Of hidden [T, D], of weight and bias in the columns of any group, [C, D] and [C]; None where not asked for.

    carry [C, D] is what rounding to 16 bits left of a weight's gradient that is summed over chunks, else None.
    """

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    carry: torch.Tensor | None
    bias: torch.Tensor | None
    several: bool

    @classmethod
    def empty(
        cls, hidden: torch.Tensor, weight: torch.Tensor, columns: int, several: bool,
        grad_hidden: bool, grad_weight: bool, grad_bias: bool,
    ) -> _Gradients:  # fmt: skip
        size = (columns, hidden.shape[1])
        create = torch.zeros if several else torch.empty
        kept = create(size, dtype=weight.dtype, device=weight.device) if grad_weight else None
        carries = several and weight.dtype != torch.float32
        return cls(
            torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device) if grad_hidden else None,
            kept,
            torch.zeros_like(kept) if carries and kept is not None else None,
            torch.zeros(columns, dtype=torch.float32, device=weight.device) if grad_bias else None,
            several,
        )

    @property
    def any(self) -> bool:
        return any(each is not None for each in (self.hidden, self.weight, self.bias))

    def columns(self, start: int, end: int) -> _Gradients:
        """Those of a group's columns."""
        weight, carry, bias = (None if each is None else each[start:end] for each in self[1:4])
        return _Gradients(self.hidden, weight, carry, bias, self.several)


class _Chunk(NamedTuple):
    """Memory of R rows of a group at a time; w [C, D] the group's columns of the head.

    x [R, D]; z [R, C], and g in its place; top [R, tiles]; target int32 [R], at_target [R]: see `logits_kernel`.
    """

    x: torch.Tensor
    z: torch.Tensor
    top: torch.Tensor
    target: torch.Tensor
    at_target: torch.Tensor
    w: torch.Tensor
    tile: configs.Product
    processors: int

    @classmethod
    def empty(cls, rows: int, w: torch.Tensor) -> _Chunk:
        w = w if w.stride(1) == 1 else w.contiguous()
        columns, features = w.shape
        arch, processors = configs.machine(w.device)
        starts = (w.data_ptr(), w.stride(0) * w.itemsize, features * w.itemsize)
        aligned = all(each % 16 == 0 for each in starts)
        tile = configs.product(arch, w.dtype, float32_precision() == "tf32", aligned)
        pitch = triton.cdiv(columns, LINE.value) * LINE.value
        z = torch.empty((rows, pitch), dtype=w.dtype, device=w.device)[:, :columns]
        x = torch.empty((rows, features), dtype=w.dtype, device=w.device)
        target = torch.empty(rows, dtype=torch.int32, device=w.device)
        top, at_target = (
            torch.empty(size, dtype=torch.float32, device=w.device)
            for size in ((rows, triton.cdiv(columns, tile.block_n)), (rows,))
        )
        return cls(x, z, top, target, at_target, w, tile, processors)

    def _operand(self, tensor: torch.Tensor, *block: int) -> torch.Tensor | TensorDescriptor:
        return TensorDescriptor.from_tensor(tensor, list(block)) if self.tile.descriptors else tensor

    def _grid(self, rows: int, columns: int) -> tuple[int]:
        tiles = triton.cdiv(rows, self.tile.block_m) * triton.cdiv(columns, self.tile.block_n)
        return (min(tiles, self.processors) if self.tile.persistent else tiles,)

    def make_logits(
        self, source: _Source, hidden: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor, start: int
    ) -> None:
        """Product 1 of the chunk's rows, gathered."""
        x, z, w, tile = self.x, self.z, self.w, self.tile
        (columns, features), here = w.shape, source.arguments
        gather_kernel[(x.shape[0],)](
            hidden, targets, source.rows, x, self.target, *here, columns, features, start, hidden.stride(0),
            x.stride(0), BLOCK=configs.COPY_BLOCK,
        )  # fmt: skip
        logits_kernel[self._grid(x.shape[0], columns)](
            self._operand(x, tile.block_m, tile.block_k), self._operand(w, tile.block_n, tile.block_k), bias,
            self.target, z, self.top, self.at_target, *here, columns, features, x.stride(0), w.stride(0), z.stride(0),
            self.top.stride(0),
            MASK_K=features % tile.block_k != 0, HAS_BIAS=bias is not None, **tile.constexprs, **tile.options,
        )  # fmt: skip

    def make_terms(
        self, source: _Source, codes: tuple[int, int], weights: Coefficients, terms: _Terms, gradient: bool
    ) -> None:
        """Terms of the chunk's rows, and with `gradient` g in place of their logits."""
        columns, segment = self.z.shape[1], self.tile.block_n
        held = min(triton.next_power_of_2(self.top.shape[1]), configs.ROW_BLOCK // segment)
        row_terms_kernel[(self.x.shape[0],)](
            self.z, self.top, self.target, self.at_target, source.rows, *weights, *terms[:4],
            terms.hit.view(torch.uint8), *source.arguments, columns, *codes, self.z.stride(0), self.top.stride(0),
            SEGMENTS=held, SEGMENT=segment, TOPS=triton.next_power_of_2(self.top.shape[1]),
            HAS_PENALTY=weights.penalty is not None, HAS_SHIFT=weights.shift is not None,
            HAS_MASS=weights.mass is not None, GRADIENT=gradient, AT_ONCE=columns <= held * segment,
            num_warps=configs.ROW_WARPS,
        )  # fmt: skip

    def add_gradients(self, source: _Source, into: _Gradients) -> None:
        """Products 2 and 3, and the sums for the bias, of those that are asked for."""
        g, x, w, tile = self.z, self.x, self.w, self.tile
        (columns, features), here = w.shape, source.arguments
        if into.hidden is not None:
            hidden_gradient_kernel[self._grid(x.shape[0], features)](
                self._operand(g, tile.block_m, tile.block_k), self._operand(w, tile.block_k, tile.block_n),
                source.rows, into.hidden, *here, columns, features, g.stride(0), w.stride(0),
                MASK_K=columns % tile.block_k != 0, MASK_N=features % tile.block_n != 0,
                **tile.constexprs, **tile.options,
            )  # fmt: skip
        if into.weight is not None:
            weight_gradient_kernel[self._grid(columns, features)](
                self._operand(g, tile.block_k, tile.block_m), self._operand(x, tile.block_k, tile.block_n),
                into.weight, into.carry, *here, columns, features, g.stride(0), x.stride(0),
                MASK_M=columns % tile.block_m != 0, MASK_N=features % tile.block_n != 0,
                ACCUMULATE=into.several, CARRY=into.carry is not None, **tile.constexprs, **tile.options,
            )  # fmt: skip
        if into.bias is not None:
            bias_gradient_kernel[(triton.cdiv(columns, configs.SUM_COLUMNS),)](
                g, into.bias, *here, columns, g.stride(0), BLOCK_R=configs.SUM_ROWS, BLOCK_C=configs.SUM_COLUMNS
            )
