// The kernels that bindings.cpp calls, and their arguments: one set of kernels per SIMD capability in the build.
//
// Sizes: B clips, T frames, C channels, maps of H x W, P = H W positions, D gate channels, num_attn units of spatial
// attention, N steps of the recurrence (T with a state, else T - 1); in batch_hard G groups of N anchors and M
// candidates of width D.
// Acc, the arithmetic dtype, is float64 where x or the features are float64, else float32. Floating tensors have any
// strides unless contiguous is noted. bindings.cpp has checked shapes, dtypes and values.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <numeric>
#include <optional>
#include <vector>

namespace rru {

using at::Tensor;

// The gate's inputs, in the order of W's columns: (A_t, M_t), (A_t) or (X_t, S_{t-1}).
enum class Inputs { appearance_motion, appearance, raw };

// The ranks that share batch statistics; none if each rank has its own.
struct Ranks {
  std::vector<int64_t> elements_per_rank;       // elements per gate channel, clips times positions, on each rank
  std::function<Tensor(const Tensor&)> gather;  // from this rank's tensor to (ranks, ...), in order of rank

  explicit operator bool() const {
    return !elements_per_rank.empty();
  }
  int64_t elements() const {
    return std::accumulate(elements_per_rank.begin(), elements_per_rank.end(), int64_t{0});
  }
};

// The arguments of rru_fast::refine.
struct RefineArguments {
  Tensor x;                            // (B, T, C, H, W) input maps; float64, float32, float16 or bfloat16
  Tensor w;                            // (D, C) or (D, 2C) weight of the transition; any floating dtype, as all parameters
  Tensor gamma;                        // (D,) scale of the batch norm
  Tensor beta;                         // (D,) shift of the batch norm
  std::optional<Tensor> w_s1;          // (num_attn, P) first weight of spatial attention
  std::optional<Tensor> w_s2;          // (P, num_attn) second weight of spatial attention; with w_s1 or not at all
  std::optional<Tensor> w_c;           // (C, D) weight of channel attention
  std::optional<Tensor> running_mean;  // (D,) read in eval mode only
  std::optional<Tensor> running_var;   // (D,) read in eval mode only
  std::optional<Tensor> lengths;       // (B,) int64, contiguous: frames of each clip, 1 to T; eval mode only
  std::optional<Tensor> state_x;       // (B, C, H, W) the frame of X before the first, in x's dtype; eval mode only
  std::optional<Tensor> state_s;       // (B, C, H, W) the frame of S before the first; with state_x or not at all
  Inputs inputs;                       // of the gate
  bool training;                       // normalize by batch statistics, else by the running ones
  double eps;                          // added to the variance
  int64_t bn_groups;                   // groups of consecutive clips, each with its own batch statistics
  Ranks ranks;                         // sharing the statistics of a single group
};

// Results of the forward that the backward reads; contiguous except features. N is 0 where the variant lacks a tensor
// and where nothing is saved.
struct RefineSaved {
  Tensor features;  // (B, T, C, H, W) S, the output maps, in x's dtype
  Tensor mean;      // (T, bn_groups, D) Acc, batch mean of U; T = 0 in eval mode
  Tensor var;       // (T, bn_groups, D) Acc, biased batch variance of U; T = 0 in eval mode
  Tensor u;         // (N, B, D, P) Acc, U of eq. 1, its elements in the order of refine_sizes.h
  Tensor z_s;       // (N, B, P) Acc, spatial attention logits, eq. 2
  Tensor z_c;       // (N, B, C) Acc, channel attention logits, eq. 3
  Tensor h;         // (N, B, num_attn) Acc, hidden units of spatial attention, eq. 2
};

struct RefineOutputs {
  RefineSaved saved;
  Tensor strips;  // (B, C, H) mean of S over frames and columns, eq. 9, in x's dtype
};

// The gradients that reach refine's outputs.
struct RefineUpstream {
  std::optional<Tensor> d_features;  // (B, T, C, H, W), in x's dtype
  std::optional<Tensor> d_strips;    // (B, C, H), in x's dtype
};

// The gradients to compute; those of a state are always computed.
struct RefineNeed {
  bool x;
  bool weights;  // all parameters: w, gamma, beta, w_s1, w_s2, w_c
};

// Gradients in the shape and dtype of the arguments; undefined where there is no argument or no need.
struct RefineGradients {
  Tensor x, w, gamma, beta, w_s1, w_s2, w_c, state_x, state_s;
};

// The arguments of rru_fast::batch_hard.
struct BatchHardArguments {
  Tensor features;                       // (G, N, D) anchors; float64, float32, float16 or bfloat16
  Tensor labels;                         // (N,) int64, contiguous
  std::optional<Tensor> gallery;         // (G, M, D) in features' dtype, the candidates; none: the features
  std::optional<Tensor> gallery_labels;  // (M,) int64, contiguous; with the gallery or not at all
  double margin;                         // of the hinge
  bool soft;                             // softplus instead of the hinge with its margin
  bool cosine;                           // distance 1 - cos(a, b), else Euclidean

  const Tensor& candidates() const {
    return gallery ? *gallery : features;
  }
  const Tensor& candidate_labels() const {
    return gallery_labels ? *gallery_labels : labels;
  }
};

// Results of the forward that the backward reads; contiguous, (G, N).
struct BatchHardSaved {
  Tensor d_pos;     // Acc, distance to the hardest positive, -infinity if there is none
  Tensor d_neg;     // Acc, distance to the hardest negative, infinity if there is none
  Tensor positive;  // int64, index of the hardest positive among the candidates, -1 if there is none
  Tensor negative;  // int64, index of the hardest negative, -1 if there is none
};

struct BatchHardOutputs {
  Tensor loss;  // (G, N) Acc, loss per anchor
  BatchHardSaved saved;
};

// The gradients that reach the loss per anchor and the two distances; Acc, contiguous, (G, N).
struct BatchHardUpstream {
  std::optional<Tensor> d_loss, d_d_pos, d_d_neg;
};

// The gradients to compute.
struct BatchHardNeed {
  bool features, gallery;
};

// Gradients in the shape and dtype of the arguments; undefined where there is no argument or no need.
struct BatchHardGradients {
  Tensor features, gallery;
};

// multiplies_bfloat16: true if refine multiplies bf16 in bf16, false if in fp32.
// refine: without `save` the saved u, z_s, z_c and h have N = 0.
// strip_pool: s (B, T, C, H, W) to strips (B, C, H); its backward from d_strips to d_s.
#define RRU_DECLARE_KERNELS(capability)                                                                      \
  namespace capability {                                                                                     \
  bool multiplies_bfloat16();                                                                                \
  RefineOutputs refine(const RefineArguments& arguments, bool save);                                         \
  RefineGradients refine_backward(                                                                           \
      const RefineUpstream& upstream, const RefineSaved& saved, const RefineArguments& arguments,            \
      RefineNeed need);                                                                                      \
  Tensor strip_pool(const Tensor& s);                                                                        \
  Tensor strip_pool_backward(const Tensor& d_strips, int64_t frames, int64_t width);                         \
  BatchHardOutputs batch_hard(const BatchHardArguments& arguments);                                          \
  BatchHardGradients batch_hard_backward(                                                                    \
      const BatchHardUpstream& upstream, const BatchHardSaved& saved, const BatchHardArguments& arguments,   \
      BatchHardNeed need);                                                                                   \
  }

RRU_DECLARE_KERNELS(DEFAULT)
#if defined(__x86_64__)
RRU_DECLARE_KERNELS(AVX2)
RRU_DECLARE_KERNELS(AVX512)
#endif

}  // namespace rru
