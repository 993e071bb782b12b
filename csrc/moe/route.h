// Routing on the host: 16 tokens side by side, so that every loop over them is one vector instruction or two.
//
// A tile holds, for each of its tokens (lanes), the columns of the token's own group: x[n * kLanes + lane]. A lane
// whose group is smaller than the largest of the tile is padded with -inf, which is never chosen.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/simd.h"
#include "moe/activation.h"
#include "moe/route.cuh"
#include "moe/tiles.h"

namespace unif2ace {

constexpr int64_t kLanes = 16;

template <class Real>
using Key = std::conditional_t<std::is_same_v<Real, double>, int64_t, int32_t>;

// As the one for float.
UNIF2ACE_INLINE int64_t order_key(double x) {
  int64_t bits;
  const double positive_zero = x + 0.0;
  std::memcpy(&bits, &positive_zero, sizeof bits);
  const int64_t key = bits ^ ((bits >> 63) & std::numeric_limits<int64_t>::max());
  return x == x ? key : std::numeric_limits<int64_t>::max();
}

// What is the same for all tokens.
template <class Real>
struct Router {
  std::vector<int64_t> first;  // column of each group, and the end: G + 1
  std::vector<Real> bias;      // [E] or empty
  int64_t top_k, shared;
  bool normalize, softmax, with_z;

  int64_t size(int64_t group) const { return group < 0 ? 0 : first[group + 1] - first[group]; }
  int64_t groups() const { return static_cast<int64_t>(first.size()) - 1; }
  int64_t routed() const { return first.back(); }
  int64_t slots() const { return top_k + shared; }
  int64_t experts() const { return routed() + shared * groups(); }
  int64_t widest() const {
    int64_t widest = 0;
    for (int64_t g = 0; g < groups(); ++g) widest = std::max(widest, size(g));
    return widest;
  }
};

template <class Real>
struct Tile {
  explicit Tile(const Router<Real>& router)
      : x(router.widest() * kLanes), score(x.size()), other(x.size()), key(x.size()), best(router.top_k * kLanes) {}

  int64_t tokens = 0, columns = 0;
  int64_t group[kLanes];  // -1 beyond the last token
  int64_t first[kLanes];
  std::vector<Real> x, score, other;  // [columns, kLanes]
  std::vector<Key<Real>> key;        // likewise
  std::vector<int32_t> best;         // [K, kLanes], column within the group
  Real total[kLanes];                // what the weights are divided by
  Real lse[kLanes];                  // logsumexp, where a z loss wants it

