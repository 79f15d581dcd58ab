// rru_fast::strip_pool for CPUs: arguments checked, then the kernels of csrc/cpu.

#include <torch/library.h>

#include "checks.h"
#include "ops/operators.h"

namespace rru {
namespace {

Tensor strip_pool(const Tensor& s, c10::string_view backend) {
  if (!is_for_cpu_kernels(backend)) {
    return call_python<&strip_pool>("rru_fast::strip_pool_python", s, backend);
  }
  check_floating("s", s, 5);
  ran().strip_pool = true;
  return RRU_KERNEL(strip_pool)(s);
}

Tensor strip_pool_backward(const Tensor& d_strips, at::IntArrayRef s_sizes, c10::string_view backend) {
  if (!is_for_cpu_kernels(backend)) {
    return call_python<&strip_pool_backward>("rru_fast::strip_pool_backward_python", d_strips, s_sizes, backend);
  }
  check_floating("d_strips", d_strips, 3);
  TORCH_CHECK_VALUE(
      s_sizes.size() == 5 && s_sizes[1] >= 1 && s_sizes[4] >= 1, "s_sizes: got ", s_sizes,
      ", wanted (B, T, C, H, W), T and W at least 1");
  check("d_strips", d_strips, {s_sizes[0], s_sizes[2], s_sizes[3]});
  return RRU_KERNEL(strip_pool_backward)(d_strips, s_sizes[1], s_sizes[4]);
}

TORCH_LIBRARY_IMPL(rru_fast, CPU, m) {
  m.impl("strip_pool", TORCH_FN(strip_pool));
  m.impl("strip_pool_backward", TORCH_FN(strip_pool_backward));
}

}  // namespace
}  // namespace rru
