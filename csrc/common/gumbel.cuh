// Uniform, exponential and Gumbel numbers from 32-bit words, bit for bit those of _philox.py, host and device.
#pragma once

#include "common/exact.cuh"

namespace unif2ace {

// (word + 1/2) / 2**32 in [2**-33, 1 - 2**-24].
UNIF2ACE_HOST_DEVICE float uniform(uint32_t word) {
  const float u = multiply(add(static_cast<float>(word), 0.5f), 0x1p-32f);
  return u < 1.0f ? u : 1.0f - 0x1p-24f;
}

// -(exponent * ln 2 + log1p(fraction)); the coefficients are explained in _philox.py.
UNIF2ACE_HOST_DEVICE float minus_log_of(int32_t exponent, float fraction) {
  float polynomial = -0x1.38B544p-4f;
  polynomial = add(multiply(polynomial, fraction), 0x1.055B5Ep-3f);
  polynomial = add(multiply(polynomial, fraction), -0x1.0D8548p-3f);
  polynomial = add(multiply(polynomial, fraction), 0x1.22DA1Ep-3f);
  polynomial = add(multiply(polynomial, fraction), -0x1.547244p-3f);
  polynomial = add(multiply(polynomial, fraction), 0x1.99A008p-3f);
  polynomial = add(multiply(polynomial, fraction), -0x1.000226p-2f);
  polynomial = add(multiply(polynomial, fraction), 0x1.555554p-2f);
  const float square = multiply(fraction, fraction);
  const float log1p = add(fraction, multiply(square, subtract(multiply(fraction, polynomial), 0.5f)));
  const float minus_exponent = static_cast<float>(-exponent);
  return subtract(multiply(minus_exponent, 0x1.62E4p-1f), subtract(log1p, multiply(minus_exponent, 0x1.7F7D1Cp-20f)));
}

struct SplitFloat {
  int32_t exponent;
  float fraction;  // x = 2**exponent * (1 + fraction), 1 + fraction in [sqrt(1/2), sqrt(2))
};

UNIF2ACE_HOST_DEVICE SplitFloat split_float(float x) {
  const int32_t shifted = float_bits(x) + (0x3F800000 - 0x3F3504F3);
  return {(shifted >> 23) - 127, subtract(bits_float((shifted & 0x7FFFFF) + 0x3F3504F3), 1.0f)};
}

// -log1p(-u), u = (word + 1/2) / 2**32.
UNIF2ACE_HOST_DEVICE float exponential(uint32_t word) {
  const bool is_small = word < 0x4AFB0CCCu;
  const float u = multiply(add(static_cast<float>(is_small ? word : ~word), 0.5f), 0x1p-32f);
  const SplitFloat split = split_float(u);
  return minus_log_of(is_small ? 0 : split.exponent, is_small ? subtract(0.0f, u) : split.fraction);
}

// -log(-log1p(-u)): finite for every word, from -3.13 to 22.87.
UNIF2ACE_HOST_DEVICE float gumbel(uint32_t word) {
  const SplitFloat split = split_float(exponential(word));
  return minus_log_of(split.exponent, split.fraction);
}

}  // namespace unif2ace
