// Shared by the operators: the choice of their kernels, and the way to Python for calls of other backends.
#pragma once

#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <atomic>
#include <optional>
#include <string>
#include <utility>

#include "cpu/kernels.h"

namespace rru {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// The best set of kernels in the build up to ATen's SIMD capability, which ATEN_CPU_CAPABILITY lowers.
template <typename F>
inline F for_capability(F with_default, F with_avx2, F with_avx512) {
  static const std::string capability = at::get_cpu_capability();
  const bool avx512 = capability == "AVX512", avx2 = avx512 || capability == "AVX2";
  const F kernel = avx512 && with_avx512 ? with_avx512 : avx2 && with_avx2 ? with_avx2 : with_default;
  TORCH_CHECK(kernel, "rru_fast: got kernels for " RRU_CAPABILITIES ", wanted a set for ", capability);
  return kernel;
}

#ifdef RRU_HAS_DEFAULT
#define RRU_DEFAULT(name) &DEFAULT::name
#else
#define RRU_DEFAULT(name) nullptr
#endif
#ifdef RRU_HAS_AVX2
#define RRU_AVX2(name) &AVX2::name
#else
#define RRU_AVX2(name) nullptr
#endif
#ifdef RRU_HAS_AVX512
#define RRU_AVX512(name) &AVX512::name
#else
#define RRU_AVX512(name) nullptr
#endif
#define RRU_KERNEL(name) for_capability<decltype(&DEFAULT::name)>(RRU_DEFAULT(name), RRU_AVX2(name), RRU_AVX512(name))

// The signature of an operator, of which F is a C++ function.
template <typename F>
struct Signature;
template <typename R, typename... Args>
struct Signature<R (*)(Args...)> {
  using type = R(Args...);
};

// Whether the CPU kernels have run an operator in this process; see rru_fast.backends.ran.
struct Ran {
  std::atomic<bool> refine{false}, strip_pool{false}, batch_hard{false};
};
inline Ran& ran() {
  static Ran instance;
  return instance;
}

// True if maps of so few positions are faster in composite, which multiplies the columns of all clips at once, than in
// the CPU kernels' products of each clip, whose columns fill less than two vectors. Measured on processors with AVX-512
// and with AVX2 by python -m rru_fast.calibrate --device cpu; with little work the kernels are faster at any width.
bool is_faster_in_composite(
    at::ScalarType dtype, int64_t clips, int64_t channels, int64_t positions, int64_t hidden, bool training);

// True if a call with tensors on the CPU is for these kernels.
inline bool is_for_cpu_kernels(c10::string_view backend) {
  return backend == "auto" || backend == "cpu";
}

// Calls `name`, the kernels of the other backends, which rru_fast/ops registers as an operator of their own; `function`
// has its signature.
template <auto function, typename... Args>
inline auto call_python(const char* name, Args&&... args) {
  static const auto python =
      c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<typename Signature<decltype(function)>::type>();
  return python.call(std::forward<Args>(args)...);
}

}  // namespace rru
