// unif2ace_native::moe_arrange on the CPU: the order of slots whose experts were chosen elsewhere.
#include <tuple>
#include <vector>

#include "moe/order.h"

namespace unif2ace {
namespace {

constexpr int64_t kChunk = 4096;  // slots

std::tuple<Tensor, Tensor, Tensor> arrange_cpu(const Tensor& expert_, int64_t experts) {
  STD_TORCH_CHECK(expert_.scalar_type() == ScalarType::Long, "expert: expected int64");
  STD_TORCH_CHECK(experts >= 1, "num_experts: expected at least 1");
  const Tensor expert = torch::stable::contiguous(expert_);
  const int64_t rows = expert.numel();
  const auto* const chosen = expert.const_data_ptr<int64_t>();
  Tensor counts = torch::stable::new_empty(expert, {experts});
  Tensor offsets = torch::stable::new_empty(expert, {experts + 1});
  Tensor order = torch::stable::new_empty(expert, {rows});
  std::vector<int64_t> places((rows + kChunk - 1) / kChunk * experts);
  std::vector<char> out_of_range((rows + kChunk - 1) / kChunk);
  for_chunks_of(kChunk, rows, [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      for (int64_t slot = c * kChunk; slot < std::min(rows, (c + 1) * kChunk); ++slot) {
        if (chosen[slot] < 0 || chosen[slot] >= experts)
          out_of_range[c] = 1;
        else
          ++places[c * experts + chosen[slot]];
      }
    }
  });
  STD_TORCH_CHECK(std::none_of(out_of_range.begin(), out_of_range.end(), [](char each) { return each != 0; }),
                  "expert: expected values in [0, ", experts, ")");
  place_slots(chosen, rows, kChunk, experts, places, static_cast<int64_t*>(counts.mutable_data_ptr()),
              static_cast<int64_t*>(offsets.mutable_data_ptr()), static_cast<int64_t*>(order.mutable_data_ptr()));
  return {counts, offsets, order};
}

}  // namespace
}  // namespace unif2ace

STABLE_TORCH_LIBRARY_FRAGMENT(unif2ace_native, m) {
  m.def("moe_arrange(Tensor expert, int experts) -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) { m.impl("moe_arrange", TORCH_BOX(&unif2ace::arrange_cpu)); }
