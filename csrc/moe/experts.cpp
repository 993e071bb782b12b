// unif2ace_native::moe_experts and its backward on the CPU: products of each expert's rows by torch's own GEMM, and
// all that stands between them in one pass each. Rows are the slots sorted by expert, R = T * S of them.
//
//   forward   x -> gather -> [m, D] -> w_in -> h = . + b_in, a = act(h) -> w_out -> [m, D];  y = sum_s w (. + b_out)
//   backward  dy -> gather, <dy, b_out>, sum w dy -> w_out^T -> da, with h: w a, dh, <da, a>, sum dh -> dw_out, dw_in
//             -> dh w_in^T -> [m, D];  dx = sum_s
//
// An expert's rows are worked on while they are in the cache, by one thread or by all (layout.h). The sums over rows
// are cut into blocks of kBlock whoever computes them. So every result has the same bits on every run.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "moe/activation.h"
#include "moe/layout.h"

namespace unif2ace {
namespace {

constexpr int64_t kBlock = 64;  // rows summed by one thread

struct Activation {
  Pointwise kind;
  bool gated;
};

Activation activation_named(const std::string& name) {
  if (name == "gelu_tanh") return {Pointwise::gelu_tanh, false};
  if (name == "gelu") return {Pointwise::gelu, false};
  if (name == "relu") return {Pointwise::relu, false};
  if (name == "silu") return {Pointwise::silu, false};
  if (name == "swiglu") return {Pointwise::silu, true};
  STD_TORCH_CHECK(name == "geglu", "activation: unknown name ", name);
  return {Pointwise::gelu_tanh, true};
}

// run(block, first row, last row) on blocks of kBlock rows.
template <class Block>
void for_blocks(int64_t rows, int64_t width, const Block& run) {
  for_rows((rows + kBlock - 1) / kBlock, width * kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) run(b, b * kBlock, std::min(rows, (b + 1) * kBlock));
  });
}

// Memory that nobody fills before it is written.
template <class T>
class Scratch {
 public:
  // `count` elements and a 0 behind them: oneDNN's bfloat16 product on AMX reads one further where a row's length is
  // odd, and multiplies it by 0, which NaN survives.
  T* of(int64_t count) {
    if (count > count_) {
      memory_ = torch::stable::empty({(count + 1) * static_cast<int64_t>(sizeof(T))}, ScalarType::Byte);
      count_ = count;
    }
    T* const data = static_cast<T*>(memory_.mutable_data_ptr());
    data[count] = T{};
    return data;
  }

 private:
  Tensor memory_;
  int64_t count_ = -1;
};

template <class T>
void gather(const Layout<T>& at, int64_t e, const T* x, T* to) {
  const int64_t m = at.count(e), first = at.offsets[e];
  for_rows(m, at.hidden, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      std::copy_n(x + at.token(first + i) * at.hidden, at.hidden, to + i * at.hidden);
  });
  std::fill(to + m * at.hidden, to + at.padded_count(e) * at.hidden, T{});
}

// h += b_in to where it is kept, unless null, and a = act(h), 0 in the padding; gate | value of 2F for a gated activation.
template <class T>
void activate(const Layout<T>& at, Activation act, int64_t e, const T* product, const T* b_in, T* h, T* a) {
  using Real = ComputeOf<T>;
  const int64_t m = at.count(e);
  for_rows(m, at.width_in, [&](int64_t begin, int64_t end) {
    Real x[kTile], y[kTile], slope[kTile];
    const auto biased = [&](int64_t row, int64_t j, int64_t count) {
      load(product + row * at.width_in + j, x, count);
      if (b_in != nullptr) add(x, b_in + j, count);
      if (h != nullptr) store(x, h + row * at.width_in + j, count);
    };
    for (int64_t row = begin; row < end; ++row) {
      for (int64_t j = 0; j < at.width; j += kTile) {
        const int64_t count = std::min(kTile, at.width - j);
        biased(row, j, count);
        pointwise(act.kind, x, y, slope, count);
        if (act.gated) {
          biased(row, at.width + j, count);
          multiply(y, x, count);
        }
        store(y, a + row * at.width + j, count);
      }
    }
  });
  std::fill(a + m * at.width, a + at.padded_count(e) * at.width, T{});
}

