// Gumbel noise: one thread makes the four columns of one Philox call.
#include "random/gumbel.h"

#include <algorithm>

#include "common/gumbel.cuh"
#include "common/launch.cuh"
#include "common/philox.cuh"

namespace unif2ace {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // beyond this a thread takes several groups

// seed, offset [1]; out [rows, columns]; group g of a row holds its columns 4 g .. 4 g + 3.
__global__ void gumbel_kernel(const int64_t* seed, const int64_t* offset, float* out, int64_t rows, int64_t columns,
                              uint32_t stream) {
  const int64_t groups = (columns + 3) / 4;
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < rows * groups; i += step) {
    const int64_t row = i / groups, group = i % groups;
    const Words words =
        words_of_group(*seed, *offset, static_cast<uint32_t>(row), static_cast<uint32_t>(group), stream);
    for (int lane = 0; lane < 4; ++lane) {
      const int64_t column = 4 * group + lane;
      if (column < columns) out[row * columns + column] = gumbel(words.w[lane]);
    }
  }
}

}  // namespace

void launch_gumbel(const int64_t* seed, const int64_t* offset, float* out, int64_t rows, int64_t columns,
                   uint32_t draw_stream, cudaStream_t stream) {
  const int64_t groups = rows * ((columns + 3) / 4);
  if (groups == 0) return;
  const auto blocks = static_cast<unsigned>(std::min((groups + kThreads - 1) / kThreads, kMaxBlocks));
  UNIF2ACE_LAUNCH(gumbel_kernel, blocks, kThreads, 0, stream, seed, offset, out, rows, columns, draw_stream);
}

}  // namespace unif2ace
