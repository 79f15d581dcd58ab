// The CUDA kernels as csrc/ops calls them: pointers, sizes and a stream, no torch headers. Twice: for a GPU, in
// namespace cuda, and emulated on a CPU, in namespace emulated.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace rru {

// Dtypes of tensors.
enum class Dtype { float32, bfloat16, float16 };

// How fp32 maps are multiplied: in fp32, in TF32, or as three products in TF32, with an error near that of fp32.
enum class Float32 { ieee, tf32, tf32x3 };

// A tensor of any dtype.
struct AnyTensor {
  const void* data = nullptr;  // null if there is none
  Dtype dtype = Dtype::float32;
};

// Feature maps (B, T, C, P), strides in elements.
struct Maps {
  const void* data = nullptr;
  int64_t clip = 0, frame = 0, channel = 0, position = 0;
};

// refine in eval mode, eq. 1-5 and 9, for frames `first` to `end` (exclusive).
struct RefineEval {
  // Sizes: of all tensors but packed, which is made for them.
  int clips, frames, channels, positions, width, d, num_attn;
  int first, end;
  Dtype dtype;             // of x, state, features
  Float32 float32;         // if that is float32
  Dtype w_c;               // of the packed w_c
  bool spatial, channel;   // attention
  bool has_state;          // frame 0 has a gate; else S_1 = X_1
  Maps x;                  // (B, T, C, P)
  Maps state;              // (B, C, P) S before frame 0; read if first = 0 and has_state
  const void* packed;      // weights, by refine_pack
  const float* u;          // (F, B, D, P) W_m M_t of the frames from u_first, or null
  float* u_out;            // (F, B, D, P) U_t of the same frames, to be saved; it may be u; or null
  int u_first;
  const int64_t* lengths;  // (B,), or null
  float* carry;            // (B, C, P) fp32 S after frame `end` - 1, and before frame `first` if that is not 0; or null
  void* features;          // (B, T, C, P) S, contiguous
  float* strips;           // (B, C, H) sum of S over frames and columns, of all frames from 0
  float *z_s, *z_c, *h;    // (N, B, ...) saved by step, N = T or T - 1 without a state; or null
};

// Weights of refine, contiguous but for the rows of w.
struct RefineWeights {
  int channels, positions, d, num_attn;
  Dtype dtype;      // of x
  Float32 float32;  // as in RefineEval
  AnyTensor w;      // (D, C), the half that multiplies A_t
  int64_t w_row;    // elements from a row of w to the next
  AnyTensor gamma, beta, running_mean, running_var;  // (D,)
  float eps;
  AnyTensor w_s1, w_s2, w_c;  // (A, P), (P, A), (C, D), or none
};

// How refine_eval is launched.
struct ClusterLaunch {
  int ctas, threads;  // of a cluster, of a CTA
  size_t shared;      // bytes of shared memory of a CTA
};

// All but refine_packed_bytes raise std::runtime_error if CUDA, or its emulation, reports an error.
#define RRU_DECLARE_CUDA_KERNELS(platform)                                                                      \
  namespace platform {                                                                                          \
  /* Why refine_eval does not carry these sizes, or "". Asks the device how many clusters fit. */               \
  std::string refine_eval_lacks(const RefineEval& arguments, int device, ClusterLaunch* launch);                \
  /* Bytes of the packed weights, which depend on sizes and dtypes alone. */                                    \
  int64_t refine_packed_bytes(const RefineWeights& weights);                                                    \
  /* Launch on a stream. */                                                                                     \
  void refine_pack(const RefineWeights& weights, void* packed, int device, void* stream);                       \
  void refine_eval(const RefineEval& arguments, int device, void* stream);                                      \
  /* d (CTAs, 16, 8) = a b + 1000 rank by one matrix instruction, its operands rounded to a dtype, float32 to */ \
  /* TF32, each CTA's product pushed to the one before it in a cluster. */                                      \
  void fragments(const float* a, const float* b, float* d, Dtype dtype, int ctas, int device, void* stream);    \
  }

RRU_DECLARE_CUDA_KERNELS(cuda)
RRU_DECLARE_CUDA_KERNELS(emulated)

}  // namespace rru
