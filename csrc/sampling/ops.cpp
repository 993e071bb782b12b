// unif2ace_native::draw for CPU.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "common/simd.h"
#include "common/torch_stable.h"
#include "sampling/draw.h"

namespace unif2ace {
namespace {

UNIF2ACE_SIMD_CLONES
void draw_one(const float* cond, const float* uncond, int64_t codes, uint32_t row, const DrawOptions& options,
              float* scratch, int64_t* code, float* confidence) {
  draw_row(cond, uncond, codes, row, options, scratch, code, confidence);
}

UNIF2ACE_SIMD_CLONES
void draw_one(const double* cond, const double* uncond, int64_t codes, uint32_t row, const DrawOptions& options,
              double* scratch, int64_t* code, double* confidence) {
  draw_row(cond, uncond, codes, row, options, scratch, code, confidence);
}

template <class T>
void draw_rows(const Tensor& cond, const std::optional<Tensor>& uncond, const Tensor& rows,
               const DrawOptions& options, Tensor& code, Tensor& confidence) {
  const int64_t codes = cond.size(1);
  const T* const first = cond.const_data_ptr<T>();
  const T* const second = uncond ? uncond->const_data_ptr<T>() : nullptr;
  const int64_t first_stride = cond.stride(0), second_stride = uncond ? uncond->stride(0) : 0;
  const int64_t* const row = rows.const_data_ptr<int64_t>();
  int64_t* const code_out = code.mutable_data_ptr<int64_t>();
  T* const confidence_out = confidence.mutable_data_ptr<T>();
  torch::stable::parallel_for(0, cond.size(0), 1, [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(2 * padded(codes));
    for (int64_t i = begin; i < end; ++i) {
      draw_one(first + i * first_stride, second == nullptr ? nullptr : second + i * second_stride, codes,
               static_cast<uint32_t>(row[i]), options, scratch.data(), code_out + i, confidence_out + i);
    }
  });
}

void check_logits(const Tensor& logits, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(0) == like.size(0) && logits.size(1) == like.size(1) &&
                      logits.scalar_type() == like.scalar_type() && (logits.size(1) <= 1 || logits.stride(1) == 1),
                  name, ": expected logits [R, V] like cond, each row contiguous");
}

std::tuple<Tensor, Tensor> draw_cpu(const Tensor& cond, std::optional<Tensor> uncond, const Tensor& rows,
                                    const Tensor& seed, const Tensor& offset, double guidance, double temperature,
                                    int64_t top_k, double top_p, std::string confidence) {
  check_logits(cond, cond, "cond");
  if (uncond) check_logits(*uncond, cond, "uncond");
  STD_TORCH_CHECK(cond.size(1) > 0, "cond: expected a code at least");
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long && rows.numel() == cond.size(0) && rows.is_contiguous(),
                  "rows: expected int64 [R], contiguous");
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "seed: expected one int64");
  STD_TORCH_CHECK(offset.scalar_type() == ScalarType::Long && offset.numel() == 1, "offset: expected one int64");
  const Confidence kind = confidence == "log_prob"      ? Confidence::kLogProb
                          : confidence == "neg_entropy" ? Confidence::kNegEntropy
                                                        : Confidence::kMargin;
  const DrawOptions options{*seed.const_data_ptr<int64_t>(), *offset.const_data_ptr<int64_t>(), guidance, temperature,
                            top_k, top_p, kind};
  Tensor code = torch::stable::new_empty(rows, {rows.size(0)});
  Tensor value = torch::stable::new_empty(cond, {rows.size(0)});
  if (cond.scalar_type() == ScalarType::Double) {
    draw_rows<double>(cond, uncond, rows, options, code, value);
  } else {
    STD_TORCH_CHECK(cond.scalar_type() == ScalarType::Float, "cond: expected float32 or float64");
    draw_rows<float>(cond, uncond, rows, options, code, value);
  }
  return {code, value};
}

}  // namespace
}  // namespace unif2ace

STABLE_TORCH_LIBRARY_FRAGMENT(unif2ace_native, m) {
  m.def(
      "draw(Tensor cond, Tensor? uncond, Tensor rows, Tensor seed, Tensor offset, float guidance, float temperature, "
      "int top_k, float top_p, str confidence) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) { m.impl("draw", TORCH_BOX(&unif2ace::draw_cpu)); }
