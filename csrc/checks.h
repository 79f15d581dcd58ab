// Checks of tensors, raised as Python's ValueError and TypeError: the name, what was got, what was wanted.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

namespace rru {

using at::Tensor;

// Raises unless a dense tensor has the shape, and the dtype, that is wanted.
inline void check(const char* name, const Tensor& tensor, at::IntArrayRef wanted) {
  TORCH_CHECK_VALUE(tensor.sizes() == wanted, name, ": got shape ", tensor.sizes(), ", wanted ", wanted);
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, name, ": got layout ", tensor.layout(), ", wanted a dense tensor");
}

inline void check(const char* name, const Tensor& tensor, at::IntArrayRef wanted, at::ScalarType dtype) {
  check(name, tensor, wanted);
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, ": got dtype ", tensor.scalar_type(), ", wanted ", dtype);
}

// Raises unless a dense floating tensor has `dims` dimensions and no empty one.
inline void check_floating(const char* name, const Tensor& tensor, int64_t dims) {
  TORCH_CHECK_VALUE(
      tensor.dim() == dims && tensor.numel() > 0, name, ": got shape ", tensor.sizes(), ", wanted ", dims,
      " dimensions, every size at least 1");
  check(name, tensor, tensor.sizes());
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kDouble || type == at::kFloat || type == at::kHalf || type == at::kBFloat16, name, ": got dtype ",
      type, ", wanted float64, float32, float16 or bfloat16");
}

// The arithmetic dtype of maps or features.
inline at::ScalarType acc_dtype(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace rru
