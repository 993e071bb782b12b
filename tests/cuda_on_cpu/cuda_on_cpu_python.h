// For the bindings.cpp of a kernel under test: numpy arrays in and out of "device" memory.
//
//   #include "cuda_on_cpu_python.h"
//   #include "random/gumbel.cu"
//   PYBIND11_MODULE(CUDA_ON_CPU_MODULE, m) {
//     cuda_on_cpu::define(m);
//     m.def("gumbel", [](...) { ... });
//   }
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "cuda_on_cpu.h"

namespace cuda_on_cpu {

// Memory of exactly n elements, so that the sanitizer sees the first byte beyond. `empty` is filled with 0xFF (NaN).
template <class T>
class DeviceArray {
 public:
  using Numpy = pybind11::array_t<T, pybind11::array::c_style | pybind11::array::forcecast>;
  using Shape = std::vector<pybind11::ssize_t>;

  explicit DeviceArray(const Numpy& values) : DeviceArray(Shape(values.shape(), values.shape() + values.ndim()), 0) {
    std::memcpy(static_cast<void*>(data_.get()), values.data(), size_ * sizeof(T));
  }
  static DeviceArray empty(const Shape& shape) { return DeviceArray(shape, 0xFF); }
  static DeviceArray zeros(const Shape& shape) { return DeviceArray(shape, 0); }

  T* data() { return data_.get(); }
  Numpy numpy() const { return Numpy(shape_, data_.get()); }

 private:
  DeviceArray(const Shape& shape, int byte) : shape_(shape) {
    for (const auto each : shape_) size_ *= static_cast<size_t>(each);
    data_.reset(new T[size_]);
    std::memset(static_cast<void*>(data_.get()), byte, size_ * sizeof(T));
  }
  Shape shape_;
  size_t size_ = 1;
  std::unique_ptr<T[]> data_;
};

inline void define(pybind11::module_& m) {
  m.def("set_seed", [](unsigned seed) { block.seed = seed; });
}

}  // namespace cuda_on_cpu