// to = sum of the blocks' partial sums; the first of them is spent.
template <class Real, class T>
void reduce(Real* sums, int64_t blocks, int64_t width, T* to) {
  for (int64_t block = 1; block < blocks; ++block) add(sums, sums + block * width, width);
  store(sums, to, width);
}

// With a = act(h): scaled_a = weight a, grad_weight += <grad_a, a>, grad_h = weight grad_a act'(h), 0 in the padding,
// and grad_b_in, unless null, = sum over rows of grad_h.
template <class T>
void activate_backward(const Layout<T>& at, Activation act, int64_t e, const T* grad_a, const T* h,
                       const ComputeOf<T>* weight, T* scaled_a, T* grad_h, ComputeOf<T>* grad_weight,
                       ComputeOf<T>* sums, T* grad_b_in) {
  using Real = ComputeOf<T>;
  const int64_t m = at.count(e), width = at.width, wide = at.width_in;
  std::fill(sums, sums + (m + kBlock - 1) / kBlock * wide, Real(0));
  for_blocks(m, wide, [&](int64_t block, int64_t begin, int64_t end) {
    Real x[kTile], y[kTile], slope[kTile], grad[kTile], value[kTile], product[kTile];
    Real* const sum = sums + block * wide;
    for (int64_t row = begin; row < end; ++row) {
      const Real w = weight[row];
      std::fill(product, product + kTile, Real(0));
      for (int64_t j = 0; j < width; j += kTile) {
        const int64_t count = std::min(kTile, width - j);
        const T* const h_at = h + row * wide + j;
        T* const grad_at = grad_h + row * wide + j;
        load(h_at, x, count);
        load(grad_a + row * width + j, grad, count);
        pointwise(act.kind, x, y, slope, count);
        if (act.gated) {
          load(h_at + width, value, count);
          std::copy(y, y + count, x);  // the gradient of the value: weight grad_a act(gate)
          multiply(x, grad, count);
          scale(x, w, count);
          if (grad_b_in != nullptr) add(sum + width + j, x, count);
          store(x, grad_at + width, count);
          multiply(y, value, count);
          multiply(slope, value, count);
        }
        add_product(product, grad, y, count);
        scale_to(y, w, scaled_a + row * width + j, count);
        multiply(slope, grad, count);
        scale(slope, w, count);
        if (grad_b_in != nullptr) add(sum + j, slope, count);
        store(slope, grad_at, count);
      }
      grad_weight[row] += folded(product);
    }
  });
  if (grad_b_in != nullptr) reduce(sums, (m + kBlock - 1) / kBlock, wide, grad_b_in);
  std::fill(scaled_a + m * width, scaled_a + at.padded_count(e) * width, T{});
  std::fill(grad_h + m * wide, grad_h + at.padded_count(e) * wide, T{});
}

