// unif2ace_native::moe_mix and its backward on the CPU: one pass over a sample's elements, summed in float32.
#include <algorithm>
#include <tuple>
#include <vector>

#include "moe/tiles.h"

namespace unif2ace {
namespace {

constexpr int64_t kPiece = 16 * kTile;  // elements of a sample that one thread takes at a time
constexpr int64_t kBlock = 64;          // elements whose sums stay in registers: a tile's are written and read a term

// y = coef_0 x + sum_k coef_k injected_k, `step` elements from one injected term to the next.
template <class T, class Real>
UNIF2ACE_INLINE void mix_block(const T* x, const T* injected, int64_t step, const Real* coef, int64_t terms, T* y,
                               int64_t count) {
  Real sum[kBlock];
  for (int64_t i = 0; i < count; ++i) sum[i] = widen<Real>(x[i]) * coef[0];
  for (int64_t k = 1; k < terms; ++k, injected += step)
    for (int64_t i = 0; i < count; ++i) sum[i] += widen<Real>(injected[i]) * coef[k];
  for (int64_t i = 0; i < count; ++i) y[i] = narrow<T>(sum[i]);
}

template <class T, class Real>
UNIF2ACE_SIMD_CLONES void mix_terms(const T* x, const T* injected, int64_t step, const Real* coef, int64_t terms, T* y,
                                    int64_t count) {
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock) mix_block(x + i, injected + i, step, coef, terms, y + i, kBlock);
  mix_block(x + i, injected + i, step, coef, terms, y + i, count - i);
}

// to = by grad; returns <grad, term>.
template <class T, class Real>
UNIF2ACE_SIMD_CLONES Real mix_term_backward(const T* __restrict grad, const T* __restrict term, Real by,
                                            T* __restrict to, int64_t count) {
  Real product[kBlock] = {};
  const auto element = [&](int64_t i, int64_t lane) __attribute__((always_inline)) {
    const Real g = widen<Real>(grad[i]);
    product[lane] += g * widen<Real>(term[i]);
    to[i] = narrow<T>(g * by);
  };
  int64_t i = 0;
  for (; i + kBlock <= count; i += kBlock)
    for (int64_t lane = 0; lane < kBlock; ++lane) element(i + lane, lane);
  for (int64_t lane = 0; i + lane < count; ++lane) element(i + lane, lane);
  for (int64_t half = kBlock / 2; half > 0; half /= 2)
    for (int64_t lane = 0; lane < half; ++lane) product[lane] += product[lane + half];
  return product[0];
}

// What both directions know. Terms of a sample: x, then the injected sequences.
template <class T>
struct Mixture {
  using Real = ComputeOf<T>;

  int64_t batch, terms, size, pieces;
  std::vector<Real> coef;  // [batch, terms]
  const T *x, *injected;

  Mixture(const Tensor& x_, const Tensor& coef_, const Tensor& injected_)
      : batch(x_.size(0)), terms(coef_.size(1)), size(x_.size(1) * x_.size(2)), pieces((size + kPiece - 1) / kPiece),
        coef(batch * terms), x(static_cast<const T*>(x_.const_data_ptr())),
        injected(static_cast<const T*>(injected_.const_data_ptr())) {
    STD_TORCH_CHECK(injected_.size(1) == terms - 1 && injected_.numel() == batch * (terms - 1) * size &&
                        injected_.scalar_type() == x_.scalar_type(),
                    "injected: expected [B, M, L, D] of x's dtype");
    dispatch(coef_.scalar_type(), "coef", [&](auto* of) {
      using C = std::remove_pointer_t<decltype(of)>;
      load(static_cast<const C*>(coef_.const_data_ptr()), coef.data(), batch * terms);
    });
  }

  // Elements of term k of sample b, in x and the injected ones or in gradients laid out alike.
  template <class Element>
  Element* term(Element* of_x, Element* of_injected, int64_t b, int64_t k) const {
    return k == 0 ? of_x + b * size : of_injected + (b * (terms - 1) + k - 1) * size;
  }

