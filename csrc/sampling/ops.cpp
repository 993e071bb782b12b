// unif2ace_native::draw, sample_logits and remask for CPU; sample_logits and remask for CUDA where nvcc compiled them.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "sampling/launch.h"
#include "sampling/remask_row.h"
#include "sampling/rows.h"

namespace unif2ace {
namespace {

using PlainFloat = Plain<float, float>;
using GuidedFloat = Guided<float, float>;
using PlainBFloat16 = Plain<BFloat16, float>;
using GuidedBFloat16 = Guided<BFloat16, float>;
using PlainHalf = Plain<Half, float>;
using GuidedHalf = Guided<Half, float>;
using PlainDouble = Plain<double, double>;
using GuidedDouble = Guided<double, double>;
UNIF2ACE_DRAW_ONE(PlainFloat, float)
UNIF2ACE_DRAW_ONE(GuidedFloat, float)
UNIF2ACE_DRAW_ONE(PlainBFloat16, float)
UNIF2ACE_DRAW_ONE(GuidedBFloat16, float)
UNIF2ACE_DRAW_ONE(PlainHalf, float)
UNIF2ACE_DRAW_ONE(GuidedHalf, float)
UNIF2ACE_DRAW_ONE(PlainDouble, double)
UNIF2ACE_DRAW_ONE(GuidedDouble, double)

// draw_one of row i of the branches.
template <class T, class In>
void draw_branches(const Branches<In>& logits, int64_t i, int64_t codes, uint32_t row, const DrawOptions& o, T* scratch,
                   int64_t* code, T* value) {
  if (logits.second == nullptr) {
    draw_one(Plain<In, T>{logits.cond(i)}, codes, row, o, scratch, code, value);
  } else {
    const T up = static_cast<T>(1 + o.guidance), down = static_cast<T>(o.guidance);
    draw_one(Guided<In, T>{logits.cond(i), logits.uncond(i), up, down}, codes, row, o, scratch, code, value);
  }
}

UNIF2ACE_SIMD_CLONES
void keys_of(const float* confidence, const bool* unknown, const int64_t* rows, int64_t length,
             const RemaskOptions& options, float* keys) {
  remask_keys(confidence, unknown, rows, length, options, keys);
}

UNIF2ACE_SIMD_CLONES
void keys_of(const double* confidence, const bool* unknown, const int64_t* rows, int64_t length,
             const RemaskOptions& options, double* keys) {
  remask_keys(confidence, unknown, rows, length, options, keys);
}

std::tuple<Tensor, Tensor> draw_cpu(const Tensor& cond, std::optional<Tensor> uncond, const Tensor& rows,
                                    const Tensor& seed, const Tensor& offset, double guidance, double temperature,
                                    int64_t top_k, double top_p, std::string confidence) {
  check_logits(cond, cond, "cond");
  if (uncond) check_logits(*uncond, cond, "uncond");
  const int64_t codes = cond.size(1);
  STD_TORCH_CHECK(codes > 0, "cond: expected a code at least");
  check_words(rows, cond.size(0), seed, offset);
  const DrawOptions options = draw_options(seed, offset, guidance, temperature, top_k, top_p, confidence);
  Tensor code = torch::stable::new_empty(rows, {rows.size(0)});
  Tensor value = torch::stable::new_empty(cond, {rows.size(0)}, compute_dtype(cond));
  by_dtype(cond, [&](auto in, auto compute) {
    using T = decltype(compute);
    const Branches<decltype(in)> logits(cond, uncond, 0);
    const int64_t* const row = rows.const_data_ptr<int64_t>();
    int64_t* const code_out = code.mutable_data_ptr<int64_t>();
    T* const value_out = value.mutable_data_ptr<T>();
    for_rows<T>(cond.size(0), codes, [&](int64_t i, T* scratch) {
      draw_branches(logits, i, codes, static_cast<uint32_t>(row[i]), options, scratch, code_out + i, value_out + i);
    });
  });
  return {code, value};
}

std::tuple<Tensor, Tensor> sample_logits_cpu(const Tensor& cond, std::optional<Tensor> uncond, const Tensor& ids,
                                             const Tensor& unknown, const Tensor& rows, const Tensor& seed,
                                             const Tensor& offset, int64_t first_code, int64_t codes, double guidance,
                                             double temperature, int64_t top_k, double top_p, std::string confidence,
                                             bool /*compact: known rows cost nothing here*/) {
  check_logits(cond, cond, "cond");
  if (guidance == 0) uncond.reset();
  if (uncond) check_logits(*uncond, cond, "uncond");
  STD_TORCH_CHECK(first_code >= 0 && codes > 0 && first_code + codes <= cond.size(1),
                  "codes: expected columns of cond");
  check_words(rows, cond.size(0), seed, offset);
  const DrawOptions options = draw_options(seed, offset, guidance, temperature, top_k, top_p, confidence);
  Samples samples(ids, unknown, cond);
  by_dtype(cond, [&](auto in, auto compute) {
    using T = decltype(compute);
    const Branches<decltype(in)> logits(cond, uncond, first_code);
    const int64_t* const row = rows.const_data_ptr<int64_t>();
    const SampleRows<T> out(samples);
    for_rows<T>(samples.count(), codes, [&](int64_t j, T* scratch) {
      const int64_t i = samples.index[j];
      int64_t code = 0;
      draw_branches(logits, i, codes, static_cast<uint32_t>(row[i]), options, scratch, &code, out.value + i);
      if (code >= 0) out.ids[i] = first_code + code;
    });
  });
  return {samples.ids, samples.value};
}

template <class T>
void remask_all(const Tensor& confidence, const Tensor& unknown, const Tensor& count, const Tensor& rows,
                const RemaskOptions& options, Tensor& mask) {
  const int64_t length = confidence.size(1);
  const T* const value = confidence.const_data_ptr<T>();
  const bool* const candidates = unknown.const_data_ptr<bool>();
  const int64_t *const row = rows.const_data_ptr<int64_t>(), *const wanted = count.const_data_ptr<int64_t>();
  bool* const out = mask.mutable_data_ptr<bool>();
  const int64_t grain = std::max<int64_t>(1, 4096 / std::max<int64_t>(1, length));
  torch::stable::parallel_for(0, confidence.size(0), grain, [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(2 * length);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t at = b * length;
      keys_of(value + at, candidates + at, row + at, length, options, scratch.data());
      remask_row(scratch.data(), candidates + at, length, wanted[b], options.exact, scratch.data() + length, out + at);
    }
  });
}

void check_remask(const Tensor& confidence, const Tensor& unknown, const Tensor& count, const Tensor& rows,
                  const Tensor& seed, const Tensor& offset, const Tensor& temperature) {
  STD_TORCH_CHECK(confidence.dim() == 2 && confidence.is_contiguous(), "confidence: expected [B, N], contiguous");
  STD_TORCH_CHECK(unknown.scalar_type() == ScalarType::Bool && unknown.numel() == confidence.numel() &&
                      unknown.is_contiguous(),
                  "unknown: expected bool [B, N], contiguous");
  STD_TORCH_CHECK(count.scalar_type() == ScalarType::Long && count.numel() == confidence.size(0) &&
                      count.is_contiguous(),
                  "count: expected int64 [B], contiguous");
  STD_TORCH_CHECK(temperature.scalar_type() == ScalarType::Float && temperature.numel() == 1,
                  "temperature: expected one float32");
  check_words(rows, confidence.numel(), seed, offset);
}

Tensor remask_cpu(const Tensor& confidence, const Tensor& unknown, const Tensor& count, const Tensor& rows,
                  const Tensor& seed, const Tensor& offset, const Tensor& temperature, std::string ties) {
  check_remask(confidence, unknown, count, rows, seed, offset, temperature);
  const RemaskOptions options{*seed.const_data_ptr<int64_t>(), *offset.const_data_ptr<int64_t>(),
                              *temperature.const_data_ptr<float>(), ties == "index"};
  Tensor mask = torch::stable::new_empty(unknown, {confidence.size(0), confidence.size(1)});
  if (confidence.numel() == 0) return mask;
  if (confidence.scalar_type() == ScalarType::Double) {
    remask_all<double>(confidence, unknown, count, rows, options, mask);
  } else {
    STD_TORCH_CHECK(confidence.scalar_type() == ScalarType::Float, "confidence: expected float32 or float64");
    remask_all<float>(confidence, unknown, count, rows, options, mask);
  }
  return mask;
}

#ifdef UNIF2ACE_WITH_CUDA
std::tuple<Tensor, Tensor> sample_logits_cuda(const Tensor& cond, std::optional<Tensor> uncond, const Tensor& ids,
                                              const Tensor& unknown, const Tensor& rows, const Tensor& seed,
                                              const Tensor& offset, int64_t first_code, int64_t codes, double guidance,
                                              double temperature, int64_t top_k, double top_p, std::string confidence,
                                              bool /*compact: known rows leave at once*/) {
  check_logits(cond, cond, "cond");
  if (guidance == 0) uncond.reset();
  if (uncond) check_logits(*uncond, cond, "uncond");
  STD_TORCH_CHECK(first_code >= 0 && codes > 0 && first_code + codes <= cond.size(1), "codes: expected columns of cond");
  STD_TORCH_CHECK(codes < (int64_t{1} << 30), "codes: expected fewer than 2**30, got ", codes);
  const int64_t count = cond.size(0);
  check_places(ids, unknown, count);
  check_words(rows, count, seed, offset);
  const ScalarType dtype = cond.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half,
                  "cond: expected float32, bfloat16 or float16");
  const torch::stable::accelerator::DeviceGuard guard(cond.get_device_index());
  Tensor out = torch::stable::new_empty(ids, {count});
  Tensor value = torch::stable::new_empty(cond, {count}, ScalarType::Float);
  const auto columns = [first_code](const Tensor& logits) -> const void* {
    const int64_t bytes = logits.scalar_type() == ScalarType::Float ? 4 : 2;
    return static_cast<const char*>(logits.const_data_ptr()) + first_code * bytes;
  };
  DrawArguments a{};
  a.cond = columns(cond), a.cond_stride = cond.stride(0);
  if (uncond) a.uncond = columns(*uncond), a.uncond_stride = uncond->stride(0);
  a.ids = ids.const_data_ptr<int64_t>(), a.rows = rows.const_data_ptr<int64_t>();
  a.seed = seed.const_data_ptr<int64_t>(), a.offset = offset.const_data_ptr<int64_t>();
  a.unknown = unknown.const_data_ptr<bool>();
  a.out_ids = out.mutable_data_ptr<int64_t>(), a.out_confidence = value.mutable_data_ptr<float>();
  a.count = count, a.first_code = first_code, a.codes = static_cast<int32_t>(codes);
  a.top_k = top_k < codes ? static_cast<int32_t>(top_k) : 0, a.top_p = top_p;
  a.up = static_cast<float>(1 + guidance), a.down = static_cast<float>(guidance);
  a.inverse = temperature > 0 ? static_cast<float>(1 / temperature) : 0.0f;
  a.confidence = confidence_of(confidence);
  launch_draw(dtype == ScalarType::Float  ? LogitsType::kFloat
              : dtype == ScalarType::Half ? LogitsType::kHalf
                                          : LogitsType::kBFloat16,
              a, current_stream(cond));
  return {out, value};
}

