"""The experts' activations and their derivatives inside Triton kernels, in float32."""

from __future__ import annotations

import triton
import triton.language as tl

_SQRT_8_OVER_PI = tl.constexpr(1.5957691216057308)
_SQRT_HALF = tl.constexpr(0.7071067811865476)
_INVERSE_SQRT_2_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _sigmoid(z):
    """sigmoid(z) and its derivative; the latter from exp(-|z|), so that it keeps its digits where sigmoid(z) is 1."""
    small = tl.exp(-tl.abs(z))
    inverse = 1.0 / (1.0 + small)
    return tl.where(z >= 0, inverse, small * inverse), small * inverse * inverse


@triton.jit
def _pointwise(h, ACTIVATION: tl.constexpr):
    """act(h) and act'(h), NaN where h is.

    gelu_tanh(h) = h (1 + tanh(u)) / 2 = h sigmoid(2 u), u = sqrt(2 / pi) (h + 0.044715 h^3).
    """
    if ACTIVATION == "relu":
        a = tl.where(h < 0, 0.0, h)
        slope = tl.where(h <= 0, 0.0, 1.0)
    elif ACTIVATION == "silu":
        s, ds = _sigmoid(h)
        a = h * s
        slope = s + h * ds
    elif ACTIVATION == "gelu":
        cdf = 0.5 + 0.5 * tl.math.erf(h * _SQRT_HALF)
        a = h * cdf
        slope = cdf + h * tl.exp(-0.5 * h * h) * _INVERSE_SQRT_2_PI
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        square = h * h
        s, ds = _sigmoid(h * (1 + 0.044715 * square) * _SQRT_8_OVER_PI)
        a = h * s
        slope = s + h * ds * (1 + 0.134145 * square) * _SQRT_8_OVER_PI
    return a, slope


@triton.jit
def activate(h, value, ACTIVATION: tl.constexpr):
    """act(h), or act(gate) * value where h is the gate; `value` is not read otherwise."""
    if ACTIVATION == "swiglu":
        return _pointwise(h, "silu")[0] * value
    elif ACTIVATION == "geglu":
        return _pointwise(h, "gelu_tanh")[0] * value
    else:
        return _pointwise(h, ACTIVATION)[0]


@triton.jit
def activate_with_slopes(h, value, ACTIVATION: tl.constexpr):
    """The activation, its derivative by h (the gate) and its derivative by the value (0 where there is none)."""
    if ACTIVATION == "swiglu" or ACTIVATION == "geglu":
        a, slope = _pointwise(h, "silu" if ACTIVATION == "swiglu" else "gelu_tanh")
        return a * value, slope * value, a
    else:
        a, slope = _pointwise(h, ACTIVATION)
        return a, slope, tl.zeros_like(a)
