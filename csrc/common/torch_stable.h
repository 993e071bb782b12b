// What every room's ops.cpp needs of torch's stable ABI: one binary serves torch 2.11 and later.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include "common/reals.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Weak, so that kernels compiled by nvcc also link and load beside torch's CPU build, where nothing calls them.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

// As in cuda_runtime.h, which host code does not need otherwise.
struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace unif2ace {

inline cudaStream_t current_stream(const Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "this torch was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

// Calls run(pointer to T) with the element type of `dtype`.
template <class Run>
void dispatch(ScalarType dtype, const char* name, const Run& run) {
  switch (dtype) {
    case ScalarType::Float: return run(static_cast<float*>(nullptr));
    case ScalarType::BFloat16: return run(static_cast<BFloat16Bits*>(nullptr));
    case ScalarType::Half: return run(static_cast<HalfBits*>(nullptr));
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Double, name, ": expected float64, float32, bfloat16 or float16");
      return run(static_cast<double*>(nullptr));
  }
}

}  // namespace unif2ace
