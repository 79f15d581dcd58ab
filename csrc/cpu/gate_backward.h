// The gate's share of refine's backward: from dz_s and dz_c of a frame to its dU, and to the gate's own gradients.
#pragma once

#include <vector>

#include "refine.h"

namespace rru {
namespace CPU_CAPABILITY {

template <typename Acc, typename Operand>
class GateBackward {
  using Vec = at::vec::Vectorized<Acc>;
  static constexpr int64_t kI = kVnni<Operand>;

 public:
  // Of the frame under way, by the sweep over the maps: dz_c (B, C), and dz_s as parts by blocks of channels
  // (blocks, B, P).
  const Array<Acc> d_z_c, d_z_s_parts;
  // For that sweep, by clip and chunk: dU_t (D, n) as right operand of W^T dU, and dU_t - dU_{t+1}, what M's half of W
  // sends to dX_t, likewise. By block of kTileN gate channels: dU_t^T (B depth, kTileN) as right operand of V dU^T,
  // with `depth` rows a clip, P but for interleaving.
  const Array<Operand> e_operand, f_operand, t_operand;
  const int64_t depth;
  const Array<Acc> d_gamma, d_beta;

  GateBackward(const RefineArguments& a, const RefineSaved& saved, const Sizes& sizes, int64_t blocks)
      : d_z_c(empty(a, {sizes.B, sizes.C})),
        d_z_s_parts(empty(a, {blocks, sizes.B, sizes.P})),
        e_operand(operand(a, {sizes.B, sizes.chunks, round_up(sizes.D, kI) * kRow})),
        f_operand(operand(a, {sizes.B, sizes.chunks, round_up(sizes.D, kI) * kRow})),
        t_operand(operand(a, {(sizes.D + kTileN - 1) / kTileN, sizes.B * round_up(sizes.P, kI), kTileN})),
        depth(round_up(sizes.P, kI)),
        d_gamma(zeros(a, {sizes.D})),
        d_beta(zeros(a, {sizes.D})),
        s_(sizes),
        gate_(a, sizes),
        training_(a.training),
        blocks_(blocks),
        all_(sizes.steps * sizes.B),
        mean_(saved.mean),
        var_(saved.var),
        u_(saved.u),
        h_(saved.h),
        d_y_p_(zeros(a, {sizes.B, sizes.D})),
        d_y_d_(zeros(a, {sizes.B, sizes.P})),
        d_u_(empty(a, {2, sizes.B, sizes.D, sizes.P})),
        sums_(empty(a, {2, sizes.B, sizes.D})),
        means_(zeros(a, {2, gate_.groups, sizes.D})),
        d_z_c_t_(zeros(a, {a.w_c ? sizes.C : 0, all_})),
        d_z_s_t_(zeros(a, {a.w_s1 ? sizes.P : 0, all_})),
        d_h_t_(zeros(a, {sizes.num_attn, all_})),
        y_p_(zeros(a, {all_, sizes.D})),
        y_d_(zeros(a, {all_, sizes.P})) {}

  at::TensorOptions options() const {
    return gate_.options;
  }

  // dz_s and dz_c of frame t to dU_t, and to the gradients of the gate's weights.
  void sweep(int64_t t) {
    if (training_) {
      gate_.use(mean_(t), var_(t));
    }
    if (d_z_c_t_) {
      parallel_gemm(s_.B, s_.D, s_.C, d_z_c(), s_.C, gate_.w_c(), d_y_p_());
    }
    parallel(s_.B, [&](int64_t clip) { attention_backward(clip, t); });
    merge_sums();
    parallel(s_.B, [&](int64_t clip) { norm_backward(clip, t); });
  }

  Tensor d_w_s1(const Tensor& w_s1) const {
    return over_all(d_h_t_, y_d_(), w_s1);
  }
  Tensor d_w_s2(const Tensor& w_s2) const {
    return over_all(d_z_s_t_, h_(), w_s2);
  }
  Tensor d_w_c(const Tensor& w_c) const {
    return over_all(d_z_c_t_, y_p_(), w_c);
  }

 private:
  static Array<Acc> empty(const RefineArguments& a, at::IntArrayRef shape) {
    return Array<Acc>(at::empty(shape, a.x.options().dtype(c10::CppTypeToScalarType<Acc>::value)));
  }
  static Array<Acc> zeros(const RefineArguments& a, at::IntArrayRef shape) {
    return Array<Acc>(at::zeros(shape, a.x.options().dtype(c10::CppTypeToScalarType<Acc>::value)));
  }
  static Array<Operand> operand(const RefineArguments& a, at::IntArrayRef shape) {
    return Array<Operand>(at::empty(shape, a.x.options().dtype(c10::CppTypeToScalarType<Operand>::value)));
  }

