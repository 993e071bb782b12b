// One sample's re-mask on the host: the positions with the lowest noisy confidence, bit for bit those of
// kernels/unif2ace_kernels/sampling/draw_torch.py.
#pragma once

#include <algorithm>
#include <cstdint>

#include "sampling/score.cuh"

namespace unif2ace {

struct RemaskOptions {
  int64_t seed, offset;
  float temperature;
  bool exact;  // mask the count, the lower index first among equals; else what is strictly below the count's value
};

// Keys that rank a sample's positions, [length]; a known position ranks at infinity, above every unknown one.
template <class T>
UNIF2ACE_HOST_DEVICE void remask_keys(const T* confidence, const bool* unknown, const int64_t* rows, int64_t length,
                                      const RemaskOptions& o, T* keys) {
  const auto* const is_unknown = reinterpret_cast<const uint8_t*>(unknown);  // g++ vectorises no loop over bools
  for (int64_t i = 0; i < length; ++i)
    keys[i] =
        remask_rank(confidence[i], is_unknown[i] != 0, o.temperature, o.seed, o.offset, static_cast<uint32_t>(rows[i]));
}

// mask[i]: whether position i is masked again. scratch: [length].
template <class T>
void remask_row(const T* keys, const bool* unknown, int64_t length, int64_t count, bool exact, T* scratch,
                bool* mask) {
  std::copy(keys, keys + length, scratch);
  if (exact) {
    count = std::min(count, static_cast<int64_t>(std::count(unknown, unknown + length, true)));
    if (count <= 0) {
      std::fill(mask, mask + length, false);
      return;
    }
    std::nth_element(scratch, scratch + count - 1, scratch + length);
    const T cut = scratch[count - 1];
    int64_t equals = count;
    for (int64_t i = 0; i < length; ++i) equals -= keys[i] < cut;
    for (int64_t i = 0; i < length; ++i) mask[i] = keys[i] < cut || (keys[i] == cut && equals-- > 0);
  } else {
    const int64_t rank = std::min(std::max<int64_t>(count, 0), length - 1);
    std::nth_element(scratch, scratch + rank, scratch + length);
    for (int64_t i = 0; i < length; ++i) mask[i] = keys[i] < scratch[rank] && unknown[i];
  }
}

}  // namespace unif2ace
