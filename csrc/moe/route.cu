// Routing in three launches, its backward in one: no atomics, no wait for the host, one order of all sums.
//
//   choose_kernel    a token on 4 to 32 lanes; slots of each expert and sums of the shares for a block of tokens
//   scan_kernel      a block of threads per expert: its slots in the blocks of tokens before each, and in all
//   order_kernel     places the slots of a block of tokens; one more block finishes offsets, f, P and the losses
//   backward_kernel  a token on 4 to 32 lanes
#include "moe/route_cuda.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>

#include "common/launch.cuh"
#include "moe/route.cuh"

namespace unif2ace {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kScanThreads = 256;
constexpr unsigned kAll = 0xFFFFFFFFu;
constexpr float kTinyFloat = static_cast<float>(kTiny);

__device__ float load_float(const Strided& from, int64_t i) {
  switch (from.type) {
    case Number::bf16: return __bfloat162float(static_cast<const __nv_bfloat16*>(from.data)[i]);
    case Number::f16: return __half2float(static_cast<const __half*>(from.data)[i]);
    default: return static_cast<const float*>(from.data)[i];
  }
}

__device__ void store_float(void* to, Number type, int64_t i, float value) {
  switch (type) {
    case Number::bf16: static_cast<__nv_bfloat16*>(to)[i] = __float2bfloat16(value); break;
    case Number::f16: static_cast<__half*>(to)[i] = __float2half(value); break;
    default: static_cast<float*>(to)[i] = value;
  }
}

__device__ int64_t load_int(const Strided& from, int64_t i) {
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

template <int kLanes, int kValues>
__global__ void __launch_bounds__(kThreads)
    choose_kernel(RouteForward a, RouteGroups groups, int tokens_of_block, int64_t blocks) {
  constexpr int kSide = 32 / kLanes;  // tokens side by side in a warp
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, routed = groups.first[groups.count];
  const int experts = routed + groups.shared * groups.count, slots = groups.top_k + groups.shared;
  UNIF2ACE_DYNAMIC_SHARED(float, shares);                      // [warps, E]
  int* const counts = reinterpret_cast<int*>(shares + kWarps * routed);  // [warps, A]
  __shared__ float squares[kThreads];
  for (int i = threadIdx.x; i < kWarps * routed; i += kThreads) shares[i] = 0;
  for (int i = threadIdx.x; i < kWarps * experts; i += kThreads) counts[i] = 0;
  __syncthreads();

  const int of_warp = tokens_of_block / kWarps;
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * tokens_of_block + warp * of_warp;
  const int64_t end = begin + of_warp < a.tokens ? begin + of_warp : a.tokens;
  float* const own_shares = shares + warp * routed;
  int* const own_counts = counts + warp * experts;
  float square = 0;
  for (int64_t t0 = begin; t0 < end; t0 += kSide) {
    const int side = lane / kLanes;
    const int64_t t = t0 + side;
    Token<kLanes, kValues> token;
    token.load(a.logits, a.group_ids, groups, t, t < end);
    token.scores(groups.softmax, a.with_z);
    if (token.active && token.place == 0 && a.with_z) square += token.lse * token.lse;

    // Without a bias the logits choose, as the scores rise with them: a choice hangs on no exponential.
    int key[kValues], slot[kValues];
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      const int n = token.column(v);
      float by = token.x[v];
      if (a.bias.data != nullptr && n < token.size)
        by = token.score[v] + load_float(a.bias, (token.first + n) * a.bias.stride0);
      key[v] = n < token.size ? order_key(by) : kNotThere;
      slot[v] = -1;
    }
    float chosen_sum = 0;
    for (int k = 0; k < groups.top_k; ++k) {
      int best = kNotThere, best_column = 0;
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        if (key[v] > best) best = key[v], best_column = token.column(v);
      }
      for (int step = kLanes / 2; step > 0; step /= 2) {
        const int other = __shfl_xor_sync(kAll, best, step);
        const int other_column = __shfl_xor_sync(kAll, best_column, step);
        if (other > best || (other == best && other_column < best_column)) best = other, best_column = other_column;
      }
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        if (token.column(v) != best_column) continue;
        key[v] = kNotThere;
        slot[v] = k;
        chosen_sum += token.score[v];
      }
    }
    const float total = groups.normalize ? sum_of_lanes<kLanes>(chosen_sum) + kTinyFloat : 1.0f;
    float score_sum = 0;
#pragma unroll
    for (int v = 0; v < kValues; ++v) score_sum += token.score[v];
    const float share_total = groups.softmax ? 1.0f : sum_of_lanes<kLanes>(score_sum) + kTinyFloat;

