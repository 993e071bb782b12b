// unif2ace_native::d3diff_noise on the CPU: kernels/unif2ace_kernels/d3diff/noise_torch.py bit for bit.
#include <algorithm>
#include <cmath>
#include <memory>
#include <tuple>
#include <vector>

#include "common/philox.cuh"
#include "common/reals.h"
#include "common/simd.h"
#include "common/torch_stable.h"

namespace unif2ace {
namespace {

UNIF2ACE_SIMD_CLONES
void noise_words(int64_t seed, int64_t offset, uint32_t row, uint32_t* words, int64_t groups) {
  for (int64_t g = 0; g < groups; ++g) {
    const Words four = words_of_group(seed, offset, row, static_cast<uint32_t>(g), kNoiseStream);
    for (int lane = 0; lane < 4; ++lane) words[4 * g + lane] = four.w[lane];
  }
}

// m of a row, and length m in float32, or in float64 for float64.
struct MaskProb {
  double m, product;
};

template <class T>
MaskProb mask_prob_at(const T* data, int64_t row, int64_t length) {
  using Real = ComputeOf<T>;
  const Real m = to_compute(data[row]);
  return {m, static_cast<Real>(length) * m};
}

MaskProb mask_prob_of(const Tensor& mask_prob, int64_t row, int64_t length) {
  const void* const data = mask_prob.const_data_ptr();
  switch (mask_prob.scalar_type()) {
    case ScalarType::Float: return mask_prob_at(static_cast<const float*>(data), row, length);
    case ScalarType::BFloat16: return mask_prob_at(static_cast<const BFloat16Bits*>(data), row, length);
    case ScalarType::Half: return mask_prob_at(static_cast<const HalfBits*>(data), row, length);
    default:
      STD_TORCH_CHECK(mask_prob.scalar_type() == ScalarType::Double, "mask_prob: expected a floating dtype");
      return mask_prob_at(static_cast<const double*>(data), row, length);
  }
}

// The exact count: positions whose (word, column) is among the smallest.
void mask_smallest(const uint32_t* words, int64_t length, const MaskProb& prob, uint64_t* keys, bool* mask) {
  const double rounded = std::nearbyint(prob.product);  // half to even
  const int64_t count = rounded >= 1 ? std::min(static_cast<int64_t>(rounded), length) : 1;
  for (int64_t i = 0; i < length; ++i) keys[i] = (uint64_t{words[i]} << 32) | static_cast<uint64_t>(i);
  std::nth_element(keys, keys + count - 1, keys + length);
  const uint64_t threshold = keys[count - 1];
  for (int64_t i = 0; i < length; ++i) mask[i] = ((uint64_t{words[i]} << 32) | static_cast<uint64_t>(i)) <= threshold;
}

void mask_bernoulli(const uint32_t* words, int64_t length, double m, bool* mask) {
  for (int64_t i = 0; i < length; ++i) mask[i] = (static_cast<double>(words[i]) + 0.5) * 0x1p-32 < m;
}

std::tuple<Tensor, Tensor> noise_cpu(const Tensor& given, const Tensor& given_prob, int64_t mask_id, bool exact_count,
                                     int64_t seed, int64_t offset, int64_t first_row) {
  const Tensor tokens = torch::stable::contiguous(given), mask_prob = torch::stable::contiguous(given_prob);
  STD_TORCH_CHECK(tokens.dim() == 2 && tokens.scalar_type() == ScalarType::Long, "tokens: expected int64 [B, N]");
  const int64_t batch = tokens.size(0), length = tokens.size(1);
  STD_TORCH_CHECK(mask_prob.numel() == batch, "mask_prob: expected [B]");
  Tensor noised = torch::stable::new_empty(tokens, {batch, length});
  Tensor mask = torch::stable::new_empty(tokens, {batch, length}, ScalarType::Bool);
  const int64_t* const from = tokens.const_data_ptr<int64_t>();
  int64_t* const to = noised.mutable_data_ptr<int64_t>();
  bool* const masked = mask.mutable_data_ptr<bool>();
  std::vector<MaskProb> prob(batch);
  for (int64_t b = 0; b < batch; ++b) prob[b] = mask_prob_of(mask_prob, b, length);
  const int64_t groups = (length + 3) / 4;
  const int64_t grain = std::max<int64_t>(1, 8192 / std::max<int64_t>(length, 1));
  torch::stable::parallel_for(0, length == 0 ? 0 : batch, grain, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> words(4 * groups);
    std::vector<uint64_t> keys(exact_count ? length : 0);
    for (int64_t b = begin; b < end; ++b) {
      noise_words(seed, offset, static_cast<uint32_t>(first_row + b), words.data(), groups);
      bool* const row = masked + b * length;
      if (exact_count) mask_smallest(words.data(), length, prob[b], keys.data(), row);
      else mask_bernoulli(words.data(), length, prob[b].m, row);
      for (int64_t i = 0; i < length; ++i) to[b * length + i] = row[i] ? mask_id : from[b * length + i];
    }
  });
  return {noised, mask};
}

}  // namespace
}  // namespace unif2ace

STABLE_TORCH_LIBRARY_FRAGMENT(unif2ace_native, m) {
  m.def(
      "d3diff_noise(Tensor tokens, Tensor mask_prob, int mask_id, bool exact_count, int seed, int offset, "
      "int first_row) -> (Tensor noised, Tensor mask)");
}

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) { m.impl("d3diff_noise", TORCH_BOX(&unif2ace::noise_cpu)); }
