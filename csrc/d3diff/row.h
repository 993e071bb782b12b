// One row of the loss: softmax statistics, loss and the gradient of its logits, in passes over a scratch row that stays
// in the first- and second-level cache. kernels/unif2ace_kernels/d3diff/rows_torch.py is the same in torch.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "common/exponential.h"
#include "common/reals.h"

namespace unif2ace {

constexpr int64_t kLossBlock = 256;  // scratch rows are padded with -inf to blocks, so that no loop has a tail
constexpr int64_t kLossLanes = 16;   // partial results of a reduction, one order for every instruction set
constexpr double kMaxExponent = 80;  // e^u goes on as its tangent beyond, as in head.py

constexpr int64_t padded_columns(int64_t columns) { return (columns + kLossBlock - 1) / kLossBlock * kLossBlock; }

// The row's loss is ce CE + penalty (e^u - 1 - u) + mass P, u = lse + shift, P = sum of p over the codes.
struct LossWeights {
  double ce, penalty, shift, mass;
  int64_t code_first, code_last;  // the codes' columns; empty where P is not asked for
};

struct LossTerms {
  double loss, ce, lse, mass;
  bool hit;  // the target has the largest logit
};

// Partial results of a reduction in registers; the compiler splits them for narrower instruction sets.
template <class Real>
using LossVector __attribute__((vector_size(kLossLanes * sizeof(Real)))) = Real;

template <class Real>
UNIF2ACE_HOST_DEVICE Real largest_of(const Real* row, int64_t length) {
  LossVector<Real> largest, next;
  std::memcpy(&largest, row, sizeof largest);
  for (int64_t i = kLossLanes; i < length; i += kLossLanes) {
    std::memcpy(&next, row + i, sizeof next);
    largest = next > largest ? next : largest;
  }
  Real result = largest[0];
  for (int64_t l = 1; l < kLossLanes; ++l) result = std::max<Real>(result, largest[l]);
  return result;
}

// row becomes e^(row - top); returns its sum.
template <class Real>
UNIF2ACE_HOST_DEVICE double exponentiate(Real* row, int64_t length, Real top) {
  LossVector<double> sums = {};
  for (int64_t first = 0; first < length; first += kLossBlock) {
    Real* const block = row + first;
    for (int64_t i = 0; i < kLossBlock; ++i) block[i] = exp_nonpositive(block[i] - top);
    LossVector<Real> partial = {}, next;
    for (int64_t i = 0; i < kLossBlock; i += kLossLanes) {
      std::memcpy(&next, block + i, sizeof next);
      partial += next;
    }
    sums += __builtin_convertvector(partial, LossVector<double>);
  }
  double sum = 0;
  for (int64_t l = 0; l < kLossLanes; ++l) sum += sums[l];
  return sum;
}

template <class Real>
UNIF2ACE_HOST_DEVICE double sum_between(const Real* row, int64_t first, int64_t last) {
  Real lanes[kLossLanes] = {};
  double sum = 0;
  int64_t i = first;
  for (; i + kLossLanes <= last; i += kLossLanes)
    for (int64_t l = 0; l < kLossLanes; ++l) lanes[l] += row[i + l];
  for (; i < last; ++i) sum += row[i];
  for (int64_t l = 0; l < kLossLanes; ++l) sum += lanes[l];
  return sum;
}

// gradient[i] = by * row[i] between two columns, added to column_sum where that is given.
template <class T, class Real>
UNIF2ACE_HOST_DEVICE void scale_between(const Real* __restrict row, int64_t first, int64_t last, double by,
                                        T* __restrict gradient, Real* __restrict column_sum) {
  const Real factor = static_cast<Real>(by);
  if (column_sum == nullptr) {
    for (int64_t i = first; i < last; ++i) from_compute(row[i] * factor, gradient[i]);
  } else {
    for (int64_t i = first; i < last; ++i) {
      const Real g = row[i] * factor;
      from_compute(g, gradient[i]);
      column_sum[i] += g;
    }
  }
}

// e^u - 1 - u >= 0, the tangent of e^u taken beyond kMaxExponent.
inline double penalty_of(double u) {
  const double low = u > kMaxExponent ? kMaxExponent : u;
  return std::expm1(low) + std::exp(low) * (u - low) - u;
}

inline double product_or_zero(double weight, double value) { return weight == 0 ? 0 : weight * value; }

// logits [columns] (bias is added where there is one) -> terms; gradient [columns] of the row's loss where it is asked
// for (it may be the logits' own memory), added to column_sum where that is given. scratch: padded_columns(columns).
template <class T, class Real>
UNIF2ACE_HOST_DEVICE LossTerms loss_row(const T* logits, const Real* bias, int64_t columns, int64_t target,
                                        const LossWeights& weight, Real* scratch, T* gradient,
                                        Real* column_sum) {
  const int64_t length = padded_columns(columns);
  if (bias == nullptr) {
    for (int64_t i = 0; i < columns; ++i) scratch[i] = to_compute(logits[i]);
  } else {
    for (int64_t i = 0; i < columns; ++i) scratch[i] = to_compute(logits[i]) + bias[i];
  }
  std::fill(scratch + columns, scratch + length, -std::numeric_limits<Real>::infinity());
  const Real top = largest_of(scratch, length), at_target = scratch[target];
  if (top == -std::numeric_limits<Real>::infinity()) {  // the caller reports it, by its lse
    if (gradient != nullptr) std::fill(gradient, gradient + columns, T{});
    const double none = top;
    return {product_or_zero(weight.ce, -none), -none, none, 0, false};
  }
  const double sum = exponentiate(scratch, length, top), log_sum = std::log(sum);
  LossTerms terms{0, (static_cast<double>(top) - at_target) + log_sum, top + log_sum, 0, at_target >= top};
  terms.mass = sum_between(scratch, weight.code_first, weight.code_last) / sum;
  const double u = terms.lse + weight.shift;
  terms.loss = product_or_zero(weight.ce, terms.ce) + product_or_zero(weight.mass, terms.mass);
  if (weight.penalty != 0) terms.loss += weight.penalty * penalty_of(u);
  if (gradient == nullptr) return terms;
  if (weight.ce == 0) {  // the other weights are multiples of parts of it
    std::fill(gradient, gradient + columns, T{});
    return terms;
  }
  const double pull = weight.penalty == 0 ? 0 : weight.penalty * std::expm1(std::min(u, kMaxExponent));
  const double outside = (weight.ce + pull - weight.mass * terms.mass) / sum;
  const double inside = outside + weight.mass / sum;
  scale_between(scratch, 0, weight.code_first, outside, gradient, column_sum);
  scale_between(scratch, weight.code_first, weight.code_last, inside, gradient, column_sum);
  scale_between(scratch, weight.code_last, columns, outside, gradient, column_sum);
  const bool is_code = weight.code_first <= target && target < weight.code_last;
  const double at_label = scratch[target] * (is_code ? inside : outside) - weight.ce;
  from_compute(static_cast<Real>(at_label), gradient[target]);
  if (column_sum != nullptr) column_sum[target] -= static_cast<Real>(weight.ce);
  return terms;
}

}  // namespace unif2ace
