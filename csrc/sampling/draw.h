// One row of the sampling draw on the host: guidance, filter, Gumbel-max and the confidence of the winner, in passes
// over a row that stays in the first- and second-level cache. kernels/unif2ace_kernels/sampling/draw_torch.py is the
// same in torch: equal ids to the bit, confidences to rounding (the exponentials differ).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <type_traits>

#include "common/gumbel.cuh"
#include "common/philox.cuh"

namespace unif2ace {

enum class Confidence { kLogProb, kNegEntropy, kMargin };

struct DrawOptions {
  int64_t seed, offset;
  double guidance;
  double temperature;
  int64_t top_k;
  double top_p;
  Confidence confidence;
};

constexpr int64_t kBlock = 256;  // scratch rows are padded with -inf to blocks, so that no loop has a tail
constexpr int64_t kLanes = 16;   // partial results of a reduction, one order for every instruction set

constexpr int64_t padded(int64_t codes) { return (codes + kBlock - 1) / kBlock * kBlock; }

// e**x for x <= 0, to about an ulp; 0 below the smallest normal number.
UNIF2ACE_HOST_DEVICE float exp_of_negative(float x) {
  const float lowest = -87.33654f;
  const float clamped = x > lowest ? x : lowest;
  const float shifted = clamped * 1.44269504f + 12582912.0f;  // 1.5 * 2**23: rounds to an integer in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (clamped - n * 0x1.62E4p-1f) - n * 0x1.7F7D1Cp-20f;
  float p = 1.0f / 5040;  // the series: |r| <= ln(2) / 2, so its next term is below 6e-9
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = (p * r) * r + r;
  const float power = bits_float((float_bits(shifted) - float_bits(12582912.0f) + 127) << 23);
  return x > lowest ? p * power + power : 0.0f;
}

UNIF2ACE_HOST_DEVICE double exp_of_negative(double x) { return std::exp(x); }

template <class T>
UNIF2ACE_HOST_DEVICE T largest_of_block(const T* values) {
  T lanes[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) lanes[l] = values[l];
  for (int64_t i = kLanes; i < kBlock; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] = values[i + l] > lanes[l] ? values[i + l] : lanes[l];
  return *std::max_element(lanes, lanes + kLanes);
}

template <class T>
UNIF2ACE_HOST_DEVICE double sum_of_block(const T* values) {
  T lanes[kLanes] = {};
  for (int64_t i = 0; i < kBlock; i += kLanes)
    for (int64_t l = 0; l < kLanes; ++l) lanes[l] += values[i + l];
  double sum = 0;
  for (int64_t l = 0; l < kLanes; ++l) sum += lanes[l];
  return sum;
}

// The first of the largest of whole blocks.
template <class T>
struct Winner {
  T score = -std::numeric_limits<T>::infinity();
  int64_t index = 0;

