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

#include "common/exponential.h"
#include "common/gumbel.cuh"
#include "common/philox.cuh"
#include "sampling/score.cuh"

namespace unif2ace {

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

// The mass of the scaled values above `threshold`, from their weights e**scaled.
template <class T>
UNIF2ACE_HOST_DEVICE double mass_above(const T* scaled, const T* weights, int64_t length, T threshold) {
  double mass = 0;
  for (int64_t first = 0; first < length; first += kBlock) {
    T terms[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) terms[i] = scaled[first + i] > threshold ? weights[first + i] : T(0);
    mass += sum_of_block(terms);
  }
  return mass;
}

// The 32-bit words of codes first .. first + kBlock - 1.
UNIF2ACE_HOST_DEVICE void words_of_block(const DrawOptions& o, uint32_t row, int64_t first, uint32_t* words) {
  for (int64_t g = 0; g < kBlock / 4; ++g) {
    const Words four = words_of_group(o.seed, o.offset, row, static_cast<uint32_t>(first / 4 + g), kTokenStream);
    for (int lane = 0; lane < 4; ++lane) words[4 * g + lane] = four.w[lane];
  }
}

// The first of the largest of scaled[i] + Gumbel number of (row, i). Few Gumbel numbers are computed: since
// G = -log(-log1p(-u)) <= -log u, code i cannot reach the best score so far unless weights[i] = e**scaled[i] is at
// least u e**best, which is one product away from the random word. `likeliest` has scaled 0: it goes first, so the
// best is at least the least Gumbel number, -3.13, and no weight that matters underflows.
template <class T>
UNIF2ACE_HOST_DEVICE int64_t race(const T* scaled, const T* weights, int64_t length, int64_t likeliest, uint32_t row,
                                  const DrawOptions& o) {
  uint32_t words[kBlock];
  T best = -std::numeric_limits<T>::infinity();
  int64_t winner = length;
  float reach = 0;  // e**best / 2**31 with room for the rounding of weights, numbers and scores (1e-5 at most)
  const auto enter = [&](int64_t i, uint32_t word) {
    const T score = scaled[i] + static_cast<T>(gumbel(word));
    if (score < best || (score == best && i > winner)) return;
    best = score;
    winner = i;
    reach = std::exp(static_cast<float>(best)) * (0.9999f * 0x1p-31f);
  };
  const int64_t first_block = likeliest / kBlock * kBlock;
  for (int64_t turn = -kBlock; turn < length; turn += kBlock) {
    if (turn == first_block) continue;
    const int64_t first = turn < 0 ? first_block : turn;
    words_of_block(o, row, first, words);
    if (turn < 0) enter(likeliest, words[likeliest - first]);
    int32_t hits = 0;
    for (int64_t i = 0; i < kBlock; ++i)
      hits += weights[first + i] >= static_cast<T>(static_cast<float>(static_cast<int32_t>(words[i] >> 1)) * reach);
    if (hits == 0) continue;
    for (int64_t i = 0; i < kBlock; ++i)
      if (weights[first + i] >= static_cast<T>(static_cast<float>(static_cast<int32_t>(words[i] >> 1)) * reach))
        enter(first + i, words[i]);
  }
  return winner;
}

// The code that is drawn. shifted: logits less their largest, which `likeliest` has; weights: e**shifted. Both are
// overwritten.
template <class T>
UNIF2ACE_HOST_DEVICE int64_t gumbel_max(T* shifted, T* weights, int64_t codes, int64_t likeliest, uint32_t row,
                                        const DrawOptions& o) {
  const T none = -std::numeric_limits<T>::infinity(), inverse = static_cast<T>(1 / o.temperature);
  const int64_t length = padded(codes);
  if (inverse != T(1)) {
    for (int64_t i = 0; i < length; ++i) shifted[i] *= inverse;
    for (int64_t i = 0; i < length; ++i) weights[i] = exp_nonpositive(shifted[i]);
  }
  if (o.top_k > 0 && o.top_k < codes) {
    std::copy(shifted, shifted + codes, weights);
    std::nth_element(weights, weights + o.top_k - 1, weights + codes, std::greater<T>());
    const T smallest = weights[o.top_k - 1];
    for (int64_t i = 0; i < length; ++i) shifted[i] = shifted[i] < smallest ? none : shifted[i];
    for (int64_t i = 0; i < length; ++i) weights[i] = exp_nonpositive(shifted[i]);
  }
  int64_t winner = race(shifted, weights, length, likeliest, row, o);
  if (o.top_p >= 1) return winner;
  // The nucleus is closed upwards: a winner outside takes itself and everything that is no likelier out of the race.
  const double nucleus = o.top_p * mass_above(shifted, weights, length, none);
  while (mass_above(shifted, weights, length, shifted[winner]) >= nucleus) {
    const T outside = shifted[winner];
    for (int64_t i = 0; i < length; ++i) weights[i] = shifted[i] > outside ? weights[i] : T(0);
    for (int64_t i = 0; i < length; ++i) shifted[i] = shifted[i] > outside ? shifted[i] : none;
    winner = race(shifted, weights, length, likeliest, row, o);
  }
  return winner;
}

// A row of logits of one branch; of two, guided, where -inf in either is -inf; of a product, still without its bias.
// In is read, T computes: double for double, else float.
template <class In, class T>
struct Plain {
  const In* cond;
  UNIF2ACE_HOST_DEVICE T operator()(int64_t i) const { return static_cast<T>(cond[i]); }
};

template <class In, class T>
struct Guided {
  const In *cond, *uncond;
  T up, down;
  UNIF2ACE_HOST_DEVICE T operator()(int64_t i) const {
    const T none = -std::numeric_limits<T>::infinity();
    const T c = static_cast<T>(cond[i]), u = static_cast<T>(uncond[i]), mixed = up * c - down * u;
    return (c == none) | (u == none) ? none : mixed;
  }
};

template <class In, class T>
struct Biased {
  const In* product;
  const T* bias;
  UNIF2ACE_HOST_DEVICE T operator()(int64_t i) const { return static_cast<T>(product[i]) + bias[i]; }
};

// Draws from the logits of a row, logit(i) for i < codes. code: -1 where the largest is not finite. scratch:
// 2 * padded(codes) values.
template <class T, class Logit>
UNIF2ACE_HOST_DEVICE void draw_row(const Logit& logit, int64_t codes, uint32_t row, const DrawOptions& o, T* scratch,
                                   int64_t* code, T* confidence) {
  const T none = -std::numeric_limits<T>::infinity();
  const int64_t length = padded(codes);
  T *const shifted = scratch, *const weights = scratch + length;
  for (int64_t i = 0; i < codes; ++i) shifted[i] = logit(i);
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
    T *const block = shifted + first, *const block_weights = weights + first;
    T terms[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) block[i] -= likeliest.score;
    for (int64_t i = 0; i < kBlock; ++i) block_weights[i] = exp_nonpositive(block[i]);
    total += sum_of_block(block_weights);
    if (o.confidence == Confidence::kNegEntropy) {
      for (int64_t i = 0; i < kBlock; ++i)
        terms[i] = block_weights[i] * (block[i] > T(-1000) ? block[i] : T(-1000));
      weighted += sum_of_block(terms);
    } else if (o.confidence == Confidence::kMargin) {
      for (int64_t i = 0; i < kBlock; ++i) terms[i] = first + i == likeliest.index ? none : block[i];
      second = std::max(second, largest_of_block(terms));
    }
  }
  *code = o.temperature > 0 ? gumbel_max(shifted, weights, codes, likeliest.index, row, o) : likeliest.index;
  const T drawn = logit(*code) - likeliest.score;  // once more: the race has scaled the row
  const T log_total = static_cast<T>(std::log(total));
  switch (o.confidence) {
    case Confidence::kLogProb: *confidence = drawn - log_total; break;
    case Confidence::kNegEntropy: *confidence = static_cast<T>(weighted / total) - log_total; break;
    case Confidence::kMargin: *confidence = static_cast<T>((1 - std::exp(static_cast<double>(second))) / total); break;
  }
}

}  // namespace unif2ace
