"""The guarded Triton import, and the device helpers that the rooms' Triton kernels share.

A kernel that calls `gumbel` (or `uniform`) is launched with ``enable_fp_fusion=False``: a fused multiply-add would
round otherwise than torch, C++ and CUDA C++ do, and one seed would no longer mean one image. Triton launches on the
current device, whatever its arguments are on: a launch goes inside ``torch.cuda.device_of(out)``.
"""

from __future__ import annotations

import importlib

import torch

from . import _philox
from ._library import KERNEL_DTYPES, Implementation

try:
    import triton
    import triton.language as tl
except ImportError as error:
    TRITON_MISSING: str | None = f"Triton cannot be imported: {error}"
else:
    TRITON_MISSING = None


def triton_implementation(
    module: str, function: str, dtypes: tuple[torch.dtype, ...] | None = KERNEL_DTYPES
) -> Implementation:
    """The implementation "triton" for CUDA that is `function` of `module`, which is imported if Triton is there.

    dtypes: the floating dtypes that it takes, None for all; see `Implementation`.
    """
    if TRITON_MISSING is not None:
        return Implementation("triton", ("cuda",), None, TRITON_MISSING, dtypes)
    return Implementation("triton", ("cuda",), getattr(importlib.import_module(module), function), None, dtypes)


def float32_precision() -> str:
    """Triton's input_precision of float32 products: exact unless torch's own may round to TF32."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


if TRITON_MISSING is None:
    LN2_HIGH = tl.constexpr(_philox.LN2_HIGH)
    LN2_LOW = tl.constexpr(_philox.LN2_LOW)
    C0, C1, C2, C3, C4, C5, C6, C7 = (tl.constexpr(c) for c in _philox.LOG1P_COEFFICIENTS)
    SQRT_HALF_BITS = tl.constexpr(_philox.SQRT_HALF_BITS)
    ONE_BITS = tl.constexpr(_philox.ONE_BITS)
    LOG1P_BELOW = tl.constexpr(_philox.LOG1P_BELOW)

    @triton.jit
    def philox(k0, k1, c0, c1, c2, c3):
        """Four uint32 tensors, Philox4x32-10 of uint32 tensors."""
        for _ in tl.static_range(10):
            high0, low0 = tl.umulhi(c0, 0xD2511F53), c0 * 0xD2511F53
            high1, low1 = tl.umulhi(c2, 0xCD9E8D57), c2 * 0xCD9E8D57
            c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
            k0 += 0x9E3779B9
            k1 += 0xBB67AE85
        return c0, c1, c2, c3

    @triton.jit
    def words_of_groups(seed, offset, row, group, stream):
        """The words of columns 4 * group .. 4 * group + 3 of a row, as four tensors.

        seed, offset: int64 scalars; row, group: int tensors that broadcast; stream: int.
        """
        c0, c1 = tl.broadcast(group.to(tl.uint32), row.to(tl.uint32))
        zero = c0 * 0
        c2, c3 = zero + offset.to(tl.uint32), zero + stream
        return philox(zero + seed.to(tl.uint32), zero + (seed >> 32).to(tl.uint32), c0, c1, c2, c3.to(tl.uint32))

    @triton.jit
    def interleave(x0, x1, x2, x3):
        """[..., G] four times -> [..., 4 G], element 4 * g + lane from x<lane>[g]: groups back to columns."""
        return tl.interleave(tl.interleave(x0, x2), tl.interleave(x1, x3))

    @triton.jit
    def uniform(word):
        """float32 of uint32 words, `_philox.uniform32` bit for bit."""
        return tl.minimum((word.to(tl.float32) + 0.5) * 2.0**-32, 1.0 - 2.0**-24)

    @triton.jit
    def minus_log_of(exponent, fraction):
        polynomial = C7 * fraction + C6
        polynomial = polynomial * fraction + C5
        polynomial = polynomial * fraction + C4
        polynomial = polynomial * fraction + C3
        polynomial = polynomial * fraction + C2
        polynomial = polynomial * fraction + C1
        polynomial = polynomial * fraction + C0
        log1p = fraction + (fraction * fraction) * (fraction * polynomial - 0.5)
        minus_exponent = (0 - exponent).to(tl.float32)
        return minus_exponent * LN2_HIGH - (log1p - minus_exponent * LN2_LOW)

    @triton.jit
    def split_float(x):
        """(exponent, fraction) with x = 2**exponent * (1 + fraction), 1 + fraction in [sqrt(1/2), sqrt(2))."""
        shifted = x.to(tl.int32, bitcast=True) + (ONE_BITS - SQRT_HALF_BITS)
        mantissa = (shifted & 0x7FFFFF) + SQRT_HALF_BITS
        return (shifted >> 23) - 127, mantissa.to(tl.float32, bitcast=True) - 1.0

    @triton.jit
    def exponential(word):
        """float32 of uint32 words, `_philox.exponential` bit for bit."""
        is_small = word < LOG1P_BELOW
        u = (tl.where(is_small, word, word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.0**-32
        exponent, fraction = split_float(u)
        return minus_log_of(tl.where(is_small, 0, exponent), tl.where(is_small, 0.0 - u, fraction))

    @triton.jit
    def gumbel(word):
        """float32 of uint32 words, `_philox.gumbel` bit for bit."""
        exponent, fraction = split_float(exponential(word))
        return minus_log_of(exponent, fraction)
