// The gate, backward: from dz_s and dz_c of a frame to its dU, and to the gradients of the gate's parameters.
#pragma once

#include <vector>

#include "parallel.h"
#include "refine_batch_norm.h"
#include "refine_transition_backward.h"

namespace rru {
namespace CPU_CAPABILITY {

// From dz_s and dz_c to dY, eq. 2 and 3, and to the gradients of W_s1, W_s2 and W_c.
template <typename Acc>
class AttentionBackward {
  using Vec = at::vec::Vectorized<Acc>;

 public:
  // Of the current frame, written by the pass over the maps: dz_c (B, C), and dz_s as partial sums over blocks of
  // channels, (blocks, B, P).
  const Array<Acc> d_z_c, d_z_s_partial;

  AttentionBackward(const RefineArguments& a, const RefineSaved& saved, const Gate<Acc>& gate, int64_t blocks)
      : d_z_c(Array<Acc>::empty({gate.sizes.B, gate.sizes.C})),
        d_z_s_partial(Array<Acc>::empty({blocks, gate.sizes.B, gate.sizes.P})),
        sizes_(gate.sizes),
        gate_(gate),
        blocks_(blocks),
        all_(sizes_.num_steps * sizes_.B),
        h_(saved.h),
        d_y_p_(Array<Acc>::zeros({sizes_.B, sizes_.D})),
        d_y_d_(Array<Acc>::zeros({sizes_.B, sizes_.P})),
        d_z_c_t_(Array<Acc>::zeros({a.w_c ? sizes_.C : 0, all_})),
        d_z_s_t_(Array<Acc>::zeros({a.w_s1 ? sizes_.P : 0, all_})),
        d_h_t_(Array<Acc>::zeros({sizes_.num_attn, all_})),
        y_p_(Array<Acc>::zeros({all_, sizes_.D})),
        y_d_(Array<Acc>::zeros({all_, sizes_.P})) {}

  // The part of dY per gate channel, W_c^T dz_c, for all clips.
  void multiply_w_c() const {
    if (d_z_c_t_) {
      parallel_gemm(sizes_.B, sizes_.D, sizes_.C, d_z_c(), sizes_.C, gate_.w_c(), d_y_p_());
    }
  }

  // The part of dY per position for one clip's frame t, given its U, and the factors of the weights' gradients.
  void add(int64_t clip, int64_t t, const Acc* u) const {
    const int64_t column = (t - sizes_.first_step) * sizes_.B + clip;
    if (d_z_c_t_) {
      for (int64_t c = 0; c < sizes_.C; c++) {
        d_z_c_t_(c)[column] = d_z_c(clip)[c];
      }
    }
    if (d_z_s_t_) {
      spatial_backward(clip, h_(t - sizes_.first_step, clip), column);
    }
    gate_.pool(clip, u, y_p_(column), y_d_(column));
  }

  // A vector of dY: what both attentions send to Y, where Y > 0 or NaN.
  Vec d_y(int64_t clip, int64_t d, const Chunk& chunk, int64_t i, int64_t count, const Vec& y) const {
    const Vec both =
        Vec::loadu(d_y_d_(clip) + chunk.p0 + i, count) + Vec(d_y_p_(clip)[d] / static_cast<Acc>(sizes_.P));
    return Vec::set(Vec(0), Vec::blendv(both, Vec(0), y <= Vec(0)), count);
  }

  Tensor d_w_s1(const Tensor& w_s1) const {
    return weight_gradient(d_h_t_, y_d_(), w_s1);
  }
  Tensor d_w_s2(const Tensor& w_s2) const {
    return weight_gradient(d_z_s_t_, h_(), w_s2);
  }
  Tensor d_w_c(const Tensor& w_c) const {
    return weight_gradient(d_z_c_t_, y_p_(), w_c);
  }

 private:
  // From dz_s to dh and dY's part per position: h = relu(W_s1 mean_D Y), z_s = W_s2 h.
  void spatial_backward(int64_t clip, const Acc* h, int64_t column) const {
    std::vector<Acc> d_h(sizes_.num_attn, Acc(0));
    for (int64_t p = 0; p < sizes_.P; p++) {
      Acc d_z_s = 0;
      for (int64_t block = 0; block < blocks_; block++) {
        d_z_s += d_z_s_partial(block, clip)[p];
      }
      d_z_s_t_(p)[column] = d_z_s;
      add_scaled(d_h.data(), d_z_s, gate_.w_s2(p), sizes_.num_attn);
    }
    Acc* d_y_d = d_y_d_(clip);
    std::fill(d_y_d, d_y_d + sizes_.P, Acc(0));
    for (int64_t i = 0; i < sizes_.num_attn; i++) {
      const Acc d_pre = h[i] > 0 ? d_h[i] : Acc(0);
      d_h_t_(i)[column] = d_pre;
      add_scaled(d_y_d, d_pre / static_cast<Acc>(sizes_.D), gate_.w_s1(i), sizes_.P);
    }
  }