    if (token.active) {
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        if (slot[v] < 0) continue;
        a.weight[t * slots + slot[v]] = token.score[v] / total;
        a.expert[t * slots + slot[v]] = token.first + token.column(v);
      }
      for (int s = token.place; s < groups.shared; s += kLanes) {
        a.weight[t * slots + groups.top_k + s] = 1;
        a.expert[t * slots + groups.top_k + s] = routed + groups.shared * token.group + s;
      }
    }
    for (int turn = 0; turn < kSide; ++turn) {  // tokens of a warp may be of one group: one after the other
      if (turn == side && token.active) {
#pragma unroll
        for (int v = 0; v < kValues; ++v) {
          if (token.column(v) >= token.size) continue;
          own_shares[token.first + token.column(v)] += token.score[v] / share_total;
          own_counts[token.first + token.column(v)] += slot[v] >= 0;
        }
        for (int s = token.place; s < groups.shared; s += kLanes) ++own_counts[routed + groups.shared * token.group + s];
      }
      __syncwarp();
    }
  }
  squares[threadIdx.x] = square;
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += kThreads) {
    int count = 0;
    for (int w = 0; w < kWarps; ++w) count += counts[w * experts + e];
    a.block_counts[e * blocks + blockIdx.x] = count;
  }
  for (int e = threadIdx.x; e < routed; e += kThreads) {
    float share = 0;
    for (int w = 0; w < kWarps; ++w) share += shares[w * routed + e];
    a.block_sums[e * blocks + blockIdx.x] = share;
  }
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < kThreads; ++i) sum += squares[i];
    a.block_sums[routed * blocks + blockIdx.x] = sum;
  }
}

// Row blockIdx.x of block_counts becomes its running sum from 0, its total goes to counts; of block_sums, to sums.
__global__ void __launch_bounds__(kScanThreads) scan_kernel(RouteForward a, int routed, int experts, int64_t blocks) {
  __shared__ int of_warps[kScanThreads / 32];
  __shared__ float partial[kScanThreads];
  const int64_t row = blockIdx.x;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row < experts) {
    int before = 0;
    for (int64_t start = 0; start < blocks; start += kScanThreads) {
      const int64_t block = start + threadIdx.x;
      const int count = block < blocks ? a.block_counts[row * blocks + block] : 0;
      int running = count;
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(kAll, running, step);
        running += lane >= step ? other : 0;
      }
      if (lane == 31) of_warps[warp] = running;
      __syncthreads();
      int earlier = before;
      for (int w = 0; w < kScanThreads / 32; ++w) {
        earlier += w < warp ? of_warps[w] : 0;
        before += of_warps[w];
      }
      if (block < blocks) a.block_counts[row * blocks + block] = earlier + running - count;
      __syncthreads();
    }
    if (threadIdx.x == 0) a.counts[row] = before;
  }
  if (row <= routed) {
    float sum = 0;
    for (int64_t block = threadIdx.x; block < blocks; block += kScanThreads) sum += a.block_sums[row * blocks + block];
    partial[threadIdx.x] = sum;
    __syncthreads();
    for (int half = kScanThreads / 2; half > 0; half /= 2) {
      if (static_cast<int>(threadIdx.x) < half) partial[threadIdx.x] += partial[threadIdx.x + half];
      __syncthreads();
    }
    if (threadIdx.x == 0) a.sums[row] = partial[0];
  }
}

// f, P and the losses; `terms` has room for a number of each thread.
__device__ void finish(const RouteForward& a, const RouteGroups& groups, float* terms) {
  float balance = 0;
  for (int e = threadIdx.x; e < groups.first[groups.count]; e += kThreads) {
    int g = 0;
    while (e >= groups.first[g + 1]) ++g;
    int64_t in_group = 0;  // slots: K for each token
    for (int i = groups.first[g]; i < groups.first[g + 1]; ++i) in_group += a.counts[i];
    const int64_t in_all = in_group / groups.top_k;
    const float tokens = static_cast<float>(in_all > 0 ? in_all : 1);
    const float size = static_cast<float>(groups.first[g + 1] - groups.first[g]);
    const float frequency = static_cast<float>(a.counts[e]) * size / (static_cast<float>(groups.top_k) * tokens);
    const float probability = a.sums[e] / tokens;
    a.frequency[e] = frequency;
    a.probability[e] = probability;
    balance += groups.coef[g] * frequency * probability;
  }
  terms[threadIdx.x] = balance;
  __syncthreads();
  if (threadIdx.x == 0) {
    float sum = 0;
    for (int i = 0; i < kThreads; ++i) sum += terms[i];
    *a.balance = sum;
    *a.z = a.with_z ? a.sums[groups.first[groups.count]] * a.z_scale : 0.0f;
  }
}

