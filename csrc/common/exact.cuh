// Float32 operations that round once, in C++ on the host and in CUDA C++ alike: never fused into a multiply-add.
// Host code that includes this is compiled with -ffp-contract=off (kernels/build_extension.py does).
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define UNIF2ACE_HOST_DEVICE __host__ __device__ inline
#else
// Inlined always, so that the loops that call it are vectorised.
#define UNIF2ACE_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace unif2ace {

UNIF2ACE_HOST_DEVICE float multiply(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

UNIF2ACE_HOST_DEVICE float add(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

UNIF2ACE_HOST_DEVICE float subtract(float a, float b) {
#ifdef __CUDA_ARCH__
  return __fsub_rn(a, b);
#else
  return a - b;
#endif
}

UNIF2ACE_HOST_DEVICE int32_t float_bits(float x) {
#ifdef __CUDA_ARCH__
  return __float_as_int(x);
#else
  int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
#endif
}

UNIF2ACE_HOST_DEVICE float bits_float(int32_t bits) {
#ifdef __CUDA_ARCH__
  return __int_as_float(bits);
#else
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
#endif
}

}  // namespace unif2ace
