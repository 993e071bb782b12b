// unif2ace_native::d3diff_head and its backward on the CPU: kernels/unif2ace_kernels/d3diff/head.py says what and why.
// A chunk of labelled rows at a time: torch's own products, and between them one pass over the logits.
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <optional>
#include <tuple>
#include <vector>

#include "common/matrix.h"
#include "common/simd.h"
#include "d3diff/rows.h"

namespace unif2ace {
namespace {

constexpr int64_t kRows = 32;  // rows whose bias gradients are summed before the others', whatever the threads are
constexpr int64_t kCopiedRows = 64;
// Rows of logits begin on lines of the cache: products write and read them faster so.
template <class T>
constexpr int64_t kAligned = 64 / sizeof(T);
// Logits of a chunk: head.py says why.
constexpr int64_t kChunkBytes = int64_t{8} << 20, kChunkShareOfWeight = 2;

#define UNIF2ACE_SCALE(T)                                                                     \
  UNIF2ACE_SIMD_CLONES                                                                        \
  void scale(const T* from, ComputeOf<T> by, T* to, int64_t count) {                          \
    for (int64_t i = 0; i < count; ++i) from_compute(to_compute(from[i]) * by, to[i]);        \
  }
UNIF2ACE_SCALE(double)
UNIF2ACE_SCALE(float)
UNIF2ACE_SCALE(BFloat16Bits)
UNIF2ACE_SCALE(HalfBits)

#define UNIF2ACE_ADD(T)                                                   \
  UNIF2ACE_SIMD_CLONES                                                    \
  void add(const T* from, ComputeOf<T>* to, int64_t count) {              \
    for (int64_t i = 0; i < count; ++i) to[i] += to_compute(from[i]);     \
  }
UNIF2ACE_ADD(BFloat16Bits)
UNIF2ACE_ADD(HalfBits)

Tensor contiguous_as(const Tensor& tensor, ScalarType dtype) {
  return torch::stable::contiguous(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

// [first, first + count) of a dimension. By value, as narrow asks for a tensor that may be changed.
Tensor part_of(Tensor tensor, int64_t first, int64_t count, int64_t dimension = 0) {
  return torch::stable::narrow(tensor, dimension, first, count);
}

// run(i) for each of `count` rows, by all threads.
template <class Run>
void for_copies(int64_t count, const Run& run) {
  torch::stable::parallel_for(0, count, kCopiedRows, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) run(i);
  });
}

// z [m, C], logits of the rows `rows` of T without their bias, becomes their gradient if `gradient`.
template <class T, class Real>
double loss_rows(Tensor& z, const Real* bias, const int64_t* rows, const RowInputs<Real>& in,
                 const RowOutputs<Real>& out, Real* bias_sum, bool gradient) {
  const int64_t count = z.size(0), columns = z.size(1), stride = z.stride(0);
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
        const int64_t row = rows[i];
        T* const at = data + i * stride;
        const LossTerms terms = one_row(at, bias, columns, in.targets[row] - in.start, in.at(row), scratch.get(),
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

// The sum of g^T x over chunks, [C, D]: in the dtype of accumulation, or at once in g's for a single chunk.
template <class T>
class WeightGradient {
 public:
  WeightGradient(const Tensor& weight, int64_t columns) : weight_(weight), columns_(columns) {}

  // Adds g^T x to the rows from `first`; `whole`: there is nothing else to add, and these are all rows.
  void add_product(const Tensor& g, const Tensor& x, int64_t first, bool whole) {
    const int64_t width = g.size(1), features = x.size(1);
    const Matrix g_matrix(g), x_matrix(x);
    if (whole) {
      sum_ = torch::stable::new_empty(x, {width, features});
      return Matrix(*sum_).be_product(g_matrix.transposed(), x_matrix);
    }
    if (!sum_) sum_ = torch::stable::new_zeros(x, {columns_, features}, accumulation_of(x));
    if constexpr (std::is_same_v<T, ComputeOf<T>>) {
      Matrix(part_of(*sum_, first, width)).add_product(g_matrix.transposed(), x_matrix);
    } else {
      Tensor part = torch::stable::new_empty(x, {width, features});
      Matrix(part).be_product(g_matrix.transposed(), x_matrix);
      const T* const from = static_cast<const T*>(part.const_data_ptr());
      float* const to = sum_->mutable_data_ptr<float>() + first * features;
      torch::stable::parallel_for(0, part.numel(), 32 * 1024, [&](int64_t begin, int64_t end) {
        add(from + begin, to + begin, end - begin);
      });
    }
  }

  Tensor result() const {
    return sum_ ? contiguous_as(*sum_, weight_.scalar_type())
                : torch::stable::new_zeros(weight_, {columns_, weight_.size(1)});
  }

 private:
  const Tensor& weight_;
  const int64_t columns_;
  std::optional<Tensor> sum_;
};

using HeadOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class T>
HeadOutputs head_of(const Tensor& given, const Tensor& weight, const std::optional<Tensor>& bias, const Tensor& targets,
                    const std::optional<Tensor>& group, const Tensor& ce_weight, const std::optional<Tensor>& penalty,
                    const std::optional<Tensor>& shift, const std::optional<Tensor>& mass_weight,
                    const std::vector<int64_t>& starts, const std::vector<int64_t>& ends,
                    const std::vector<int64_t>& codes, int64_t ignore_index, ScalarType compute_dtype, bool grad_hidden,
                    bool grad_weight, bool grad_bias) {
  using Real = ComputeOf<T>;
  const ScalarType dtype = std::is_same_v<Real, double> ? ScalarType::Double : ScalarType::Float;
  const Tensor hidden = torch::stable::contiguous(given);
  const int64_t total = hidden.size(0), features = hidden.size(1);
  const size_t row_bytes = static_cast<size_t>(features) * hidden.element_size();
  const int64_t first = *std::min_element(starts.begin(), starts.end());
  const int64_t columns = *std::max_element(ends.begin(), ends.end()) - first;
  const auto zeros = [&](int64_t count, ScalarType of) { return torch::stable::new_zeros(hidden, {count}, of); };
  Tensor ce = zeros(total, dtype), lse = zeros(total, dtype), mass = zeros(total, dtype);
  Tensor hit = zeros(total, ScalarType::Bool), d_bias = zeros(grad_bias ? columns : 0, dtype);
  Tensor d_hidden = grad_hidden ? torch::stable::new_zeros(hidden, {total, features}) : zeros(0, hidden.scalar_type());
  WeightGradient<T> d_weight(weight, columns);
  const auto out = row_outputs<Real>(ce, lse, mass, hit, total);
  double loss = 0;

  for (size_t g = 0; g < starts.size(); ++g) {
    const std::vector<int64_t> rows =
        labelled(targets, ignore_index, group ? group->const_data_ptr<int64_t>() : nullptr, static_cast<int64_t>(g));
    if (rows.empty()) continue;
    const int64_t count = static_cast<int64_t>(rows.size()), start = starts[g], width = ends[g] - start;
    const auto in = row_inputs<Real>(targets, ce_weight, penalty, shift, mass_weight, codes, start, width);
    check_targets(in.targets, rows, start, width);
    const Tensor w = contiguous_as(part_of(weight, start, width), compute_dtype);
    std::optional<Tensor> b;
    if (bias) b = contiguous_as(part_of(*bias, start, width), dtype);
    Real* const bias_sum = grad_bias ? static_cast<Real*>(d_bias.mutable_data_ptr()) + (start - first) : nullptr;

    const int64_t share = w.numel() * static_cast<int64_t>(sizeof(Real)) / kChunkShareOfWeight;
    const int64_t stride = (width + kAligned<T> - 1) / kAligned<T> * kAligned<T>;
    const int64_t row_size = stride * static_cast<int64_t>(sizeof(T));
    const int64_t most = std::max<int64_t>(1, std::max(kChunkBytes, share) / row_size);
    const int64_t chunks = (count + most - 1) / most, size = (count + chunks - 1) / chunks;
    const Tensor memory = torch::stable::new_empty(w, {size, stride});  // once: fresh pages cost more than a pass
    // What oneDNN's bfloat16 product on AMX reads behind a row of odd length, it multiplies by 0: NaN would stay NaN.
    Tensor padding = part_of(memory, width, stride - width, 1);
    torch::stable::zero_(padding);
    const Tensor logits = part_of(memory, 0, width, 1);
    for (int64_t begin = 0; begin < count; begin += size) {
      const int64_t m = std::min(size, count - begin);
      const int64_t* const index = rows.data() + begin;
      Tensor x = hidden;
      if (m < total) {
        x = torch::stable::new_empty(hidden, {m, features});
        const char* const from = static_cast<const char*>(hidden.const_data_ptr());
        char* const to = static_cast<char*>(x.mutable_data_ptr());
        for_copies(m, [&](int64_t i) { std::memcpy(to + i * row_bytes, from + index[i] * row_bytes, row_bytes); });
      }
      x = contiguous_as(x, compute_dtype);
      Tensor z = part_of(logits, 0, m);
      Matrix(z).be_product(Matrix(x), Matrix(w).transposed());
      loss += loss_rows<T>(z, vector_data<Real>(b, width, "bias"), index, in, out, bias_sum,
                           grad_hidden || grad_weight || grad_bias);
      if (grad_weight) d_weight.add_product(z, x, start - first, starts.size() == 1 && m == count);
      if (grad_hidden) {
        Tensor d_x = torch::stable::new_empty(x, {m, features});
        Matrix(d_x).be_product(Matrix(z), Matrix(w));
        d_x = contiguous_as(d_x, hidden.scalar_type());
        const char* const from = static_cast<const char*>(d_x.const_data_ptr());
        char* const to = static_cast<char*>(d_hidden.mutable_data_ptr());
        for_copies(m, [&](int64_t i) { std::memcpy(to + index[i] * row_bytes, from + i * row_bytes, row_bytes); });
      }
    }
  }
  return {scalar_of(loss, hidden, dtype), ce, lse, mass, hit, d_hidden,
          grad_weight ? d_weight.result() : torch::stable::new_empty(weight, {0}),
          contiguous_as(d_bias, bias ? bias->scalar_type() : dtype)};
}

HeadOutputs head_cpu(const Tensor& hidden, const Tensor& weight, std::optional<Tensor> bias, const Tensor& targets,
                     std::optional<Tensor> group, const Tensor& ce_weight, std::optional<Tensor> penalty,
                     std::optional<Tensor> shift, std::optional<Tensor> mass_weight, std::vector<int64_t> starts,
                     std::vector<int64_t> ends, std::vector<int64_t> codes, int64_t ignore_index,
                     ScalarType compute_dtype, bool grad_hidden, bool grad_weight, bool grad_bias) {
  STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1),
                  "hidden, weight: expected [T, D] and [V, D]");
  STD_TORCH_CHECK(targets.numel() == hidden.size(0), "targets: expected [T]");
  STD_TORCH_CHECK(!bias || bias->numel() == weight.size(0), "bias: expected [V]");
  STD_TORCH_CHECK(!starts.empty() && starts.size() == ends.size() && (group || starts.size() == 1),
                  "starts, ends: expected one of each for a group");
  for (size_t g = 0; g < starts.size(); ++g)
    STD_TORCH_CHECK(0 <= starts[g] && starts[g] < ends[g] && ends[g] <= weight.size(0),
                    "starts, ends: expected columns of the vocabulary");
  if (group) {
    group = torch::stable::contiguous(*group);
    STD_TORCH_CHECK(group->scalar_type() == ScalarType::Long && group->numel() == hidden.size(0),
                    "group: expected int64 [T]");
  }
  std::optional<HeadOutputs> outputs;
  dispatch(compute_dtype, "compute_dtype", [&](auto* of) {
    outputs = head_of<std::remove_pointer_t<decltype(of)>>(
        hidden, weight, bias, targets, group, ce_weight, penalty, shift, mass_weight, starts, ends, codes, ignore_index,
        compute_dtype, grad_hidden, grad_weight, grad_bias);
  });
  return *outputs;
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
      "d3diff_head(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? group, Tensor ce_weight, "
      "Tensor? penalty_weight, Tensor? shift, Tensor? mass_weight, int[] starts, int[] ends, int[] codes, "
      "int ignore_index, ScalarType compute_dtype, bool grad_hidden, bool grad_weight, bool grad_bias) "
      "-> (Tensor loss, Tensor ce, Tensor lse, Tensor mass, Tensor hit, Tensor grad_hidden, Tensor grad_weight, "
      "Tensor grad_bias)");
  m.def(
      "d3diff_head_backward(Tensor grad_loss, Tensor grad_hidden, Tensor grad_weight, Tensor grad_bias, "
      "int vocabulary, int first) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) {
  m.impl("d3diff_head", TORCH_BOX(&unif2ace::head_cpu));
  m.impl("d3diff_head_backward", TORCH_BOX(&unif2ace::head_backward_cpu));
}
