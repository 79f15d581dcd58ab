// The kernels as bindings.cpp calls them: one set for each SIMD capability that this build carries.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <functional>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

namespace rru {

using at::Tensor;

enum class Inputs { appearance_motion, appearance, raw };

// The ranks that share their batch statistics; none: each rank's are its own.
struct Ranks {
  std::vector<int64_t> counts;                  // how many values of a gate channel each of them brings
  std::function<Tensor(const Tensor&)> gather;  // a tensor of this rank to (ranks, ...) of all, in their order

  explicit operator bool() const {
    return !counts.empty();
  }
  int64_t elements() const {
    return std::accumulate(counts.begin(), counts.end(), int64_t{0});
  }
};

// What rru_fast::refine takes; shapes as in the Python function's documentation. Checked by bindings.cpp.
struct RefineArguments {
  Tensor x;                                                    // (B, T, C, H, W), any strides
  Tensor w, gamma, beta;                                       // (D, C) or (D, 2C); (D,); (D,)
  std::optional<Tensor> w_s1, w_s2, w_c;                       // (A, P), (P, A), (C, D)
  std::optional<Tensor> running_mean, running_var;             // (D,)
  std::optional<Tensor> lengths;                               // (B,) int64
  std::optional<Tensor> state_x, state_s;                      // (B, C, H, W)
  Inputs inputs;
  bool training;
  double eps;
  int64_t groups;
  Ranks ranks;
};

// What refine keeps for its backward; N steps of recurrence. u's elements are in an order of their own, see refine.h.
struct RefineSaved {
  Tensor mean, var;  // (T, groups, D), T = 0 in eval mode
  Tensor u;          // (N, B, D, P)
  Tensor z_s, z_c;   // (N, B, P), (N, B, C)
  Tensor h;          // (N, B, A)
};

using Tensors5 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors8 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;
using Tensors9 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

#define RRU_DECLARE_KERNELS(capability)                                                                             \
  namespace capability {                                                                                            \
  /* true if refine multiplies bfloat16 in bfloat16, false if in float32 */                                         \
  bool multiplies_bfloat16();                                                                                       \
  /* features, strips, mean, var, u, z_s, z_c, h */                                                                 \
  Tensors8 refine(const RefineArguments& arguments, bool save);                                                     \
  /* gradients of x, w, gamma, beta, w_s1, w_s2, w_c, state_x, state_s; empty where there is none */                \
  Tensors9 refine_backward(                                                                                         \
      const std::optional<Tensor>& d_features, const std::optional<Tensor>& d_strips, bool need_x,                  \
      bool need_weights, const Tensor& features, const RefineSaved& saved, const RefineArguments& arguments);       \
  Tensor strip_pool(const Tensor& s);                                                                               \
  Tensor strip_pool_backward(const Tensor& d_strips, int64_t frames, int64_t width);                                \
  /* loss, d_pos, d_neg, positive, negative */                                                                      \
  Tensors5 batch_hard(const Tensor& features, const Tensor& labels, double margin, bool soft, bool cosine);         \
  Tensor batch_hard_backward(                                                                                       \
      const Tensor& d_loss, const Tensor& features, const Tensor& d_pos, const Tensor& d_neg,                       \
      const Tensor& positive, const Tensor& negative, double margin, bool soft, bool cosine);                       \
  }

RRU_DECLARE_KERNELS(DEFAULT)
#if defined(__x86_64__)
RRU_DECLARE_KERNELS(AVX2)
RRU_DECLARE_KERNELS(AVX512)
#endif

}  // namespace rru
