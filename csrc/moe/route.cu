// Routing in three launches: no atomics, no wait for the host, one order of all sums.
//
//   choose_kernel    a token on 4 to 32 lanes; slots of each expert and sums of the shares for a block of tokens
//   scan_kernel      a block of threads per expert: its slots in the blocks of tokens before each, and in all
//   order_kernel     places the slots of a block of tokens; one more block finishes offsets, f, P and the losses
#include <algorithm>

#include "moe/route_token.cuh"

namespace unif2ace {
namespace {

constexpr int kScanThreads = 256;

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
        for (int s = token.place; s < groups.shared; s += kLanes)
          ++own_counts[routed + groups.shared * token.group + s];
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

int tokens_of_block(int64_t tokens) { return tokens <= 1 << 16 ? 64 : 512; }

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

}  // namespace unif2ace