Tensor remask_cuda(const Tensor& confidence, const Tensor& unknown, const Tensor& count, const Tensor& rows,
                   const Tensor& seed, const Tensor& offset, const Tensor& temperature, std::string ties) {
  check_remask(confidence, unknown, count, rows, seed, offset, temperature);
  STD_TORCH_CHECK(confidence.scalar_type() == ScalarType::Float, "confidence: expected float32");
  const int64_t samples = confidence.size(0), length = confidence.size(1);
  STD_TORCH_CHECK(length <= kLargestSample, "confidence: expected at most ", kLargestSample,
                  " positions a sample on CUDA, got ", length);
  const torch::stable::accelerator::DeviceGuard guard(confidence.get_device_index());
  Tensor mask = torch::stable::new_empty(unknown, {samples, length});
  RemaskArguments a{};
  a.confidence = confidence.const_data_ptr<float>(), a.temperature = temperature.const_data_ptr<float>();
  a.unknown = unknown.const_data_ptr<bool>(), a.mask = mask.mutable_data_ptr<bool>();
  a.count = count.const_data_ptr<int64_t>(), a.rows = rows.const_data_ptr<int64_t>();
  a.seed = seed.const_data_ptr<int64_t>(), a.offset = offset.const_data_ptr<int64_t>();
  a.samples = samples, a.length = static_cast<int32_t>(length), a.exact = ties == "index";
  launch_remask(a, current_stream(confidence));
  return mask;
}
#endif

}  // namespace
}  // namespace unif2ace