// Slots are numbered along the tokens, so a warp that takes 32 at a time, in order, ranks them by its ballots.
__global__ void __launch_bounds__(kThreads)
    order_kernel(RouteForward a, RouteGroups groups, int tokens_of_block, int64_t blocks) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, slots = groups.top_k + groups.shared;
  const int experts = groups.first[groups.count] + groups.shared * groups.count;
  UNIF2ACE_DYNAMIC_SHARED(int64_t, start);                    // [A]: where the block's first slot of an expert goes
  int* const taken = reinterpret_cast<int*>(start + experts);  // [warps, A]: slots of the warps before, then running
  __shared__ float terms[kThreads];
  const bool is_last = blockIdx.x == blocks;
  if (warp == 0) {
    int64_t before = 0;
    for (int e0 = 0; e0 < experts; e0 += 32) {
      const int e = e0 + lane;
      const int64_t count = e < experts ? a.counts[e] : 0;
      int64_t running = count;
      for (int step = 1; step < 32; step *= 2) {
        const int64_t other = __shfl_up_sync(kAll, running, step);
        running += lane >= step ? other : 0;
      }
      const int64_t offset = before + running - count;
      if (e < experts) {
        start[e] = offset + (is_last ? 0 : a.block_counts[e * blocks + blockIdx.x]);
        if (is_last) a.offsets[e] = offset;
      }
      before += __shfl_sync(kAll, running, 31);
    }
    if (is_last && lane == 0) a.offsets[experts] = before;
  }
  if (is_last) {
    finish(a, groups, terms);
    return;
  }
  for (int i = threadIdx.x; i < kWarps * experts; i += kThreads) taken[i] = 0;
  __syncthreads();

  const int of_warp = tokens_of_block / kWarps;
  const int64_t begin = (static_cast<int64_t>(blockIdx.x) * tokens_of_block + warp * of_warp) * slots;
  const int64_t end = begin + of_warp * slots < a.tokens * slots ? begin + of_warp * slots : a.tokens * slots;
  int* const own = taken + warp * experts;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t first = begin; first < end; first += 32) {
      const int64_t slot = first + lane;
      const int expert = slot < end ? static_cast<int>(a.expert[slot]) : -1;
      const unsigned same = __match_any_sync(kAll, expert);
      const int rank = __popc(same & ((1u << lane) - 1));
      if (pass == 1 && expert >= 0) a.order[start[expert] + own[expert] + rank] = slot;
      __syncwarp();
      if (expert >= 0 && rank == 0) own[expert] += __popc(same);
      __syncwarp();
    }
    __syncthreads();
    if (pass == 1) break;
    for (int e = threadIdx.x; e < experts; e += kThreads) {
      int before = 0;
      for (int w = 0; w < kWarps; ++w) {
        const int count = taken[w * experts + e];
        taken[w * experts + e] = before;
        before += count;
      }
    }
    __syncthreads();
  }
}

template <int kLanes, int kValues>
__global__ void __launch_bounds__(kThreads) backward_kernel(RouteBackward a, RouteGroups groups) {
  const int64_t t = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kLanes;
  const int routed = groups.first[groups.count], slots = groups.top_k + groups.shared;
  Token<kLanes, kValues> token;
  token.load(a.logits, a.group_ids, groups, t, t < a.tokens);
  token.scores(groups.softmax, false);
  float grad[kValues] = {};  // of the scores

  if (a.grad_balance != nullptr || a.grad_probability != nullptr) {
    int64_t counts[kValues], in_group = 0;
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      counts[v] = token.column(v) < token.size ? a.counts[token.first + token.column(v)] : 0;
      in_group += counts[v];
    }
    const int64_t in_all = sum_of_lanes<kLanes>(in_group) / groups.top_k;
    const float tokens = static_cast<float>(in_all > 0 ? in_all : 1);
    float scale = 0;
    if (a.grad_balance != nullptr)
      scale = *a.grad_balance * groups.coef[token.group] * static_cast<float>(token.size) /
              (static_cast<float>(groups.top_k) * tokens);
    float sum = 0, dot = 0;
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      if (token.column(v) >= token.size) continue;
      grad[v] = scale * static_cast<float>(counts[v]);
      if (a.grad_probability != nullptr)
        grad[v] += a.grad_probability[(token.first + token.column(v)) * a.stride_probability];
      grad[v] /= tokens;
      sum += token.score[v];
      dot += grad[v] * token.score[v];
    }
    if (!groups.softmax) {  // a share is a score over the sum of the scores
      sum = sum_of_lanes<kLanes>(sum) + kTinyFloat;
      dot = sum_of_lanes<kLanes>(dot) / sum;
#pragma unroll
      for (int v = 0; v < kValues; ++v) grad[v] = (grad[v] - dot) / sum;
    }
  }
  if (a.grad_weight.data != nullptr) {
    bool chosen[kValues] = {};
    float picked[kValues] = {}, sum = 0, dot = 0;
    for (int k = 0; token.active && k < groups.top_k; ++k) {
      const int64_t expert = a.expert[t * slots + k];
      const float value = load_float(a.grad_weight, t * a.grad_weight.stride0 + k * a.grad_weight.stride1);
#pragma unroll
      for (int v = 0; v < kValues; ++v) {
        if (token.first + token.column(v) != expert) continue;
        chosen[v] = true;
        picked[v] = value;
        sum += token.score[v];
        dot += value * token.score[v];
      }
    }
    if (groups.normalize) {
      sum = sum_of_lanes<kLanes>(sum) + kTinyFloat;
      dot = sum_of_lanes<kLanes>(dot) / sum;
    } else {
      sum = 1, dot = 0;
    }
#pragma unroll
    for (int v = 0; v < kValues; ++v) {
      if (chosen[v]) grad[v] += (picked[v] - dot) / sum;
    }
  }
  float dot = 0;
