// Kernels that are right, and kernels that are wrong in one way each, to prove that each fault is found.
#include "common/launch.cuh"
#include "cuda_on_cpu_python.h"

namespace {

using cuda_on_cpu::DeviceArray;
constexpr unsigned kFull = 0xFFFFFFFFu;

// out[block] = sum of the block's 128 values; shuffles within warps, shared memory between them.
template <bool kBarrier>
__global__ void block_sum(const int* x, int* out) {
  __shared__ int partial[4];
  int value = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (int delta = 16; delta > 0; delta /= 2) value += __shfl_down_sync(kFull, value, delta);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  if (kBarrier) __syncthreads();
  if (threadIdx.x == 0) out[blockIdx.x] = partial[0] + partial[1] + partial[2] + partial[3];
  if (kBarrier) __syncthreads();
}

// out[turn] = sum of x[turn * blockDim.x ...], over the same shared memory at every turn. Without the barrier a warp may
// write its part of the next sum while another still reads this one.
template <bool kBarrier>
__global__ void sums_in_turns(const int* x, int* out, int turns) {
  __shared__ int partial[4];
  for (int turn = 0; turn < turns; ++turn) {
    int value = x[turn * blockDim.x + threadIdx.x];
    for (int delta = 16; delta > 0; delta /= 2) value += __shfl_down_sync(kFull, value, delta);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
    __syncthreads();
    if (threadIdx.x % 32 == 0) out[turn * 4 + threadIdx.x / 32] = partial[0] + partial[1] + partial[2] + partial[3];
    if (kBarrier) __syncthreads();
  }
}

__global__ void histogram(const int* x, unsigned* bins, int n, int n_bins) {
  UNIF2ACE_DYNAMIC_SHARED(unsigned, local);
  for (int i = threadIdx.x; i < n_bins; i += blockDim.x) local[i] = 0;
  __syncthreads();
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) atomicAdd(&local[x[i]], 1);
  __syncthreads();
  for (int i = threadIdx.x; i < n_bins; i += blockDim.x) atomicAdd(&bins[i], local[i]);
}

// out[i] = how many of x[0 .. i) are not zero, within a block of whole warps.
__global__ void ballot_scan(const int* x, int* out) {
  __shared__ int counts[32];
  const unsigned lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned ballot = __ballot_sync(kFull, x[threadIdx.x]);
  if (lane == 0) counts[warp] = __popc(ballot);
  __syncthreads();
  int before = __popc(ballot & ((1u << lane) - 1));
  for (unsigned w = 0; w < warp; ++w) before += counts[w];
  out[threadIdx.x] = before;
}

__global__ void warp_lessons(const int* x, int* out) {
  const int lane = threadIdx.x;
  const int value = x[lane];
  out[lane] = __shfl_up_sync(kFull, value, 3, 16);
  out[32 + lane] = __shfl_xor_sync(kFull, value, 5);
  out[64 + lane] = __shfl_sync(kFull, value, 2, 8);
  out[96 + lane] = static_cast<int>(__match_any_sync(kFull, value % 3));
  out[128 + lane] = __reduce_max_sync(kFull, value);
  out[160 + lane] = lane < 8 ? __any_sync(0xFFu, value == x[7]) + 2 * __all_sync(0xFFu, value == x[7]) : -1;
  out[192 + lane] = __syncthreads_count(value > 0) + 100 * __syncthreads_or(lane == 3) + 1000 * __syncthreads_and(1);
}

__global__ void reads_beyond_shared(int* out) {
  __shared__ int tile[32];
  tile[threadIdx.x] = 1;
  __syncthreads();
  const int* next = tile + 1;
  out[threadIdx.x] = next[threadIdx.x];
}

__global__ void reads_beyond_dynamic(int* out) {
  UNIF2ACE_DYNAMIC_SHARED(int, tile);
  tile[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x + 1];
}

__global__ void writes_beyond_global(int* out) { out[threadIdx.x + 1] = 1; }

__global__ void overflows(int* out) { out[threadIdx.x] = 0x7FFFFFFF + out[threadIdx.x]; }

