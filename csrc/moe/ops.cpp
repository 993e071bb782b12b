// unif2ace_native::moe_activation and its backward on the CPU: what happens to an expert's rows between its products.
#include <algorithm>
#include <string>
#include <tuple>
#include <type_traits>

#include <torch/headeronly/util/Half.h>

#include "common/torch_stable.h"
#include "moe/activation.h"

namespace unif2ace {
namespace {

constexpr int64_t kTile = 256;        // elements a step: half a dozen float arrays of it stay in the first-level cache
constexpr int64_t kGrain = 16 * 1024;  // elements worth a thread

struct Bfloat16 {
  uint16_t bits;
};
using Half = torch::headeronly::Half;

// Tiles of any dtype to and from the type that computes: float, and double for double.
UNIF2ACE_SIMD_CLONES
void load(const Bfloat16* from, float* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = bits_float(static_cast<int32_t>(uint32_t{from[i].bits} << 16));
}
UNIF2ACE_SIMD_CLONES
void store(const float* from, Bfloat16* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(float_bits(from[i]));
    const uint32_t nearest_even = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    to[i].bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : nearest_even);
  }
}
template <class From, class To>
void load(const From* from, To* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
}
template <class From, class To>
void store(const From* from, To* to, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(from[i]);
}

UNIF2ACE_SIMD_CLONES
void multiply(float* __restrict into, const float* __restrict by, int64_t count) {
  for (int64_t i = 0; i < count; ++i) into[i] *= by[i];
}
UNIF2ACE_SIMD_CLONES
void scale(float* into, float by, int64_t count) {
  for (int64_t i = 0; i < count; ++i) into[i] *= by;
}
UNIF2ACE_SIMD_CLONES
void add_product(float* __restrict sum, const float* __restrict a, const float* __restrict b, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] += a[i] * b[i];
}
void multiply(double* into, const double* by, int64_t count) {
  for (int64_t i = 0; i < count; ++i) into[i] *= by[i];
}
void scale(double* into, double by, int64_t count) {
  for (int64_t i = 0; i < count; ++i) into[i] *= by;
}
void add_product(double* sum, const double* a, const double* b, int64_t count) {
  for (int64_t i = 0; i < count; ++i) sum[i] += a[i] * b[i];
}

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

template <class T>
using Compute = std::conditional_t<std::is_same_v<T, double>, double, float>;

// h [rows, width] or gate | value [rows, 2 width] -> a [rows, width].
template <class T>
void forward_rows(Activation act, const T* h, T* a, int64_t width, int64_t begin, int64_t end) {
  using Real = Compute<T>;
  const int64_t h_width = act.gated ? 2 * width : width;
  Real x[kTile], y[kTile], slope[kTile];
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t j = 0; j < width; j += kTile) {
      const int64_t count = std::min(kTile, width - j);
      const T* const at = h + row * h_width + j;
      load(at, x, count);
      pointwise(act.kind, x, y, slope, count);
      if (act.gated) {
        load(at + width, x, count);
        multiply(y, x, count);
      }
      store(y, a + row * width + j, count);
    }
  }
}

// With a = act(h): scaled_a = weight a, grad_weight = <grad_a, a>, grad_h = weight grad_a act'(h), a row at a time.
template <class T, class Weight>
void backward_rows(Activation act, const T* grad_a, const T* h, const Weight* weight, T* scaled_a, T* grad_h,
                   Weight* grad_weight, int64_t width, int64_t begin, int64_t end) {
  using Real = Compute<T>;
  const int64_t h_width = act.gated ? 2 * width : width;
  Real x[kTile], y[kTile], slope[kTile], grad[kTile], value[kTile], sum[kTile];
  for (int64_t row = begin; row < end; ++row) {
    const Real w = static_cast<Real>(weight[row]);
    std::fill(sum, sum + kTile, Real(0));
    for (int64_t j = 0; j < width; j += kTile) {
      const int64_t count = std::min(kTile, width - j);
      const T* const at = h + row * h_width + j;
      T* const grad_at = grad_h + row * h_width + j;
      load(at, x, count);
      load(grad_a + row * width + j, grad, count);
      pointwise(act.kind, x, y, slope, count);
      if (act.gated) {
        load(at + width, value, count);
        std::copy(y, y + count, x);  // the gradient of the value: weight grad_a act(gate)
        multiply(x, grad, count);
        scale(x, w, count);
        store(x, grad_at + width, count);
        multiply(y, value, count);
        multiply(slope, value, count);
      }
      add_product(sum, grad, y, count);
      scale(y, w, count);
      store(y, scaled_a + row * width + j, count);
      multiply(slope, grad, count);
      scale(slope, w, count);
      store(slope, grad_at, count);
    }
    Real total = 0;
    for (int64_t i = 0; i < std::min(kTile, width); ++i) total += sum[i];
    grad_weight[row] = static_cast<Weight>(total);
  }
}