  // left (M, all) right (all, N), over all steps and clips, as the gradient of a weight.
  Tensor over_all(const Array<Acc>& left, const Acc* right, const Tensor& weight) const {
    const Array<Acc> out(at::zeros(weight.sizes(), gate_.options));
    if (all_ > 0) {
      parallel_gemm(weight.size(0), weight.size(1), all_, left(), all_, right, out());
    }
    return out.tensor().to(weight.scalar_type());
  }

  // dY of a vector: what both attentions send, where Y is above zero (or not a number).
  Vec d_y(int64_t clip, int64_t d, const Chunk& chunk, int64_t i, int64_t count, const Vec& y) const {
    const Vec both = Vec::loadu(d_y_d_(clip) + chunk.p0 + i, count) + Vec(d_y_p_(clip)[d] / static_cast<Acc>(s_.P));
    return Vec::set(Vec(0), Vec::blendv(both, Vec(0), y <= Vec(0)), count);
  }

  void attention_backward(int64_t clip, int64_t t) {
    Acc *sum_d_y = sums_(0, clip), *sum_d_y_uhat = sums_(1, clip);
    std::fill(sum_d_y, sum_d_y + s_.D, Acc(0));
    std::fill(sum_d_y_uhat, sum_d_y_uhat + s_.D, Acc(0));
    if (!s_.has_frame(clip, t)) {
      return;
    }
    const int64_t column = (t - s_.start) * s_.B + clip;
    if (d_z_c_t_) {
      for (int64_t c = 0; c < s_.C; c++) {
        d_z_c_t_(c)[column] = d_z_c(clip)[c];
      }
    }
    if (d_z_s_t_) {
      spatial_backward(clip, t, column);
    }
    gate_.pool(clip, u_(t - s_.start, clip), y_p_(column), y_d_(column));
    gate_.each(
        clip, u_(t - s_.start, clip),
        [&](int64_t d, const Chunk& chunk, int64_t i, int64_t count, const Vec& uhat, const Vec& y) {
          const Vec dy = d_y(clip, d, chunk, i, count, y);
          sum_d_y[d] += reduce_add<Acc>(dy);
          sum_d_y_uhat[d] += reduce_add<Acc>(Vec::set(Vec(0), dy * uhat, count));
        });
  }

  // dz_s of a clip to dh and to dY's part by position: h = relu(W_s1 mean_D Y), z_s = W_s2 h.
  void spatial_backward(int64_t clip, int64_t t, int64_t column) {
    const Acc* h = h_(t - s_.start, clip);
    std::vector<Acc> d_h(s_.num_attn, Acc(0));
    for (int64_t p = 0; p < s_.P; p++) {
      Acc d_z_s = 0;
      for (int64_t block = 0; block < blocks_; block++) {
        d_z_s += d_z_s_parts(block, clip)[p];
      }
      d_z_s_t_(p)[column] = d_z_s;
      add_scaled(d_h.data(), d_z_s, gate_.w_s2(p), s_.num_attn);
    }
    Acc* d_y_d = d_y_d_(clip);
    std::fill(d_y_d, d_y_d + s_.P, Acc(0));
    for (int64_t a = 0; a < s_.num_attn; a++) {
      const Acc d = h[a] > 0 ? d_h[a] : Acc(0);
      d_h_t_(a)[column] = d;
      add_scaled(d_y_d, d / static_cast<Acc>(s_.D), gate_.w_s1(a), s_.P);
    }
  }

  // The sums over each group's clips, in their order: gradients of beta and gamma, and what the norm takes off dY.
  void merge_sums() {
    const int64_t clips = s_.B / gate_.groups, elements = gate_.ranks ? gate_.ranks.elements() : clips * s_.P;
    for (int64_t i = 0; i < gate_.groups * s_.D; i++) {
      const int64_t first = i / s_.D * clips, d = i % s_.D;
      double sum_d_y = 0, sum_d_y_uhat = 0;
      for (int64_t clip = first; clip < first + clips; clip++) {
        sum_d_y += sums_(0, clip)[d];
        sum_d_y_uhat += sums_(1, clip)[d];
      }
      d_beta()[d] += static_cast<Acc>(sum_d_y);
      d_gamma()[d] += static_cast<Acc>(sum_d_y_uhat);
      if (training_) {
        means_(0)[i] = static_cast<Acc>(sum_d_y / elements);
        means_(1)[i] = static_cast<Acc>(sum_d_y_uhat / elements);
      }
    }
    if (gate_.ranks) {
      add_ranks();
    }
  }

