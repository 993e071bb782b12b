// unif2ace_native: the loss's pass between the head's products, the loss of ready logits, and the placing of gradients.
#include <sys/mman.h>

#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "common/simd.h"
#include "common/torch_stable.h"
#include "d3diff/row.h"

namespace unif2ace {
namespace {

constexpr int64_t kRows = 32;  // rows whose bias gradients are summed before the others', whatever the threads are

#define UNIF2ACE_LOSS_ROW(T)                                                                                        \
  UNIF2ACE_SIMD_CLONES                                                                                              \
  LossTerms one_row(const T* logits, const ComputeOf<T>* bias, int64_t columns, int64_t target,                     \
                    const LossWeights& weight, ComputeOf<T>* scratch, T* gradient, ComputeOf<T>* column_sum) {       \
    return loss_row(logits, bias, columns, target, weight, scratch, gradient, column_sum);                          \
  }
UNIF2ACE_LOSS_ROW(double)
UNIF2ACE_LOSS_ROW(float)
UNIF2ACE_LOSS_ROW(BFloat16Bits)
UNIF2ACE_LOSS_ROW(HalfBits)

#define UNIF2ACE_SCALE(T)                                                                     \
  UNIF2ACE_SIMD_CLONES                                                                        \
  void scale(const T* from, ComputeOf<T> by, T* to, int64_t count) {                          \
    for (int64_t i = 0; i < count; ++i) from_compute(to_compute(from[i]) * by, to[i]);        \
  }
UNIF2ACE_SCALE(double)
UNIF2ACE_SCALE(float)
UNIF2ACE_SCALE(BFloat16Bits)
UNIF2ACE_SCALE(HalfBits)

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
  STD_TORCH_CHECK(hit.scalar_type() == ScalarType::Bool && hit.numel() == total && hit.is_contiguous(), "hit: expected bool [T]");
  return {static_cast<Real*>(ce.mutable_data_ptr()), static_cast<Real*>(lse.mutable_data_ptr()),
          static_cast<Real*>(mass.mutable_data_ptr()), hit.mutable_data_ptr<bool>()};
}

void check_targets(const int64_t* targets, const std::vector<int64_t>& rows, int64_t start, int64_t columns) {
  for (const int64_t row : rows)
    STD_TORCH_CHECK(targets[row] >= start && targets[row] < start + columns, "targets: expected tokens in [", start,
                    ", ", start + columns, ") or ignore_index, got ", targets[row]);
}

double total_of(const std::vector<double>& losses) {
  double sum = 0;
  for (const double each : losses) sum += each;
  return sum;
}

Tensor scalar_of(double value, const Tensor& like, ScalarType dtype) {
  Tensor scalar = torch::stable::new_empty(like, {}, dtype);
  if (dtype == ScalarType::Double) *scalar.mutable_data_ptr<double>() = value;
  else *scalar.mutable_data_ptr<float>() = static_cast<float>(value);
  return scalar;
}

// z [m, C], logits without their bias of the rows `rows` [m] of T, becomes their gradient if `gradient`.
template <class T>
double loss_rows(Tensor& z, const std::optional<Tensor>& bias, const Tensor& rows, const Tensor& targets,
                 const Tensor& ce_weight, const std::optional<Tensor>& penalty, const std::optional<Tensor>& shift,
                 const std::optional<Tensor>& mass_weight, Tensor& ce, Tensor& lse, Tensor& mass, Tensor& hit,
                 const std::optional<Tensor>& grad_bias, int64_t start, const std::vector<int64_t>& codes,
                 bool gradient) {
  using Real = ComputeOf<T>;
  const int64_t count = z.size(0), columns = z.size(1), total = targets.numel();
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long && rows.numel() == count && rows.is_contiguous(), "rows: expected int64 [m]");
  const int64_t* const row_data = rows.const_data_ptr<int64_t>();
  const std::vector<int64_t> index(row_data, row_data + count);
  for (const int64_t row : index) STD_TORCH_CHECK(row >= 0 && row < total, "rows: expected indices of targets");
  const auto in = row_inputs<Real>(targets, ce_weight, penalty, shift, mass_weight, codes, start, columns);
  const auto out = row_outputs<Real>(ce, lse, mass, hit, total);
  check_targets(in.targets, index, start, columns);
  const Real* const bias_data = vector_data<Real>(bias, columns, "bias");
  Real* const bias_sum = const_cast<Real*>(vector_data<Real>(grad_bias, columns, "grad_bias"));
  T* const data = static_cast<T*>(z.mutable_data_ptr());