#pragma unroll
  for (int v = 0; v < kValues; ++v) dot += token.column(v) < token.size ? grad[v] * token.score[v] : 0.0f;
  dot = sum_of_lanes<kLanes>(dot);
#pragma unroll
  for (int v = 0; v < kValues; ++v)
    grad[v] = token.score[v] * (groups.softmax ? grad[v] - dot : grad[v] * (1.0f - token.score[v]));
  if (a.grad_z != nullptr) {
    float probability[kValues];
    token.softmax(probability);
    const float scale = *a.grad_z * 2.0f * a.z_scale * token.lse;
#pragma unroll
    for (int v = 0; v < kValues; ++v) grad[v] += scale * probability[v];
  }
  if (!token.active) return;
#pragma unroll
  for (int v = 0; v < kValues; ++v) {
    if (token.column(v) < token.size)
      store_float(a.grad, a.logits.type, t * routed + token.first + token.column(v), grad[v]);
  }
  for (int c = token.place; c < routed; c += kLanes) {
    if (c < token.first || c >= token.first + token.size) store_float(a.grad, a.logits.type, t * routed + c, 0.0f);
  }
}

int tokens_of_block(int64_t tokens) { return tokens <= 1 << 16 ? 64 : 512; }

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

int widest_group(const RouteGroups& groups) {
  int widest = 0;
  for (int g = 0; g < groups.count; ++g) widest = std::max(widest, groups.first[g + 1] - groups.first[g]);
  return widest;
}

}  // namespace

int64_t route_blocks(int64_t tokens) { return (tokens + tokens_of_block(tokens) - 1) / tokens_of_block(tokens); }

void launch_route(const RouteForward& a, const RouteGroups& groups, cudaStream_t stream) {
  const int64_t blocks = route_blocks(a.tokens);
  const int routed = groups.routed(), experts = groups.experts(), of_block = tokens_of_block(a.tokens);
  const size_t choose_bytes = kWarps * (routed * sizeof(float) + experts * sizeof(int));
  const size_t order_bytes = experts * (sizeof(int64_t) + kWarps * sizeof(int));
  const auto grid = static_cast<unsigned>(blocks);
#define UNIF2ACE_CHOOSE(lanes, values) \
  UNIF2ACE_LAUNCH((choose_kernel<lanes, values>), grid, kThreads, choose_bytes, stream, a, groups, of_block, blocks)
  if (blocks > 0) UNIF2ACE_FOR_WIDTH(widest_group(groups), UNIF2ACE_CHOOSE);
#undef UNIF2ACE_CHOOSE
  UNIF2ACE_LAUNCH(scan_kernel, std::max(experts, routed + 1), kScanThreads, 0, stream, a, routed, experts, blocks);
  UNIF2ACE_LAUNCH(order_kernel, grid + 1, kThreads, order_bytes, stream, a, groups, of_block, blocks);
}

void launch_route_backward(const RouteBackward& a, const RouteGroups& groups, cudaStream_t stream) {
  if (a.tokens == 0) return;
#define UNIF2ACE_BACKWARD(lanes, values)                                                                          \
  UNIF2ACE_LAUNCH((backward_kernel<lanes, values>),                                                               \
                  static_cast<unsigned>((a.tokens + kThreads / lanes - 1) / (kThreads / lanes)), kThreads, 0, stream, a, \
                  groups)
  UNIF2ACE_FOR_WIDTH(widest_group(groups), UNIF2ACE_BACKWARD);
#undef UNIF2ACE_BACKWARD
}

}  // namespace unif2ace