  bool one_group() const { return std::all_of(group, group + kLanes, [&](int64_t g) { return g == group[0]; }); }
};

// ids, which are in range, and logits are those of the tile's first token on.
template <class Real, class Logit>
void load_tile(const Router<Real>& router, const int64_t* ids, const Logit* logits, int64_t stride_t, int64_t stride_e,
               Tile<Real>& tile) {
  tile.columns = 1;
  for (int64_t l = 0; l < kLanes; ++l) {
    const int64_t group = l < tile.tokens ? ids[l] : -1, at = group < 0 ? 0 : group;
    tile.group[l] = group;
    tile.first[l] = router.first[at];
    tile.columns = std::max(tile.columns, router.size(group));
  }
  for (int64_t l = 0; l < kLanes; ++l) {
    const int64_t size = router.size(tile.group[l]);
    const Logit* const row = logits + l * stride_t + tile.first[l] * stride_e;
    Real* const x = tile.x.data() + l;
    for (int64_t n = 0; n < size; ++n) x[n * kLanes] = widen<Real>(row[n * stride_e]);
    for (int64_t n = size; n < tile.columns; ++n) x[n * kLanes] = -std::numeric_limits<Real>::infinity();
  }
}

// score = softmax of the lanes, lse their logsumexp unless it is nullptr.
template <class Real>
UNIF2ACE_INLINE void softmax_tile(const Real* __restrict x, Real* __restrict score, int64_t columns, Real* lse) {
  Real largest[kLanes], sum[kLanes];
  for (int64_t l = 0; l < kLanes; ++l) largest[l] = x[l], sum[l] = 0;
  for (int64_t n = 1; n < columns; ++n)
    for (int64_t l = 0; l < kLanes; ++l) {
      const Real value = x[n * kLanes + l];
      largest[l] = value > largest[l] ? value : largest[l];
    }
  for (int64_t n = 0; n < columns; ++n)
    for (int64_t l = 0; l < kLanes; ++l) {
      const Real e = exp_nonpositive(x[n * kLanes + l] - largest[l]);
      score[n * kLanes + l] = e;
      sum[l] += e;
    }
  for (int64_t n = 0; n < columns; ++n)
    for (int64_t l = 0; l < kLanes; ++l) score[n * kLanes + l] /= sum[l];
  for (int64_t l = 0; lse != nullptr && l < kLanes; ++l) lse[l] = largest[l] + std::log(sum[l]);
}

template <class Real>
UNIF2ACE_INLINE void sigmoid_tile(const Real* __restrict x, Real* __restrict score, int64_t columns) {
  for (int64_t i = 0; i < columns * kLanes; ++i) {
    Real slope;
    sigmoid(x[i], score[i], slope);
  }
}

template <class Real>
UNIF2ACE_INLINE void sum_tile(const Real* __restrict values, int64_t columns, Real* __restrict sum) {
  for (int64_t l = 0; l < kLanes; ++l) sum[l] = 0;
  for (int64_t n = 0; n < columns; ++n)
    for (int64_t l = 0; l < kLanes; ++l) sum[l] += values[n * kLanes + l];
}

// best[k] = the k-th largest: keys are taken out as they win, and of equals the first wins.
template <class Integer>
UNIF2ACE_INLINE void take_best(Integer* __restrict key, int64_t columns, int64_t top_k, int32_t* __restrict best) {
  const Integer lowest = std::numeric_limits<Integer>::min();
  for (int64_t k = 0; k < top_k; ++k) {
    Integer largest[kLanes], at[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) largest[l] = lowest, at[l] = 0;
    for (int64_t n = 0; n < columns; ++n)
      for (int64_t l = 0; l < kLanes; ++l) {
        const Integer value = key[n * kLanes + l];
        at[l] = value > largest[l] ? static_cast<Integer>(n) : at[l];
        largest[l] = value > largest[l] ? value : largest[l];
      }
    for (int64_t l = 0; l < kLanes; ++l) {
      best[k * kLanes + l] = static_cast<int32_t>(at[l]);
      key[at[l] * kLanes + l] = lowest;
    }
  }
}

// Scores, choices and the weights' divisor of a loaded tile; returns the shares: scores that sum to 1.
template <class Real>
UNIF2ACE_INLINE const Real* choose_tile(const Router<Real>& router, Tile<Real>& tile) {
  const int64_t columns = tile.columns, numbers = columns * kLanes;
  Real *const x = tile.x.data(), *const score = tile.score.data(), *const other = tile.other.data();
  Key<Real>* const key = tile.key.data();
  Real* const lse = router.with_z ? tile.lse : nullptr;
  if (router.softmax) {
    softmax_tile(x, score, columns, lse);
  } else {
    if (router.with_z) softmax_tile(x, score, columns, lse);
    sigmoid_tile(x, score, columns);
  }
  // Without a bias the logits choose, as the scores rise with them: a choice hangs on no exponential.
  if (router.bias.empty()) {
    for (int64_t i = 0; i < numbers; ++i) key[i] = order_key(x[i]);
  } else {
    const bool one_group = tile.one_group();
    for (int64_t n = 0; n < columns; ++n) {
      Real bias[kLanes];
      for (int64_t l = 0; l < kLanes; ++l)
        bias[l] = router.bias[one_group ? tile.first[0] + n : std::min(tile.first[l] + n, router.routed() - 1)];
      for (int64_t l = 0; l < kLanes; ++l) key[n * kLanes + l] = order_key(score[n * kLanes + l] + bias[l]);
    }
  }
  for (int64_t l = 0; l < kLanes; ++l)
    for (int64_t n = router.size(tile.group[l]); n < columns; ++n)
      key[n * kLanes + l] = std::numeric_limits<Key<Real>>::min();
  take_best(key, columns, router.top_k, tile.best.data());
  for (int64_t l = 0; l < kLanes; ++l) tile.total[l] = router.normalize ? Real(kTiny) : Real(1);
  for (int64_t k = 0; router.normalize && k < router.top_k; ++k)
    for (int64_t l = 0; l < kLanes; ++l) tile.total[l] += score[tile.best[k * kLanes + l] * kLanes + l];
  if (router.softmax) return score;
  Real sum[kLanes];
  sum_tile(score, columns, sum);
  for (int64_t n = 0; n < columns; ++n)
    for (int64_t l = 0; l < kLanes; ++l) other[n * kLanes + l] = score[n * kLanes + l] / (sum[l] + Real(kTiny));
  return other;
}

// sums [E, kLanes] += the shares of the tokens of each group that the tile has.
template <class Real>
UNIF2ACE_INLINE void add_shares(const Router<Real>& router, const Tile<Real>& tile, const Real* __restrict share,
                                Real* __restrict sums) {
  int64_t lowest = router.groups(), highest = -1;
  for (int64_t l = 0; l < tile.tokens; ++l) {
    lowest = std::min(lowest, tile.group[l]);
    highest = std::max(highest, tile.group[l]);
  }
  for (int64_t g = lowest; g <= highest; ++g) {
    Real* const own = sums + router.first[g] * kLanes;
    const int64_t size = std::min(tile.columns, router.size(g));
    bool is_in[kLanes];
    for (int64_t l = 0; l < kLanes; ++l) is_in[l] = tile.group[l] == g;
    for (int64_t n = 0; n < size; ++n)
      for (int64_t l = 0; l < kLanes; ++l) own[n * kLanes + l] += is_in[l] ? share[n * kLanes + l] : Real(0);
  }
}

// The gradients of the outputs, as a token sees them.
template <class Real>
struct Cotangent {
  const Real* weight = nullptr;  // [T, S] with strides, or nullptr for zeros
  int64_t stride_t = 0, stride_s = 0;
  std::vector<Real> share;  // [E], of a token's shares, the same for all tokens; empty for zeros
  Real lse = 0;             // of a token's logsumexp, over the logsumexp
};

// tile.other = gradient of the loaded logits, whose first token is token t.
template <class Real>
UNIF2ACE_INLINE void backward_tile(const Router<Real>& router, const Cotangent<Real>& given, const int64_t* expert,
                                   int64_t t, Tile<Real>& tile) {
  const int64_t columns = tile.columns, numbers = columns * kLanes;
  Real *const x = tile.x.data(), *const score = tile.score.data(), *const grad = tile.other.data();
  Real dot[kLanes];
  if (router.softmax) {
    softmax_tile(x, score, columns, router.with_z ? tile.lse : nullptr);
  } else {
    sigmoid_tile(x, score, columns);
  }

  if (given.share.empty()) {
    std::fill(grad, grad + numbers, Real(0));
  } else if (tile.one_group()) {
    for (int64_t n = 0; n < columns; ++n)
      for (int64_t l = 0; l < kLanes; ++l) grad[n * kLanes + l] = given.share[tile.first[0] + n];
  } else {
    for (int64_t l = 0; l < kLanes; ++l) {
      const int64_t size = router.size(tile.group[l]);
      for (int64_t n = 0; n < columns; ++n) grad[n * kLanes + l] = n < size ? given.share[tile.first[l] + n] : Real(0);
    }
  }
  if (!router.softmax && !given.share.empty()) {  // a share is a score over the sum of the scores
    Real sum[kLanes];
    sum_tile(score, columns, sum);
    for (int64_t l = 0; l < kLanes; ++l) sum[l] += Real(kTiny), dot[l] = 0;
    for (int64_t n = 0; n < columns; ++n)
      for (int64_t l = 0; l < kLanes; ++l) dot[l] += grad[n * kLanes + l] * score[n * kLanes + l];
    for (int64_t n = 0; n < columns; ++n)
      for (int64_t l = 0; l < kLanes; ++l) grad[n * kLanes + l] = (grad[n * kLanes + l] - dot[l] / sum[l]) / sum[l];
  }
  for (int64_t l = 0; given.weight != nullptr && l < tile.tokens; ++l) {
    const int64_t* const chosen = expert + (t + l) * router.slots();
    const Real* const by_slot = given.weight + (t + l) * given.stride_t;
    Real total = router.normalize ? Real(kTiny) : Real(1), mean = 0;
    for (int64_t k = 0; router.normalize && k < router.top_k; ++k) {
      const Real s = score[(chosen[k] - tile.first[l]) * kLanes + l];
      total += s;
      mean += by_slot[k * given.stride_s] * s;
    }
    for (int64_t k = 0; k < router.top_k; ++k)
      grad[(chosen[k] - tile.first[l]) * kLanes + l] += (by_slot[k * given.stride_s] - mean / total) / total;
  }
  if (router.softmax) {
    for (int64_t l = 0; l < kLanes; ++l) dot[l] = 0;
    for (int64_t n = 0; n < columns; ++n)
      for (int64_t l = 0; l < kLanes; ++l) dot[l] += grad[n * kLanes + l] * score[n * kLanes + l];
    for (int64_t n = 0; n < columns; ++n)
      for (int64_t l = 0; l < kLanes; ++l)
        grad[n * kLanes + l] = score[n * kLanes + l] * (grad[n * kLanes + l] - dot[l]);
  } else {
    for (int64_t i = 0; i < numbers; ++i) grad[i] *= score[i] * (Real(1) - score[i]);
  }
  if (!router.with_z) return;
  if (!router.softmax) softmax_tile(x, score, columns, tile.lse);
  for (int64_t n = 0; n < columns; ++n)
    for (int64_t l = 0; l < kLanes; ++l) grad[n * kLanes + l] += given.lse * tile.lse[l] * score[n * kLanes + l];
}

}  // namespace unif2ace
