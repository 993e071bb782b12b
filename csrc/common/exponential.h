// The exponential of softmaxes and sigmoids, which never needs more than e**0, written so that loops of it vectorise.
#pragma once

#include <cmath>

#include "common/exact.cuh"

namespace unif2ace {

// e**x for x <= 0, to about an ulp; 0 below the smallest normal number, a NaN stays one.
UNIF2ACE_HOST_DEVICE float exp_nonpositive(float x) {
  const float lowest = -87.33654f;
  const float clamped = x < lowest ? lowest : x;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2**23: rounds to an integer in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0x1.62E4p-1f) - n * 0x1.7F7D1Cp-20f;
  float p = 1.0f / 5040;  // the series: |r| <= ln(2) / 2, so its next term is below 6e-9
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = (p * r) * r + r;
  const uint32_t exponent = static_cast<uint32_t>(float_bits(shifted)) - 0x4B400000u + 127u;  // less the shifter's bits
  const float power = bits_float(static_cast<int32_t>(exponent << 23));
  // Not p * power + power, the same number: p * power is denormal where x is least, which is slow on some processors.
  return x < lowest ? 0.0f : (p + 1.0f) * power;
}

UNIF2ACE_HOST_DEVICE double exp_nonpositive(double x) { return std::exp(x); }

}  // namespace unif2ace
