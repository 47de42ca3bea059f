// Views of stable-ABI tensors for the kernels, and the safety net under the checks that Python makes once per layout.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

namespace sp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Tensor of `dim` dimensions, contiguous: what every kernel expects of every argument.
inline void check_dense(const Tensor& tensor, const char* name, int64_t dim) {
  STD_TORCH_CHECK(tensor.dim() == dim, name, " has ", tensor.dim(), " dimensions; want ", dim);
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " is not contiguous; pass ", name, ".contiguous()");
}

inline const int32_t* int32_data(const Tensor& tensor, const char* name) {
  check_dense(tensor, name, 1);
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Int, name, " must be int32");
  return static_cast<const int32_t*>(tensor.const_data_ptr());
}

// True for uint16 block ids, false for int32; anything else is refused.
inline bool is_narrow(const Tensor& ids, const char* name) {
  check_dense(ids, name, 1);
  const ScalarType type = ids.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::UInt16 || type == ScalarType::Int, name, " must be uint16 or int32");
  return type == ScalarType::UInt16;
}

constexpr int64_t kMaxDim = 8;  // of x and y

// Uninitialised contiguous CPU tensor; the C call, because the stable C++ `empty` goes through the dispatcher by name.
inline Tensor empty_cpu(const int64_t* sizes, int64_t dim, ScalarType type) {
  int64_t strides[kMaxDim];
  int64_t stride = 1;
  for (int64_t i = dim; i-- > 0;) {
    strides[i] = stride;
    stride *= sizes[i];
  }
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)),
      aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

}  // namespace sp
