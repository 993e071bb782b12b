// Reductions over a block of kWarps warps, in one order: every thread gets the result.
#pragma once

#include <cuda_runtime.h>

namespace unif2ace {

constexpr int kWarps = 8, kThreads = 32 * kWarps;
constexpr unsigned kAllLanes = 0xFFFFFFFFu;

template <class T, class Combine>
__device__ T warp_reduce(T value, Combine combine) {
  for (int bits = 16; bits > 0; bits /= 2) value = combine(value, __shfl_xor_sync(kAllLanes, value, bits));
  return value;
}

template <class T, class Combine>
__device__ T block_reduce(T value, Combine combine) {
  __shared__ T of_warp[kWarps];
  value = warp_reduce(value, combine);
  __syncthreads();  // of_warp may still be read by the reduction before
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = value;
  __syncthreads();
  T result = of_warp[0];
  for (int warp = 1; warp < kWarps; ++warp) result = combine(result, of_warp[warp]);
  return result;
}

template <class T>
__device__ T block_sum(T value) {
  return block_reduce(value, [](T a, T b) { return a + b; });
}

template <class T>
__device__ T block_max(T value) {
  return block_reduce(value, [](T a, T b) { return b > a ? b : a; });
}

template <class T>
__device__ T block_min(T value) {
  return block_reduce(value, [](T a, T b) { return b < a ? b : a; });
}

}  // namespace unif2ace
