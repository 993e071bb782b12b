// Tiles: short arrays of any dtype, brought to the type that computes (float; double for double), worked on and stored.
#pragma once

#include <cstdint>
#include <type_traits>

#include <torch/headeronly/util/Half.h>

#include "common/exact.cuh"
#include "common/simd.h"
#include "common/torch_stable.h"

namespace unif2ace {

constexpr int64_t kTile = 256;  // elements: half a dozen float arrays of it stay in the first-level cache

struct Bfloat16 {
  uint16_t bits;
};
using Half = torch::headeronly::Half;

template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

#define UNIF2ACE_INLINE inline __attribute__((always_inline))

template <class Real, class T>
UNIF2ACE_INLINE Real widen(T value) {
  if constexpr (std::is_same_v<T, Bfloat16>) return bits_float(static_cast<int32_t>(uint32_t{value.bits} << 16));
  else return static_cast<Real>(value);
}
template <class T, class Real>
UNIF2ACE_INLINE T narrow(Real value) {
  if constexpr (std::is_same_v<T, Bfloat16>) {
    const uint32_t bits = static_cast<uint32_t>(float_bits(static_cast<float>(value)));
    const uint32_t nearest_even = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return {static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : nearest_even)};
  } else {
    return static_cast<T>(value);
  }
}

template <class T, class Real>
UNIF2ACE_SIMD_CLONES void load(const T* __restrict from, Real* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = widen<Real>(from[i]);
}
template <class T, class Real>
UNIF2ACE_SIMD_CLONES void store(const Real* __restrict from, T* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = narrow<T>(from[i]);
}
template <class Real>
UNIF2ACE_SIMD_CLONES void multiply(Real* __restrict into, const Real* __restrict by, int64_t count) {
  for (int64_t i = 0; i < count; ++i) into[i] *= by[i];
}
template <class Real>
UNIF2ACE_SIMD_CLONES void scale(Real* into, Real by, int64_t count) {
  for (int64_t i = 0; i < count; ++i) into[i] *= by;
}
template <class T, class Real>
UNIF2ACE_SIMD_CLONES void add(Real* __restrict sum, const T* __restrict a, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] += widen<Real>(a[i]);
}
template <class T, class Real>
UNIF2ACE_SIMD_CLONES void add_scaled(Real* __restrict sum, const T* __restrict a, Real by, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] += widen<Real>(a[i]) * by;
}
template <class T, class Real>
UNIF2ACE_SIMD_CLONES void add_product(Real* __restrict sum, const Real* __restrict a, const T* __restrict b,
                                      int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] += a[i] * widen<Real>(b[i]);
}
// to = by from
template <class T, class U, class Real>
UNIF2ACE_SIMD_CLONES void scale_to(const T* __restrict from, Real by, U* __restrict to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = narrow<U>(widen<Real>(from[i]) * by);
}

// The sum of a tile, which is spent.
template <class Real>
Real folded(Real* tile) {
  for (int64_t half = kTile / 2; half > 0; half /= 2) add(tile, tile + half, half);
  return tile[0];
}

// Calls run(pointer to T) with the element type of `dtype`.
template <class Run>
void dispatch(ScalarType dtype, const char* name, const Run& run) {
  switch (dtype) {
    case ScalarType::Float: return run(static_cast<float*>(nullptr));
    case ScalarType::BFloat16: return run(static_cast<Bfloat16*>(nullptr));
    case ScalarType::Half: return run(static_cast<Half*>(nullptr));
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Double, name, ": expected float64, float32, bfloat16 or float16");
      return run(static_cast<double*>(nullptr));
  }
}

}  // namespace unif2ace
