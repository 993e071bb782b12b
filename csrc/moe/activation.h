// The experts' activations and their derivatives over short arrays, written so that the compiler vectorises them.
#pragma once

#include <cmath>
#include <cstdint>

#include "common/exponential.h"
#include "moe/tiles.h"

namespace unif2ace {

enum class Pointwise { gelu_tanh, gelu, relu, silu };

// value = sigmoid(z) and its slope. Of e^-|z|, so that neither loses its digits where sigmoid(z) is next to 1.
template <class Real>
UNIF2ACE_INLINE void sigmoid(Real z, Real& value, Real& slope) {
  const Real e = exp_nonpositive(z < 0 ? z : -z), r = Real(1) / (Real(1) + e);
  value = z < 0 ? e * r : r;
  slope = e * r * r;
}

// The normal distribution function and its density.
// float: erfc(z) / 2 = e^{-z^2} t P(t), t = 1 / (1 + 0.55 z); P by least maximal error for 0 <= z <= 6, within 1e-8.
UNIF2ACE_INLINE void normal(float x, float& cdf, float& density) {
  const float e = exp_nonpositive(-0.5f * x * x);
  const float t = 1.0f / (1.0f + 0.388908730f * (x < 0 ? -x : x));
  float p = 0.0536623501f;
  p = p * t - 0.259019552f;
  p = p * t + 0.379857834f;
  p = p * t - 0.0207135278f;
  p = p * t + 0.195421206f;
  p = p * t + 0.150791698f;
  const float tail = p * t * e;
  cdf = x < 0 ? tail : 1.0f - tail;
  density = 0.398942280f * e;
}
UNIF2ACE_INLINE void normal(double x, double& cdf, double& density) {
  cdf = 0.5 * std::erfc(-x * 0.70710678118654752440);
  density = 0.398942280401432678 * std::exp(-0.5 * x * x);
}

// a[i] = act(h[i]), d[i] = act'(h[i]).
template <class Real>
UNIF2ACE_SIMD_CLONES void pointwise(Pointwise kind, const Real* __restrict h, Real* __restrict a, Real* __restrict d,
                                    int64_t count) {
  switch (kind) {
    case Pointwise::gelu_tanh:  // x (1 + tanh u) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
      for (int64_t i = 0; i < count; ++i) {
        const Real x = h[i], k = Real(1.59576912160573071), c = Real(0.044715), square = x * x;
        Real s, slope;
        sigmoid(k * x * (Real(1) + c * square), s, slope);
        a[i] = x * s;
        d[i] = s + x * slope * k * (Real(1) + Real(3) * c * square);
      }
      break;
    case Pointwise::gelu:
      for (int64_t i = 0; i < count; ++i) {
        const Real x = h[i];
        Real cdf, density;
        normal(x, cdf, density);
        a[i] = x * cdf;
        d[i] = cdf + x * density;
      }
      break;
    case Pointwise::relu:
      for (int64_t i = 0; i < count; ++i) {
        const Real x = h[i];
        a[i] = x < 0 ? Real(0) : x;  // a NaN stays
        d[i] = x > 0 ? Real(1) : Real(0);
      }
      break;
    case Pointwise::silu:
      for (int64_t i = 0; i < count; ++i) {
        const Real x = h[i];
        Real s, slope;
        sigmoid(x, s, slope);
        a[i] = x * s;
        d[i] = s + x * slope;
      }
      break;
  }
}

}  // namespace unif2ace
