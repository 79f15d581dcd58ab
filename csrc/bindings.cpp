// The extension module: operators registered with PyTorch, their arguments checked, and a record of the build.
//
// Python's rru_fast checks what users pass; the checks here keep a kernel from accessing memory out of bounds.

#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <sstream>
#include <string>
#include <tuple>

#include "checks.h"
#include "cpu/kernels.h"
#include "refine_arguments.h"

namespace rru {
namespace {

using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors8 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors9 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The best set of kernels in the build up to ATen's SIMD capability, which ATEN_CPU_CAPABILITY lowers.
template <typename F>
F for_capability(F with_default, F with_avx2, F with_avx512) {
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

// The operators, whose C++ signatures the dispatcher checks against the schemas: they take the parameters of
// refine_arguments, written there alone, after the gradients and the saved tensors.
template <typename F>
struct Refine;

template <typename... Parameters>
struct Refine<RefineArguments(Parameters...)> {
  static Tensors8 forward(Parameters... parameters, bool save) {
    const auto [saved, strips] = RRU_KERNEL(refine)(refine_arguments(parameters...), save);
    return {saved.features, strips, saved.mean, saved.var, saved.u, saved.z_s, saved.z_c, saved.h};
  }

  static Tensors9 backward(
      const OptionalTensor& d_features, const OptionalTensor& d_strips, const Tensor& features, const Tensor& mean,
      const Tensor& var, const Tensor& u, const Tensor& z_s, const Tensor& z_c, const Tensor& h,
      Parameters... parameters, bool need_x, bool need_weights) {
    const auto arguments = refine_arguments(parameters...);
    const auto upstream = refine_upstream(d_features, d_strips, arguments);
    const auto saved = refine_saved(features, mean, var, u, z_s, z_c, h, arguments);
    const RefineNeed need{.x = need_x, .weights = need_weights};
    const auto d = RRU_KERNEL(refine_backward)(upstream, saved, arguments, need);
    const auto or_empty = [&](const Tensor& tensor) {
      return tensor.defined() ? tensor : at::empty({0}, arguments.x.options());
    };
    return {or_empty(d.x),    or_empty(d.w),   or_empty(d.gamma),   or_empty(d.beta),   or_empty(d.w_s1),
            or_empty(d.w_s2), or_empty(d.w_c), or_empty(d.state_x), or_empty(d.state_s)};
  }
};

using RefineOperators = Refine<decltype(refine_arguments)>;

Tensor strip_pool(const Tensor& s) {
  check_floating("s", s, 5);
  return RRU_KERNEL(strip_pool)(s);
}

Tensor strip_pool_backward(const Tensor& d_strips, int64_t frames, int64_t width) {
  check_floating("d_strips", d_strips, 3);
  TORCH_CHECK_VALUE(frames >= 1 && width >= 1, "frames, width: got ", frames, ", ", width, ", wanted at least 1");
  return RRU_KERNEL(strip_pool_backward)(d_strips, frames, width);
}

// The arguments of batch_hard and of its backward, checked.
BatchHardArguments batch_hard_arguments(
    const Tensor& features, const Tensor& labels, double margin, bool soft, c10::string_view metric) {
  check_floating("features", features, 3);
  check("labels", labels, {features.size(1)});
  TORCH_CHECK_TYPE(
      at::isIntegralType(labels.scalar_type(), /*includeBool=*/false), "labels: got dtype ", labels.scalar_type(),
      ", wanted an integer dtype");
  TORCH_CHECK_VALUE(
      metric == "euclidean" || metric == "cosine", "metric: got '", metric, "', wanted 'euclidean' or 'cosine'");
  return {
      .features = features,
      .labels = labels.to(at::kLong).contiguous(),
      .margin = margin,
      .soft = soft,
      .cosine = metric == "cosine"};
}

Tensors5 batch_hard(const Tensor& features, const Tensor& labels, double margin, bool soft, c10::string_view metric) {
  const auto [loss, saved] = RRU_KERNEL(batch_hard)(batch_hard_arguments(features, labels, margin, soft, metric));
  return {loss, saved.d_pos, saved.d_neg, saved.positive, saved.negative};
}

Tensor batch_hard_backward(
    const Tensor& d_loss, const Tensor& d_pos, const Tensor& d_neg, const Tensor& positive, const Tensor& negative,
    const Tensor& features, const Tensor& labels, double margin, bool soft, c10::string_view metric) {
  const auto arguments = batch_hard_arguments(features, labels, margin, soft, metric);
  const int64_t groups = features.size(0), n = features.size(1);
  const auto dense = [&](const char* name, const Tensor& tensor, at::ScalarType dtype) {
    check(name, tensor, {groups, n}, dtype);
    return tensor.contiguous();
  };
  const auto indices = [&](const char* name, const Tensor& tensor) {
    const Tensor result = dense(name, tensor, at::kLong);
    const int64_t* index = result.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < groups * n; i++) {
      TORCH_CHECK_INDEX(index[i] >= -1 && index[i] < n, name, ": got index ", index[i], ", wanted -1 to ", n - 1);
    }
    return result;
  };
  const auto dtype = acc_dtype(features);
  const Tensor dense_d_loss = dense("d_loss", d_loss, dtype);
  const BatchHardSaved saved{
      .d_pos = dense("d_pos", d_pos, dtype),
      .d_neg = dense("d_neg", d_neg, dtype),
      .positive = indices("positive", positive),
      .negative = indices("negative", negative)};
  return RRU_KERNEL(batch_hard_backward)(dense_d_loss, saved, arguments);
}

// Kernels only: the operators of rru_fast/ops call them, and have the autograd and the fake implementations.
TORCH_LIBRARY_FRAGMENT(rru_fast, m) {
  m.def("refine_cpu(" RRU_REFINE_SCHEMA ", bool save) -> (Tensor features, Tensor strips, " RRU_SAVED_SCHEMA ")");
  m.def(
      "refine_backward_cpu(Tensor? d_features, Tensor? d_strips, Tensor features, " RRU_SAVED_SCHEMA
      ", " RRU_REFINE_SCHEMA ", bool need_x, bool need_weights) -> (Tensor d_x, Tensor d_w, Tensor d_gamma, "
      "Tensor d_beta, Tensor d_w_s1, Tensor d_w_s2, Tensor d_w_c, Tensor d_state_x, Tensor d_state_s)");
  m.def("strip_pool_cpu(Tensor s) -> Tensor");
  m.def("strip_pool_backward_cpu(Tensor d_strips, int frames, int width) -> Tensor");
  m.def(
      "batch_hard_cpu(Tensor features, Tensor labels, float margin, bool soft, str metric) -> "
      "(Tensor loss, Tensor d_pos, Tensor d_neg, Tensor positive, Tensor negative)");
  m.def(
      "batch_hard_backward_cpu(Tensor d_loss, Tensor d_pos, Tensor d_neg, Tensor positive, Tensor negative, "
      "Tensor features, Tensor labels, float margin, bool soft, str metric) -> Tensor");
}

TORCH_LIBRARY_IMPL(rru_fast, CPU, m) {
  m.impl("refine_cpu", TORCH_FN(RefineOperators::forward));
  m.impl("refine_backward_cpu", TORCH_FN(RefineOperators::backward));
  m.impl("strip_pool_cpu", TORCH_FN(strip_pool));
  m.impl("strip_pool_backward_cpu", TORCH_FN(strip_pool_backward));
  m.impl("batch_hard_cpu", TORCH_FN(batch_hard));
  m.impl("batch_hard_backward_cpu", TORCH_FN(batch_hard_backward));
}

pybind11::dict build_info() {
  const auto words = [](const std::string& text) {
    pybind11::list list;
    std::istringstream stream(text);
    for (std::string word; stream >> word;) {
      list.append(word);
    }
    return list;
  };
  pybind11::dict info;
  info["compiler"] = __VERSION__;
  info["flags"] = RRU_FLAGS;
  info["torch"] = RRU_TORCH_VERSION;
  info["simd"] = words(RRU_CAPABILITIES);
  info["simd_here"] = at::get_cpu_capability();
  info["bfloat16_here"] = RRU_KERNEL(multiplies_bfloat16)();
  info["cuda_architectures"] = words(RRU_CUDA_ARCHITECTURES);
  return info;
}

}  // namespace
}  // namespace rru

// mod_gil_not_used: free-threaded Python may leave its lock off, as no state here changes after its first use.
PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.doc() = "C++ kernels of rru_fast; importing it registers them as torch.ops.rru_fast.*_cpu.";
  m.def(
      "build_info", &rru::build_info,
      "The compiler and its flags, the PyTorch built for, the SIMD capabilities built and the one in use, whether "
      "bfloat16 is multiplied in bfloat16, and the CUDA architectures built for.");
}
