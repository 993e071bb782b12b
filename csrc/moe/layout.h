// Who has which rows: the slots sorted by expert, an expert's weights, and the experts shared out among the threads.
//
// Large experts take turns, each on all threads; small ones go to one thread each, which saves the waiting at the end
// of every step.
#pragma once

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "common/matrix.h"
#include "moe/tiles.h"

namespace unif2ace {

constexpr int64_t kGrain = 16 * 1024;  // elements worth a thread

template <class Rows>
void for_rows(int64_t rows, int64_t width, const Rows& run) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrain / std::max<int64_t>(width, 1)), run);
}

// What both directions know: sizes, who has which rows, and the weights' places.
template <class T>
struct Layout {
  using Real = ComputeOf<T>;

  int64_t tokens, slots, hidden, width, width_in, rows, experts;
  int32_t dtype;
  const int64_t *order, *offsets;
  std::vector<int64_t> padded;    // first row of each expert where its rows are padded; [experts + 1]
  std::vector<int64_t> position;  // [T * S]: padded row of a slot
  Tensor w_in_tensor, w_out_tensor;

  Layout(const Tensor& x, const Tensor& weight, const Tensor& order_, const Tensor& offsets_, const Tensor& w_in,
         const Tensor& w_out)
      : tokens(x.size(0)), slots(weight.size(1)), hidden(x.size(1)), width(w_out.size(1)), width_in(w_in.size(2)),
        rows(order_.numel()), experts(w_in.size(0)),
        dtype(torch::stable::detail::to<int32_t>(torch::stable::detail::from(x.scalar_type()))),
        order(order_.const_data_ptr<int64_t>()), offsets(offsets_.const_data_ptr<int64_t>()), padded(experts + 1),
        position(rows), w_in_tensor(w_in), w_out_tensor(w_out) {
    STD_TORCH_CHECK(rows == tokens * slots && offsets_.numel() == experts + 1 && offsets[0] == 0 &&
                        offsets[experts] == rows,
                    "routing: expected the order of ", tokens * slots, " slots among ", experts, " experts");
    for (int64_t e = 0; e < experts; ++e) {
      STD_TORCH_CHECK(offsets[e] <= offsets[e + 1], "routing.offsets: expected a running sum");
      padded[e + 1] = padded[e] + padded_count(e);
      for (int64_t row = offsets[e]; row < offsets[e + 1]; ++row) {
        STD_TORCH_CHECK(order[row] >= 0 && order[row] < rows, "routing.order: expected slots below ", rows);
        position[order[row]] = padded[e] + row - offsets[e];
      }
    }
  }

  int64_t count(int64_t e) const { return offsets[e + 1] - offsets[e]; }
  // oneDNN, which multiplies bfloat16 and float16, builds a kernel for each new number of rows, which can take as long
  // as the product itself, and routing brings new numbers at every step: products take a multiple of 32 rows, or of the
  // next power of two where they are fewer.
  int64_t padded_count(int64_t e) const {
    int64_t step = 1;
    while (sizeof(T) == 2 && step < std::min<int64_t>(32, count(e))) step *= 2;
    return (count(e) + step - 1) / step * step;
  }
  int64_t token(int64_t row) const { return order[row] / slots; }

  Matrix matrix(const T* data, int64_t m, int64_t n) const { return {data, m, n, dtype}; }
  Matrix of_expert(const Tensor& w, int64_t e) const {
    const T* const data = static_cast<const T*>(w.const_data_ptr()) + e * w.stride(0);
    return {data, w.size(1), w.size(2), w.stride(1), w.stride(2), dtype};
  }
  Matrix w_in(int64_t e) const { return of_expert(w_in_tensor, e); }
  Matrix w_out(int64_t e) const { return of_expert(w_out_tensor, e); }

  // run(expert, scratch) for every expert: a thread each, the longest first, save those so long that the others would
  // be waited for: they come before, each on all threads.
  template <class ScratchOf, class Run>
  void for_experts(const Run& run) const {
    std::vector<int64_t> by_count(experts);
    std::iota(by_count.begin(), by_count.end(), 0);
    std::stable_sort(by_count.begin(), by_count.end(), [&](int64_t a, int64_t b) { return count(a) > count(b); });
    const int64_t threads = torch::stable::get_num_threads();
    int64_t together = 0, left = rows;
    while (together < experts && longest_share(by_count, together, threads) * threads > left + left / 8)
      left -= count(by_count[together++]);
    {
      ScratchOf scratch;
      for (int64_t i = 0; i < together; ++i) run(by_count[i], scratch);
    }
    std::atomic<int64_t> next{together};
    torch::stable::parallel_for(0, std::min(threads, experts - together), 1, [&](int64_t, int64_t) {
      ScratchOf scratch;
      for (int64_t i = next++; i < experts; i = next++) run(by_count[i], scratch);
    });
  }

  // Rows of the busiest of `threads` when each takes the longest expert that is left, from by_count[first] on.
  int64_t longest_share(const std::vector<int64_t>& by_count, int64_t first, int64_t threads) const {
    std::vector<int64_t> busy(threads);
    for (int64_t i = first; i < experts; ++i) *std::min_element(busy.begin(), busy.end()) += count(by_count[i]);
    return *std::max_element(busy.begin(), busy.end());
  }

  // y_t = sum_s weight_ts (rows[position_ts] + bias_e), or the plain sum where there is no weight and no bias.
  template <class W>
  void combine(const T* from, const W* weight, const T* bias, T* y) const {
    std::vector<int64_t> expert_of(bias == nullptr ? 0 : rows);
    if (bias != nullptr)
      for (int64_t e = 0; e < experts; ++e)
        for (int64_t row = offsets[e]; row < offsets[e + 1]; ++row) expert_of[order[row]] = e;
    for_rows(tokens, hidden * slots, [&](int64_t begin, int64_t end) {
      Real sum[kTile];
      for (int64_t t = begin; t < end; ++t) {
        for (int64_t j = 0; j < hidden; j += kTile) {
          const int64_t count = std::min(kTile, hidden - j);
          std::fill(sum, sum + count, Real(0));
          for (int64_t slot = t * slots; slot < (t + 1) * slots; ++slot) {
            const T* const row = from + position[slot] * hidden + j;
            if (weight == nullptr) {
              unif2ace::add(sum, row, count);
              continue;
            }
            add_scaled(sum, row, static_cast<Real>(weight[slot]), count);
            if (bias != nullptr)
              add_scaled(sum, bias + expert_of[slot] * hidden + j, static_cast<Real>(weight[slot]), count);
          }
          store(sum, y + t * hidden + j, count);
        }
      }
    });
  }
};

}  // namespace unif2ace
