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

// Feature maps (B, T, C, P), strides in elements. Those of a training pass have rows of the next multiple of 8
// positions, whose last ones are zeros, all addresses of multiples of 16 bytes, and positions one after another.
struct Maps {
  const void* data = nullptr;
  int64_t clip = 0, frame = 0, channel = 0, position = 0;
};

// A call of refine: sizes and variant.
struct RefineSizes {
  int clips, frames, channels, positions, width, d, num_attn;
  Dtype dtype;            // of x, state, features and their gradients
  Float32 float32;        // if that is float32
  Dtype w_c;              // of the packed w_c
  bool spatial, channel;  // attention
};

// refine in eval mode, eq. 1-5 and 9, for frames `first` to `end` (exclusive).
struct RefineEval : RefineSizes {
  int first, end;
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

// What the clips of a training pass exchange.
struct RefineScratch {
  float* sums;      // (N, B, kD, 2) two sums over positions, by gate channel; kD is the Cut's
  uint32_t* flags;  // (B, 16, 32) steps that the CTA of a clip and rank has finished; zeros
  float* strips;    // forward alone: see TrainingPlan::strip_rows
};

// refine in training mode, eq. 1-5 and 9, N = T - 1 steps.
struct RefineForward : RefineSizes {
  int groups;            // of consecutive clips, that have batch statistics of their own
  float eps;
  Maps x;                // (B, T, C, P)
  const void* packed;    // weights, by refine_pack
  const float* u;        // (N, B, D, P) W_m M_t, or null
  float* u_out;          // (N, B, D, P) U_t, to be saved; it may be u; or null
  float *mean, *var;     // (T, G, D), of the frames with a gate
  void* features;        // (B, T, C, P) S, contiguous
  float* strips;         // (B, C, H) sum of S over frames and columns
  float *z_s, *z_c, *h;  // (N, B, ...) saved; or null
  RefineScratch scratch;
};

// The backward of refine in training mode but for what follows from dU in one product over all frames.
struct RefineBackward : RefineSizes {
  int groups;
  float eps;
  Maps x, features;                // (B, T, C, P) X and S
  Maps d_features;                 // (B, T, C, P), or null
  const float* d_strips;           // (B, C, H) over T W, or null
  const void* packed;              // weights, by refine_pack
  const float *u, *mean, *var;     // saved: (N, B, D, P), (T, G, D)
  const float *z_s, *z_c, *h;      // saved: (N, B, ...), or null
  void* d_x;                       // (B, T, C, P) without what comes through the motion, contiguous; or null
  float* du;                       // (N, B, D, P)
  float *d_z_s, *d_z_c, *d_h;      // (N, B, ...); or null
  float *y_channels, *y_positions; // (N, B, D) mean of Y over positions, (N, B, n, P) sum over a CTA's rows; or null
  RefineScratch scratch;           // sums: of dY, and of dY Uhat
};

// Kernels that weights are packed for.
enum class Pass { eval, forward, backward };

// Weights of refine, contiguous but for the rows of w.
struct RefineWeights {
  int channels, positions, d, num_attn;
  Dtype dtype;      // of x
  Float32 float32;  // as in RefineSizes
  Pass pass;
  int multiple;     // of a training pass: ClusterLaunch::multiple
  AnyTensor w;      // (D, C), the half that multiplies A_t
  int64_t w_row;    // elements from a row of w to the next
  AnyTensor gamma, beta, running_mean, running_var;  // (D,), the latter two in eval mode alone
  float eps;
  AnyTensor w_s1, w_s2, w_c;  // (A, P), (P, A), (C, D), or none
};

// How a kernel is launched.
struct ClusterLaunch {
  int ctas, threads;  // of a cluster, of a CTA
  size_t shared;      // bytes of shared memory of a CTA
  // Of training passes:
  int multiple;         // channels of a CTA, as a multiple of refine_eval's
  int launches;         // each of as many groups
  int64_t sums, strips;  // floats of RefineScratch
};

// All but refine_packed_bytes raise std::runtime_error if CUDA, or its emulation, reports an error.
#define RRU_DECLARE_CUDA_KERNELS(platform)                                                                      \
  namespace platform {                                                                                          \
  /* Why refine_eval does not carry these sizes, or "". Asks the device how many clusters fit. */               \
  std::string refine_eval_lacks(const RefineEval& arguments, int device, ClusterLaunch* launch);                \
  /* The same of the training passes, whose clips have to be on the chip at once; 0 or the multiple that is wanted. */ \
  std::string refine_forward_lacks(const RefineForward& arguments, int device, int multiple, ClusterLaunch* launch); \
  std::string refine_backward_lacks(const RefineBackward& arguments, int device, int multiple, ClusterLaunch* launch); \
  /* Bytes of the packed weights, which depend on sizes and dtypes alone. */                                    \
  int64_t refine_packed_bytes(const RefineWeights& weights);                                                    \
  /* Launch on a stream. */                                                                                     \
  void refine_pack(const RefineWeights& weights, void* packed, int device, void* stream);                       \
  void refine_eval(const RefineEval& arguments, int device, void* stream);                                      \
  void refine_forward(const RefineForward& arguments, const ClusterLaunch& launch, int device, void* stream);   \
  void refine_backward(const RefineBackward& arguments, const ClusterLaunch& launch, int device, void* stream); \
  /* d (CTAs, 16, 8) = a b + 1000 rank by one matrix instruction, its operands rounded to a dtype, float32 to */ \
  /* TF32, each CTA's product pushed to the one before it in a cluster. */                                      \
  void fragments(const float* a, const float* b, float* d, Dtype dtype, int ctas, int device, void* stream);    \
  }

RRU_DECLARE_CUDA_KERNELS(cuda)
RRU_DECLARE_CUDA_KERNELS(emulated)

}  // namespace rru
