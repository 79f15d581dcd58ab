// The gate after its transition, forward: batch norm, ReLU, pooling, and the attention vectors of eq. 2 to 4.
#pragma once

#include <cmath>
#include <optional>

#include "array.h"
#include "refine_sizes.h"

namespace rru {
namespace CPU_CAPABILITY {

// 1 / (1 + exp(-logits)), eq. 4; NaN where the logits are.
template <typename Vec>
inline Vec sigmoid(const Vec& logits) {
  const Vec one(1);
  if constexpr (std::is_same_v<Vec, at::vec::Vectorized<float>>) {
    // exp_u20 is within 2e-7 of the exponential, relative, but finite even for NaN inputs.
    return Vec::blendv(one / (one + logits.neg().exp_u20()), logits, logits != logits);
  } else {
    return one / (one + logits.neg().exp());
  }
}

// sum over i of a[i] b[i]
template <typename Acc>
inline Acc dot(const Acc* a, const Acc* b, int64_t n) {
  using Vec = at::vec::Vectorized<Acc>;
  Vec sum(0);
  int64_t i = 0;
  for (; i + Vec::size() <= n; i += Vec::size()) {
    sum = at::vec::fmadd(Vec::loadu(a + i), Vec::loadu(b + i), sum);
  }
  Acc rest = 0;
  for (; i < n; i++) {
    rest += a[i] * b[i];
  }
  return reduce_add<Acc>(sum) + rest;
}

// The gate's parameters in the arithmetic dtype, and its forward given U.
template <typename Acc>
class Gate {
  using Vec = at::vec::Vectorized<Acc>;

 public:
  const Sizes& sizes;
  const int64_t groups;  // of clips, each with its own batch statistics; 1 in eval mode
  const Ranks ranks;     // sharing the statistics of the single group
  const Array<const Acc> gamma, beta, w_s1, w_s2, w_c;
  const Array<Acc> mean, rstd;  // (groups, D): statistics in use; rstd = 1 / sqrt(var + eps)

  Gate(const RefineArguments& a, const Sizes& sizes)
      : sizes(sizes),
        groups(a.training ? a.bn_groups : 1),
        ranks(a.ranks),
        gamma(Array<const Acc>::from(a.gamma)),
        beta(Array<const Acc>::from(a.beta)),
        w_s1(from(a.w_s1)),
        w_s2(from(a.w_s2)),
        w_c(from(a.w_c)),
        mean(Array<Acc>::empty({groups, sizes.D})),
        rstd(Array<Acc>::empty({groups, sizes.D})),
        eps_(static_cast<Acc>(a.eps)) {
    if (!a.training) {
      set_statistics(from(a.running_mean)(), from(a.running_var)());
    }
  }

  // Normalizes by these statistics, (groups, D), from now on.
  void set_statistics(const Acc* new_mean, const Acc* var) const {
    for (int64_t i = 0; i < groups * sizes.D; i++) {
      mean()[i] = new_mean[i];
      rstd()[i] = 1 / std::sqrt(var[i] + eps_);
    }
  }

  int64_t group(int64_t clip) const {
    return clip / (sizes.B / groups);
  }

  // Calls body(d, chunk, i, count, uhat, y) for each gate channel and chunk of a clip's U, vector by vector: uhat and y
  // are at positions chunk.p0 + i onwards, `count` of them within the chunk.
  template <typename F>
  void each_normalized(int64_t clip, const Acc* u, const F& body) const {
    const Acc *mu = mean(group(clip)), *rs = rstd(group(clip)), *g = gamma(), *b = beta();
    for (int64_t q = 0; q < sizes.num_chunks; q++) {
      const Chunk chunk = sizes.chunk(q);
      for (int64_t d = 0; d < sizes.D; d++) {
        const Acc* row = u + sizes.D * chunk.p0 + d * chunk.n;
        for (int64_t i = 0; i < chunk.n; i += Vec::size()) {
          const int64_t count = std::min<int64_t>(Vec::size(), chunk.n - i);
          const Vec uhat = (Vec::loadu(row + i, count) - Vec(mu[d])) * Vec(rs[d]);
          const Vec pre = at::vec::fmadd(uhat, Vec(g[d]), Vec(b[d]));
          body(d, chunk, i, count, uhat, at::vec::clamp_min(pre, Vec(0)));  // NaN where `pre` is
        }
      }
    }
  }

