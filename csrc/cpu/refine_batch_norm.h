// Statistics of the gate's batch norm over clips and positions, forward and backward.
//
// Sums are taken per clip in parallel, then merged over the clips of a group, and over ranks, in a fixed order.
#pragma once

#include "refine_gate.h"

namespace rru {
namespace CPU_CAPABILITY {

// Mean and biased variance of U per frame, group and gate channel.
template <typename Acc>
class BatchStatistics {
  using Vec = at::vec::Vectorized<Acc>;

 public:
  const Array<Acc> mean, var;  // (T, bn_groups, D); T = 0 in eval mode

  BatchStatistics(const RefineArguments& a, const Gate<Acc>& gate)
      : mean(Array<Acc>::zeros({a.training ? gate.sizes.T : 0, a.bn_groups, gate.sizes.D})),
        var(Array<Acc>::zeros(mean.tensor().sizes())),
        gate_(gate),
        sizes_(gate.sizes),
        clip_mean_(Array<Acc>::empty({sizes_.B, sizes_.D})),
        clip_m2_(Array<Acc>::empty({sizes_.B, sizes_.D})) {}

  // Adds one clip's U: per gate channel its mean over positions, and the sum of squared deviations from it.
  void add(int64_t clip, const Acc* u) const {
    Acc *clip_mean = clip_mean_(clip), *clip_m2 = clip_m2_(clip);
    const auto sum = [&](int64_t d, const auto& term) {
      Acc result = 0;
      for (int64_t q = 0; q < sizes_.num_chunks; q++) {
        const Chunk chunk = sizes_.chunk(q);
        const Acc* row = u + sizes_.D * chunk.p0 + d * chunk.n;
        Vec partial(0);
        for (int64_t i = 0; i < chunk.n; i += Vec::size()) {
          const int64_t count = std::min<int64_t>(Vec::size(), chunk.n - i);
          partial = partial + Vec::set(Vec(0), term(Vec::loadu(row + i, count)), count);
        }
        result += reduce_add<Acc>(partial);
      }
      return result;
    };
    for (int64_t d = 0; d < sizes_.D; d++) {
      clip_mean[d] = sum(d, [](const Vec& v) { return v; }) / static_cast<Acc>(sizes_.P);
      clip_m2[d] = sum(d, [&](const Vec& v) { return (v - Vec(clip_mean[d])) * (v - Vec(clip_mean[d])); });
    }
  }

  // Merges the clips added into the statistics of frame t, by which the gate normalizes from now on.
  void merge(int64_t t) const {
    const int64_t clips = sizes_.B / gate_.groups;
    Acc *mean_t = mean(t), *var_t = var(t);
    for (int64_t i = 0; i < gate_.groups * sizes_.D; i++) {
      const int64_t first = i / sizes_.D * clips, d = i % sizes_.D;
      const Acc *means = clip_mean_(first) + d, *m2s = clip_m2_(first) + d;
      double sum = 0, m2 = 0;
      for (int64_t clip = 0; clip < clips; clip++) {
        sum += means[clip * sizes_.D];
      }
      const double group_mean = sum / clips;
      for (int64_t clip = 0; clip < clips; clip++) {
        const double deviation = means[clip * sizes_.D] - group_mean;
        m2 += m2s[clip * sizes_.D] + sizes_.P * deviation * deviation;
      }
      mean_t[i] = static_cast<Acc>(group_mean);
      var_t[i] = static_cast<Acc>(m2 / (clips * sizes_.P));
    }
    if (gate_.ranks) {
      merge_ranks(mean_t, var_t);
    }
    gate_.set_statistics(mean_t, var_t);
  }

