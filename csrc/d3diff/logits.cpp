// unif2ace_native: the loss of ready logits and its backward, on the CPU.
#include <algorithm>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "d3diff/rows.h"

namespace unif2ace {
namespace {

void check_logits(const Tensor& logits, int64_t start, int64_t end) {
  STD_TORCH_CHECK(logits.dim() == 2 && 0 <= start && start < end && end <= logits.size(1),
                  "logits: expected [T, V] with the columns ", start, " to ", end);
}

// The loss, and ce, lse, mass and hit of each row, 0 in rows without a label.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> logits_cpu(
    const Tensor& given, const Tensor& targets, const Tensor& ce_weight, std::optional<Tensor> penalty,
    std::optional<Tensor> shift, std::optional<Tensor> mass_weight, int64_t start, int64_t end,
    std::vector<int64_t> codes, int64_t ignore_index) {
  check_logits(given, start, end);
  const Tensor logits = torch::stable::contiguous(given);
  const int64_t total = logits.size(0), vocabulary = logits.size(1), columns = end - start;
  const ScalarType dtype = accumulation_of(logits);
  Tensor ce = torch::stable::new_zeros(logits, {total}, dtype), lse = torch::stable::new_zeros(logits, {total}, dtype);
  Tensor mass = torch::stable::new_zeros(logits, {total}, dtype);
  Tensor hit = torch::stable::new_zeros(logits, {total}, ScalarType::Bool);
  double loss = 0;
  dispatch(logits.scalar_type(), "logits", [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    using Real = ComputeOf<T>;
    const auto in = row_inputs<Real>(targets, ce_weight, penalty, shift, mass_weight, codes, start, columns);
    const auto out = row_outputs<Real>(ce, lse, mass, hit, total);
    const std::vector<int64_t> rows = labelled(targets, ignore_index);
    check_targets(in.targets, rows, start, columns);
    const T* const data = static_cast<const T*>(logits.const_data_ptr());
    std::vector<double> losses(rows.size());
    torch::stable::parallel_for(0, static_cast<int64_t>(rows.size()), 8, [&](int64_t begin, int64_t last) {
      const std::unique_ptr<Real[]> scratch(new Real[padded_columns(columns)]);
      for (int64_t i = begin; i < last; ++i) {
        const int64_t row = rows[i];
        const LossTerms terms =
            one_row(data + row * vocabulary + start, nullptr, columns, in.targets[row] - start, in.at(row),
                    scratch.get(), nullptr, nullptr);
        losses[i] = terms.loss;
        out.put(row, terms);
      }
    });
    loss = total_of(losses);
  });
  return {scalar_of(loss, logits, dtype), ce, lse, mass, hit};
}

Tensor logits_backward_cpu(const Tensor& grad_loss, const Tensor& given, const Tensor& targets,
                           const Tensor& ce_weight, std::optional<Tensor> penalty, std::optional<Tensor> shift,
                           std::optional<Tensor> mass_weight, const Tensor& /*lse: made again*/,
                           const Tensor& /*mass*/, int64_t start, int64_t end, std::vector<int64_t> codes,
                           int64_t ignore_index) {
  check_logits(given, start, end);
  const Tensor logits = torch::stable::contiguous(given);
  const int64_t total = logits.size(0), vocabulary = logits.size(1), columns = end - start;
  Tensor gradient = torch::stable::new_empty(logits, {total, vocabulary});
  dispatch(logits.scalar_type(), "logits", [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    using Real = ComputeOf<T>;
    const auto in = row_inputs<Real>(targets, ce_weight, penalty, shift, mass_weight, codes, start, columns);
    check_targets(in.targets, labelled(targets, ignore_index), start, columns);
    const double by = *vector_data<Real>(grad_loss, 1, "grad_loss");
    const T* const from = static_cast<const T*>(logits.const_data_ptr());
    T* const to = static_cast<T*>(gradient.mutable_data_ptr());
    torch::stable::parallel_for(0, total, 8, [&](int64_t begin, int64_t last) {
      const std::unique_ptr<Real[]> scratch(new Real[padded_columns(columns)]);
      for (int64_t row = begin; row < last; ++row) {
        T* const at = to + row * vocabulary;
        if (in.targets[row] == ignore_index) {
          std::fill(at, at + vocabulary, T{});
          continue;
        }
        std::fill(at, at + start, T{});
        std::fill(at + end, at + vocabulary, T{});
        LossWeights weight = in.at(row);
        weight.ce *= by;
        weight.penalty *= by;
        weight.mass *= by;
        one_row(from + row * vocabulary + start, nullptr, columns, in.targets[row] - start, weight, scratch.get(),
                at + start, nullptr);
      }
    });
  });
  return gradient;
}

}  // namespace
}  // namespace unif2ace

STABLE_TORCH_LIBRARY_FRAGMENT(unif2ace_native, m) {
  m.def(
      "d3diff_logits(Tensor logits, Tensor targets, Tensor ce_weight, Tensor? penalty_weight, Tensor? shift, "
      "Tensor? mass_weight, int start, int end, int[] codes, int ignore_index) "
      "-> (Tensor loss, Tensor ce, Tensor lse, Tensor mass, Tensor hit)");
  m.def(
      "d3diff_logits_backward(Tensor grad_loss, Tensor logits, Tensor targets, Tensor ce_weight, "
      "Tensor? penalty_weight, Tensor? shift, Tensor? mass_weight, Tensor lse, Tensor mass, int start, int end, "
      "int[] codes, int ignore_index) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) {
  m.impl("d3diff_logits", TORCH_BOX(&unif2ace::logits_cpu));
  m.impl("d3diff_logits_backward", TORCH_BOX(&unif2ace::logits_backward_cpu));
}
