// What the loss of a head and that of ready logits share: the row in each type; rows' weights, targets and statistics.
#pragma once

#include <optional>
#include <vector>

#include "common/torch_stable.h"
#include "d3diff/row.h"

namespace unif2ace {

// loss_row, made for each instruction set in row.cpp.
#define UNIF2ACE_LOSS_ROW(T)                                                                       \
  LossTerms one_row(const T* logits, const ComputeOf<T>* bias, int64_t columns, int64_t target,    \
                    const LossWeights& weight, ComputeOf<T>* scratch, T* gradient, ComputeOf<T>* column_sum)
UNIF2ACE_LOSS_ROW(double);
UNIF2ACE_LOSS_ROW(float);
UNIF2ACE_LOSS_ROW(BFloat16Bits);
UNIF2ACE_LOSS_ROW(HalfBits);

// The rows' weights and targets, [T] each, read by the index of a row.
template <class Real>
struct RowInputs {
  const int64_t* targets;
  const Real *ce, *penalty, *shift, *mass;
  int64_t start, code_first, code_last;

  LossWeights at(int64_t row) const {
    const double none = 0;
    return {ce[row], penalty ? penalty[row] : none, shift ? shift[row] : none, mass ? mass[row] : none,
            code_first, code_last};
  }
};

template <class Real>
const Real* vector_data(const Tensor& vector, int64_t length, const char* name) {
  constexpr ScalarType dtype = std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float;
  STD_TORCH_CHECK(vector.scalar_type() == dtype && vector.numel() == length && vector.is_contiguous(), name,
                  ": expected a contiguous vector of ", length, " in the dtype of accumulation");
  return static_cast<const Real*>(vector.const_data_ptr());
}
template <class Real>
const Real* vector_data(const std::optional<Tensor>& vector, int64_t length, const char* name) {
  return vector ? vector_data<Real>(*vector, length, name) : nullptr;
}

template <class Real>
RowInputs<Real> row_inputs(const Tensor& targets, const Tensor& ce_weight, const std::optional<Tensor>& penalty,
                           const std::optional<Tensor>& shift, const std::optional<Tensor>& mass,
                           const std::vector<int64_t>& codes, int64_t start, int64_t columns) {
  const int64_t total = targets.numel();
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long && targets.is_contiguous(), "targets: expected int64 [T]");
  RowInputs<Real> in{targets.const_data_ptr<int64_t>(),
                     vector_data<Real>(ce_weight, total, "ce_weight"),
                     vector_data<Real>(penalty, total, "penalty_weight"),
                     vector_data<Real>(shift, total, "shift"),
                     vector_data<Real>(mass, total, "mass_weight"), start, 0, 0};
  if (in.mass != nullptr) {
    STD_TORCH_CHECK(codes.size() == 2, "codes: expected start and end");
    in.code_first = codes[0] - start;
    in.code_last = codes[1] - start;
    STD_TORCH_CHECK(0 <= in.code_first && in.code_first <= in.code_last && in.code_last <= columns,
                    "codes: expected columns of the softmax");
  }
  return in;
}

// Where a row's statistics go, [T] each.
template <class Real>
struct RowOutputs {
  Real *ce, *lse, *mass;
  bool* hit;

  void put(int64_t row, const LossTerms& terms) const {
    ce[row] = static_cast<Real>(terms.ce);
    lse[row] = static_cast<Real>(terms.lse);
    mass[row] = static_cast<Real>(terms.mass);
    hit[row] = terms.hit;
  }
};

template <class Real>
RowOutputs<Real> row_outputs(Tensor& ce, Tensor& lse, Tensor& mass, Tensor& hit, int64_t total) {
  vector_data<Real>(ce, total, "ce");
  vector_data<Real>(lse, total, "lse");
  vector_data<Real>(mass, total, "mass");
  STD_TORCH_CHECK(hit.scalar_type() == ScalarType::Bool && hit.numel() == total && hit.is_contiguous(),
                  "hit: expected bool [T]");
  return {static_cast<Real*>(ce.mutable_data_ptr()), static_cast<Real*>(lse.mutable_data_ptr()),
          static_cast<Real*>(mass.mutable_data_ptr()), hit.mutable_data_ptr<bool>()};
}

inline void check_targets(const int64_t* targets, const std::vector<int64_t>& rows, int64_t start, int64_t columns) {
  for (const int64_t row : rows)
    STD_TORCH_CHECK(targets[row] >= start && targets[row] < start + columns, "targets: expected tokens in [", start,
                    ", ", start + columns, ") or ignore_index, got ", targets[row]);
}

inline double total_of(const std::vector<double>& losses) {
  double sum = 0;
  for (const double each : losses) sum += each;
  return sum;
}

inline Tensor scalar_of(double value, const Tensor& like, ScalarType dtype) {
  Tensor scalar = torch::stable::new_empty(like, {}, dtype);
  if (dtype == ScalarType::Double) *scalar.mutable_data_ptr<double>() = value;
  else *scalar.mutable_data_ptr<float>() = static_cast<float>(value);
  return scalar;
}

inline ScalarType accumulation_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The rows that have a label and, with `group` [T], are of the group `which`.
inline std::vector<int64_t> labelled(const Tensor& targets, int64_t ignore_index, const int64_t* group = nullptr,
                                     int64_t which = 0) {
  STD_TORCH_CHECK(targets.scalar_type() == ScalarType::Long && targets.is_contiguous(), "targets: expected int64 [T]");
  const int64_t* const data = targets.const_data_ptr<int64_t>();
  std::vector<int64_t> rows;
  rows.reserve(targets.numel());
  for (int64_t row = 0; row < targets.numel(); ++row)
    if (data[row] != ignore_index && (group == nullptr || group[row] == which)) rows.push_back(row);
  return rows;
}

}  // namespace unif2ace
