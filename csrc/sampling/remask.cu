// The re-mask: a block holds a sample's keys in shared memory and finds the cut bit by bit.
#include "common/launch.cuh"
#include "sampling/block.cuh"
#include "sampling/launch.h"
#include "sampling/score.cuh"

namespace unif2ace {
namespace {

__global__ void remask_kernel(RemaskArguments a) {
  UNIF2ACE_DYNAMIC_SHARED(uint32_t, keys);
  __shared__ int tied_in_warp[kWarps];
  const int64_t first = static_cast<int64_t>(blockIdx.x) * a.length;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t seed = *a.seed, offset = *a.offset;
  const float temperature = *a.temperature;
  int unknown = 0;
  for (int i = thread; i < a.length; i += kThreads) {
    const bool is_unknown = a.unknown[first + i];
    unknown += is_unknown;
    keys[i] = ascending_key(remask_rank(a.confidence[first + i], is_unknown, temperature, seed, offset,
                                        static_cast<uint32_t>(a.rows[first + i])));
  }
  unknown = block_sum(unknown);  // which also waits for the keys
  // The cut is the key of rank `wanted`, counted from 1, among all positions.
  const int64_t asked = a.count[blockIdx.x] > 0 ? a.count[blockIdx.x] : 0;
  const int most = a.exact ? unknown : a.length - 1;
  const int wanted = (asked < most ? static_cast<int>(asked) : most) + (a.exact ? 0 : 1);
  uint32_t cut = 0;
  for (uint32_t bit = 0x80000000u; bit != 0; bit >>= 1) {
    int below = 0;
    for (int i = thread; i < a.length; i += kThreads) below += keys[i] < (cut | bit);
    if (block_sum(below) < wanted) cut |= bit;
  }
  int below = 0;
  for (int i = thread; i < a.length; i += kThreads) below += keys[i] < cut;
  const int left = a.exact ? wanted - block_sum(below) : 0;  // positions at the cut that are masked, lowest index first

  int tied_before = 0;
  for (int start = 0; start < a.length; start += kThreads) {
    const int i = start + thread;
    const bool is_tied = i < a.length && keys[i] == cut;
    const unsigned ballot = __ballot_sync(kAllLanes, is_tied);
    __syncthreads();  // tied_in_warp may still be read by the round before
    if (lane == 0) tied_in_warp[warp] = __popc(ballot);
    __syncthreads();
    int rank = tied_before + __popc(ballot & ((1u << lane) - 1));
    for (int w = 0; w < kWarps; ++w) {
      if (w < warp) rank += tied_in_warp[w];
      tied_before += tied_in_warp[w];
    }
    if (i < a.length) a.mask[first + i] = a.unknown[first + i] && (keys[i] < cut || (is_tied && rank < left));
  }
}

}  // namespace

void launch_remask(const RemaskArguments& a, cudaStream_t stream) {
  if (a.samples == 0 || a.length == 0) return;
  UNIF2ACE_LAUNCH(remask_kernel, static_cast<unsigned>(a.samples), kThreads, a.length * sizeof(uint32_t), stream, a);
}

}  // namespace unif2ace