  const int64_t blocks = (count + kRows - 1) / kRows;
  const std::unique_ptr<Real[]> sums(bias_sum == nullptr ? nullptr : new Real[blocks * columns]);
  std::vector<double> losses(count);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const std::unique_ptr<Real[]> scratch(new Real[padded_columns(columns)]);
    for (int64_t block = begin; block < end; ++block) {
      Real* const sum = sums ? sums.get() + block * columns : nullptr;
      if (sum != nullptr) std::fill(sum, sum + columns, Real(0));
      for (int64_t i = block * kRows; i < std::min(count, (block + 1) * kRows); ++i) {
        const int64_t row = index[i];
        T* const at = data + i * columns;
        const LossTerms terms = one_row(at, bias_data, columns, in.targets[row] - start, in.at(row), scratch.get(),
                                        gradient ? at : nullptr, sum);
        losses[i] = terms.loss;
        out.put(row, terms);
      }
    }
  });
  if (sums)
    torch::stable::parallel_for(0, columns, 4096, [&](int64_t begin, int64_t end) {
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t j = begin; j < end; ++j) bias_sum[j] += sums[block * columns + j];
    });
  return total_of(losses);
}

Tensor rows_cpu(Tensor z, std::optional<Tensor> bias, const Tensor& rows, const Tensor& targets,
                const Tensor& ce_weight, std::optional<Tensor> penalty, std::optional<Tensor> shift,
                std::optional<Tensor> mass_weight, Tensor ce, Tensor lse, Tensor mass, Tensor hit,
                std::optional<Tensor> grad_bias, int64_t start, std::vector<int64_t> codes, bool gradient) {
  STD_TORCH_CHECK(z.dim() == 2 && z.is_contiguous(), "z: expected a contiguous matrix");
  double loss = 0;
  dispatch(z.scalar_type(), "z", [&](auto* of) {
    loss = loss_rows<std::remove_pointer_t<decltype(of)>>(z, bias, rows, targets, ce_weight, penalty, shift,
                                                          mass_weight, ce, lse, mass, hit, grad_bias, start, codes,
                                                          gradient);
  });
  return scalar_of(loss, z, ScalarType::Double);
}

