// unif2ace_native::sample_hidden for CPU: guidance, the head's product and the draw, over the rows to be drawn alone.
#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "common/matrix.h"
#include "sampling/rows.h"

namespace unif2ace {
namespace {

using BiasedFloat = Biased<float, float>;
using BiasedBFloat16 = Biased<BFloat16, float>;
using BiasedHalf = Biased<Half, float>;
using BiasedDouble = Biased<double, double>;
UNIF2ACE_DRAW_ONE(BiasedFloat, float)
UNIF2ACE_DRAW_ONE(BiasedBFloat16, float)
UNIF2ACE_DRAW_ONE(BiasedHalf, float)
UNIF2ACE_DRAW_ONE(BiasedDouble, double)

// (1 + w) cond - w uncond in T, or cond where there is no other, rounded to the head's type.
template <class T, class In, class Out>
inline __attribute__((always_inline)) void fold_row(const In* cond, const In* uncond, int64_t hidden, double guidance,
                                                    Out* out) {
  const T up = static_cast<T>(1 + guidance), down = static_cast<T>(guidance);
  if (uncond == nullptr) {
    for (int64_t i = 0; i < hidden; ++i) out[i] = static_cast<Out>(static_cast<T>(cond[i]));
  } else {
    for (int64_t i = 0; i < hidden; ++i)
      out[i] = static_cast<Out>(up * static_cast<T>(cond[i]) - down * static_cast<T>(uncond[i]));
  }
}

#define UNIF2ACE_FOLD_ONE(In, Out)                                                                                  \
  UNIF2ACE_SIMD_CLONES                                                                                              \
  void fold_float(const In* cond, const In* uncond, int64_t hidden, double guidance, Out* out) {                    \
    fold_row<float>(cond, uncond, hidden, guidance, out);                                                           \
  }
UNIF2ACE_FOLD_ONE(float, float)
UNIF2ACE_FOLD_ONE(BFloat16, BFloat16)
#undef UNIF2ACE_FOLD_ONE

template <class T, class In, class Out>
void fold_one(const In* cond, const In* uncond, int64_t hidden, double guidance, Out* out) {
  constexpr bool common = std::is_same_v<In, Out> && (std::is_same_v<In, float> || std::is_same_v<In, BFloat16>);
  if constexpr (common) {
    fold_float(cond, uncond, hidden, guidance, out);
  } else {
    fold_row<T>(cond, uncond, hidden, guidance, out);
  }
}

constexpr int64_t kTileRows = 64, kTileColumns = 1024;  // of a product: what it rounds to may hang on its shape
constexpr int64_t kTiles = 4;                           // row tiles whose logits are there at once

// The head over the rows to be drawn, folded, and the draw from it. Products have one shape, on one thread each,
// whatever the number of rows (what is missing of a tile is zeros) and of threads: so a row has the same logits in
// any batch.
std::tuple<Tensor, Tensor> sample_hidden_cpu(const Tensor& h_cond, std::optional<Tensor> h_uncond,
                                             const Tensor& weight, std::optional<Tensor> bias, const Tensor& ids,
                                             const Tensor& unknown, const Tensor& rows, const Tensor& seed,
                                             const Tensor& offset, int64_t first_code, int64_t codes, double guidance,
                                             double temperature, int64_t top_k, double top_p, std::string confidence,
                                             bool /*compact: known rows cost nothing here*/) {
  check_logits(h_cond, h_cond, "h_cond");
  if (guidance == 0) h_uncond.reset();
  if (h_uncond) check_logits(*h_uncond, h_cond, "h_uncond");
  const int64_t hidden = h_cond.size(1);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.size(1) == hidden && weight.is_contiguous(),
                  "weight: expected [V, D], contiguous");
  STD_TORCH_CHECK(first_code >= 0 && codes > 0 && first_code + codes <= weight.size(0),
                  "codes: expected rows of weight");
  STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == weight.size(0) && bias->is_contiguous()),
                  "bias: expected [V], contiguous");
  check_words(rows, h_cond.size(0), seed, offset);
  const DrawOptions options = draw_options(seed, offset, 0.0, temperature, top_k, top_p, confidence);
  Samples samples(ids, unknown, weight);
  by_dtype(weight, [&](auto head, auto compute) {
    using W = decltype(head);
    using T = decltype(compute);
    std::vector<T> shift(codes, T(0));
    if (bias) {
      by_dtype(*bias, [&](auto in, auto) {
        const auto* const from = static_cast<const decltype(in)*>(bias->const_data_ptr()) + first_code;
        // Through the head's type, in which torch adds it.
        for (int64_t i = 0; i < codes; ++i) shift[i] = static_cast<T>(static_cast<W>(static_cast<T>(from[i])));
      });
    }
    const int32_t dtype = aoti_dtype(weight);
    const W* const codes_of = static_cast<const W*>(weight.const_data_ptr()) + first_code * hidden;
    const int64_t* const row = rows.const_data_ptr<int64_t>();
    const SampleRows<T> out(samples);
    const int64_t group = std::min(kTiles * kTileRows, (samples.count() + kTileRows - 1) / kTileRows * kTileRows);
    std::vector<W> folded(group * hidden), logits(group * codes);
    const int64_t blocks = (codes + kTileColumns - 1) / kTileColumns;
    for (int64_t first = 0; first < samples.count(); first += group) {
      const int64_t count = std::min(group, samples.count() - first);
      const int64_t tiles = (count + kTileRows - 1) / kTileRows;
      by_dtype(h_cond, [&](auto in, auto) {
        const Branches<decltype(in)> branches(h_cond, h_uncond, 0);
        const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, hidden));
        torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
          for (int64_t j = begin; j < end; ++j) {
            const int64_t i = samples.index[first + j];
            fold_one<T>(branches.cond(i), branches.uncond(i), hidden, guidance, folded.data() + j * hidden);
          }
        });
      });
      std::fill(folded.begin() + count * hidden, folded.begin() + tiles * kTileRows * hidden, W());
      torch::stable::parallel_for(0, blocks * tiles, 1, [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {  // a block of columns serves all tiles while it is in cache
          const int64_t column = task / tiles * kTileColumns, tile = task % tiles * kTileRows;
          const int64_t width = std::min(kTileColumns, codes - column);
          Matrix(logits.data() + tile * codes + column, kTileRows, width, codes, 1, dtype)
              .be_product(Matrix(folded.data() + tile * hidden, kTileRows, hidden, dtype),
                          Matrix(codes_of + column * hidden, hidden, width, 1, hidden, dtype));
        }
      });
      for_rows<T>(count, codes, [&](int64_t j, T* scratch) {
        const int64_t i = samples.index[first + j];
        int64_t code = 0;
        draw_one(Biased<W, T>{logits.data() + j * codes, shift.data()}, codes, static_cast<uint32_t>(row[i]), options,
                 scratch, &code, out.value + i);
        if (code >= 0) out.ids[i] = first_code + code;
      });
    }
  });
  return {samples.ids, samples.value};
}

}  // namespace
}  // namespace unif2ace

STABLE_TORCH_LIBRARY_FRAGMENT(unif2ace_native, m) {
  m.def(
      "sample_hidden(Tensor h_cond, Tensor? h_uncond, Tensor weight, Tensor? bias, Tensor ids, Tensor unknown, "
      "Tensor rows, Tensor seed, Tensor offset, int first_code, int codes, float guidance, float temperature, "
      "int top_k, float top_p, str confidence, bool compact) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) {
  m.impl("sample_hidden", TORCH_BOX(&unif2ace::sample_hidden_cpu));
}
