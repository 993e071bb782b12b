// The one way a kernel is launched and the one way dynamic shared memory is named, so that the same .cu file also
// runs on the CPU in tests/cuda_on_cpu (which defines UNIF2ACE_CUDA_ON_CPU and both macros itself).
#pragma once

#include <cuda_runtime.h>

#ifndef UNIF2ACE_CUDA_ON_CPU

#include <stdexcept>
#include <string>

namespace unif2ace {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// A kernel has to ask for more than 48 KiB, its static shared memory included; no kernel here has 8 KiB of that.
template <class Kernel>
void allow_shared_bytes(Kernel* kernel, size_t bytes) {
  if (bytes > 40 * 1024)
    check_cuda(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(bytes)),
               "cudaFuncSetAttribute(MaxDynamicSharedMemorySize)");
}

}  // namespace unif2ace

// UNIF2ACE_LAUNCH((kernel<A, B>), grid, block, shared_bytes, stream, arguments...): parentheses around a template.
#define UNIF2ACE_LAUNCH(kernel, grid, block, shared_bytes, stream, ...)              \
  do {                                                                               \
    unif2ace::allow_shared_bytes(&kernel, shared_bytes);                              \
    kernel<<<(grid), (block), (shared_bytes), (stream)>>>(__VA_ARGS__);              \
    unif2ace::check_cuda(cudaGetLastError(), "launch of " #kernel);                   \
  } while (0)

// UNIF2ACE_DYNAMIC_SHARED(float, tile); declares `float* tile`, 16-byte aligned.
#define UNIF2ACE_DYNAMIC_SHARED(type, name)                        \
  extern __shared__ __align__(16) unsigned char name##_bytes[];    \
  type* const name = reinterpret_cast<type*>(name##_bytes)

#endif  // UNIF2ACE_CUDA_ON_CPU
