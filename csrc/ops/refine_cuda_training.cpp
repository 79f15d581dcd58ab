// refine's CUDA kernels of training mode as operators of their own, which rru_fast/cuda/refine/training.py calls:
// tensors checked, weights packed, scratch allocated, pointers passed on. On CPU tensors they run emulated.
//
// Maps are (B, T, C, R) here, rows of R elements, the next multiple of 8 of H * W positions.

#include <ATen/ops/zeros.h>

#include <tuple>
#include <vector>

#include "ops/refine_cuda.h"

namespace rru {
namespace {

// Clusters have at most 16 CTAs, each with a flag in 128 bytes of its own.
constexpr int64_t kFlags = 16 * 32;

void check_groups(int64_t bn_groups, const RefineSizes& a) {
  TORCH_CHECK_VALUE(
      bn_groups >= 1 && a.clips % bn_groups == 0, "bn_groups: got ", bn_groups, ", wanted a divisor of ", a.clips);
}

template <class A>
A sizes_of(
    const Tensor& x, int64_t height, int64_t width, const Weights& weights, double eps, int64_t bn_groups,
    c10::string_view precision) {
  A a{};
  set_sizes(a, x, height, width, weights.d(), weights.num_attn(), weights.w_c, precision);
  check_groups(bn_groups, a);
  TORCH_CHECK_VALUE(a.spatial || a.channel, "w_s1, w_c: got None for both, wanted one at least");
  a.groups = static_cast<int>(bn_groups);
  a.eps = static_cast<float>(eps);
  return a;
}

// Why a pass of training mode cannot be launched with these sizes, or "", and how it is: CTAs of a cluster, threads of
// a CTA, its bytes of shared memory and its channels as a multiple of those in eval mode, and launches.
std::tuple<std::string, std::vector<int64_t>> plan(
    const Tensor& x, int64_t d, int64_t num_attn, const OptionalTensor& w_c, int64_t bn_groups,
    c10::string_view precision, bool backward) {
  check_floating("x", x, 5);
  std::string lacks;
  ClusterLaunch launch{};
  const auto ask = [&](auto a, auto lacks_of) {
    set_sizes(a, x, x.size(3), x.size(4), d, num_attn, w_c, precision);
    check_groups(bn_groups, a);
    a.groups = static_cast<int>(bn_groups);
    lacks = lacks_of(a, x.get_device(), 0, &launch);
  };
  const Kernels& kernels = kernels_on(x);
  if (backward) {
    run("refine_backward", [&] { ask(RefineBackward{}, kernels.backward_lacks); });
  } else {
    run("refine_forward", [&] { ask(RefineForward{}, kernels.forward_lacks); });
  }
  return {
      std::move(lacks),
      {launch.ctas, launch.threads, static_cast<int64_t>(launch.shared), launch.multiple, launch.launches}};
}

// Maps that can be read 16 bytes at a time.
Maps maps_of(const char* name, const Tensor& maps, const Tensor& x, int64_t positions) {
  check(name, maps, {x.size(0), x.size(1), x.size(2), (positions + 7) / 8 * 8}, x.scalar_type());
  check_on_device(name, maps, x);
  const int64_t per_16_bytes = 16 / maps.element_size();
  bool fits = maps.stride(3) == 1 && reinterpret_cast<uintptr_t>(maps.const_data_ptr()) % 16 == 0;
  for (int64_t i = 0; i < 3; i++) {
    fits = fits && maps.stride(i) % per_16_bytes == 0;
  }
  TORCH_CHECK_VALUE(
      fits, name, ": got strides ", maps.strides(), ", wanted contiguous rows at multiples of 16 bytes");
  return {maps.const_data_ptr(), maps.stride(0), maps.stride(1), maps.stride(2), 1};
}

void* written_maps(const char* name, const Tensor& maps, const Tensor& x, int64_t positions) {
  maps_of(name, maps, x, positions);
  TORCH_CHECK_VALUE(maps.is_contiguous(), name, ": got strides ", maps.strides(), ", wanted a contiguous tensor");
  return maps.mutable_data_ptr();
}

const float* saved(const char* name, const Tensor& tensor, at::IntArrayRef shape, const Tensor& x) {
  const AnyTensor found = any(name, tensor, shape, x);
  check(name, tensor, shape, at::kFloat);
  return static_cast<const float*>(found.data);
}

// How a pass is launched, which has to be possible.
template <class A, class LACKS>
ClusterLaunch launch_of(const char* name, const A& a, const Tensor& x, LACKS lacks_of) {
  ClusterLaunch launch{};
  std::string lacks;
  run(name, [&] { lacks = lacks_of(a, x.get_device(), 0, &launch); });
  TORCH_CHECK_VALUE(lacks.empty(), "x: got shape ", x.sizes(), ", wanted what ", name, " carries: ", lacks);
  return launch;
}

// Launches a pass with packed weights and scratch; returns the sums of the scratch.
template <class A, class LAUNCH>
Tensor launch_pass(
    const char* name, A& a, Pass pass, const ClusterLaunch& launch, const Weights& weights, const Tensor& x,
    int64_t stream, LAUNCH launch_kernel) {
  RefineWeights packing = packing_of(a);
  packing.pass = pass;
  packing.multiple = launch.multiple;
  set_weights(packing, weights, x);
  void* on = reinterpret_cast<void*>(stream);
  const Tensor packed = pack(packing, x, on);
  const Tensor flags = at::zeros({a.clips * kFlags}, x.options().dtype(at::kInt));
  const Tensor sums = at::empty({a.frames - 1, a.clips, launch.threads, 2}, x.options().dtype(at::kFloat));
  const Tensor strips = at::empty({launch.strips}, sums.options());
  a.packed = packed.const_data_ptr();
  a.scratch = {
      sums.mutable_data_ptr<float>(), reinterpret_cast<uint32_t*>(flags.mutable_data_ptr<int>()),
      strips.mutable_data_ptr<float>()};
  run(name, [&] { launch_kernel(a, launch, x.get_device(), on); });
  return sums;
}

// Fills features, strips (the sum of S over frames and columns), mean and var; u (N, B, D, P) has W_m M_t if `motion`,
// and is U afterwards if there are saved tensors, z_s, z_c and h, empty where there is none.
void forward(
    const Tensor& x, const Tensor& w, const Tensor& gamma, const Tensor& beta, const OptionalTensor& w_s1,
    const OptionalTensor& w_s2, const OptionalTensor& w_c, double eps, int64_t bn_groups, c10::string_view precision,
    int64_t height, int64_t width, bool motion, const Tensor& features, const Tensor& strips, const Tensor& mean,
    const Tensor& var, const OptionalTensor& u, at::TensorList saved_tensors, int64_t stream) {
  const Weights weights{w, gamma, beta, w_s1, w_s2, w_c};
  check_floating("x", x, 4);
  auto a = sizes_of<RefineForward>(x, height, width, weights, eps, bn_groups, precision);
  const int64_t steps = a.frames - 1, clips = a.clips;
  a.x = maps_of("x", x, x, a.positions);
  a.features = written_maps("features", features, x, a.positions);
  a.strips = written<float>("strips", strips, {clips, a.channels, height}, x);
  a.mean = written<float>("mean", mean, {a.frames, a.groups, a.d}, x);
  a.var = written<float>("var", var, {a.frames, a.groups, a.d}, x);
  TORCH_CHECK_VALUE(u || (!motion && saved_tensors.empty()), "u: got None, wanted a tensor");
  if (u) {
    float* all = written<float>("u", *u, {steps, clips, a.d, a.positions}, x);
    a.u = motion ? all : nullptr;
    a.u_out = saved_tensors.empty() ? nullptr : all;
  }
  if (!saved_tensors.empty()) {
    TORCH_CHECK_VALUE(saved_tensors.size() == 3, "saved: got ", saved_tensors.size(), " tensors, wanted none or 3");
    if (a.spatial) {
      a.z_s = written<float>("saved[0]", saved_tensors[0], {steps, clips, a.positions}, x);
      a.h = written<float>("saved[2]", saved_tensors[2], {steps, clips, a.num_attn}, x);
    }
    if (a.channel) {
      a.z_c = written<float>("saved[1]", saved_tensors[1], {steps, clips, a.channels}, x);
    }
  }
  const Kernels& kernels = kernels_on(x);
  const ClusterLaunch launch = launch_of("refine_forward", a, x, kernels.forward_lacks);
  launch_pass("refine_forward", a, Pass::forward, launch, weights, x, stream, kernels.forward);
}

// Fills d_x, without what reaches it through the motion, and du (N, B, D, P); returns sums over positions for the
// weights' gradients: of dY and dY Uhat (N, B, kD, 2), kD >= D; then, empty without them, dz_s, dz_c, dh, means of Y
// over positions (N, B, D), and sums of Y over parts of the gate channels (N, B, n, P).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    const OptionalTensor& d_features, const OptionalTensor& d_strips, const Tensor& x, const Tensor& features,
    const Tensor& mean, const Tensor& var, const Tensor& u, const Tensor& z_s, const Tensor& z_c, const Tensor& h,
    const Tensor& w, const Tensor& gamma, const Tensor& beta, const OptionalTensor& w_s1, const OptionalTensor& w_s2,
    const OptionalTensor& w_c, double eps, int64_t bn_groups, c10::string_view precision, int64_t height,
    int64_t width, const OptionalTensor& d_x, const Tensor& du, bool need_weights, int64_t stream) {
  const Weights weights{w, gamma, beta, w_s1, w_s2, w_c};
  check_floating("x", x, 4);
  auto a = sizes_of<RefineBackward>(x, height, width, weights, eps, bn_groups, precision);
  const int64_t steps = a.frames - 1, clips = a.clips;
  a.x = maps_of("x", x, x, a.positions);
  a.features = maps_of("features", features, x, a.positions);
  if (d_features) {
    a.d_features = maps_of("d_features", *d_features, x, a.positions);
  }
  if (d_strips) {
    a.d_strips = saved("d_strips", *d_strips, {clips, a.channels, height}, x);
  }
  a.u = saved("u", u, {steps, clips, a.d, a.positions}, x);
  a.mean = saved("mean", mean, {a.frames, a.groups, a.d}, x);
  a.var = saved("var", var, {a.frames, a.groups, a.d}, x);
  if (d_x) {
    a.d_x = written_maps("d_x", *d_x, x, a.positions);
  }
  a.du = written<float>("du", du, {steps, clips, a.d, a.positions}, x);
  const auto make = [&](bool there, int64_t size) {
    return at::empty({there ? steps : 0, clips, size}, x.options().dtype(at::kFloat));
  };
  const bool spatial = need_weights && a.spatial, channel = need_weights && a.channel;
  const Tensor d_z_s = make(spatial, a.positions), d_z_c = make(channel, a.channels), d_h = make(spatial, a.num_attn);
  const Tensor y_channels = make(need_weights, a.d);
  if (a.spatial) {
    a.z_s = saved("z_s", z_s, {steps, clips, a.positions}, x);
    a.h = saved("h", h, {steps, clips, a.num_attn}, x);
  }
  if (a.channel) {
    a.z_c = saved("z_c", z_c, {steps, clips, a.channels}, x);
  }
  const Kernels& kernels = kernels_on(x);
  const ClusterLaunch launch = launch_of("refine_backward", a, x, kernels.backward_lacks);
  const Tensor y_positions = at::empty(
      {need_weights ? steps : 0, clips, launch.ctas, a.positions}, x.options().dtype(at::kFloat));
  const auto filled = [](bool there, const Tensor& tensor) {
    return there ? tensor.mutable_data_ptr<float>() : nullptr;
  };
  a.d_z_s = filled(spatial, d_z_s);
  a.d_z_c = filled(channel, d_z_c);
  a.d_h = filled(spatial, d_h);
  a.y_channels = filled(need_weights, y_channels);
  a.y_positions = filled(need_weights, y_positions);
  const Tensor sums = launch_pass("refine_backward", a, Pass::backward, launch, weights, x, stream, kernels.backward);
  return {sums, d_z_s, d_z_c, d_h, y_channels, y_positions};
}

TORCH_LIBRARY_FRAGMENT(rru_fast, m) {
  m.def(
      "refine_cuda_training_plan(Tensor x, int d, int num_attn, Tensor? w_c, int bn_groups, str precision, "
      "bool backward) -> (str lacks, int[] launch)",
      TORCH_FN(plan));
  m.def(
      "refine_cuda_forward(Tensor x, Tensor w, Tensor gamma, Tensor beta, Tensor? w_s1, Tensor? w_s2, Tensor? w_c, "
      "float eps, int bn_groups, str precision, int height, int width, bool motion, Tensor(a!) features, "
      "Tensor(b!) strips, Tensor(c!) mean, Tensor(d!) var, Tensor(e!)? u, Tensor(f!)[] saved, int stream) -> ()",
      TORCH_FN(forward));
  m.def(
      "refine_cuda_backward(Tensor? d_features, Tensor? d_strips, Tensor x, Tensor features, Tensor mean, Tensor var, "
      "Tensor u, Tensor z_s, Tensor z_c, Tensor h, Tensor w, Tensor gamma, Tensor beta, Tensor? w_s1, Tensor? w_s2, "
      "Tensor? w_c, float eps, int bn_groups, str precision, int height, int width, Tensor(a!)? d_x, Tensor(b!) du, "
      "bool need_weights, int stream) -> (Tensor sums, Tensor d_z_s, Tensor d_z_c, Tensor d_h, Tensor y_channels, "
      "Tensor y_positions)",
      TORCH_FN(backward));
}

}  // namespace
}  // namespace rru