STABLE_TORCH_LIBRARY_FRAGMENT(unif2ace_native, m) {
  m.def(
      "draw(Tensor cond, Tensor? uncond, Tensor rows, Tensor seed, Tensor offset, float guidance, float temperature, "
      "int top_k, float top_p, str confidence) -> (Tensor, Tensor)");
  m.def(
      "sample_logits(Tensor cond, Tensor? uncond, Tensor ids, Tensor unknown, Tensor rows, Tensor seed, Tensor offset, "
      "int first_code, int codes, float guidance, float temperature, int top_k, float top_p, str confidence, "
      "bool compact) -> (Tensor, Tensor)");
  m.def(
      "remask(Tensor confidence, Tensor unknown, Tensor count, Tensor rows, Tensor seed, Tensor offset, "
      "Tensor temperature, str ties) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) {
  m.impl("draw", TORCH_BOX(&unif2ace::draw_cpu));
  m.impl("sample_logits", TORCH_BOX(&unif2ace::sample_logits_cpu));
  m.impl("remask", TORCH_BOX(&unif2ace::remask_cpu));
}

#ifdef UNIF2ACE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CUDA, m) {
  m.impl("sample_logits", TORCH_BOX(&unif2ace::sample_logits_cuda));
  m.impl("remask", TORCH_BOX(&unif2ace::remask_cuda));
}
#endif