// Rows of grad_y to `to`; with a bias, grad_weight = <grad_y, b_out> and grad_b_out = sum over rows of weight grad_y.
template <class T>
void gather_grad(const Layout<T>& at, int64_t e, const T* grad_y, const ComputeOf<T>* weight, const T* b_out, T* to,
                 ComputeOf<T>* grad_weight, ComputeOf<T>* sums, T* grad_b_out) {
  using Real = ComputeOf<T>;
  const int64_t m = at.count(e), first = at.offsets[e], width = at.hidden;
  if (b_out == nullptr) {
    std::fill(grad_weight, grad_weight + m, Real(0));
    return gather(at, e, grad_y, to);
  }
  std::fill(sums, sums + (m + kBlock - 1) / kBlock * width, Real(0));
  for_blocks(m, width, [&](int64_t block, int64_t begin, int64_t end) {
    Real grad[kTile], product[kTile];
    for (int64_t row = begin; row < end; ++row) {
      const T* const from = grad_y + at.token(first + row) * width;
      std::fill(product, product + kTile, Real(0));
      for (int64_t j = 0; j < width; j += kTile) {
        const int64_t count = std::min(kTile, width - j);
        std::copy_n(from + j, count, to + row * width + j);
        load(from + j, grad, count);
        add_product(product, grad, b_out + j, count);
        add_scaled(sums + block * width + j, grad, weight[row], count);
      }
      grad_weight[row] = folded(product);
    }
  });
  reduce(sums, (m + kBlock - 1) / kBlock, width, grad_b_out);
  std::fill(to + m * width, to + at.padded_count(e) * width, T{});
}

template <class T>
struct ForwardScratch {
  Scratch<T> x, product, a;
};
template <class T>
struct BackwardScratch {
  Scratch<T> x, grad_y, grad_a, scaled_a, grad_h;
  Scratch<ComputeOf<T>> sums;
};

