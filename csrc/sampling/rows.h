// What the samplers of ops.cpp and head.cpp share: rows of any dtype, checks, what is drawn and what comes of it.
#pragma once

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "common/simd.h"
#include "common/torch_stable.h"
#include "sampling/draw.h"

namespace unif2ace {

using BFloat16 = torch::headeronly::BFloat16;
using Half = torch::headeronly::Half;

// One row a call, in one version per instruction set.
#define UNIF2ACE_DRAW_ONE(Logit, T)                                                                                 \
  UNIF2ACE_SIMD_CLONES                                                                                              \
  void draw_one(const Logit& logit, int64_t codes, uint32_t row, const DrawOptions& options, T* scratch,            \
                int64_t* code, T* confidence) {                                                                     \
    draw_row(logit, codes, row, options, scratch, code, confidence);                                                \
  }
// Rows of both branches, [R, V] or [R, D], each contiguous; `second` is null where there is one branch.
template <class In>
struct Branches {
  const In *first, *second;
  int64_t first_stride, second_stride;

  Branches(const Tensor& cond, const std::optional<Tensor>& uncond, int64_t column)
      : first(static_cast<const In*>(cond.const_data_ptr()) + column),
        second(uncond ? static_cast<const In*>(uncond->const_data_ptr()) + column : nullptr),
        first_stride(cond.stride(0)),
        second_stride(uncond ? uncond->stride(0) : 0) {}
  const In* cond(int64_t row) const { return first + row * first_stride; }
  const In* uncond(int64_t row) const { return second == nullptr ? nullptr : second + row * second_stride; }
};

// draw(i, scratch) for every i < count, on all threads.
template <class T, class Draw>
void for_rows(int64_t count, int64_t codes, const Draw& draw) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    std::vector<T> scratch(2 * padded(codes));
    for (int64_t i = begin; i < end; ++i) draw(i, scratch.data());
  });
}

// function(In(), T()) for the logits' dtype: In is read, T computes.
template <class Function>
void by_dtype(const Tensor& logits, const Function& function) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return function(float(), float());
    case ScalarType::Double: return function(double(), double());
    case ScalarType::BFloat16: return function(BFloat16(), float());
    case ScalarType::Half: return function(Half(), float());
    default: STD_TORCH_CHECK(false, "cond: expected a floating dtype");
  }
}

inline void check_logits(const Tensor& logits, const Tensor& like, const char* name) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(0) == like.size(0) && logits.size(1) == like.size(1) &&
                      logits.scalar_type() == like.scalar_type() && (logits.size(1) <= 1 || logits.stride(1) == 1),
                  name, ": expected logits [R, V] like cond, each row contiguous");
}

inline void check_words(const Tensor& rows, int64_t count, const Tensor& seed, const Tensor& offset) {
  STD_TORCH_CHECK(rows.scalar_type() == ScalarType::Long && rows.numel() == count && rows.is_contiguous(),
                  "rows: expected int64, contiguous, one a position");
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "seed: expected one int64");
  STD_TORCH_CHECK(offset.scalar_type() == ScalarType::Long && offset.numel() == 1, "offset: expected one int64");
}

inline void check_places(const Tensor& ids, const Tensor& unknown, int64_t count) {
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long && ids.numel() == count && ids.is_contiguous(),
                  "ids: expected int64 [R], contiguous");
  STD_TORCH_CHECK(unknown.scalar_type() == ScalarType::Bool && unknown.numel() == count && unknown.is_contiguous(),
                  "unknown: expected bool [R], contiguous");
}

inline Confidence confidence_of(const std::string& name) {
  if (name == "log_prob") return Confidence::kLogProb;
  return name == "neg_entropy" ? Confidence::kNegEntropy : Confidence::kMargin;
}

inline DrawOptions draw_options(const Tensor& seed, const Tensor& offset, double guidance, double temperature,
                                int64_t top_k, double top_p, const std::string& confidence) {
  return {*seed.const_data_ptr<int64_t>(), *offset.const_data_ptr<int64_t>(), guidance, temperature, top_k, top_p,
          confidence_of(confidence)};
}

inline ScalarType compute_dtype(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// What the two samplers give, known positions filled in, and where there is something to draw.
struct Samples {
  Tensor ids, value;
  std::vector<int64_t> index;

  Samples(const Tensor& given, const Tensor& unknown, const Tensor& like)
      : ids(torch::stable::new_empty(given, {given.size(0)})),
        value(torch::stable::new_empty(like, {given.size(0)}, compute_dtype(like))) {
    const int64_t rows = given.size(0);
    check_places(given, unknown, rows);
    std::copy_n(given.const_data_ptr<int64_t>(), rows, ids.mutable_data_ptr<int64_t>());
    by_dtype(value, [&](auto, auto compute) {
      using T = decltype(compute);
      std::fill_n(value.mutable_data_ptr<T>(), rows, std::numeric_limits<T>::infinity());
    });
    const bool* const drawn = unknown.const_data_ptr<bool>();
    for (int64_t i = 0; i < rows; ++i)
      if (drawn[i]) index.push_back(i);
  }
  int64_t count() const { return static_cast<int64_t>(index.size()); }
};

template <class T>
struct SampleRows {
  int64_t* ids;
  T* value;

  explicit SampleRows(Samples& samples)
      : ids(samples.ids.mutable_data_ptr<int64_t>()), value(samples.value.mutable_data_ptr<T>()) {}
};

}  // namespace unif2ace
