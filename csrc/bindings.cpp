// unif2ace_kernels._C: how the extension was built, and the host-and-device mathematics called on the host.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "common/gumbel.cuh"
#include "common/philox.cuh"

namespace py = pybind11;
using namespace py::literals;

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information, and the mathematics of csrc/common on the host (numpy arrays in and out).";

  m.def("build_information", [] {
    return py::dict("compiler"_a = UNIF2ACE_COMPILER, "nvcc"_a = UNIF2ACE_NVCC, "cuda_archs"_a = UNIF2ACE_CUDA_ARCHS,
                    "torch"_a = UNIF2ACE_TORCH);
  });
  m.def(
      "philox",
      [](std::array<uint32_t, 2> key, std::array<uint32_t, 4> counter) {
        const auto words = unif2ace::philox(key[0], key[1], counter[0], counter[1], counter[2], counter[3]);
        return py::make_tuple(words.w[0], words.w[1], words.w[2], words.w[3]);
      },
      "key"_a, "counter"_a, "The four words of one Philox4x32-10 call.");
  m.def("uniform", py::vectorize(unif2ace::uniform), "words"_a, "float32 uniforms of uint32 words.");
  m.def("exponential", py::vectorize(unif2ace::exponential), "words"_a, "float32 exponentials of uint32 words.");
  m.def("gumbel", py::vectorize(unif2ace::gumbel), "words"_a, "float32 Gumbels of uint32 words.");
}
