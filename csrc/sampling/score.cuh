// What the draw and the re-mask rank by, for host and device: the same bits in C++, CUDA C++, torch and Triton.
#pragma once

#include <cstdint>
#include <limits>

#include "common/gumbel.cuh"
#include "common/philox.cuh"

namespace unif2ace {

template <class T>
constexpr T kInfinity = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kLargest = std::numeric_limits<T>::max();

enum class Confidence { kLogProb, kNegEntropy, kMargin };

// (1 + w) cond - w uncond in float32, up = 1 + w, down = w; -inf in either branch is -inf.
UNIF2ACE_HOST_DEVICE float guided_logit(float cond, float uncond, float up, float down) {
  const float none = -kInfinity<float>;
  const float mixed = subtract(multiply(up, cond), multiply(down, uncond));
  return (cond == none) | (uncond == none) ? none : mixed;
}

// What a masked position is ranked by: NaN lowest, +inf below a known position, which ranks at infinity.
template <class T>
UNIF2ACE_HOST_DEVICE T remask_rank(T confidence, bool is_unknown, float temperature, int64_t seed, int64_t offset,
                                   uint32_t row) {
  const T largest = kLargest<T>, infinity = kInfinity<T>;
  const T value = confidence != confidence ? -infinity : confidence < largest ? confidence : largest;
  const uint32_t word = words_of_group(seed, offset, row, 0, kRemaskStream).w[0];
  const T noisy = value + static_cast<T>(multiply(temperature, gumbel(word)));
  return is_unknown ? (noisy < largest ? noisy : largest) : infinity;
}

// Unsigned keys that order as float32 values do, the two zeros alike.
UNIF2ACE_HOST_DEVICE uint32_t ascending_key(float value) {
  const uint32_t bits = value == 0 ? 0u : static_cast<uint32_t>(float_bits(value));
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

}  // namespace unif2ace
