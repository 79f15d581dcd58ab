// Contiguous tensors addressed by index.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <array>
#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace rru {
namespace CPU_CAPABILITY {

using at::Tensor;

// Requests huge pages for a large tensor before its first write: each page costs a fault at its first touch.
inline Tensor on_huge_pages(const Tensor& uninitialized) {
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  const auto first = reinterpret_cast<uintptr_t>(uninitialized.mutable_data_ptr());
  const auto begin = (first + page - 1) / page * page, end = (first + uninitialized.nbytes()) / page * page;
  if (end > begin + 4 * page) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // a hint: refusal is not an error
  }
#endif
  return uninitialized;
}

// A contiguous tensor with its data pointer cached: Tensor's accessor costs more than a row of arithmetic.
template <typename E>
class Array {
 public:
  static constexpr at::ScalarType kDtype = c10::CppTypeToScalarType<std::remove_const_t<E>>::value;

  Array() = default;
  explicit Array(Tensor tensor) : tensor_(std::move(tensor)) {
    if constexpr (std::is_const_v<E>) {
      data_ = tensor_.const_data_ptr<std::remove_const_t<E>>();
    } else {
      data_ = tensor_.mutable_data_ptr<E>();
    }
    // Not the tensor's own strides: that of a dimension of size 1 may be anything.
    int64_t stride = 1;
    for (int64_t i = tensor_.dim() - 1; i >= 0; i--) {
      if (i < 3) {
        strides_[i] = stride;
      }
      stride *= tensor_.size(i);
    }
  }

  static Array empty(at::IntArrayRef shape) {
    return Array(on_huge_pages(at::empty(shape, kDtype)));
  }
  static Array zeros(at::IntArrayRef shape) {
    return Array(at::zeros(shape, kDtype));
  }
  // `tensor` in this dtype, contiguous: copied only where it has to be.
  static Array from(const Tensor& tensor) {
    return Array(tensor.to(kDtype).contiguous());
  }

  E* operator()(int64_t i = 0, int64_t j = 0, int64_t k = 0) const {
    return data_ + i * strides_[0] + j * strides_[1] + k * strides_[2];
  }
  // True unless the tensor is undefined or empty, as it is where a variant does not use it.
  explicit operator bool() const {
    return tensor_.defined() && tensor_.numel() > 0;
  }
  const Tensor& tensor() const {
    return tensor_;
  }

 private:
  Tensor tensor_;
  E* data_ = nullptr;
  std::array<int64_t, 3> strides_{};
};

}  // namespace CPU_CAPABILITY
}  // namespace rru
