// Detection of bf16 matrix products on this processor.

#include <ATen/Context.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <exception>

#include "kernels.h"

namespace rru {
namespace CPU_CAPABILITY {

namespace {

// True if the processor has bf16 instructions. ATen asks for AVX-512 alone, which Skylake, Cascade Lake and Ice Lake
// have without them.
bool processor_multiplies_bfloat16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return true;  // decided by oneDNN alone
#endif
}

// True if oneDNN has a bf16 kernel: ONEDNN_MAX_CPU_ISA may exclude instructions that the processor has.
bool onednn_multiplies_bfloat16() {
  const c10::BFloat16 a[2] = {1.0f, 1.0f};
  c10::BFloat16 b[2 * 16];
  std::fill_n(b, 2 * 16, c10::BFloat16(1.0f));
  float c[16] = {};
  try {
    at::native::cpublas::brgemm(1, 16, 2, 2, 16, 16, false, a, b, c, /*is_vnni=*/true);
  } catch (const std::exception&) {
    return false;
  }
  at::native::cpublas::brgemm_release();
  return std::all_of(c, c + 16, [](float sum) { return sum == 2.0f; });
}

}  // namespace

bool multiplies_bfloat16() {
  if (!at::globalContext().userEnabledMkldnn()) {  // may change between calls
    return false;
  }
  static const bool supported = processor_multiplies_bfloat16() && onednn_multiplies_bfloat16();
  return supported;
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