template <class T>
const T* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}
std::optional<Tensor> contiguous(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// Whether [E, M, N] lies as [E, N, M] does, as the layers of torch and transformers keep their weights. Its gradient is
// made in the same layout: autograd would copy another.
bool is_flipped(const Tensor& w) { return !w.is_contiguous() && torch::stable::transpose(w, 1, 2).is_contiguous(); }
Tensor empty_like(const Tensor& w, bool flipped) {
  return torch::stable::new_empty(w, {w.size(0), w.size(flipped ? 2 : 1), w.size(flipped ? 1 : 2)});
}

// Calls run(pointer to the data of `weight`), float or double.
template <class Run>
void with_weight(const Tensor& weight, const Run& run) {
  if (weight.scalar_type() == ScalarType::Double) return run(weight.const_data_ptr<double>());
  STD_TORCH_CHECK(weight.scalar_type() == ScalarType::Float, "routing.weight: expected float32 or float64");
  run(weight.const_data_ptr<float>());
}

std::tuple<Tensor, Tensor> experts_cpu(const Tensor& x_, const Tensor& weight_, const Tensor& order_,
                                       const Tensor& offsets_, const Tensor& w_in, std::optional<Tensor> b_in_,
                                       const Tensor& w_out, std::optional<Tensor> b_out_, std::string activation,
                                       bool keep_h) {
  const Activation act = activation_named(activation);
  const Tensor x = torch::stable::contiguous(x_), weight = torch::stable::contiguous(weight_);
  const Tensor order = torch::stable::contiguous(order_), offsets = torch::stable::contiguous(offsets_);
  const std::optional<Tensor> b_in = contiguous(b_in_), b_out = contiguous(b_out_);
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  Tensor h = torch::stable::new_empty(x, {keep_h ? order.numel() : 0, w_in.size(2)});
  dispatch(x.scalar_type(), "x", [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    const Layout<T> at(x, weight, order, offsets, w_in, w_out);
    const T* const x_data = static_cast<const T*>(x.const_data_ptr());
    T* const h_data = static_cast<T*>(h.mutable_data_ptr());
    Scratch<T> y_scratch;
    T* const y_rows = y_scratch.of(at.padded.back() * at.hidden);
    at.template for_experts<ForwardScratch<T>>([&](int64_t e, ForwardScratch<T>& scratch) {
      const int64_t m = at.padded_count(e);
      if (m == 0) return;
      T* const x_e = scratch.x.of(m * at.hidden);
      T* const product = scratch.product.of(m * at.width_in);
      T* const a = scratch.a.of(m * at.width);
      gather(at, e, x_data, x_e);
      at.matrix(product, m, at.width_in).be_product(at.matrix(x_e, m, at.hidden), at.w_in(e));
      activate(at, act, e, product, b_in ? data_of<T>(b_in) + e * at.width_in : nullptr,
               keep_h ? h_data + at.offsets[e] * at.width_in : nullptr, a);
      at.matrix(y_rows + at.padded[e] * at.hidden, m, at.hidden).be_product(at.matrix(a, m, at.width), at.w_out(e));
    });
    with_weight(weight, [&](const auto* w) {
      at.combine(y_rows, w, data_of<T>(b_out), static_cast<T*>(y.mutable_data_ptr()));
    });
  });
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> experts_backward_cpu(
    const Tensor& grad_y_, const Tensor& x_, const Tensor& h_, const Tensor& weight_, const Tensor& order_,
    const Tensor& offsets_, const Tensor& w_in, const Tensor& w_out, std::optional<Tensor> b_out_,
    bool has_b_in, std::string activation) {
  const Activation act = activation_named(activation);
  const Tensor x = torch::stable::contiguous(x_), weight = torch::stable::contiguous(weight_);
  const Tensor grad_y = torch::stable::contiguous(grad_y_), h = torch::stable::contiguous(h_);
  const Tensor order = torch::stable::contiguous(order_), offsets = torch::stable::contiguous(offsets_);
  const std::optional<Tensor> b_out = contiguous(b_out_);
  const int64_t experts = w_in.size(0);
  STD_TORCH_CHECK(h.size(0) == order.numel() && h.size(1) == w_in.size(2), "h: expected the rows' pre-activations");
  Tensor grad_x = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  Tensor grad_weight = torch::stable::new_empty(weight, {weight.size(0), weight.size(1)});
  const bool flips_in = is_flipped(w_in), flips_out = is_flipped(w_out);
  Tensor grad_w_in = empty_like(w_in, flips_in), grad_w_out = empty_like(w_out, flips_out);
  Tensor grad_b_in = torch::stable::new_empty(w_in, {has_b_in ? experts : 0, w_in.size(2)});
  Tensor grad_b_out = torch::stable::new_empty(w_out, {b_out ? experts : 0, w_out.size(2)});
  dispatch(x.scalar_type(), "x", [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    using Real = ComputeOf<T>;
    const Layout<T> at(x, weight, order, offsets, w_in, w_out);
    const auto input = [](const Tensor& tensor) { return static_cast<const T*>(tensor.const_data_ptr()); };
    const auto of_expert = [](Tensor& tensor, int64_t e, int64_t size) {
      return static_cast<T*>(tensor.mutable_data_ptr()) + e * size;
    };
    const int64_t weights = at.hidden * at.width_in, weights_out = at.width * at.hidden;
    // to [m, n] = a^T b, or its transpose.
    const auto outer = [&](bool flipped, T* to, const Matrix& a, int64_t m, const Matrix& b, int64_t n) {
      if (flipped)
        at.matrix(to, n, m).be_product(b.transposed(), a);
      else
        at.matrix(to, m, n).be_product(a.transposed(), b);
    };
    Scratch<T> grad_x_scratch;
    T* const grad_x_rows = grad_x_scratch.of(at.padded.back() * at.hidden);
    std::vector<Real> weight_rows(at.rows), grad_weight_rows(at.rows);
    with_weight(weight, [&](const auto* w) {
      for (int64_t row = 0; row < at.rows; ++row) weight_rows[row] = static_cast<Real>(w[at.order[row]]);
    });
    at.template for_experts<BackwardScratch<T>>([&](int64_t e, BackwardScratch<T>& scratch) {
      const int64_t m = at.padded_count(e), first = at.offsets[e];
      T* const to_w_in = of_expert(grad_w_in, e, weights);
      T* const to_w_out = of_expert(grad_w_out, e, weights_out);
      T* const to_b_in = has_b_in ? of_expert(grad_b_in, e, at.width_in) : nullptr;
      T* const to_b_out = b_out ? of_expert(grad_b_out, e, at.hidden) : nullptr;
      if (m == 0) {
        std::fill(to_w_in, to_w_in + weights, T{});
        std::fill(to_w_out, to_w_out + weights_out, T{});
        if (has_b_in) std::fill(to_b_in, to_b_in + at.width_in, T{});
        if (b_out) std::fill(to_b_out, to_b_out + at.hidden, T{});
        return;
      }
      T* const x_e = scratch.x.of(m * at.hidden);
      T* const grad_y_e = scratch.grad_y.of(m * at.hidden);
      T* const grad_a = scratch.grad_a.of(m * at.width);
      T* const scaled_a = scratch.scaled_a.of(m * at.width);
      T* const grad_h = scratch.grad_h.of(m * at.width_in);
      Real* const sums = scratch.sums.of((m + kBlock - 1) / kBlock * std::max(at.hidden, at.width_in));
      const Matrix x_matrix = at.matrix(x_e, m, at.hidden), grad_y_matrix = at.matrix(grad_y_e, m, at.hidden);
      const Matrix scaled_a_matrix = at.matrix(scaled_a, m, at.width);
      const Matrix grad_h_matrix = at.matrix(grad_h, m, at.width_in);
      gather_grad(at, e, input(grad_y), weight_rows.data() + first,
                  b_out ? data_of<T>(b_out) + e * at.hidden : nullptr, grad_y_e, grad_weight_rows.data() + first, sums,
                  to_b_out);
      at.matrix(grad_a, m, at.width).be_product(grad_y_matrix, at.w_out(e).transposed());
      activate_backward(at, act, e, grad_a, input(h) + first * at.width_in, weight_rows.data() + first, scaled_a,
                        grad_h, grad_weight_rows.data() + first, sums, to_b_in);
      outer(flips_out, to_w_out, scaled_a_matrix, at.width, grad_y_matrix, at.hidden);
      gather(at, e, input(x), x_e);
      outer(flips_in, to_w_in, x_matrix, at.hidden, grad_h_matrix, at.width_in);
      at.matrix(grad_x_rows + at.padded[e] * at.hidden, m, at.hidden)
          .be_product(grad_h_matrix, at.w_in(e).transposed());
    });
    with_weight(grad_weight, [&](const auto* to) {
      using W = std::remove_const_t<std::remove_pointer_t<decltype(to)>>;
      W* const grad = static_cast<W*>(grad_weight.mutable_data_ptr());
      for (int64_t row = 0; row < at.rows; ++row) grad[at.order[row]] = static_cast<W>(grad_weight_rows[row]);
      at.combine(grad_x_rows, static_cast<const W*>(nullptr), nullptr, static_cast<T*>(grad_x.mutable_data_ptr()));
    });
  });
  if (flips_in) grad_w_in = torch::stable::transpose(grad_w_in, 1, 2);
  if (flips_out) grad_w_out = torch::stable::transpose(grad_w_out, 1, 2);
  return {grad_x, grad_weight, grad_w_in, grad_b_in, grad_w_out, grad_b_out};
}

}  // namespace
}  // namespace unif2ace

STABLE_TORCH_LIBRARY_FRAGMENT(unif2ace_native, m) {
  m.def(
      "moe_experts(Tensor x, Tensor weight, Tensor order, Tensor offsets, Tensor w_in, Tensor? b_in, Tensor w_out,"
      " Tensor? b_out, str activation, bool keep_h=True) -> (Tensor, Tensor)");
  m.def(
      "moe_experts_backward(Tensor grad_y, Tensor x, Tensor h, Tensor weight, Tensor order, Tensor offsets,"
      " Tensor w_in, Tensor w_out, Tensor? b_out, bool has_b_in, str activation)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) {
  m.impl("moe_experts", TORCH_BOX(&unif2ace::experts_cpu));
  m.impl("moe_experts_backward", TORCH_BOX(&unif2ace::experts_backward_cpu));
}