// Calls run(pointer to T) with the element type of `dtype`.
template <class Run>
void dispatch(ScalarType dtype, const Run& run) {
  switch (dtype) {
    case ScalarType::Float: return run(static_cast<float*>(nullptr));
    case ScalarType::BFloat16: return run(static_cast<Bfloat16*>(nullptr));
    case ScalarType::Half: return run(static_cast<Half*>(nullptr));
    default:
      STD_TORCH_CHECK(dtype == ScalarType::Double, "h: expected float64, float32, bfloat16 or float16");
      return run(static_cast<double*>(nullptr));
  }
}

template <class Rows>
void for_rows(int64_t rows, int64_t width, const Rows& run) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(width, 1)), run);
}

Tensor activation_cpu(const Tensor& h, std::string name) {
  const Activation act = activation_named(name);
  STD_TORCH_CHECK(h.dim() == 2 && h.is_contiguous(), "h: expected a contiguous matrix");
  const int64_t rows = h.size(0), width = act.gated ? h.size(1) / 2 : h.size(1);
  Tensor a = torch::stable::new_empty(h, {rows, width});
  dispatch(h.scalar_type(), [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    const T* const from = static_cast<const T*>(h.const_data_ptr());
    T* const to = static_cast<T*>(a.mutable_data_ptr());
    for_rows(rows, width, [&](int64_t begin, int64_t end) { forward_rows(act, from, to, width, begin, end); });
  });
  return a;
}

std::tuple<Tensor, Tensor, Tensor> activation_backward_cpu(const Tensor& grad_a, const Tensor& h,
                                                           const Tensor& weight, std::string name) {
  const Activation act = activation_named(name);
  const int64_t rows = h.size(0), width = grad_a.size(1), padded = grad_a.size(0);
  STD_TORCH_CHECK(grad_a.is_contiguous() && h.is_contiguous() && weight.is_contiguous(), "expected contiguous tensors");
  STD_TORCH_CHECK(h.scalar_type() == grad_a.scalar_type(), "h: expected grad_a's dtype");
  STD_TORCH_CHECK(h.size(1) == width * (act.gated ? 2 : 1), "h: expected grad_a's width, twice it for a gated one");
  STD_TORCH_CHECK(padded >= rows && weight.numel() == rows, "grad_a, weight: expected h's rows");
  const bool is_double = weight.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double || weight.scalar_type() == ScalarType::Float, "weight: expected float32 or float64");
  Tensor scaled_a = torch::stable::new_empty(grad_a, {padded, width});
  Tensor grad_h = torch::stable::new_empty(h, {padded, h.size(1)});
  Tensor grad_weight = torch::stable::new_empty(weight, {rows});
  dispatch(h.scalar_type(), [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    T* const scaled_data = static_cast<T*>(scaled_a.mutable_data_ptr());
    T* const grad_data = static_cast<T*>(grad_h.mutable_data_ptr());
    const auto with_weight = [&](auto* of_weight) {
      using W = std::remove_pointer_t<decltype(of_weight)>;
      for_rows(rows, width, [&](int64_t begin, int64_t end) {
        backward_rows(act, static_cast<const T*>(grad_a.const_data_ptr()), static_cast<const T*>(h.const_data_ptr()),
                      static_cast<const W*>(weight.const_data_ptr()), scaled_data, grad_data,
                      static_cast<W*>(grad_weight.mutable_data_ptr()), width, begin, end);
      });
    };
    is_double ? with_weight(static_cast<double*>(nullptr)) : with_weight(static_cast<float*>(nullptr));
    std::fill(scaled_data + rows * width, scaled_data + padded * width, T{});
    std::fill(grad_data + rows * h.size(1), grad_data + padded * h.size(1), T{});
  });
  return {scaled_a, grad_h, grad_weight};
}

}  // namespace
}  // namespace unif2ace

STABLE_TORCH_LIBRARY_FRAGMENT(unif2ace_native, m) {
  m.def("moe_activation(Tensor h, str activation) -> Tensor");
  m.def(
      "moe_activation_backward(Tensor grad_a, Tensor h, Tensor weight, str activation) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) {
  m.impl("moe_activation", TORCH_BOX(&unif2ace::activation_cpu));
  m.impl("moe_activation_backward", TORCH_BOX(&unif2ace::activation_backward_cpu));
}
