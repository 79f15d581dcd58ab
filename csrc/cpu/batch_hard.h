// Features and distances of batch_hard, forward and backward: G groups (strips) of N features of width D.
#pragma once

#include "array.h"
#include "kernels.h"

namespace rru {
namespace CPU_CAPABILITY {

// Euclidean distances are sqrt(max(d2, kMinDistance2)). Up to kMinDistance, that floor with rounding, their gradient
// is 0: coincident points have gradient 0.
constexpr double kMinDistance2 = 1e-12;
constexpr double kMinDistance = 1e-6 * (1 + 1e-6);

// Features (G, N, D) as rows of Acc: copied only where the dtype differs or the last dimension is strided.
template <typename Acc>
class Features {
 public:
  explicit Features(const Tensor& features) : tensor_(in_rows(features)), data_(tensor_.const_data_ptr<Acc>()) {
    group_stride_ = tensor_.stride(0);
    row_stride_ = tensor_.stride(1);
  }

  const Acc* row(int64_t group, int64_t n) const {
    return data_ + group * group_stride_ + n * row_stride_;
  }

 private:
  static Tensor in_rows(const Tensor& features) {
    const auto dtype = Array<Acc>::kDtype;
    if (features.scalar_type() == dtype && (features.stride(2) == 1 || features.size(2) == 1)) {
      return features;
    }
    return at::empty(features.sizes(), dtype).copy_(features);
  }

  const Tensor tensor_;
  const Acc* const data_;
  int64_t group_stride_, row_stride_;
};

}  // namespace CPU_CAPABILITY
}  // namespace rru
