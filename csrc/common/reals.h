// Storage types and the types that compute with them: float for float, bfloat16 and half, double for double.
#pragma once

#include <cstdint>
#include <type_traits>

#include <torch/headeronly/util/Half.h>

#include "common/exact.cuh"

namespace unif2ace {

struct BFloat16Bits {
  uint16_t bits;
};
using HalfBits = torch::headeronly::Half;

template <class T>
using ComputeOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

UNIF2ACE_HOST_DEVICE double to_compute(double x) { return x; }
UNIF2ACE_HOST_DEVICE float to_compute(float x) { return x; }
UNIF2ACE_HOST_DEVICE float to_compute(BFloat16Bits x) {
  return bits_float(static_cast<int32_t>(uint32_t{x.bits} << 16));
}
UNIF2ACE_HOST_DEVICE float to_compute(HalfBits x) { return static_cast<float>(x); }

UNIF2ACE_HOST_DEVICE void from_compute(double x, double& to) { to = x; }
UNIF2ACE_HOST_DEVICE void from_compute(float x, float& to) { to = x; }
UNIF2ACE_HOST_DEVICE void from_compute(float x, HalfBits& to) { to = static_cast<HalfBits>(x); }
UNIF2ACE_HOST_DEVICE void from_compute(float x, BFloat16Bits& to) {  // to nearest, ties to even; a NaN stays one
  const uint32_t bits = static_cast<uint32_t>(float_bits(x));
  const uint32_t nearest_even = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : nearest_even);
}

}  // namespace unif2ace
