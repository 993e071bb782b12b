// unif2ace_native: on the CPU, what the rows of a task weigh in the loss, and the statistics told beside it. One pass
// over the rows each, in place of twenty small ops, whose dispatch would take longer.
#include <algorithm>
#include <optional>
#include <tuple>

#include "d3diff/rows.h"

namespace unif2ace {
namespace {

const bool* flags(const Tensor& tensor, int64_t total, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Bool && tensor.numel() == total && tensor.is_contiguous(), name,
                  ": expected bool [T]");
  return tensor.const_data_ptr<bool>();
}

// How many rows are valid [T], the share of each, and their weights in the score term, 0 where they are not.
std::tuple<Tensor, Tensor, Tensor> row_weights_cpu(const Tensor& valid, std::optional<Tensor> weight,
                                                   std::optional<Tensor> sample_id, bool token_mean) {
  const int64_t total = valid.numel();
  const bool* const counts = flags(valid, total, "valid");
  Tensor number = torch::stable::new_empty(valid, {}, ScalarType::Long);
  const int64_t count = std::count(counts, counts + total, true);
  *number.mutable_data_ptr<int64_t>() = count;
  const double mean = 1.0 / static_cast<double>(std::max<int64_t>(count, 1));
  Tensor score = torch::stable::new_empty(valid, {weight ? total : 0}, ScalarType::Double);
  if (weight) {
    weight = torch::stable::contiguous(*weight);
    const int64_t samples = weight->numel(), length = samples == 0 ? 0 : total / samples;
    const double* const of_sample = vector_data<double>(weight, samples, "weight");
    const int64_t* ids = nullptr;
    if (sample_id) {
      sample_id = torch::stable::contiguous(*sample_id);
      STD_TORCH_CHECK(sample_id->scalar_type() == ScalarType::Long && sample_id->numel() == total,
                      "sample_id: expected int64 [T]");
      ids = sample_id->const_data_ptr<int64_t>();
    } else {
      STD_TORCH_CHECK(length * samples == total, "weight: expected one for each of T / B rows");
    }
    const double reduced = token_mean ? mean : 1.0 / static_cast<double>(std::max<int64_t>(samples, 1));
    double* const to = score.mutable_data_ptr<double>();
    for (int64_t row = 0; row < total; ++row) {
      if (!counts[row]) {
        to[row] = 0;
        continue;
      }
      const int64_t sample = ids == nullptr ? row / length : ids[row];
      STD_TORCH_CHECK(sample >= 0 && sample < samples, "sample_id: expected values in [0, ", samples, "), got ", sample);
      to[row] = of_sample[sample] * reduced;
    }
  }
  return {number, scalar_of(mean, score, ScalarType::Double), score};
}

double scalar_in(const Tensor& scalar, const char* name) { return *vector_data<double>(scalar, 1, name); }

// The mean CE, the score term, its constant, the mean lse and the accuracy of the rows that are `valid` [T].
Tensor statistics_cpu(const Tensor& valid, const Tensor& share, std::optional<Tensor> score,
                      std::optional<Tensor> penalty, std::optional<Tensor> shift, std::optional<Tensor> mass_weight,
                      std::optional<Tensor> constant, const Tensor& ce, const Tensor& lse, const Tensor& mass,
                      const Tensor& hit, bool /*one_of_two: other rows are passed over all the same*/) {
  const int64_t total = valid.numel();
  const bool *const counts = flags(valid, total, "valid"), *const hits = flags(hit, total, "hit");
  const double* const of_ce = vector_data<double>(score, total, "score");
  const double* const of_penalty = vector_data<double>(penalty, total, "penalty_weight");
  const double* const shifts = vector_data<double>(shift, total, "shift");
  const double* const of_mass = vector_data<double>(mass_weight, total, "mass_weight");
  const double mean = scalar_in(share, "share");
  Tensor statistics = torch::stable::new_empty(ce, {5});
  dispatch(ce.scalar_type(), "ce", [&](auto* of) {
    using Real = ComputeOf<std::remove_pointer_t<decltype(of)>>;
    const Real* const ces = vector_data<Real>(ce, total, "ce");
    const Real* const lses = vector_data<Real>(lse, total, "lse");
    const Real* const masses = vector_data<Real>(mass, total, "mass");
    double sum_ce = 0, sum_score = 0, sum_lse = 0, sum_hit = 0;
    for (int64_t row = 0; row < total; ++row) {
      if (!counts[row]) continue;
      sum_ce += ces[row];
      sum_lse += lses[row];
      sum_hit += hits[row];
      if (of_ce != nullptr) sum_score += product_or_zero(of_ce[row], ces[row]);
      if (of_mass != nullptr) sum_score += product_or_zero(of_mass[row], masses[row]);
      if (of_penalty != nullptr && of_penalty[row] != 0)
        sum_score += of_penalty[row] * penalty_of(lses[row] + (shifts == nullptr ? 0 : shifts[row]));
    }
    const double values[] = {sum_ce * mean, sum_score, constant ? scalar_in(*constant, "constant") : 0, sum_lse * mean,
                             sum_hit * mean};
    Real* const to = static_cast<Real*>(statistics.mutable_data_ptr());
    for (int i = 0; i < 5; ++i) to[i] = static_cast<Real>(values[i]);
  });
  return statistics;
}

}  // namespace
}  // namespace unif2ace

STABLE_TORCH_LIBRARY_FRAGMENT(unif2ace_native, m) {
  m.def(
      "d3diff_row_weights(Tensor valid, Tensor? weight, Tensor? sample_id, bool token_mean) "
      "-> (Tensor number, Tensor share, Tensor score)");
  m.def(
      "d3diff_statistics(Tensor valid, Tensor share, Tensor? score, Tensor? penalty_weight, Tensor? shift, "
      "Tensor? mass_weight, Tensor? constant, Tensor ce, Tensor lse, Tensor mass, Tensor hit, bool one_of_two) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) {
  m.impl("d3diff_row_weights", TORCH_BOX(&unif2ace::row_weights_cpu));
  m.impl("d3diff_statistics", TORCH_BOX(&unif2ace::statistics_cpu));
}
