// The experts' activations and their derivatives over short arrays, written so that the compiler vectorises them.
#pragma once

#include <cmath>
#include <cstdint>

#include "moe/tiles.h"

namespace unif2ace {

enum class Pointwise { gelu_tanh, gelu, relu, silu };

// exp within 2 ulp, by e^z = 2^n e^r with |r| <= ln(2) / 2; z is clamped to where the result is a normal number.
UNIF2ACE_INLINE float exponential_of(float z) {
  z = z > 88.0f ? 88.0f : z;  // comparisons that a NaN fails, so it stays
  z = z < -87.0f ? -87.0f : z;
  const float shifter = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, kept in the low bits
  const float shifted = z * 1.44269504088896341f + shifter;
  const float n = shifted - shifter;
  const float r = (z - n * 0.693145751953125f) - n * 1.42860682030941723e-6f;
  float p = 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const uint32_t exponent = static_cast<uint32_t>(float_bits(shifted)) - 0x4B400000u + 127u;
  return p * bits_float(static_cast<int32_t>(exponent << 23));
}
UNIF2ACE_INLINE double exponential_of(double z) { return std::exp(z); }

// Normal distribution function. Float: Abramowitz & Stegun 7.1.26, within 1e-7.
UNIF2ACE_INLINE float normal_cdf(float x) {
  const float z = x * 0.707106781186547524f;
  const float magnitude = z < 0 ? -z : z;
  const float t = 1.0f / (1.0f + 0.3275911f * magnitude);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float half_erfc = 0.5f * p * t * exponential_of(-z * z);
  return z < 0 ? half_erfc : 1.0f - half_erfc;
}
UNIF2ACE_INLINE double normal_cdf(double x) { return 0.5 * std::erfc(-x * 0.70710678118654752440); }

// a[i] = act(h[i]), d[i] = act'(h[i]).
template <class Real>
UNIF2ACE_SIMD_CLONES void pointwise(Pointwise kind, const Real* __restrict h, Real* __restrict a, Real* __restrict d,
                                    int64_t count) {
  switch (kind) {
    case Pointwise::gelu_tanh:  // x (1 + tanh u) / 2 = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
      for (int64_t i = 0; i < count; ++i) {
        const Real x = h[i], k = Real(1.59576912160573071), c = Real(0.044715), square = x * x;
        const Real s = Real(1) / (Real(1) + exponential_of(-k * x * (Real(1) + c * square)));
        a[i] = x * s;
        d[i] = s * (Real(1) + x * (Real(1) - s) * k * (Real(1) + Real(3) * c * square));
      }
      break;
    case Pointwise::gelu:
      for (int64_t i = 0; i < count; ++i) {
        const Real x = h[i], cdf = normal_cdf(x);
        a[i] = x * cdf;
        d[i] = cdf + x * Real(0.398942280401432678) * exponential_of(Real(-0.5) * x * x);
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
        const Real x = h[i], s = Real(1) / (Real(1) + exponential_of(-x));
        a[i] = x * s;
        d[i] = s * (Real(1) + x * (Real(1) - s));
      }
      break;
  }
}

}  // namespace unif2ace
