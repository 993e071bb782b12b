// csrc/moe/route.cu and route_backward.cu as they are, on fibers. Tensors of any dtype come as the bytes of their
// storage.
#include "moe/route.cu"
#include "moe/route_backward.cu"

#include "cuda_on_cpu_python.h"

#include <pybind11/stl.h>

namespace {

using cuda_on_cpu::DeviceArray;
using Bytes = DeviceArray<uint8_t>::Numpy;
namespace py = pybind11;

// (storage, number type, stride 0, stride 1); an empty storage is no tensor.
struct Argument {
  DeviceArray<uint8_t> storage;
  unif2ace::Strided strided;

  explicit Argument(const py::tuple& given) : storage(given[0].cast<Bytes>()) {
    strided = {given[0].cast<Bytes>().size() ? storage.data() : nullptr,
               static_cast<unif2ace::Number>(given[1].cast<int>()), given[2].cast<int64_t>(), given[3].cast<int64_t>()};
  }
};

unif2ace::RouteGroups make_groups(const std::vector<int>& sizes, const std::vector<float>& coefs, int top_k, int shared,
                                  bool normalize, bool softmax) {
  unif2ace::RouteGroups groups{static_cast<int>(sizes.size()), top_k, shared, normalize, softmax, {}, {}};
  for (size_t g = 0; g < sizes.size(); ++g) {
    groups.first[g + 1] = groups.first[g] + sizes[g];
    groups.coef[g] = coefs[g];
  }
  return groups;
}

py::tuple forward(py::tuple logits_given, py::tuple ids_given, py::tuple bias_given, int64_t tokens,
                  std::vector<int> sizes, std::vector<float> coefs, int top_k, int shared, bool normalize, bool softmax,
                  float z_coef) {
  Argument logits(logits_given), ids(ids_given), bias(bias_given);
  const unif2ace::RouteGroups groups = make_groups(sizes, coefs, top_k, shared, normalize, softmax);
  const int64_t slots = top_k + shared, routed = groups.routed(), experts = groups.experts();
  const int64_t blocks = unif2ace::route_blocks(tokens);
  auto weight = DeviceArray<float>::empty({tokens, slots});
  auto expert = DeviceArray<int64_t>::empty({tokens, slots}), counts = DeviceArray<int64_t>::empty({experts});
  auto offsets = DeviceArray<int64_t>::empty({experts + 1}), order = DeviceArray<int64_t>::empty({tokens * slots});
  auto frequency = DeviceArray<float>::empty({routed}), probability = DeviceArray<float>::empty({routed});
  auto balance = DeviceArray<float>::empty({}), z = DeviceArray<float>::empty({});
  auto block_counts = DeviceArray<int>::empty({experts, blocks});
  auto block_sums = DeviceArray<float>::empty({routed + 1, blocks}), sums = DeviceArray<float>::empty({routed + 1});
  const float scale = z_coef / static_cast<float>(std::max<int64_t>(tokens, 1));
  launch_route({logits.strided, ids.strided, bias.strided, tokens, scale, z_coef != 0, weight.data(), expert.data(),
                counts.data(), offsets.data(), order.data(), frequency.data(), probability.data(), balance.data(),
                z.data(), block_counts.data(), block_sums.data(), sums.data()},
               groups, nullptr);
  return py::make_tuple(weight.numpy(), expert.numpy(), counts.numpy(), offsets.numpy(), order.numpy(),
                        frequency.numpy(), probability.numpy(), balance.numpy(), z.numpy());
}

// block_counts [A, blocks] as running sums, counts [A] and sums [E + 1] of block_sums [E + 1, blocks].
py::tuple scan(DeviceArray<int>::Numpy counts_given, DeviceArray<float>::Numpy sums_given) {
  DeviceArray<int> block_counts(counts_given);
  DeviceArray<float> block_sums(sums_given);
  const auto experts = static_cast<int>(counts_given.shape(0)), rows = static_cast<int>(sums_given.shape(0));
  auto counts = DeviceArray<int64_t>::empty({experts});
  auto sums = DeviceArray<float>::empty({rows});
  unif2ace::RouteForward a{};
  a.block_counts = block_counts.data();
  a.block_sums = block_sums.data();
  a.counts = counts.data();
  a.sums = sums.data();
  UNIF2ACE_LAUNCH(unif2ace::scan_kernel, std::max(experts, rows), unif2ace::kScanThreads, 0, nullptr, a, rows - 1,
                  experts, counts_given.shape(1));
  return py::make_tuple(block_counts.numpy(), counts.numpy(), sums.numpy());
}

// The gradient's bytes. Scalars are arrays of one number, absent gradients empty arrays.
Bytes backward(py::tuple weight_given, py::tuple probability_given, DeviceArray<float>::Numpy balance_given,
               DeviceArray<float>::Numpy z_given, py::tuple logits_given, py::tuple ids_given,
               DeviceArray<int64_t>::Numpy expert_given, DeviceArray<int64_t>::Numpy counts_given, int64_t tokens,
               std::vector<int> sizes, std::vector<float> coefs, int top_k, int shared, bool normalize, bool softmax,
               float z_coef, int itemsize) {
  Argument weight(weight_given), probability(probability_given), logits(logits_given), ids(ids_given);
  DeviceArray<float> balance(balance_given), z(z_given);
  DeviceArray<int64_t> expert(expert_given), counts(counts_given);
  const unif2ace::RouteGroups groups = make_groups(sizes, coefs, top_k, shared, normalize, softmax);
  auto grad = DeviceArray<uint8_t>::empty({tokens * groups.routed() * itemsize});
  launch_route_backward({weight.strided, static_cast<const float*>(probability.strided.data),
                         balance_given.size() ? balance.data() : nullptr, z_given.size() ? z.data() : nullptr,
                         probability.strided.stride0, logits.strided, ids.strided, expert.data(), counts.data(), tokens,
                         z_coef / static_cast<float>(std::max<int64_t>(tokens, 1)), grad.data()},
                        groups, nullptr);
  return grad.numpy();
}

}  // namespace

PYBIND11_MODULE(CUDA_ON_CPU_MODULE, m) {
  cuda_on_cpu::define(m);
  m.def("forward", forward);
  m.def("backward", backward);
  m.def("scan", scan);
}
