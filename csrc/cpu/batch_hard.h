// What batch_hard and its backward share. Letters as in the paper: G groups (strips), N features, D their width.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <cmath>
#include <limits>

#include "kernels.h"
#include "rows.h"

namespace rru {
namespace CPU_CAPABILITY {

// Distances are sqrt(max(d2, kFloor)); at the floor, up to rounding, their gradient is 0: coincident points do not
// pull.
constexpr double kFloor = 1e-12;
constexpr double kClosest = 1e-6 * (1 + 1e-6);

// The features as rows of Acc, (G, N, D): themselves where their last dimension is dense, else a copy.
template <typename Acc>
class Features {
 public:
  explicit Features(const Tensor& features) : tensor_(in_rows(features)), data_(tensor_.const_data_ptr<Acc>()) {
    group_ = tensor_.stride(0);
    row_ = tensor_.stride(1);
  }

  const Acc* row(int64_t group, int64_t n) const {
    return data_ + group * group_ + n * row_;
  }

 private:
  static Tensor in_rows(const Tensor& features) {
    const auto type = c10::CppTypeToScalarType<Acc>::value;
    if (features.scalar_type() == type && (features.stride(2) == 1 || features.size(2) == 1)) {
      return features;
    }
    return at::empty(features.sizes(), features.options().dtype(type)).copy_(features);
  }

  Tensor tensor_;
  const Acc* data_;
  int64_t group_, row_;
};

}  // namespace CPU_CAPABILITY
}  // namespace rru