  // Means of one clip's Y: y_p (D,) over positions for eq. 3, y_d (P,) over gate channels for eq. 2.
  void pool(int64_t clip, const Acc* u, Acc* y_p, Acc* y_d) const {
    std::fill(y_d, y_d + sizes.P, Acc(0));
    std::fill(y_p, y_p + sizes.D, Acc(0));
    each_normalized(clip, u, [&](int64_t d, const Chunk& chunk, int64_t i, int64_t count, const Vec&, const Vec& y) {
      Acc* at = y_d + chunk.p0 + i;
      (Vec::loadu(at, count) + y).store(at, count);
      y_p[d] += reduce_add<Acc>(Vec::set(Vec(0), y, count));
    });
    for (int64_t d = 0; d < sizes.D; d++) {
      y_p[d] /= static_cast<Acc>(sizes.P);
    }
    for (int64_t p = 0; p < sizes.P; p++) {
      y_d[p] /= static_cast<Acc>(sizes.D);
    }
  }

  // h (num_attn,) and z_s (P,) of eq. 2, given y_d (P,).
  void spatial_attention(const Acc* y_d, Acc* h, Acc* z_s) const {
    for (int64_t i = 0; i < sizes.num_attn; i++) {
      const Acc pre = dot(w_s1(i), y_d, sizes.P);
      h[i] = pre < 0 ? Acc(0) : pre;  // NaN where `pre` is
    }
    for (int64_t p = 0; p < sizes.P; p++) {
      z_s[p] = dot(w_s2(p), h, sizes.num_attn);
    }
  }

 private:
  static Array<const Acc> from(const std::optional<Tensor>& tensor) {
    return tensor ? Array<const Acc>::from(*tensor) : Array<const Acc>();
  }

  const Acc eps_;
};

// The gate's results: one slot per step where they are saved for the backward, else a single slot that is reused.
template <typename Acc>
class GateActivations {
 public:
  const Array<Acc> u, z_s, z_c, h;  // (slots, B, D, P), (slots, B, P), (slots, B, C), (slots, B, num_attn)

  GateActivations(const RefineArguments& a, const Sizes& sizes, bool save)
      : GateActivations(a, sizes, save, save ? sizes.num_steps : std::min<int64_t>(sizes.num_steps, 1)) {}

  // One clip's part of `results` at frame t.
  Acc* at(const Array<Acc>& results, int64_t t, int64_t clip) const {
    return results(save_ ? t - first_step_ : 0, clip);
  }

  // `results` of all steps if they are saved, else of none.
  Tensor saved(const Array<Acc>& results) const {
    return save_ ? results.tensor() : results.tensor().narrow(0, 0, 0).clone();
  }

 private:
  GateActivations(const RefineArguments& a, const Sizes& s, bool save, int64_t slots)
      : u(make(s, {slots, s.B, s.D, s.P})),
        z_s(make(s, {a.w_s2 ? slots : 0, s.B, s.P})),
        z_c(make(s, {a.w_c ? slots : 0, s.B, s.C})),
        h(make(s, {a.w_s1 ? slots : 0, s.B, s.num_attn})),
        save_(save),
        first_step_(s.first_step) {}

  // Zero where the frames that clips lack would leave elements unwritten.
  static Array<Acc> make(const Sizes& sizes, at::IntArrayRef shape) {
    return sizes.lengths ? Array<Acc>::zeros(shape) : Array<Acc>::empty(shape);
  }

  const bool save_;
  const int64_t first_step_;
};

}  // namespace CPU_CAPABILITY
}  // namespace rru
