// The extension module: operators registered with PyTorch, their arguments checked, and what the build was.
//
// Python's rru_fast checks what users pass; here stands what keeps a kernel from reading memory that is not its own.

#include <ATen/Version.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <torch/library.h>

#include <sstream>
#include <string>
#include <utility>

#include "cpu/kernels.h"

namespace rru {
namespace {

using OptionalTensor = std::optional<Tensor>;

// The best kernel set built that is not above ATen's SIMD capability, which ATEN_CPU_CAPABILITY lowers.
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

void check(const char* name, const Tensor& tensor, at::IntArrayRef wanted) {
  TORCH_CHECK_VALUE(tensor.sizes() == wanted, name, ": got shape ", tensor.sizes(), ", wanted ", wanted);
  TORCH_CHECK_TYPE(tensor.layout() == at::kStrided, name, ": got layout ", tensor.layout(), ", wanted a dense tensor");
}

void check(const char* name, const Tensor& tensor, at::IntArrayRef wanted, at::ScalarType dtype) {
  check(name, tensor, wanted);
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, name, ": got dtype ", tensor.scalar_type(), ", wanted ", dtype);
}

void check_maps(const char* name, const Tensor& tensor, int64_t dims) {
  TORCH_CHECK_VALUE(
      tensor.dim() == dims && tensor.numel() > 0, name, ": got shape ", tensor.sizes(), ", wanted ", dims,
      " dimensions, every size at least 1");
  check(name, tensor, tensor.sizes());
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kDouble || type == at::kFloat || type == at::kHalf || type == at::kBFloat16, name, ": got dtype ",
      type, ", wanted float64, float32, float16 or bfloat16");
}

