// A token of routing on 4 to 32 lanes of a warp, and numbers of the dtypes that its tensors may have: what choosing an
// expert (route.cu) and its gradient (route_backward.cu) start with.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "common/launch.cuh"
#include "moe/route.cuh"
#include "moe/route_cuda.h"

namespace unif2ace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr float kTinyFloat = static_cast<float>(kTiny);

__device__ inline float load_float(const Strided& from, int64_t i) {
  switch (from.type) {
    case Number::bf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(from.data)[i]);
    case Number::f16: return __half2float(static_cast<const __half*>(from.data)[i]);
    default: return static_cast<const float*>(from.data)[i];
  }
}

__device__ inline int64_t load_int(const Strided& from, int64_t i) {
  switch (from.type) {
    case Number::i32: return static_cast<const int32_t*>(from.data)[i];
    case Number::i16: return static_cast<const int16_t*>(from.data)[i];
    case Number::i8: return static_cast<const int8_t*>(from.data)[i];
    case Number::u8: return static_cast<const uint8_t*>(from.data)[i];
    default: return static_cast<const int64_t*>(from.data)[i];
  }
}

// Sum over the kLanes lanes of a token, in one order.
template <int kLanes, class T>
__device__ T sum_of_lanes(T value) {
  for (int step = kLanes / 2; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  return value;
}

// A token on kLanes lanes: lane `place` has the columns n = v * kLanes + place of the token's group.
template <int kLanes, int kValues>
struct Token {
  bool active;
  int group, first, size, place;
  float x[kValues], score[kValues];  // -inf and 0 where the group has no column
  float lse;

  __device__ int column(int v) const { return v * kLanes + place; }

  // An id out of range is clamped, so that it leads nowhere out of bounds.
  __device__ void load(const Strided& logits, const Strided& group_ids, const RouteGroups& groups, int64_t t, bool is) {
    active = is;
    place = static_cast<int>(threadIdx.x) % kLanes;
    const int64_t id = active ? load_int(group_ids, t * group_ids.stride0) : 0;
    group = static_cast<int>(id < 0 ? 0 : id < groups.count ? id : groups.count - 1);
    first = groups.first[group];
    size = active ? groups.first[group + 1] - first : 0;
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const int n = column(v);
      x[v] = n < size ? load_float(logits, t * logits.stride0 + (first + n) * logits.stride1) : -INFINITY;
    }
  }

  // to = softmax of x, lse its logsumexp.
  __device__ void softmax(float (&to)[kValues]) {
    float largest = -INFINITY, sum = 0;
#pragma unroll
    for (int v = 0; v < kValues; ++v) largest = x[v] > largest ? x[v] : largest;
    for (int step = kLanes / 2; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(kAll, largest, step);
      largest = other > largest ? other : largest;
    }
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      to[v] = column(v) < size ? expf(x[v] - largest) : 0.0f;
      sum += to[v];
    }
    sum = sum_of_lanes<kLanes>(sum);
#pragma unroll
    for (int v = 0; v < kValues; ++v) to[v] /= sum;
    lse = largest + logf(sum);
  }

  __device__ void scores(bool by_softmax, bool with_lse) {
    if (by_softmax || with_lse) softmax(score);
    if (by_softmax) return;
#pragma unroll
    for (int v = 0; v < kValues; ++v) score[v] = column(v) < size ? 1.0f / (1.0f + expf(-x[v])) : 0.0f;
  }
};

// Calls run(lanes, values) with the fewest lanes and registers that hold the widest group's columns.
#define UNIF2ACE_FOR_WIDTH(widest, RUN)                                                     \
  do {                                                                                      \
    if ((widest) <= 4) RUN(4, 1);                                                           \
    else if ((widest) <= 8) RUN(8, 1);                                                      \
    else if ((widest) <= 16) RUN(16, 1);                                                    \
    else if ((widest) <= 32) RUN(32, 1);                                                    \
    else if ((widest) <= 64) RUN(32, 2);                                                    \
    else if ((widest) <= 128) RUN(32, 4);                                                   \
    else if ((widest) <= 256) RUN(32, 8);                                                   \
    else if ((widest) <= 1024) RUN(32, 32);                                                 \
    else throw std::runtime_error("group_sizes: expected at most 1024 experts in a group"); \
  } while (0)

inline int widest_group(const RouteGroups& groups) {
  int widest = 0;
  for (int g = 0; g < groups.count; ++g) widest = std::max(widest, groups.first[g + 1] - groups.first[g]);
  return widest;
}

}  // namespace unif2ace
