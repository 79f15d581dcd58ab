// What operators of the CUDA kernels share: which kernels serve a tensor, and tensors checked into their arguments.
#pragma once

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <stdexcept>
#include <string>

#include "checks.h"
#include "cuda/kernels.h"
#include "ops/operators.h"

namespace rru {

// The kernels of one platform.
struct Kernels {
  decltype(&cuda::refine_eval_lacks) lacks;
  decltype(&cuda::refine_packed_bytes) packed_bytes;
  decltype(&cuda::refine_pack) pack;
  decltype(&cuda::refine_eval) eval;
  decltype(&cuda::refine_forward_lacks) forward_lacks;
  decltype(&cuda::refine_backward_lacks) backward_lacks;
  decltype(&cuda::refine_forward) forward;
  decltype(&cuda::refine_backward) backward;
  decltype(&cuda::fragments) fragments;
};

#define RRU_KERNELS_OF(platform) \
  {&platform::refine_eval_lacks, &platform::refine_packed_bytes, &platform::refine_pack, &platform::refine_eval, \
   &platform::refine_forward_lacks, &platform::refine_backward_lacks, &platform::refine_forward,                  \
   &platform::refine_backward, &platform::fragments}

// The kernels for a tensor's device: on a GPU, or emulated.
inline const Kernels& kernels_on(const Tensor& x) {
#ifdef RRU_HAS_CUDA
  static const Kernels on_gpu RRU_KERNELS_OF(cuda);
  if (x.is_cuda()) {
    return on_gpu;
  }
#endif
#ifdef RRU_HAS_EMULATION
  static const Kernels on_cpu RRU_KERNELS_OF(emulated);
  if (x.is_cpu()) {
    return on_cpu;
  }
#endif
  TORCH_CHECK_VALUE(
      false, "backend: got 'cuda' with tensors on ", x.device(), ", wanted a device for which this build has kernels");
}

// Runs a kernel, whose error names the backend that needs none.
template <class F>
void run(const char* kernel, F launch) {
  try {
    launch();
  } catch (const std::runtime_error& error) {
    TORCH_CHECK(
        false, "backend: got 'cuda', whose ", kernel, " failed: ", error.what(),
        "; wanted backend='composite', which needs no CUDA kernels");
  }
}

inline Dtype dtype_of(const char* name, const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(
      type == at::kFloat || type == at::kBFloat16 || type == at::kHalf, name, ": got dtype ", type,
      ", wanted float32, bfloat16 or float16");
  return type == at::kFloat ? Dtype::float32 : type == at::kBFloat16 ? Dtype::bfloat16 : Dtype::float16;
}

inline void check_on_device(const char* name, const Tensor& tensor, const Tensor& x) {
  TORCH_CHECK_VALUE(tensor.device() == x.device(), name, ": got device ", tensor.device(), ", wanted ", x.device());
}

inline AnyTensor any(const char* name, const Tensor& tensor, at::IntArrayRef shape, const Tensor& x) {
  check(name, tensor, shape);
  check_on_device(name, tensor, x);
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, ": got strides ", tensor.strides(), ", wanted a contiguous tensor");
  return {tensor.const_data_ptr(), dtype_of(name, tensor)};
}

template <typename T>
T* written(const char* name, const Tensor& tensor, at::IntArrayRef shape, const Tensor& x) {
  check(name, tensor, shape, c10::CppTypeToScalarType<T>::value);
  check_on_device(name, tensor, x);
  TORCH_CHECK_VALUE(tensor.is_contiguous(), name, ": got strides ", tensor.strides(), ", wanted a contiguous tensor");
  return tensor.mutable_data_ptr<T>();
}

// Sets sizes and dtypes of a call whose maps are (B, T, C, ...).
inline void set_sizes(
    RefineSizes& a, const Tensor& x, int64_t height, int64_t width, int64_t d, int64_t num_attn,
    const OptionalTensor& w_c, c10::string_view precision) {
  a.clips = static_cast<int>(x.size(0));
  a.frames = static_cast<int>(x.size(1));
  a.channels = static_cast<int>(x.size(2));
  a.positions = static_cast<int>(height * width);
  a.width = static_cast<int>(width);
  a.d = static_cast<int>(d);
  a.num_attn = static_cast<int>(num_attn);
  a.dtype = dtype_of("x", x);
  TORCH_CHECK_VALUE(
      precision == "ieee" || precision == "tf32" || precision == "tf32x3", "precision: got '", precision,
      "', wanted 'ieee', 'tf32' or 'tf32x3'");
  a.float32 = precision == "ieee" ? Float32::ieee : precision == "tf32" ? Float32::tf32 : Float32::tf32x3;
  a.spatial = num_attn > 0;
  if (w_c) {
    check("w_c", *w_c, {a.channels, d});
  }
  a.channel = w_c.has_value();
  a.w_c = w_c ? dtype_of("w_c", *w_c) : a.dtype;
}

// The weights of all passes but those of the norm in eval mode.
struct Weights {
  const Tensor &w, &gamma, &beta;
  const OptionalTensor &w_s1, &w_s2, &w_c;

  int64_t d() const {
    return w.size(0);
  }
  int64_t num_attn() const {
    return w_s1 ? w_s1->size(0) : 0;
  }
};

// Sizes and dtypes of weights, which decide how they are packed.
inline RefineWeights packing_of(const RefineSizes& a) {
  RefineWeights weights{};
  weights.channels = a.channels;
  weights.positions = a.positions;
  weights.d = a.d;
  weights.num_attn = a.num_attn;
  weights.dtype = a.dtype;
  weights.float32 = a.float32;
  weights.pass = Pass::eval;
  weights.multiple = 1;
  weights.w_c.dtype = a.w_c;
  return weights;
}

inline void set_weights(RefineWeights& to, const Weights& from, const Tensor& x) {
  const int64_t d = to.d;
  check("w", from.w, {d, to.channels});
  check_on_device("w", from.w, x);
  TORCH_CHECK_VALUE(
      from.w.stride(1) == 1 || to.channels == 1, "w: got strides ", from.w.strides(), ", wanted contiguous rows");
  to.w = {from.w.const_data_ptr(), dtype_of("w", from.w)};
  to.w_row = from.w.stride(0);
  to.gamma = any("gamma", from.gamma, {d}, x);
  to.beta = any("beta", from.beta, {d}, x);
  if (from.w_s1) {
    to.w_s1 = any("w_s1", *from.w_s1, {to.num_attn, to.positions}, x);
    to.w_s2 = any("w_s2", *from.w_s2, {to.positions, to.num_attn}, x);
  }
  if (from.w_c) {
    to.w_c = any("w_c", *from.w_c, {to.channels, d}, x);
  }
}

inline Tensor pack(const RefineWeights& weights, const Tensor& x, void* stream) {
  const Kernels& kernels = kernels_on(x);
  Tensor packed = at::empty({kernels.packed_bytes(weights)}, x.options().dtype(at::kByte));
  run("refine_pack", [&] { kernels.pack(weights, packed.mutable_data_ptr(), x.get_device(), stream); });
  return packed;
}

}  // namespace rru
