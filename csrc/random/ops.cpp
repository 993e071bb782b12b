// unif2ace_native::gumbel for CPU and, where nvcc compiled gumbel.cu, for CUDA.
#include <algorithm>

#include "common/gumbel.cuh"
#include "common/philox.cuh"
#include "common/simd.h"
#include "common/torch_stable.h"
#include "random/gumbel.h"

namespace unif2ace {
namespace {

constexpr int64_t kGroups = 64;  // Philox calls a tile: 256 words, 1 KiB, stay in the first-level cache

// columns [4 * group0, 4 * group0 + count) of a row, count <= 4 * kGroups.
UNIF2ACE_SIMD_CLONES
void gumbel_tile(int64_t seed, int64_t offset, uint32_t row, uint32_t group0, uint32_t stream, float* out,
                 int64_t count) {
  uint32_t words[4 * kGroups];
  for (int64_t g = 0; g < (count + 3) / 4; ++g) {
    const Words four = words_of_group(seed, offset, row, group0 + static_cast<uint32_t>(g), stream);
    for (int lane = 0; lane < 4; ++lane) words[4 * g + lane] = four.w[lane];
  }
  for (int64_t i = 0; i < count; ++i) out[i] = gumbel(words[i]);
}

Tensor empty_output(const Tensor& seed, const Tensor& offset, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(seed.scalar_type() == ScalarType::Long && seed.numel() == 1, "seed: expected one int64");
  STD_TORCH_CHECK(offset.scalar_type() == ScalarType::Long && offset.numel() == 1, "offset: expected one int64");
  STD_TORCH_CHECK(rows >= 0 && columns >= 0, "rows, columns: expected none below 0");
  return torch::stable::new_empty(seed, {rows, columns}, ScalarType::Float);
}

Tensor gumbel_cpu(const Tensor& seed, const Tensor& offset, int64_t rows, int64_t columns, int64_t stream) {
  Tensor out = empty_output(seed, offset, rows, columns);
  const int64_t seed_value = *seed.const_data_ptr<int64_t>(), offset_value = *offset.const_data_ptr<int64_t>();
  float* const data = out.mutable_data_ptr<float>();
  const int64_t tiles = (columns + 4 * kGroups - 1) / (4 * kGroups);
  torch::stable::parallel_for(0, rows * tiles, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i / tiles, column0 = i % tiles * 4 * kGroups;
      gumbel_tile(seed_value, offset_value, static_cast<uint32_t>(row), static_cast<uint32_t>(column0 / 4),
                  static_cast<uint32_t>(stream), data + row * columns + column0,
                  std::min(columns - column0, 4 * kGroups));
    }
  });
  return out;
}

#ifdef UNIF2ACE_WITH_CUDA
Tensor gumbel_cuda(const Tensor& seed, const Tensor& offset, int64_t rows, int64_t columns, int64_t stream) {
  const torch::stable::accelerator::DeviceGuard guard(seed.get_device_index());
  Tensor out = empty_output(seed, offset, rows, columns);
  launch_gumbel(seed.const_data_ptr<int64_t>(), offset.const_data_ptr<int64_t>(), out.mutable_data_ptr<float>(), rows,
                columns, static_cast<uint32_t>(stream), current_stream(seed));
  return out;
}
#endif

}  // namespace
}  // namespace unif2ace

STABLE_TORCH_LIBRARY_FRAGMENT(unif2ace_native, m) {
  m.def("gumbel(Tensor seed, Tensor offset, int rows, int columns, int stream) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CPU, m) { m.impl("gumbel", TORCH_BOX(&unif2ace::gumbel_cpu)); }

#ifdef UNIF2ACE_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(unif2ace_native, CUDA, m) { m.impl("gumbel", TORCH_BOX(&unif2ace::gumbel_cuda)); }
#endif
