// Tiles: short arrays of any dtype, brought to the type that computes (float; double for double), worked on and stored.
#pragma once

#include <cstdint>

#include "common/reals.h"
#include "common/simd.h"
#include "common/torch_stable.h"

namespace unif2ace {

constexpr int64_t kTile = 256;  // elements: half a dozen float arrays of it stay in the first-level cache

#define UNIF2ACE_INLINE inline __attribute__((always_inline))

template <class Real, class T>
UNIF2ACE_INLINE Real widen(T value) {
  return static_cast<Real>(to_compute(value));
}
template <class T, class Real>
UNIF2ACE_INLINE T narrow(Real value) {
  T to;
  from_compute(static_cast<ComputeOf<T>>(value), to);
  return to;
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

}  // namespace unif2ace
