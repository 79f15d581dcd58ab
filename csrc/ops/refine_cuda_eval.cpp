// refine's CUDA kernel of eval mode as operators of its own, which rru_fast/cuda/refine/eval.py calls: tensors checked,
// pointers passed on. On CPU tensors it runs emulated.

#include <ATen/ops/full.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "ops/refine_cuda.h"

namespace rru {
namespace {

// Maps (B, F, C, H, W) whose positions are at one stride.
Maps maps_of(const char* name, const Tensor& tensor) {
  const auto height = tensor.size(3), width = tensor.size(4);
  const auto row = tensor.stride(3), column = width == 1 ? row : tensor.stride(4);
  TORCH_CHECK_VALUE(
      height == 1 || width == 1 || row == width * column, name, ": got strides ", tensor.strides(),
      ", wanted positions at one stride");
  return {tensor.const_data_ptr(), tensor.stride(0), tensor.stride(1), tensor.stride(2), column};
}

RefineEval sizes_of(
    const Tensor& x, int64_t d, int64_t num_attn, const OptionalTensor& w_c, c10::string_view precision) {
  check_floating("x", x, 5);
  RefineEval a{};
  set_sizes(a, x, x.size(3), x.size(4), d, num_attn, w_c, precision);
  return a;
}

// Why the kernels do not carry a call with these sizes, or "", and how it is launched: CTAs of a cluster, threads of a
// CTA and its bytes of shared memory.
std::tuple<std::string, std::vector<int64_t>> plan(
    const Tensor& x, int64_t d, int64_t num_attn, const OptionalTensor& w_c, c10::string_view precision) {
  const RefineEval a = sizes_of(x, d, num_attn, w_c, precision);
  ClusterLaunch launch{};
  std::string lacks;
  run("refine_eval", [&] { lacks = kernels_on(x).lacks(a, x.get_device(), &launch); });
  return {std::move(lacks), {launch.ctas, launch.threads, static_cast<int64_t>(launch.shared)}};
}

Tensor pack_eval(
    const Tensor& x, const Tensor& w, const Tensor& gamma, const Tensor& beta, const Tensor& running_mean,
    const Tensor& running_var, const OptionalTensor& w_s1, const OptionalTensor& w_s2, const OptionalTensor& w_c,
    double eps, c10::string_view precision, int64_t stream) {
  const Weights from{w, gamma, beta, w_s1, w_s2, w_c};
  RefineWeights weights = packing_of(sizes_of(x, from.d(), from.num_attn(), w_c, precision));
  set_weights(weights, from, x);
  weights.running_mean = any("running_mean", running_mean, {from.d()}, x);
  weights.running_var = any("running_var", running_var, {from.d()}, x);
  weights.eps = static_cast<float>(eps);
  return pack(weights, x, reinterpret_cast<void*>(stream));
}

// Runs frames `first` to `end` (exclusive); saved is (), or U, z_s, z_c and h, empty where there is none.
void eval(
    const Tensor& x, const Tensor& packed, const OptionalTensor& w_c, const OptionalTensor& u,
    const OptionalTensor& lengths, const OptionalTensor& state_s, const Tensor& features, const Tensor& strips,
    const OptionalTensor& carry, at::TensorList saved, int64_t d, int64_t num_attn, c10::string_view precision,
    int64_t first, int64_t end, int64_t stream) {
  RefineEval a = sizes_of(x, d, num_attn, w_c, precision);
  const int64_t clips = a.clips, steps = a.frames - (state_s ? 0 : 1);
  TORCH_CHECK_VALUE(
      0 <= first && first < end && end <= a.frames, "first, end: got ", first, ", ", end, ", wanted frames of ",
      a.frames);
  a.first = static_cast<int>(first);
  a.end = static_cast<int>(end);
  a.has_state = state_s.has_value();
  a.x = maps_of("x", x);
  if (state_s) {
    check("state_s", *state_s, {clips, a.channels, x.size(3), x.size(4)}, x.scalar_type());
    check_on_device("state_s", *state_s, x);
    a.state = maps_of("state_s", state_s->unsqueeze(1));
  }
  const Kernels& kernels = kernels_on(x);
  check("packed", packed, {kernels.packed_bytes(packing_of(a))}, at::kByte);
  check_on_device("packed", packed, x);
  a.packed = packed.const_data_ptr();
  const int64_t gated = a.has_state || first > 0 ? first : 1;
  a.u_first = static_cast<int>(gated);
  if (u) {
    a.u = written<float>("u", *u, {std::max<int64_t>(end - gated, 0), clips, d, a.positions}, x);
  }
  if (lengths) {
    check("lengths", *lengths, {clips}, at::kLong);
    check_on_device("lengths", *lengths, x);
    a.lengths = lengths->const_data_ptr<int64_t>();
  }
  if (carry) {
    a.carry = written<float>("carry", *carry, {clips, a.channels, a.positions}, x);
  }
  TORCH_CHECK_VALUE(first == 0 || a.carry != nullptr, "carry: got None with first=", first, ", wanted a tensor");
  check("features", features, x.sizes(), x.scalar_type());
  check_on_device("features", features, x);
  TORCH_CHECK_VALUE(
      features.is_contiguous(), "features: got strides ", features.strides(), ", wanted a contiguous tensor");
  a.features = features.mutable_data_ptr();
  a.strips = written<float>("strips", strips, {clips, a.channels, x.size(3)}, x);
  if (!saved.empty()) {
    TORCH_CHECK_VALUE(saved.size() == 4, "saved: got ", saved.size(), " tensors, wanted none or 4");
    // All steps of U, of which `u` may be a part.
    a.u_out = written<float>("saved[0]", saved[0], {steps, clips, d, a.positions}, x) +
        (gated - (a.has_state ? 0 : 1)) * clips * d * a.positions;
    if (a.spatial) {
      a.z_s = written<float>("saved[1]", saved[1], {steps, clips, a.positions}, x);
      a.h = written<float>("saved[3]", saved[3], {steps, clips, num_attn}, x);
    }
    if (a.channel) {
      a.z_c = written<float>("saved[2]", saved[2], {steps, clips, a.channels}, x);
    }
  }
  run("refine_eval", [&] { kernels.eval(a, x.get_device(), reinterpret_cast<void*>(stream)); });
}

// The product of a (16, K) and b (K, 8) by one matrix instruction of a dtype, and 1000 times its rank, by each CTA of a
// cluster: (CTAs, 16, 8).
Tensor fragments(const Tensor& a, const Tensor& b, at::ScalarType dtype, int64_t ctas, int64_t stream) {
  const int64_t depth = dtype == at::kFloat ? 8 : 16;
  check("a", a, {16, depth}, at::kFloat);
  check("b", b, {depth, 8}, at::kFloat);
  check_on_device("b", b, a);
  TORCH_CHECK_VALUE(a.is_contiguous() && b.is_contiguous(), "a, b: got other strides, wanted contiguous tensors");
  Tensor d = at::full({ctas, 16, 8}, std::nan(""), a.options());
  const auto of = dtype == at::kFloat ? Dtype::float32 : dtype == at::kBFloat16 ? Dtype::bfloat16 : Dtype::float16;
  run("fragments", [&] {
    kernels_on(a).fragments(
        a.const_data_ptr<float>(), b.const_data_ptr<float>(), d.mutable_data_ptr<float>(), of, static_cast<int>(ctas),
        a.get_device(), reinterpret_cast<void*>(stream));
  });
  return d;
}

TORCH_LIBRARY_FRAGMENT(rru_fast, m) {
  m.def("cuda_fragments(Tensor a, Tensor b, ScalarType dtype, int ctas, int stream) -> Tensor", TORCH_FN(fragments));

  m.def(
      "refine_cuda_plan(Tensor x, int d, int num_attn, Tensor? w_c, str precision) -> (str lacks, int[] launch)",
      TORCH_FN(plan));
  m.def(
      "refine_cuda_pack(Tensor x, Tensor w, Tensor gamma, Tensor beta, Tensor running_mean, Tensor running_var, "
      "Tensor? w_s1, Tensor? w_s2, Tensor? w_c, float eps, str precision, int stream) -> Tensor",
      TORCH_FN(pack_eval));
  m.def(
      "refine_cuda_eval(Tensor x, Tensor packed, Tensor? w_c, Tensor? u, Tensor? lengths, Tensor? state_s, "
      "Tensor(a!) features, Tensor(b!) strips, Tensor(c!)? carry, Tensor(d!)[] saved, int d, int num_attn, "
      "str precision, int first, int end, int stream) -> ()",
      TORCH_FN(eval));
}

}  // namespace
}  // namespace rru
