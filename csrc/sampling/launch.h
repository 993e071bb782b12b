// The launchers between draw.cu and remask.cu (which know no torch) and ops.cpp (which knows no CUDA).
#pragma once

#include <cstdint>

#include "sampling/score.cuh"

struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace unif2ace {

enum class LogitsType { kFloat, kBFloat16, kHalf };

struct DrawArguments {
  const void *cond, *uncond;                    // first code column of row 0; uncond is null where there is one branch
  int64_t cond_stride, uncond_stride;           // elements from row to row
  const int64_t *ids, *rows, *seed, *offset;    // [count], [count], [1], [1]
  const bool* unknown;                          // [count]
  int64_t* out_ids;                             // [count]
  float* out_confidence;                        // [count]
  int64_t count, first_code;
  int32_t codes, top_k;                         // top_k 0 and top_p 1 filter nothing
  float up, down, inverse;                      // 1 + w, w, 1 / temperature; inverse 0 takes the largest
  double top_p;
  Confidence confidence;
};

void launch_draw(LogitsType type, const DrawArguments& arguments, cudaStream_t stream);

struct RemaskArguments {
  const float *confidence, *temperature;        // [samples, length], [1]
  const bool* unknown;                          // [samples, length]
  const int64_t *count, *rows, *seed, *offset;  // [samples], [samples, length], [1], [1]
  bool* mask;                                   // [samples, length]
  int64_t samples;
  int32_t length;                               // at most kLargestSample
  bool exact;                                   // mask the count, else what is strictly below the count's value
};

constexpr int64_t kLargestSample = 24 * 1024;  // its keys, 96 KiB, fit a block's shared memory everywhere

void launch_remask(const RemaskArguments& arguments, cudaStream_t stream);

}  // namespace unif2ace