  // y += factor x
  static void add_scaled(Acc* y, Acc factor, const Acc* x, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
      y[i] += factor * x[i];
    }
  }

  // left (M, all_) right (all_, N), in the weight's dtype.
  Tensor weight_gradient(const Array<Acc>& left, const Acc* right, const Tensor& weight) const {
    const auto out = Array<Acc>::zeros(weight.sizes());
    if (all_ > 0) {
      parallel_gemm(weight.size(0), weight.size(1), all_, left(), all_, right, out());
    }
    return out.tensor().to(weight.scalar_type());
  }

  const Sizes& sizes_;
  const Gate<Acc>& gate_;
  const int64_t blocks_, all_;      // blocks of channels; steps times clips
  const Array<const Acc> h_;        // (N, B, num_attn)
  const Array<Acc> d_y_p_, d_y_d_;  // (B, D), (B, P): W_c^T dz_c, and W_s1^T dh / D
  // Of all steps and clips, zero where a clip lacks the frame: dz_c^T, dz_s^T, dh^T, and the means of Y.
  const Array<Acc> d_z_c_t_, d_z_s_t_, d_h_t_, y_p_, y_d_;
};

template <typename Operand>
class GateBackward {
  using Acc = at::opmath_type<Operand>;
  using Vec = at::vec::Vectorized<Acc>;

 public:
  const Gate<Acc> gate;
  const AttentionBackward<Acc> attention;
  const BatchNormBackward<Acc> norm;
  const PackedDU<Operand> packed_du;

  GateBackward(const RefineArguments& a, const RefineSaved& saved, const Sizes& sizes, int64_t blocks)
      : gate(a, sizes),
        attention(a, saved, gate, blocks),
        norm(a, gate),
        packed_du(sizes),
        sizes_(sizes),
        training_(a.training),
        mean_(saved.mean),
        var_(saved.var),
        u_(saved.u),
        d_u_(Array<Acc>::empty({2, sizes.B, sizes.D, sizes.P})) {}

  // From dz_s and dz_c of frame t to dU_t, packed, and to the gradients of the gate's parameters.
  void step(int64_t t) const {
    if (training_) {
      gate.set_statistics(mean_(t), var_(t));
    }
    attention.multiply_w_c();
    parallel(sizes_.B, [&](int64_t clip) { sum_d_y(clip, t); });
    norm.merge();
    parallel(sizes_.B, [&](int64_t clip) { norm_backward(clip, t); });
  }

 private:
  // One clip's dY, summed over positions for the batch norm.
  void sum_d_y(int64_t clip, int64_t t) const {
    Acc *sum_dy = norm.clip_dy(clip), *sum_dy_uhat = norm.clip_dy_uhat(clip);
    std::fill(sum_dy, sum_dy + sizes_.D, Acc(0));
    std::fill(sum_dy_uhat, sum_dy_uhat + sizes_.D, Acc(0));
    if (!sizes_.has_frame(clip, t)) {
      return;
    }
    const Acc* u = u_(t - sizes_.first_step, clip);
    attention.add(clip, t, u);
    gate.each_normalized(
        clip, u, [&](int64_t d, const Chunk& chunk, int64_t i, int64_t count, const Vec& uhat, const Vec& y) {
          const Vec dy = attention.d_y(clip, d, chunk, i, count, y);
          sum_dy[d] += reduce_add<Acc>(dy);
          sum_dy_uhat[d] += reduce_add<Acc>(Vec::set(Vec(0), dy * uhat, count));
        });
  }

  // One clip's dU_t = gamma r (dY - mean(dY) - Uhat mean(dY Uhat)), packed.
  void norm_backward(int64_t clip, int64_t t) const {
    Acc* du = d_u_(t & 1, clip);
    if (!sizes_.has_frame(clip, t)) {
      std::fill(du, du + sizes_.D * sizes_.P, Acc(0));
    } else {
      const int64_t group = gate.group(clip);
      const Acc *mean_dy = norm.means(0, group), *mean_dy_uhat = norm.means(1, group);
      const Acc *rstd = gate.rstd(group), *gamma = gate.gamma();
      gate.each_normalized(
          clip, u_(t - sizes_.first_step, clip),
          [&](int64_t d, const Chunk& chunk, int64_t i, int64_t count, const Vec& uhat, const Vec& y) {
            const Vec centered =
                attention.d_y(clip, d, chunk, i, count, y) - Vec(mean_dy[d]) - uhat * Vec(mean_dy_uhat[d]);
            (centered * Vec(gamma[d] * rstd[d])).store(du + sizes_.D * chunk.p0 + d * chunk.n + i, count);
          });
    }
    packed_du.pack(clip, t, du, t + 1 < sizes_.T ? d_u_((t + 1) & 1, clip) : nullptr);
  }

  const Sizes& sizes_;
  const bool training_;
  const Array<const Acc> mean_, var_, u_;  // saved by the forward
  const Array<Acc> d_u_;                   // (2, B, D, P): dU of frames t and t + 1, by parity of the frame
};

}  // namespace CPU_CAPABILITY
}  // namespace rru