 private:
  // Replaces this rank's statistics by those of all ranks: the same bits on each.
  void merge_ranks(Acc* mean, Acc* var) const {
    const Ranks& ranks = gate_.ranks;
    const auto own = Array<Acc>::empty({2, sizes_.D});
    std::copy_n(mean, sizes_.D, own(0));
    std::copy_n(var, sizes_.D, own(1));
    const Array<const Acc> all(ranks.gather(own.tensor()));
    const int64_t size = static_cast<int64_t>(ranks.elements_per_rank.size());
    const auto elements = static_cast<double>(ranks.elements());
    for (int64_t d = 0; d < sizes_.D; d++) {
      double sum = 0, m2 = 0;
      for (int64_t rank = 0; rank < size; rank++) {
        sum += ranks.elements_per_rank[rank] * static_cast<double>(all(rank, 0)[d]);
      }
      const double total_mean = sum / elements;
      for (int64_t rank = 0; rank < size; rank++) {
        const double deviation = all(rank, 0)[d] - total_mean;
        m2 += ranks.elements_per_rank[rank] * (all(rank, 1)[d] + deviation * deviation);
      }
      mean[d] = static_cast<Acc>(total_mean);
      var[d] = static_cast<Acc>(m2 / elements);
    }
  }

  const Gate<Acc>& gate_;
  const Sizes& sizes_;
  const Array<Acc> clip_mean_, clip_m2_;  // (B, D), of the current frame
};

// Sums of dY and dY Uhat over clips and positions: gradients of beta and gamma, and the means that dU subtracts.
template <typename Acc>
class BatchNormBackward {
 public:
  const Array<Acc> d_gamma, d_beta;        // (D,)
  const Array<Acc> clip_dy, clip_dy_uhat;  // (B, D), the current frame's sums over positions
  const Array<Acc> means;                  // (2, groups, D): means of dY and of dY Uhat; zero in eval mode

  BatchNormBackward(const RefineArguments& a, const Gate<Acc>& gate)
      : d_gamma(Array<Acc>::zeros({gate.sizes.D})),
        d_beta(Array<Acc>::zeros({gate.sizes.D})),
        clip_dy(Array<Acc>::empty({gate.sizes.B, gate.sizes.D})),
        clip_dy_uhat(Array<Acc>::empty({gate.sizes.B, gate.sizes.D})),
        means(Array<Acc>::zeros({2, gate.groups, gate.sizes.D})),
        gate_(gate),
        training_(a.training) {}

  // Merges the clips' sums in order of the clips. d_gamma and d_beta remain each rank's own.
  void merge() const {
    const int64_t D = gate_.sizes.D, clips = gate_.sizes.B / gate_.groups;
    const int64_t elements = gate_.ranks ? gate_.ranks.elements() : clips * gate_.sizes.P;
    for (int64_t i = 0; i < gate_.groups * D; i++) {
      const int64_t first = i / D * clips, d = i % D;
      double sum_dy = 0, sum_dy_uhat = 0;
      for (int64_t clip = first; clip < first + clips; clip++) {
        sum_dy += clip_dy(clip)[d];
        sum_dy_uhat += clip_dy_uhat(clip)[d];
      }
      d_beta()[d] += static_cast<Acc>(sum_dy);
      d_gamma()[d] += static_cast<Acc>(sum_dy_uhat);
      if (training_) {
        means(0)[i] = static_cast<Acc>(sum_dy / elements);
        means(1)[i] = static_cast<Acc>(sum_dy_uhat / elements);
      }
    }
    if (gate_.ranks) {
      sum_over_ranks();
    }
  }

 private:
  // Each rank's means are its sums over the elements of all ranks.
  void sum_over_ranks() const {
    const Array<const Acc> all(gate_.ranks.gather(means.tensor()).flatten(1));
    for (int64_t i = 0; i < 2 * gate_.sizes.D; i++) {
      double sum = 0;
      for (size_t rank = 0; rank < gate_.ranks.elements_per_rank.size(); rank++) {
        sum += all(rank)[i];
      }
      means()[i] = static_cast<Acc>(sum);
    }
  }

  const Gate<Acc>& gate_;
  const bool training_;
};

}  // namespace CPU_CAPABILITY
}  // namespace rru