at::ScalarType arithmetic(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// What reaches the other ranks of a process group: PyTorch's own collectives, found by name, which a PyTorch without
// torch.distributed lacks.
Ranks ranks_of(c10::string_view process_group, at::IntArrayRef counts, bool training, int64_t groups) {
  if (counts.empty()) {
    return {};
  }
  TORCH_CHECK_VALUE(
      training && groups == 1, "process_group: got one with training=", training, ", bn_groups=", groups,
      ", wanted batch statistics of one group");
  for (const int64_t count : counts) {
    TORCH_CHECK_VALUE(count >= 1, "counts: got ", counts, ", wanted at least 1 of every rank");
  }
  const auto all_gather =
      c10::Dispatcher::singleton().findSchemaOrThrow("_c10d_functional::all_gather_into_tensor", "");
  const auto wait = c10::Dispatcher::singleton().findSchemaOrThrow("_c10d_functional::wait_tensor", "");
  const auto size = static_cast<int64_t>(counts.size());
  return {counts.vec(), [=, name = std::string(process_group)](const Tensor& own) {
            // Boxed: the group's static type is a string until PyTorch 2.11, and anything at all in 2.14.
            std::vector<c10::IValue> stack{own.unsqueeze(0), size, name};
            all_gather.callBoxed(stack);
            wait.callBoxed(stack);
            return stack.front().toTensor();
          }};
}

RefineArguments refine_arguments(
    const Tensor& x, const Tensor& w, const Tensor& gamma, const Tensor& beta, const OptionalTensor& w_s1,
    const OptionalTensor& w_s2, const OptionalTensor& w_c, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& lengths, const OptionalTensor& state_x,
    const OptionalTensor& state_s, c10::string_view inputs, bool training, double eps, int64_t groups,
    c10::string_view process_group, at::IntArrayRef counts) {
  check_maps("x", x, 5);
  const int64_t clips = x.size(0), frames = x.size(1), channels = x.size(2), positions = x.size(3) * x.size(4);
  TORCH_CHECK_VALUE(w.dim() == 2 && w.size(0) > 0, "w: got shape ", w.sizes(), ", wanted (D, C) or (D, 2C)");
  TORCH_CHECK_VALUE(
      inputs == "appearance+motion" || inputs == "appearance" || inputs == "raw", "inputs: got '", inputs,
      "', wanted 'appearance+motion', 'appearance' or 'raw'");
  const int64_t d = w.size(0);
  check("w", w, {d, inputs == "appearance" ? channels : 2 * channels});
  check("gamma", gamma, {d});
  check("beta", beta, {d});
  TORCH_CHECK_VALUE(
      w_s1.has_value() == w_s2.has_value(), "w_s1, w_s2: got one of them, wanted both (spatial attention) or neither");
  TORCH_CHECK_VALUE(w_s1 || w_c, "w_s1, w_s2, w_c: got none, wanted spatial attention, channel attention or both");
  if (w_s1) {
    TORCH_CHECK_VALUE(w_s1->dim() == 2, "w_s1: got shape ", w_s1->sizes(), ", wanted (A, P)");
    check("w_s1", *w_s1, {w_s1->size(0), positions});
    check("w_s2", *w_s2, {positions, w_s1->size(0)});
  }
  if (w_c) {
    check("w_c", *w_c, {channels, d});
  }
  TORCH_CHECK_VALUE(
      training || (running_mean && running_var), "running_mean, running_var: got None in eval mode, wanted both");
  if (running_mean && running_var) {
    check("running_mean", *running_mean, {d});
    check("running_var", *running_var, {d});
  }
  TORCH_CHECK_VALUE(
      groups >= 1 && (!training || clips % groups == 0), "bn_groups: got ", groups, ", wanted a divisor of the ", clips,
      " clips");
  TORCH_CHECK_VALUE(
      !training || (!lengths && !state_x && !state_s), "lengths, state: got them with batch statistics (training), ",
      "wanted running ones (eval mode)");
  TORCH_CHECK_VALUE(state_x.has_value() == state_s.has_value(), "state_x, state_s: got one of them, wanted both");
  if (state_x) {
    check("state_x", *state_x, {clips, channels, x.size(3), x.size(4)}, x.scalar_type());
    check("state_s", *state_s, {clips, channels, x.size(3), x.size(4)}, x.scalar_type());
  }
  OptionalTensor whole_lengths;
  if (lengths) {
    check("lengths", *lengths, {clips}, at::kLong);
    whole_lengths = lengths->contiguous();
    const int64_t* values = whole_lengths->const_data_ptr<int64_t>();
    for (int64_t clip = 0; clip < clips; clip++) {
      TORCH_CHECK_VALUE(
          values[clip] >= 1 && values[clip] <= frames, "lengths: got ", values[clip], ", wanted 1 to T=", frames);
    }
  }
  const Inputs kind = inputs == "raw" ? Inputs::raw
      : inputs == "appearance"        ? Inputs::appearance
                                      : Inputs::appearance_motion;
  return {x,       w,       gamma,         beta,    w_s1,    w_s2, w_c,      running_mean,
          running_var, whole_lengths, state_x, state_s, kind, training, eps,     groups,
          ranks_of(process_group, counts, training, groups)};
}

Tensors8 refine(
    const Tensor& x, const Tensor& w, const Tensor& gamma, const Tensor& beta, const OptionalTensor& w_s1,
    const OptionalTensor& w_s2, const OptionalTensor& w_c, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& lengths, const OptionalTensor& state_x,
    const OptionalTensor& state_s, c10::string_view inputs, bool training, double eps, int64_t bn_groups,
    c10::string_view process_group, at::IntArrayRef counts, bool save) {
  const auto arguments = refine_arguments(
      x, w, gamma, beta, w_s1, w_s2, w_c, running_mean, running_var, lengths, state_x, state_s, inputs, training, eps,
      bn_groups, process_group, counts);
  return RRU_KERNEL(refine)(arguments, save);
}

Tensors9 refine_backward(
    const OptionalTensor& d_features, const OptionalTensor& d_strips, bool need_x, bool need_weights,
    const Tensor& features, const Tensor& mean, const Tensor& var, const Tensor& u, const Tensor& z_s,
    const Tensor& z_c, const Tensor& h, const Tensor& x, const Tensor& w, const Tensor& gamma, const Tensor& beta,
    const OptionalTensor& w_s1, const OptionalTensor& w_s2, const OptionalTensor& w_c,
    const OptionalTensor& running_mean, const OptionalTensor& running_var, const OptionalTensor& lengths,
    const OptionalTensor& state_x, const OptionalTensor& state_s, c10::string_view inputs, bool training, double eps,
    int64_t bn_groups, c10::string_view process_group, at::IntArrayRef counts) {
  const auto arguments = refine_arguments(
      x, w, gamma, beta, w_s1, w_s2, w_c, running_mean, running_var, lengths, state_x, state_s, inputs, training, eps,
      bn_groups, process_group, counts);
  const int64_t clips = x.size(0), frames = x.size(1), channels = x.size(2), positions = x.size(3) * x.size(4);
  const int64_t d = w.size(0), hidden = w_s1 ? w_s1->size(0) : 0, steps = state_s ? frames : frames - 1;
  const auto type = arithmetic(x);
  if (d_features) {
    check("d_features", *d_features, x.sizes(), x.scalar_type());
  }
  if (d_strips) {
    check("d_strips", *d_strips, {clips, channels, x.size(3)}, x.scalar_type());
  }
  check("features", features, x.sizes(), x.scalar_type());
  check("mean", mean, {training ? frames : 0, bn_groups, d}, type);
  check("var", var, {training ? frames : 0, bn_groups, d}, type);
  check("u", u, {steps, clips, d, positions}, type);
  check("z_s", z_s, {w_s1 ? steps : 0, clips, positions}, type);
  check("z_c", z_c, {w_c ? steps : 0, clips, channels}, type);
  check("h", h, {w_s1 ? steps : 0, clips, hidden}, type);
  const RefineSaved saved{
      mean.contiguous(), var.contiguous(), u.contiguous(), z_s.contiguous(), z_c.contiguous(), h.contiguous()};
  return RRU_KERNEL(refine_backward)(d_features, d_strips, need_x, need_weights, features, saved, arguments);
}

Tensor strip_pool(const Tensor& s) {
  check_maps("s", s, 5);
  return RRU_KERNEL(strip_pool)(s);
}

Tensor strip_pool_backward(const Tensor& d_strips, int64_t frames, int64_t width) {
  check_maps("d_strips", d_strips, 3);
  TORCH_CHECK_VALUE(frames >= 1 && width >= 1, "frames, width: got ", frames, ", ", width, ", wanted at least 1");
  return RRU_KERNEL(strip_pool_backward)(d_strips, frames, width);
}

bool is_cosine(c10::string_view metric) {
  TORCH_CHECK_VALUE(
      metric == "euclidean" || metric == "cosine", "metric: got '", metric, "', wanted 'euclidean' or 'cosine'");
  return metric == "cosine";
}

Tensors5 batch_hard(const Tensor& features, const Tensor& labels, double margin, bool soft, c10::string_view metric) {
  check_maps("features", features, 3);
  check("labels", labels, {features.size(1)});
  TORCH_CHECK_TYPE(
      at::isIntegralType(labels.scalar_type(), /*includeBool=*/false), "labels: got dtype ", labels.scalar_type(),
      ", wanted an integer dtype");
  return RRU_KERNEL(batch_hard)(features, labels.to(at::kLong).contiguous(), margin, soft, is_cosine(metric));
}

Tensor batch_hard_backward(
    const Tensor& d_loss, const Tensor& features, const Tensor& d_pos, const Tensor& d_neg, const Tensor& positive,
    const Tensor& negative, double margin, bool soft, c10::string_view metric) {
  check_maps("features", features, 3);
  const int64_t groups = features.size(0), n = features.size(1);
  const std::pair<const char*, const Tensor&> distances[] = {{"d_loss", d_loss}, {"d_pos", d_pos}, {"d_neg", d_neg}};
  for (const auto& [name, tensor] : distances) {
    check(name, tensor, {groups, n}, arithmetic(features));
  }
  const std::pair<const char*, const Tensor&> partners[] = {{"positive", positive}, {"negative", negative}};
  for (const auto& [name, tensor] : partners) {
    check(name, tensor, {groups, n}, at::kLong);
    const Tensor whole = tensor.contiguous();
    const int64_t* index = whole.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < groups * n; i++) {
      TORCH_CHECK_INDEX(index[i] >= -1 && index[i] < n, name, ": got index ", index[i], ", wanted -1 to ", n - 1);
    }
  }
  return RRU_KERNEL(batch_hard_backward)(
      d_loss.contiguous(), features, d_pos.contiguous(), d_neg.contiguous(), positive.contiguous(),
      negative.contiguous(), margin, soft, is_cosine(metric));
}

