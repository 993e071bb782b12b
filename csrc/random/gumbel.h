// The launcher between gumbel.cu (which knows no torch) and ops.cpp (which knows no CUDA).
#pragma once

#include <cstdint>

struct CUstream_st;
using cudaStream_t = CUstream_st*;

namespace unif2ace {

// out [rows, columns] on the device of seed and offset; draw_stream is the counter's last word, not a CUDA stream.
void launch_gumbel(const int64_t* seed, const int64_t* offset, float* out, int64_t rows, int64_t columns,
                   uint32_t draw_stream, cudaStream_t stream);

}  // namespace unif2ace
