// rru_fast::refine for CPUs: arguments checked, then the kernels of csrc/cpu.

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "checks.h"
#include "ops/operators.h"

namespace rru {

bool is_faster_in_composite(
    at::ScalarType dtype, int64_t clips, int64_t channels, int64_t positions, int64_t hidden, bool training) {
  const bool in_bf16 = dtype == at::kBFloat16 && RRU_KERNEL(multiplies_bfloat16)();
  static const bool avx512 = at::get_cpu_capability() == "AVX512";
  const int64_t widest = dtype == at::kDouble ? 8 : !avx512 || (in_bf16 && training) ? 16 : 32;
  const bool narrowest = positions < 4, many = clips >= 4 && !in_bf16;
  const int log2_least = training ? (narrowest ? 20 : 22) : (narrowest ? 19 : many ? 20 : 22);
  return positions < widest && clips * channels * hidden >= int64_t{1} << log2_least;
}

namespace {

using Tensors8 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors9 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Ranks with PyTorch's own collectives, found by name: a PyTorch without torch.distributed lacks them.
Ranks make_ranks(
    c10::string_view process_group, at::IntArrayRef elements_per_rank, bool training, int64_t bn_groups) {
  if (elements_per_rank.empty()) {
    return {};
  }
  TORCH_CHECK_VALUE(
      training && bn_groups == 1, "process_group: got one with training=", training, ", bn_groups=", bn_groups,
      ", wanted batch statistics of one group");
  for (const int64_t elements : elements_per_rank) {
    TORCH_CHECK_VALUE(
        elements >= 1, "elements_per_rank: got ", elements_per_rank, ", wanted at least 1 of every rank");
  }
  const auto all_gather =
      c10::Dispatcher::singleton().findSchemaOrThrow("_c10d_functional::all_gather_into_tensor", "");
  const auto wait = c10::Dispatcher::singleton().findSchemaOrThrow("_c10d_functional::wait_tensor", "");
  const auto size = static_cast<int64_t>(elements_per_rank.size());
  return {elements_per_rank.vec(), [=, name = std::string(process_group)](const Tensor& own) {
            // Boxed: the group's static type is a string until PyTorch 2.11, and any type in 2.14.
            std::vector<c10::IValue> stack{own.unsqueeze(0), size, name};
            all_gather.callBoxed(stack);
            wait.callBoxed(stack);
            return stack.front().toTensor();
          }};
}

// The arguments of refine and of its backward, checked.
RefineArguments refine_arguments(
    const Tensor& x, const Tensor& w, const Tensor& gamma, const Tensor& beta, const OptionalTensor& w_s1,
    const OptionalTensor& w_s2, const OptionalTensor& w_c, const OptionalTensor& running_mean,
    const OptionalTensor& running_var, const OptionalTensor& lengths, const OptionalTensor& state_x,
    const OptionalTensor& state_s, c10::string_view inputs, bool training, double eps, int64_t bn_groups,
    c10::string_view process_group, at::IntArrayRef elements_per_rank) {
  check_floating("x", x, 5);
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
      bn_groups >= 1 && (!training || clips % bn_groups == 0), "bn_groups: got ", bn_groups,
      ", wanted a divisor of the ", clips, " clips");
  TORCH_CHECK_VALUE(
      !training || (!lengths && !state_x && !state_s), "lengths, state: got them with batch statistics (training), ",
      "wanted running ones (eval mode)");
  TORCH_CHECK_VALUE(state_x.has_value() == state_s.has_value(), "state_x, state_s: got one of them, wanted both");
  if (state_x) {
    check("state_x", *state_x, {clips, channels, x.size(3), x.size(4)}, x.scalar_type());
    check("state_s", *state_s, {clips, channels, x.size(3), x.size(4)}, x.scalar_type());
  }
  OptionalTensor dense_lengths;
  if (lengths) {
    check("lengths", *lengths, {clips}, at::kLong);
    dense_lengths = lengths->contiguous();
    const int64_t* values = dense_lengths->const_data_ptr<int64_t>();
    for (int64_t clip = 0; clip < clips; clip++) {
      TORCH_CHECK_VALUE(
          values[clip] >= 1 && values[clip] <= frames, "lengths: got ", values[clip], ", wanted 1 to T=", frames);
    }
  }
  const Inputs gate_inputs = inputs == "raw" ? Inputs::raw
      : inputs == "appearance"               ? Inputs::appearance
                                             : Inputs::appearance_motion;
  return {
      .x = x,
      .w = w,
      .gamma = gamma,
      .beta = beta,
      .w_s1 = w_s1,
      .w_s2 = w_s2,
      .w_c = w_c,
      .running_mean = running_mean,
      .running_var = running_var,
      .lengths = dense_lengths,
      .state_x = state_x,
      .state_s = state_s,
      .inputs = gate_inputs,
      .training = training,
      .eps = eps,
      .bn_groups = bn_groups,
      .ranks = make_ranks(process_group, elements_per_rank, training, bn_groups)};
}

// The gradients that reach refine's outputs, checked against its arguments.
RefineUpstream refine_upstream(
    const OptionalTensor& d_features, const OptionalTensor& d_strips, const RefineArguments& a) {
  if (d_features) {
    check("d_features", *d_features, a.x.sizes(), a.x.scalar_type());
  }
  if (d_strips) {
    check("d_strips", *d_strips, {a.x.size(0), a.x.size(2), a.x.size(3)}, a.x.scalar_type());
  }
  return {.d_features = d_features, .d_strips = d_strips};
}

// The results that refine saved, checked against its arguments.
RefineSaved refine_saved(
    const Tensor& features, const Tensor& mean, const Tensor& var, const Tensor& u, const Tensor& z_s,
    const Tensor& z_c, const Tensor& h, const RefineArguments& a) {
  const int64_t clips = a.x.size(0), frames = a.x.size(1), channels = a.x.size(2);
  const int64_t positions = a.x.size(3) * a.x.size(4), d = a.w.size(0), num_attn = a.w_s1 ? a.w_s1->size(0) : 0;
  const int64_t steps = a.state_s ? frames : frames - 1, bn_frames = a.training ? frames : 0;
  const auto dtype = acc_dtype(a.x);
  check("features", features, a.x.sizes(), a.x.scalar_type());
  check("mean", mean, {bn_frames, a.bn_groups, d}, dtype);
  check("var", var, {bn_frames, a.bn_groups, d}, dtype);
  check("u", u, {steps, clips, d, positions}, dtype);
  check("z_s", z_s, {a.w_s1 ? steps : 0, clips, positions}, dtype);
  check("z_c", z_c, {a.w_c ? steps : 0, clips, channels}, dtype);
  check("h", h, {a.w_s1 ? steps : 0, clips, num_attn}, dtype);
  return {
      .features = features,
      .mean = mean.contiguous(),
      .var = var.contiguous(),
      .u = u.contiguous(),
      .z_s = z_s.contiguous(),
      .z_c = z_c.contiguous(),
      .h = h.contiguous()};
}

// The operators, whose signatures the dispatcher holds to the schemas: they take the parameters of refine_arguments,
// written there alone, after the gradients and the saved tensors.
template <typename F>
struct Refine;

template <typename... Parameters>
struct Refine<RefineArguments(Parameters...)> {
  // The backend of a call; the same for its backward, whose arguments are the same. Ranks have to agree.
  static c10::string_view choose(c10::string_view backend, const Parameters&... parameters) {
    const auto all = std::tie(parameters...);
    const Tensor &x = std::get<0>(all), &w = std::get<1>(all);
    const bool training = std::get<const bool&>(all), has_ranks = !std::get<const at::IntArrayRef&>(all).empty();
    if (backend != "auto") {
      return backend;
    }
    if (has_ranks || x.dim() != 5 || w.dim() != 2) {
      return "cpu";
    }
    const int64_t positions = x.size(3) * x.size(4);
    const bool narrow = is_faster_in_composite(x.scalar_type(), x.size(0), x.size(2), positions, w.size(0), training);
    return narrow ? "composite" : "cpu";
  }