  // run(sample, piece, first element, last element)
  template <class Run>
  void for_pieces(const Run& run) const {
    torch::stable::parallel_for(0, batch * pieces, 4, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t first = i % pieces * kPiece;
        run(i / pieces, i % pieces, first, std::min(size, first + kPiece));
      }
    });
  }
};

Tensor mix_cpu(const Tensor& x_, const Tensor& coef_, const Tensor& injected_) {
  const Tensor x = torch::stable::contiguous(x_), coef = torch::stable::contiguous(coef_);
  const Tensor injected = torch::stable::contiguous(injected_);
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  dispatch(x.scalar_type(), "x", [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    using Real = ComputeOf<T>;
    const Mixture<T> at(x, coef, injected);
    T* const to = static_cast<T*>(y.mutable_data_ptr());
    at.for_pieces([&](int64_t b, int64_t, int64_t begin, int64_t end) {
      const T* const injected_terms = at.injected + b * (at.terms - 1) * at.size;
      mix_terms(at.x + b * at.size + begin, injected_terms + begin, at.size, at.coef.data() + b * at.terms, at.terms,
                to + b * at.size + begin, end - begin);
    });
  });
  return y;
}

std::tuple<Tensor, Tensor, Tensor> mix_backward_cpu(const Tensor& grad_y_, const Tensor& x_, const Tensor& coef_,
                                                    const Tensor& injected_) {
  const Tensor grad_y = torch::stable::contiguous(grad_y_), x = torch::stable::contiguous(x_);
  const Tensor coef = torch::stable::contiguous(coef_), injected = torch::stable::contiguous(injected_);
  Tensor grad_x = torch::stable::new_empty(x, {x.size(0), x.size(1), x.size(2)});
  Tensor grad_coef = torch::stable::new_empty(coef, {coef.size(0), coef.size(1)});
  Tensor grad_injected =
      torch::stable::new_empty(injected, {injected.size(0), injected.size(1), injected.size(2), injected.size(3)});
  STD_TORCH_CHECK(grad_y.scalar_type() == x.scalar_type() && grad_y.numel() == x.numel(), "grad_y: expected x's shape");
  dispatch(x.scalar_type(), "x", [&](auto* of) {
    using T = std::remove_pointer_t<decltype(of)>;
    using Real = ComputeOf<T>;
    const Mixture<T> at(x, coef, injected);
    const T* const from = static_cast<const T*>(grad_y.const_data_ptr());
    T* const to_x = static_cast<T*>(grad_x.mutable_data_ptr());
    T* const to_injected = static_cast<T*>(grad_injected.mutable_data_ptr());
    std::vector<Real> products(at.batch * at.pieces * at.terms);  // <grad_y, term> of each piece
    at.for_pieces([&](int64_t b, int64_t piece, int64_t begin, int64_t end) {
      for (int64_t k = 0; k < at.terms; ++k)
        products[(b * at.pieces + piece) * at.terms + k] = mix_term_backward(
            from + b * at.size + begin, at.term(at.x, at.injected, b, k) + begin, at.coef[b * at.terms + k],
            at.term(to_x, to_injected, b, k) + begin, end - begin);
    });
    std::vector<Real> sums(at.batch * at.terms);
    for (int64_t i = 0; i < at.batch * at.pieces; ++i)
      add(sums.data() + i / at.pieces * at.terms, products.data() + i * at.terms, at.terms);
    dispatch(grad_coef.scalar_type(), "coef", [&](auto* of_coef) {
      using C = std::remove_pointer_t<decltype(of_coef)>;
      store(sums.data(), static_cast<C*>(grad_coef.mutable_data_ptr()), at.batch * at.terms);
    });
  });
  return {grad_x, grad_coef, grad_injected};
}

}  // namespace
}  // namespace unif2ace

STABLE_TORCH_LIBRARY_FRAGMENT(unif2ace_native, m) {
  m.def("moe_mix(Tensor x, Tensor coef, Tensor injected) -> Tensor");
  m.def("moe_mix_backward(Tensor grad_y, Tensor x, Tensor coef, Tensor injected) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) {
  m.impl("moe_mix", TORCH_BOX(&unif2ace::mix_cpu));
  m.impl("moe_mix_backward", TORCH_BOX(&unif2ace::mix_backward_cpu));
}
