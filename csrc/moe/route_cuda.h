// The launchers between route.cu, route_backward.cu (which know no torch) and route.cpp (which knows no CUDA).
#pragma once

#include <cstdint>

struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace unif2ace {

constexpr int kMaxGroups = 128;  // they travel with the launch, which has 4 KiB for its arguments

enum class Number { f32, bf16, f16, i64, i32, i16, i8, u8 };

// A tensor of any of these types; strides count elements.
struct Strided {
  const void* data = nullptr;
  Number type = Number::f32;
  int64_t stride0 = 0, stride1 = 0;
};

struct RouteGroups {
  int count;
  int top_k, shared;
  bool normalize, softmax;
  int first[kMaxGroups + 1];  // column of each group, and the end
  float coef[kMaxGroups];     // of the balance loss

  int routed() const { return first[count]; }
  int experts() const { return routed() + shared * count; }
};

struct RouteForward {
  Strided logits, group_ids, bias;  // [T, E], [T], [E] or no data
  int64_t tokens;
  float z_scale;  // coefficient over T; 0: no z loss
  bool with_z;
  // Outputs, as ops.route returns them.
  float* weight;
  int64_t *expert, *counts, *offsets, *order;
  float *frequency, *probability, *balance, *z;
  // From one launch to the next: slots of an expert in each block [A, blocks], then before each block; sums of the
  // shares, then of logsumexp squared [E + 1, blocks], and over all blocks [E + 1].
  int* block_counts;
  float *block_sums, *sums;
};

struct RouteBackward {
  Strided grad_weight;                                      // [T, S] or no data
  const float *grad_probability, *grad_balance, *grad_z;    // [E], [], []; or nullptr
  int64_t stride_probability;
  Strided logits, group_ids;
  const int64_t *expert, *counts;
  int64_t tokens;
  float z_scale;
  void* grad;  // [T, E] of the logits' type
};

int64_t route_blocks(int64_t tokens);

// Both throw std::runtime_error where a group has more than 1,024 experts.
void launch_route(const RouteForward& arguments, const RouteGroups& groups, cudaStream_t stream);
void launch_route_backward(const RouteBackward& arguments, const RouteGroups& groups, cudaStream_t stream);

}  // namespace unif2ace
