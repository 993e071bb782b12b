// csrc/random/gumbel.cu as it is, on fibers.
#include "random/gumbel.cu"

#include "cuda_on_cpu_python.h"

PYBIND11_MODULE(CUDA_ON_CPU_MODULE, m) {
  using cuda_on_cpu::DeviceArray;
  cuda_on_cpu::define(m);
  m.def("gumbel", [](int64_t seed, int64_t offset, int64_t rows, int64_t columns, uint32_t stream) {
    auto device_seed = DeviceArray<int64_t>::empty({1}), device_offset = DeviceArray<int64_t>::empty({1});
    *device_seed.data() = seed;
    *device_offset.data() = offset;
    auto out = DeviceArray<float>::empty({rows, columns});
    unif2ace::launch_gumbel(device_seed.data(), device_offset.data(), out.data(), rows, columns, stream, nullptr);
    return out.numpy();
  });
}