#define RRU_REFINE_SCHEMA                                                                                      \
  "Tensor x, Tensor w, Tensor gamma, Tensor beta, Tensor? w_s1, Tensor? w_s2, Tensor? w_c, "                   \
  "Tensor? running_mean, Tensor? running_var, Tensor? lengths, Tensor? state_x, Tensor? state_s, str inputs, " \
  "bool training, float eps, int bn_groups, str process_group, int[] counts"
#define RRU_SAVED_SCHEMA "Tensor mean, Tensor var, Tensor u, Tensor z_s, Tensor z_c, Tensor h"

// Called by the operators of rru_fast/ops, which have the autograd and the shapes; these are their kernels only.
TORCH_LIBRARY_FRAGMENT(rru_fast, m) {
  m.def("refine_cpu(" RRU_REFINE_SCHEMA ", bool save) -> (Tensor features, Tensor strips, " RRU_SAVED_SCHEMA ")");
  m.def(
      "refine_backward_cpu(Tensor? d_features, Tensor? d_strips, bool need_x, bool need_weights, Tensor features, "
      RRU_SAVED_SCHEMA ", " RRU_REFINE_SCHEMA ") -> (Tensor d_x, Tensor d_w, Tensor d_gamma, Tensor d_beta, "
      "Tensor d_w_s1, Tensor d_w_s2, Tensor d_w_c, Tensor d_state_x, Tensor d_state_s)");
  m.def("strip_pool_cpu(Tensor s) -> Tensor");
  m.def("strip_pool_backward_cpu(Tensor d_strips, int frames, int width) -> Tensor");
  m.def(
      "batch_hard_cpu(Tensor features, Tensor labels, float margin, bool soft, str metric) -> "
      "(Tensor loss, Tensor d_pos, Tensor d_neg, Tensor positive, Tensor negative)");
  m.def(
      "batch_hard_backward_cpu(Tensor d_loss, Tensor features, Tensor d_pos, Tensor d_neg, Tensor positive, "
      "Tensor negative, float margin, bool soft, str metric) -> Tensor");
}

TORCH_LIBRARY_IMPL(rru_fast, CPU, m) {
  m.impl("refine_cpu", TORCH_FN(refine));
  m.impl("refine_backward_cpu", TORCH_FN(refine_backward));
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

// Free-threaded Python need not turn its lock on for this module: nothing in it changes after its first use.
PYBIND11_MODULE(_C, m, pybind11::mod_gil_not_used()) {
  m.doc() = "C++ kernels of rru_fast; importing it registers them as torch.ops.rru_fast.*_cpu.";
  m.def(
      "build_info", &rru::build_info,
      "The compiler and its flags, the PyTorch built for, the SIMD capabilities built and the one in use, whether "
      "bfloat16 is multiplied in bfloat16, and the CUDA architectures built for.");
}
