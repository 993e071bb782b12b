// The draw from logits: a block draws for one masked row, whose guided logits it keeps in shared memory.
//
// Few Gumbel numbers are made: since G = -log(-log1p(-u)) <= -log u, a code whose weight e**scaled is below u e**best
// cannot reach the best score so far, and a warp shares its best.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/launch.cuh"
#include "sampling/block.cuh"
#include "sampling/launch.h"
#include "sampling/score.cuh"

namespace unif2ace {
namespace {

constexpr int32_t kMostStaged = 24 * 1024;  // codes whose float32 logits, 96 KiB, fit a block's shared memory everywhere
constexpr float kNone = -kInfinity<float>;
constexpr float kSlack = 0.999f;  // weights, Gumbel numbers and scores are off by less than 1e-4 together

// The row's guided logits less their peak; read again for each pass where they are too many for shared memory.
template <class In, bool kStaged>
struct Row {
  const In *cond, *uncond;
  float up, down, peak;
  float* staged;

  __device__ float logit(int i) const {
    const float z = static_cast<float>(cond[i]);
    return uncond == nullptr ? z : guided_logit(z, static_cast<float>(uncond[i]), up, down);
  }
  __device__ float shifted(int i) const { return kStaged ? staged[i] : subtract(logit(i), peak); }
};

// How far below the peak, as an integer that orders alike; 0x7F800000 for a code without probability.
__device__ int32_t distance(float scaled) { return float_bits(scaled) & 0x7FFFFFFF; }

__device__ float larger(float a, float b) { return b > a ? b : a; }

// The smallest distance within which there are top_k codes.
template <class R>
__device__ int32_t distance_of_top(const R& row, const DrawArguments& a) {
  int32_t low = 0, high = 0x7F800000;
  while (low < high) {
    const int32_t middle = low + (high - low) / 2;
    int within = 0;
    for (int i = static_cast<int>(threadIdx.x); i < a.codes; i += kThreads)
      within += distance(multiply(row.shifted(i), a.inverse)) <= middle;
    within = block_sum(within);
    if (within == a.top_k) return middle;
    if (within > a.top_k)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
}

// The mass of the codes within `limit` of the peak.
template <class R>
__device__ double mass_within(const R& row, const DrawArguments& a, int32_t limit) {
  double mass = 0;
  for (int i = static_cast<int>(threadIdx.x); i < a.codes; i += kThreads) {
    const float scaled = multiply(row.shifted(i), a.inverse);
    if (distance(scaled) <= limit) mass += __expf(scaled);
  }
  return block_sum(mass);
}

// The first of the largest of scaled + Gumbel number among the codes within `limit` of the peak.
template <class R>
__device__ int race(const R& row, const DrawArguments& a, int32_t limit, uint32_t global_row) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t seed = *a.seed, offset = *a.offset;
  float best = kNone, bar = 0;  // bar: what weight / u of a code has to reach
  int code = a.codes;
  for (int first = static_cast<int>(threadIdx.x) - lane; 4 * first < a.codes; first += kThreads) {
    const int group = first + lane;
    const Words words = words_of_group(seed, offset, global_row, static_cast<uint32_t>(group), kTokenStream);
    for (int j = 0; j < 4; ++j) {
      const int i = 4 * group + j;
      const float scaled = i < a.codes ? multiply(row.shifted(i), a.inverse) : kNone;
      const bool enters = distance(scaled) <= limit &&
                          __expf(scaled) >= multiply(multiply(static_cast<float>(words.w[j]), 0x1p-32f), bar);
      if (!__any_sync(kAllLanes, enters)) continue;
      if (enters) {
        const float score = add(scaled, gumbel(words.w[j]));
        if (score > best || (score == best && i < code)) {
          best = score;
          code = i;
        }
      }
      bar = multiply(__expf(warp_reduce(best, larger)), kSlack);
    }
  }
  const float top = block_max(best);
  return block_min(best == top ? code : a.codes);
}

template <class In, bool kStaged>
__global__ void __launch_bounds__(kThreads) draw_kernel(DrawArguments a) {
  UNIF2ACE_DYNAMIC_SHARED(float, staged);
  const int64_t place = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  if (!a.unknown[place]) {
    if (thread == 0) {
      a.out_ids[place] = a.ids[place];
      a.out_confidence[place] = -kNone;
    }
    return;
  }
  Row<In, kStaged> row{static_cast<const In*>(a.cond) + place * a.cond_stride,
                       a.uncond == nullptr ? nullptr : static_cast<const In*>(a.uncond) + place * a.uncond_stride,
                       a.up, a.down, 0, staged};
  float largest = kNone;
  bool has_nan = false;
  for (int i = thread; i < a.codes; i += kThreads) {
    const float z = row.logit(i);
    if (kStaged) staged[i] = z;
    largest = larger(largest, z);
    has_nan |= z != z;
  }
  row.peak = block_max(largest);
  if (__syncthreads_or(has_nan) || !(row.peak > kNone && row.peak < -kNone)) {
    if (thread == 0) {
      a.out_ids[place] = a.ids[place];
      a.out_confidence[place] = kNone;
    }
    return;
  }

  float total = 0, weighted = 0, second = kNone;
  int at_peak = 0, first_at_peak = a.codes;
  for (int i = thread; i < a.codes; i += kThreads) {
    const float shifted = subtract(kStaged ? staged[i] : row.logit(i), row.peak);
    if (kStaged) staged[i] = shifted;
    const float weight = __expf(shifted);
    total += weight;
    if (weight > 0) weighted += weight * shifted;
    if (shifted == 0) {
      ++at_peak;
      first_at_peak = i < first_at_peak ? i : first_at_peak;
    } else {
      second = larger(second, shifted);
    }
  }
  total = block_sum(total);  // which also waits for the shifted logits

  int code;
  if (a.inverse == 0) {
    code = block_min(first_at_peak);
  } else {
    int32_t limit = 0x7F7FFFFF;
    if (a.top_k > 0) {
      const int32_t top = distance_of_top(row, a);
      limit = top < limit ? top : limit;
    }
    const uint32_t global_row = static_cast<uint32_t>(a.rows[place]);
    code = race(row, a, limit, global_row);
    if (a.top_p < 1) {
      // The nucleus is closed upwards: a winner outside takes all that is no likelier out of the race.
      const double nucleus = a.top_p * mass_within(row, a, limit);
      for (;;) {
        const int32_t nearer = distance(multiply(row.shifted(code), a.inverse)) - 1;
        if (nearer < 0 || mass_within(row, a, nearer) < nucleus) break;
        limit = nearer;
        code = race(row, a, limit, global_row);
      }
    }
  }

  float confidence = 0;
  if (a.confidence == Confidence::kLogProb) {
    confidence = row.shifted(code) - logf(total);
  } else if (a.confidence == Confidence::kNegEntropy) {
    confidence = block_sum(weighted) / total - logf(total);
  } else {
    second = block_sum(at_peak) > 1 ? 0.0f : block_max(second);
    confidence = (1 - expf(second)) / total;
  }
  if (thread == 0) {
    a.out_ids[place] = a.first_code + code;
    a.out_confidence[place] = confidence;
  }
}

template <class In>
void launch(const DrawArguments& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(a.count);
  if (a.codes <= kMostStaged)
    UNIF2ACE_LAUNCH((draw_kernel<In, true>), blocks, kThreads, a.codes * sizeof(float), stream, a);
  else
    UNIF2ACE_LAUNCH((draw_kernel<In, false>), blocks, kThreads, 0, stream, a);
}

}  // namespace

void launch_draw(LogitsType type, const DrawArguments& a, cudaStream_t stream) {
  if (a.count == 0) return;
  switch (type) {
    case LogitsType::kFloat: return launch<float>(a, stream);
    case LogitsType::kBFloat16: return launch<__nv_bfloat16>(a, stream);
    case LogitsType::kHalf: return launch<__half>(a, stream);
  }
}

}  // namespace unif2ace
