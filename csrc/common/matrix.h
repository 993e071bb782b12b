// Borrowed memory as the matrices that torch's own products take: MKL's and oneDNN's, whatever torch was built with.
#pragma once

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>

#include "common/torch_stable.h"

namespace unif2ace {

inline int32_t aoti_dtype(const Tensor& tensor) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor.get(), &dtype));
  return dtype;
}

// Does not own its elements; element (i, j) is at data[i * row_stride + j * column_stride].
class Matrix {
 public:
  Matrix(const void* data, int64_t rows, int64_t columns, int64_t row_stride, int64_t column_stride, int32_t dtype)
      : data_(data), sizes_{rows, columns}, strides_{row_stride, column_stride}, dtype_(dtype) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_create_tensor_from_blob(const_cast<void*>(data), 2, sizes_, strides_, 0, dtype,
                                                              aoti_torch_device_type_cpu(), 0, &handle_));
  }
  Matrix(const void* data, int64_t rows, int64_t columns, int32_t dtype)
      : Matrix(data, rows, columns, columns, 1, dtype) {}
  explicit Matrix(const Tensor& of)
      : Matrix(of.const_data_ptr(), of.size(0), of.size(1), of.stride(0), of.stride(1), aoti_dtype(of)) {}
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;
  ~Matrix() { aoti_torch_delete_tensor_object(handle_); }

  Matrix transposed() const { return {data_, sizes_[1], sizes_[0], strides_[1], strides_[0], dtype_}; }

  // *this = a b; callable from any thread, and on one thread within a parallel region.
  void be_product(const Matrix& a, const Matrix& b) const {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_mm_out(handle_, a.handle_, b.handle_));
  }

  void add_product(const Matrix& a, const Matrix& b) const {
    TORCH_ERROR_CODE_CHECK(aoti_torch_cpu_addmm_out(handle_, handle_, a.handle_, b.handle_, 1, 1));
  }

 private:
  const void* data_;
  int64_t sizes_[2], strides_[2];
  int32_t dtype_;
  AtenTensorHandle handle_ = nullptr;
};

}  // namespace unif2ace