ScalarType accumulation_of(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_logits(const Tensor& logits, int64_t start, int64_t end) {
  STD_TORCH_CHECK(logits.dim() == 2 && 0 <= start && start < end && end <= logits.size(1),
                  "logits: expected [T, V] with the columns ", start, " to ", end);
}

std::vector<int64_t> labelled(const Tensor& targets, int64_t ignore_index) {
  const int64_t* const data = targets.const_data_ptr<int64_t>();
  std::vector<int64_t> rows;
  rows.reserve(targets.numel());
  for (int64_t row = 0; row < targets.numel(); ++row)
    if (data[row] != ignore_index) rows.push_back(row);
  return rows;
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

// Zeros [rows, ...] like `like`. From where malloc would map fresh pages all the same, they are mapped here and stay
// untouched: most of a head's gradient is rows that get none, and they then cost neither time nor memory.
constexpr int64_t kMappedBytes = int64_t{32} << 20;

Tensor zeros_like_rows(const Tensor& like, int64_t rows) {
  std::vector<int64_t> sizes(like.sizes().begin(), like.sizes().end());
  sizes[0] = rows;
  int64_t count = 1;
  for (const int64_t size : sizes) count *= size;
  const size_t bytes = static_cast<size_t>(count) * like.element_size();
#ifdef __linux__
  if (bytes >= static_cast<size_t>(kMappedBytes)) {
    void* const data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    STD_TORCH_CHECK(data != MAP_FAILED, "no memory for a gradient of ", bytes, " bytes");
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
    return torch::stable::from_blob(data, sizes, strides, like.device(), like.scalar_type(),
                                    [bytes](void* at) { munmap(at, bytes); });
  }
#endif
  return torch::stable::new_zeros(like, sizes);
}

template <class T>
void scale_into(const Tensor& from, double by, Tensor& into, int64_t first) {
  const int64_t count = from.numel();
  const T* const source = static_cast<const T*>(from.const_data_ptr());
  T* const target = static_cast<T*>(into.mutable_data_ptr()) + first;
  torch::stable::parallel_for(0, count, 32 * 1024, [&](int64_t begin, int64_t end) {
    scale(source + begin, static_cast<ComputeOf<T>>(by), target + begin, end - begin);
  });
}

// gradient [C, ...] times grad_loss, as rows [first, first + C) of [vocabulary, ...]; nothing for nothing.
Tensor placed(const Tensor& gradient, double by, int64_t vocabulary, int64_t first) {
  STD_TORCH_CHECK(gradient.is_contiguous(), "expected contiguous gradients");
  if (gradient.numel() == 0) return torch::stable::new_empty(gradient, {0});
  const int64_t rows = gradient.size(0), width = gradient.numel() / rows;
  STD_TORCH_CHECK(0 <= first && first + rows <= vocabulary, "vocabulary: expected the gradient's rows inside");
  Tensor full = zeros_like_rows(gradient, vocabulary);
  dispatch(gradient.scalar_type(), "gradient", [&](auto* of) {
    scale_into<std::remove_pointer_t<decltype(of)>>(gradient, by, full, first * width);
  });
  return full;
}

std::tuple<Tensor, Tensor, Tensor> head_backward_cpu(const Tensor& grad_loss, const Tensor& grad_hidden,
                                                     const Tensor& grad_weight, const Tensor& grad_bias,
                                                     int64_t vocabulary, int64_t first) {
  STD_TORCH_CHECK(grad_loss.numel() == 1, "grad_loss: expected one number");
  const double by = grad_loss.scalar_type() == ScalarType::Double ? *vector_data<double>(grad_loss, 1, "grad_loss")
                                                                  : *vector_data<float>(grad_loss, 1, "grad_loss");
  STD_TORCH_CHECK(grad_hidden.is_contiguous(), "grad_hidden: expected a contiguous tensor");
  Tensor hidden = torch::stable::empty_like(grad_hidden);
  dispatch(grad_hidden.scalar_type(), "grad_hidden", [&](auto* of) {
    scale_into<std::remove_pointer_t<decltype(of)>>(grad_hidden, by, hidden, 0);
  });
  return {hidden, placed(grad_weight, by, vocabulary, first), placed(grad_bias, by, vocabulary, first)};
}

}  // namespace
}  // namespace unif2ace

STABLE_TORCH_LIBRARY_FRAGMENT(unif2ace_native, m) {
  m.def(
      "d3diff_rows(Tensor(a!) z, Tensor? bias, Tensor rows, Tensor targets, Tensor ce_weight, Tensor? penalty_weight, "
      "Tensor? shift, Tensor? mass_weight, Tensor(b!) ce, Tensor(c!) lse, Tensor(d!) mass, Tensor(e!) hit, "
      "Tensor(f!)? grad_bias, int start, int[] codes, bool gradient) -> Tensor loss");
  m.def(
      "d3diff_logits(Tensor logits, Tensor targets, Tensor ce_weight, Tensor? penalty_weight, Tensor? shift, "
      "Tensor? mass_weight, int start, int end, int[] codes, int ignore_index) "
      "-> (Tensor loss, Tensor ce, Tensor lse, Tensor mass, Tensor hit)");
  m.def(
      "d3diff_logits_backward(Tensor grad_loss, Tensor logits, Tensor targets, Tensor ce_weight, "
      "Tensor? penalty_weight, Tensor? shift, Tensor? mass_weight, Tensor lse, Tensor mass, int start, int end, "
      "int[] codes, int ignore_index) -> Tensor");
  m.def(
      "d3diff_head_backward(Tensor grad_loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, "
      "int vocabulary, int first) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) {
  m.impl("d3diff_rows", TORCH_BOX(&unif2ace::rows_cpu));
  m.impl("d3diff_logits", TORCH_BOX(&unif2ace::logits_cpu));
  m.impl("d3diff_logits_backward", TORCH_BOX(&unif2ace::logits_backward_cpu));
  m.impl("d3diff_head_backward", TORCH_BOX(&unif2ace::head_backward_cpu));
}