__global__ void barrier_in_branch(int* out) {
  if (threadIdx.x < 16)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void leaves_before_barrier(int* out) {
  if (threadIdx.x == 7) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void mask_names_absent_lane(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_xor_sync(kFull, int(threadIdx.x), 1);
}

__global__ void mask_leaves_out_caller(int* out) { out[threadIdx.x] = __shfl_sync(0xFFFFu, int(threadIdx.x), 0); }

__global__ void reads_outside_mask(int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xFFFFu, int(threadIdx.x), 20);
}

__global__ void never_written_shared(float* out) {
  UNIF2ACE_DYNAMIC_SHARED(float, tile);
  out[threadIdx.x] = tile[threadIdx.x];
}

using Ints = DeviceArray<int>;

template <class Kernel>
auto one_warp(Kernel kernel) {
  return [kernel](size_t shared_bytes) {
    Ints out = Ints::empty({32});
    UNIF2ACE_LAUNCH(kernel, 1, 32, shared_bytes, nullptr, out.data());
    return out.numpy();
  };
}

}  // namespace

PYBIND11_MODULE(CUDA_ON_CPU_MODULE, m) {
  cuda_on_cpu::define(m);
  m.def("block_sum", [](Ints::Numpy x, bool barrier) {
    Ints device(x), out = Ints::empty({x.size() / 128});
    const auto blocks = static_cast<unsigned>(x.size() / 128);
    if (barrier)
      UNIF2ACE_LAUNCH((block_sum<true>), blocks, 128, 0, nullptr, device.data(), out.data());
    else
      UNIF2ACE_LAUNCH((block_sum<false>), blocks, 128, 0, nullptr, device.data(), out.data());
    return out.numpy();
  });
  m.def("sums_in_turns", [](Ints::Numpy x, bool barrier) {
    const int turns = static_cast<int>(x.size() / 128);
    Ints device(x), out = Ints::empty({turns, 4});
    if (barrier)
      UNIF2ACE_LAUNCH((sums_in_turns<true>), 1, 128, 0, nullptr, device.data(), out.data(), turns);
    else
      UNIF2ACE_LAUNCH((sums_in_turns<false>), 1, 128, 0, nullptr, device.data(), out.data(), turns);
    return out.numpy();
  });
  m.def("histogram", [](Ints::Numpy x, int bins) {
    Ints device(x);
    auto out = DeviceArray<unsigned>::zeros({bins});
    UNIF2ACE_LAUNCH(histogram, 3, 96, bins * sizeof(unsigned), nullptr, device.data(), out.data(), int(x.size()), bins);
    return out.numpy();
  });
  m.def("ballot_scan", [](Ints::Numpy x) {
    Ints device(x), out = Ints::empty({x.size()});
    UNIF2ACE_LAUNCH(ballot_scan, 1, static_cast<unsigned>(x.size()), 0, nullptr, device.data(), out.data());
    return out.numpy();
  });
  m.def("warp_lessons", [](Ints::Numpy x) {
    Ints device(x), out = Ints::empty({7, 32});
    UNIF2ACE_LAUNCH(warp_lessons, 1, 32, 0, nullptr, device.data(), out.data());
    return out.numpy();
  });
  m.def("never_written_shared", [] {
    auto out = DeviceArray<float>::zeros({32});
    UNIF2ACE_LAUNCH(never_written_shared, 1, 32, 32 * sizeof(float), nullptr, out.data());
    return out.numpy();
  });
  m.def("launch_block_of", [](unsigned threads) {
    Ints out = Ints::empty({4096});
    UNIF2ACE_LAUNCH(writes_beyond_global, 1, threads, 0, nullptr, out.data());
  });
  m.def("reads_beyond_shared", one_warp(reads_beyond_shared));
  m.def("reads_beyond_dynamic", one_warp(reads_beyond_dynamic));
  m.def("writes_beyond_global", one_warp(writes_beyond_global));
  m.def("overflows", [](size_t) {
    Ints out = Ints::zeros({32});
    for (int i = 0; i < 32; ++i) out.data()[i] = 1;
    UNIF2ACE_LAUNCH(overflows, 1, 32, 0, nullptr, out.data());
    return out.numpy();
  });
  m.def("barrier_in_branch", one_warp(barrier_in_branch));
  m.def("leaves_before_barrier", one_warp(leaves_before_barrier));
  m.def("mask_names_absent_lane", one_warp(mask_names_absent_lane));
  m.def("mask_leaves_out_caller", one_warp(mask_leaves_out_caller));
  m.def("reads_outside_mask", one_warp(reads_outside_mask));
  m.def("bfloat16", [](DeviceArray<float>::Numpy x) {
    DeviceArray<float> values(x);
    for (pybind11::ssize_t i = 0; i < x.size(); ++i) values.data()[i] = __bfloat162float(__float2bfloat16(x.data()[i]));
    return values.numpy();
  });
}