  UNIF2ACE_HOST_DEVICE void take_block(const T* scores, int64_t first) {
    const T largest = largest_of_block(scores);
    if (!(largest > score)) return;
    score = largest;
    index = first + (std::find(scores, scores + kBlock, largest) - scores);
  }
};

// The scaled values above `threshold`, as a sum of exponentials.
template <class T>
UNIF2ACE_HOST_DEVICE double mass_above(const T* scaled, int64_t length, T threshold) {
  double mass = 0;
  for (int64_t first = 0; first < length; first += kBlock) {
    T terms[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) {
      const T x = scaled[first + i], term = exp_of_negative(x);
      terms[i] = x > threshold ? term : T(0);
    }
    mass += sum_of_block(terms);
  }
  return mass;
}

// scores[i] = shifted[i] / temperature + Gumbel number of (row, i), with -inf where top-k leaves i out; returns the
// first of the largest scores that top-p leaves in. `shifted` becomes the scaled values.
template <class T>
UNIF2ACE_HOST_DEVICE int64_t gumbel_max(T* shifted, T* scores, int64_t codes, uint32_t row, const DrawOptions& o) {
  const T none = -std::numeric_limits<T>::infinity(), inverse = static_cast<T>(1 / o.temperature);
  const int64_t length = padded(codes);
  for (int64_t i = 0; i < length; ++i) shifted[i] *= inverse;
  if (o.top_k > 0 && o.top_k < codes) {
    std::copy(shifted, shifted + codes, scores);
    std::nth_element(scores, scores + o.top_k - 1, scores + codes, std::greater<T>());
    const T smallest = scores[o.top_k - 1];
    for (int64_t i = 0; i < length; ++i) shifted[i] = shifted[i] < smallest ? none : shifted[i];
  }
  Winner<T> winner;
  for (int64_t first = 0; first < length; first += kBlock) {
    uint32_t words[kBlock];
    for (int64_t g = 0; g < kBlock / 4; ++g) {
      const Words four = words_of_group(o.seed, o.offset, row, static_cast<uint32_t>(first / 4 + g), kTokenStream);
      for (int lane = 0; lane < 4; ++lane) words[4 * g + lane] = four.w[lane];
    }
    for (int64_t i = 0; i < kBlock; ++i) scores[first + i] = shifted[first + i] + static_cast<T>(gumbel(words[i]));
    winner.take_block(scores + first, first);
  }
  if (o.top_p >= 1) return winner.index;
  // The nucleus is closed upwards: a winner outside takes itself and everything that is no likelier out of the race.
  const double nucleus = o.top_p * mass_above(shifted, length, none);
  while (mass_above(shifted, length, shifted[winner.index]) >= nucleus) {
    const T outside = shifted[winner.index];
    winner = {};
    for (int64_t first = 0; first < length; first += kBlock) {
      for (int64_t i = first; i < first + kBlock; ++i) scores[i] = shifted[i] > outside ? scores[i] : none;
      winner.take_block(scores + first, first);
    }
  }
  return winner.index;
}

// code: -1 where the largest guided logit is not finite. scratch: 2 * padded(codes) values.
template <class T>
UNIF2ACE_HOST_DEVICE void draw_row(const T* cond, const T* uncond, int64_t codes, uint32_t row, const DrawOptions& o,
                                   T* scratch, int64_t* code, T* confidence) {
  const T none = -std::numeric_limits<T>::infinity();
  const int64_t length = padded(codes);
  T *const shifted = scratch, *const scores = scratch + length;
  if (uncond == nullptr) {
    std::copy(cond, cond + codes, shifted);
  } else {
    const T a = static_cast<T>(1 + o.guidance), b = static_cast<T>(o.guidance);
    for (int64_t i = 0; i < codes; ++i) {
      const T mixed = a * cond[i] - b * uncond[i];
      shifted[i] = (cond[i] == none) | (uncond[i] == none) ? none : mixed;
    }
  }
  std::fill(shifted + codes, shifted + length, none);

  Winner<T> likeliest;
  bool has_nan = false;
  for (int64_t first = 0; first < length; first += kBlock) {
    int32_t nans = 0;
    for (int64_t i = first; i < first + kBlock; ++i) nans += shifted[i] != shifted[i];
    has_nan |= nans != 0;
    likeliest.take_block(shifted + first, first);
  }
  if (has_nan || !std::isfinite(likeliest.score)) {
    *code = -1;
    *confidence = none;
    return;
  }

  double total = 0, weighted = 0;
  T second = none;
  for (int64_t first = 0; first < length; first += kBlock) {
    T* const block = shifted + first;
    T terms[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) block[i] -= likeliest.score;
    for (int64_t i = 0; i < kBlock; ++i) terms[i] = exp_of_negative(block[i]);
    total += sum_of_block(terms);
    if (o.confidence == Confidence::kNegEntropy) {
      for (int64_t i = 0; i < kBlock; ++i) terms[i] *= block[i] > T(-1000) ? block[i] : T(-1000);
      weighted += sum_of_block(terms);
    } else if (o.confidence == Confidence::kMargin) {
      for (int64_t i = 0; i < kBlock; ++i) terms[i] = first + i == likeliest.index ? none : block[i];
      second = std::max(second, largest_of_block(terms));
    }
  }
  *code = o.temperature > 0 ? gumbel_max(shifted, scores, codes, row, o) : likeliest.index;
  // The guided logit of the winner once more: the race has scaled the row.
  const T logit = uncond == nullptr
      ? cond[*code]
      : static_cast<T>(1 + o.guidance) * cond[*code] - static_cast<T>(o.guidance) * uncond[*code];
  const T drawn = logit - likeliest.score;
  const T log_total = static_cast<T>(std::log(total));
  switch (o.confidence) {
    case Confidence::kLogProb: *confidence = drawn - log_total; break;
    case Confidence::kNegEntropy: *confidence = static_cast<T>(weighted / total) - log_total; break;
    case Confidence::kMargin: *confidence = static_cast<T>((1 - std::exp(static_cast<double>(second))) / total); break;
  }
}

}  // namespace unif2ace