  static Tensors8 forward(Parameters... parameters, bool save, c10::string_view backend) {
    const c10::string_view chosen = choose(backend, parameters...);
    if (chosen != "cpu") {
      return call_python<&forward>("rru_fast::refine_python", parameters..., save, chosen);
    }
    ran().refine = true;
    const auto [saved, strips] = RRU_KERNEL(refine)(refine_arguments(parameters...), save);
    return {saved.features, strips, saved.mean, saved.var, saved.u, saved.z_s, saved.z_c, saved.h};
  }

  static Tensors9 backward(
      const OptionalTensor& d_features, const OptionalTensor& d_strips, const Tensor& features, const Tensor& mean,
      const Tensor& var, const Tensor& u, const Tensor& z_s, const Tensor& z_c, const Tensor& h,
      Parameters... parameters, c10::List<bool> need, c10::string_view backend) {
    const c10::string_view chosen = choose(backend, parameters...);
    if (chosen != "cpu") {
      return call_python<&backward>(
          "rru_fast::refine_backward_python", d_features, d_strips, features, mean, var, u, z_s, z_c, h, parameters...,
          need, chosen);
    }
    TORCH_CHECK_VALUE(need.size() == 9, "need: got ", need.size(), " values, wanted 9, one per gradient");
    const auto arguments = refine_arguments(parameters...);
    const auto upstream = refine_upstream(d_features, d_strips, arguments);
    const auto saved = refine_saved(features, mean, var, u, z_s, z_c, h, arguments);
    const bool weights = need[1] || need[2] || need[3] || need[4] || need[5] || need[6];
    const auto d = RRU_KERNEL(refine_backward)(upstream, saved, arguments, {.x = need[0], .weights = weights});
    const auto or_empty = [&](const Tensor& tensor) {
      return tensor.defined() ? tensor : at::empty({0}, arguments.x.options());
    };
    return {or_empty(d.x),    or_empty(d.w),   or_empty(d.gamma),   or_empty(d.beta),   or_empty(d.w_s1),
            or_empty(d.w_s2), or_empty(d.w_c), or_empty(d.state_x), or_empty(d.state_s)};
  }
};

using Operators = Refine<decltype(refine_arguments)>;

TORCH_LIBRARY_IMPL(rru_fast, CPU, m) {
  m.impl("refine", TORCH_FN(Operators::forward));
  m.impl("refine_backward", TORCH_FN(Operators::backward));
}

}  // namespace
}  // namespace rru