  // What the norm takes off dY is summed over all ranks, in their order; the gradients above are each rank's own.
  void add_ranks() {
    const Array<const Acc> all(gate_.ranks.gather(means_.tensor()).flatten(1));
    for (int64_t i = 0; i < 2 * s_.D; i++) {
      double sum = 0;
      for (size_t rank = 0; rank < gate_.ranks.counts.size(); rank++) {
        sum += all(rank)[i];
      }
      means_()[i] = static_cast<Acc>(sum);
    }
  }

  // dU_t = gamma r (dY - mean(dY) - Uhat mean(dY Uhat)) of a clip, and the operands made of it.
  void norm_backward(int64_t clip, int64_t t) {
    Acc* du = d_u_(t & 1, clip);
    if (!s_.has_frame(clip, t)) {
      std::fill(du, du + s_.D * s_.P, Acc(0));
    } else {
      const int64_t group = gate_.group(clip);
      const Acc *mean = means_(0, group), *mean_uhat = means_(1, group), *r = gate_.r(group), *gamma = gate_.gamma();
      gate_.each(
          clip, u_(t - s_.start, clip),
          [&](int64_t d, const Chunk& chunk, int64_t i, int64_t count, const Vec& uhat, const Vec& y) {
            const Vec off = d_y(clip, d, chunk, i, count, y) - Vec(mean[d]) - uhat * Vec(mean_uhat[d]);
            (off * Vec(gamma[d] * r[d])).store(du + s_.D * chunk.p0 + d * chunk.n + i, count);
          });
    }
    const Acc* du_next = t + 1 < s_.T ? d_u_((t + 1) & 1, clip) : nullptr;
    for (int64_t q = 0; q < s_.chunks; q++) {
      const Chunk chunk = s_.chunk(q);
      const int64_t at = s_.D * chunk.p0;
      pack(clip, q, t, du + at, du_next == nullptr ? nullptr : du_next + at);
    }
  }

  void pack(int64_t clip, int64_t q, int64_t t, const Acc* du, const Acc* du_next) const {
    const Chunk chunk = s_.chunk(q);
    const int64_t n = chunk.n;
    Operand *e = e_operand(clip, q), *f = f_operand(clip, q);
    for (int64_t d = 0; d < s_.D; d += kI) {
      alignas(64) Acc rows[kI * kRow] = {}, differences[kI * kRow] = {};
      for (int64_t i = 0; i < kI && d + i < s_.D; i++) {
        const Acc *row = du + (d + i) * n, *next = du_next == nullptr ? nullptr : du_next + (d + i) * n;
        for (int64_t p = 0; p < n; p++) {
          rows[i * kRow + p] = row[p];
          differences[i * kRow + p] = (s_.segments_equal(t) ? Acc(0) : row[p]) - (next == nullptr ? Acc(0) : next[p]);
        }
      }
      pack_rows(rows, e, d, chunk.ld, n);
      if (s_.motion) {
        pack_rows(differences, f, d, chunk.ld, n);
      }
    }
    for (int64_t d0 = 0; d0 < s_.D; d0 += kTileN) {
      const int64_t width = std::min(kTileN, s_.D - d0);
      for (int64_t p = 0; p < n; p += kI) {
        alignas(64) Acc rows[kI * kRow] = {};
        for (int64_t i = 0; i < kI && p + i < n; i++) {
          for (int64_t d = 0; d < width; d++) {
            rows[i * kRow + d] = du[(d0 + d) * n + p + i];
          }
        }
        pack_rows(rows, t_operand(d0 / kTileN), clip * depth + chunk.p0 + p, kTileN, width);
      }
    }
  }

  const Sizes& s_;
  const Gate<Acc> gate_;
  const bool training_;
  const int64_t blocks_, all_;                             // of channels; steps times clips
  const Array<const Acc> mean_, var_, u_, h_;                // what forward kept
  const Array<Acc> d_y_p_, d_y_d_, d_u_, sums_, means_;      // of the frame under way, dU of the next one too
  const Array<Acc> d_z_c_t_, d_z_s_t_, d_h_t_, y_p_, y_d_;   // of all steps and clips
};

}  // namespace CPU_CAPABILITY
}  // namespace rru
