// Backward of rru_fast::batch_hard: gradients are nonzero only for active anchors and their two partners.
//
// An anchor's gradient is a sum over its two pairs, a candidate's over the pairs of the anchors that chose it, which
// are listed by candidate. A task sums all pairs of one feature, in the order of their anchors. Nothing is scattered:
// there are no atomics, and results do not depend on the number of threads.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "batch_hard.h"

namespace rru {
namespace CPU_CAPABILITY {

namespace {

template <typename T>
class Backward {
  using Acc = at::opmath_type<T>;
  static constexpr int64_t kGrain = 8192;  // elements; fewer are not worth a thread

 public:
  Backward(const BatchHardUpstream& upstream, const BatchHardSaved& saved, const BatchHardArguments& a)
      : batch_(a),
        margin_(static_cast<Acc>(a.margin)),
        soft_(a.soft),
        d_loss_(upstream.d_loss ? Array<const Acc>(*upstream.d_loss) : Array<const Acc>()),
        d_d_pos_(upstream.d_d_pos ? Array<const Acc>(*upstream.d_d_pos) : Array<const Acc>()),
        d_d_neg_(upstream.d_d_neg ? Array<const Acc>(*upstream.d_d_neg) : Array<const Acc>()),
        d_pos_(saved.d_pos),
        d_neg_(saved.d_neg),
        positive_(saved.positive),
        negative_(saved.negative),
        weights_(batch_.G * batch_.N * 2),
        starts_(batch_.G * (batch_.M + 1)),
        pairs_(batch_.G * batch_.N * 2) {}

  BatchHardGradients run(BatchHardNeed need) {
    const bool of_candidates = batch_.gallery ? need.gallery : need.features;
    at::parallel_for(0, batch_.G, std::max<int64_t>(1, kGrain / batch_.N), [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; group++) {
        weigh_pairs(group);
        if (of_candidates) {
          list_pairs(group);
        }
      }
    });
    BatchHardGradients gradients;
    if (need.features) {
      gradients.features = sum_rows(batch_.N, [&](int64_t group, int64_t n, Acc* sum) {
        add_own_pairs(group, n, sum);
        if (!batch_.gallery) {
          add_chosen_pairs(group, n, sum);
        }
      });
    }
    if (need.gallery && batch_.gallery) {
      gradients.gallery =
          sum_rows(batch_.M, [&](int64_t group, int64_t m, Acc* sum) { add_chosen_pairs(group, m, sum); });
    }
    return gradients;
  }

 private:
  // The gradient (G, size, D) whose rows `add` sums up.
  template <typename F>
  Tensor sum_rows(int64_t size, const F& add) const {
    const auto gradient = Array<T>::empty({batch_.G, size, batch_.D});
    at::parallel_for(0, batch_.G * size, std::max<int64_t>(1, kGrain / batch_.D), [&](int64_t begin, int64_t end) {
      std::vector<Acc> sum(round_up(batch_.D, kMaxRow));
      for (int64_t i = begin; i < end; i++) {
        std::fill_n(sum.data(), batch_.D, Acc(0));
        add(i / size, i % size, sum.data());
        store(sum.data(), batch_.D, gradient(i / size, i % size));
      }
    });
    return gradient.tensor();
  }

  // A pair is 2 n for anchor n and its positive, 2 n + 1 for it and its negative.
  int64_t partner(int64_t group, int64_t pair) const {
    return (pair % 2 == 0 ? positive_ : negative_)(group)[pair / 2];
  }
  Acc weight(int64_t group, int64_t pair) const {
    return weights_[group * 2 * batch_.N + pair];
  }
  Acc distance(int64_t group, int64_t pair) const {
    return (pair % 2 == 0 ? d_pos_ : d_neg_)(group)[pair / 2];
  }

  // Stores the gradient of each pair's distance, 0 without a partner, for the Euclidean metric over the distance.
  void weigh_pairs(int64_t group) {
    Acc* weights = &weights_[group * 2 * batch_.N];
    for (int64_t n = 0; n < batch_.N; n++) {
      Acc of_pair[2] = {d_d_pos_ ? d_d_pos_(group)[n] : Acc(0), d_d_neg_ ? d_d_neg_(group)[n] : Acc(0)};
      if (d_loss_) {
        const Acc gap = d_pos_(group)[n] - d_neg_(group)[n];
        const bool inactive = !soft_ && margin_ + gap <= 0;  // its gradient is 0 even if the loss's is not finite
        const Acc slope = soft_ ? 1 / (1 + std::exp(-gap)) : Acc(1);
        const Acc d_gap = inactive ? Acc(0) : d_loss_(group)[n] * slope;
        of_pair[0] += d_gap;
        of_pair[1] -= d_gap;
      }
      for (int64_t i = 0; i < 2; i++) {
        const Acc length = distance(group, 2 * n + i);
        if (!batch_.cosine) {
          of_pair[i] *= (length > kMinDistance ? Acc(1) : Acc(0)) / length;
        }
        weights[2 * n + i] = partner(group, 2 * n + i) < 0 ? Acc(0) : of_pair[i];
      }
    }
  }

  // Lists the group's pairs with a nonzero or NaN weight by candidate: those of candidate m are from starts[m] to
  // starts[m + 1].
  void list_pairs(int64_t group) {
    int64_t *starts = &starts_[group * (batch_.M + 1)], *pairs = &pairs_[group * 2 * batch_.N];
    const auto each_pair = [&](const auto& visit) {
      for (int64_t pair = 0; pair < 2 * batch_.N; pair++) {
        if (weight(group, pair) != 0) {
          visit(pair, partner(group, pair));
        }
      }
    };
    each_pair([&](int64_t, int64_t m) { starts[m]++; });
    int64_t end = 0;
    for (int64_t m = 0; m <= batch_.M; m++) {
      end += starts[m];
      starts[m] = end;
    }
    // Lists are filled backwards, which moves each end down to its start; add_chosen_pairs reads them backwards, in the
    // order of the anchors.
    each_pair([&](int64_t pair, int64_t m) { pairs[--starts[m]] = pair; });
  }

  void add_own_pairs(int64_t group, int64_t n, Acc* sum) const {
    for (int64_t pair = 2 * n; pair < 2 * n + 2; pair++) {
      if (weight(group, pair) != 0) {
        const int64_t m = partner(group, pair);
        add_pair(
            group, pair, batch_.anchors.row(group, n), anchor_norm(group, n), batch_.candidates.row(group, m),
            candidate_norm(group, m), sum);
      }
    }
  }

  void add_chosen_pairs(int64_t group, int64_t m, Acc* sum) const {
    const int64_t* starts = &starts_[group * (batch_.M + 1)];
    for (int64_t i = starts[m + 1] - 1; i >= starts[m]; i--) {
      const int64_t pair = pairs_[group * 2 * batch_.N + i], n = pair / 2;
      add_pair(
          group, pair, batch_.candidates.row(group, m), candidate_norm(group, m), batch_.anchors.row(group, n),
          anchor_norm(group, n), sum);
    }
  }

  // Read for cosine only.
  Acc anchor_norm(int64_t group, int64_t n) const {
    return batch_.norms ? batch_.norms(group)[n] : Acc(1);
  }
  Acc candidate_norm(int64_t group, int64_t m) const {
    return batch_.norms ? batch_.candidate_norms(group)[m] : Acc(1);
  }

  // sum (D,) += the gradient of one of a pair's features: weight (self - other), or for cosine, with unit vectors,
  // weight (self - other - distance self) / |self|. Differences come first, so that a common part leaves no rounding.
  void add_pair(
      int64_t group, int64_t pair, const Acc* self, Acc self_norm, const Acc* other, Acc other_norm, Acc* sum) const {
    const Acc w = weight(group, pair);
    if (!batch_.cosine) {
      for (int64_t d = 0; d < batch_.D; d++) {
        sum[d] += w * (self[d] - other[d]);
      }
      return;
    }
    const Length<Acc> length(self_norm);
    const Acc unit = length.projected ? length.inverse : Acc(0), other_unit = Length<Acc>(other_norm).inverse;
    const Acc along = distance(group, pair), scale = w * length.inverse;
    for (int64_t d = 0; d < batch_.D; d++) {
      const Acc own = self[d] * unit;
      sum[d] += scale * (own - other[d] * other_unit - along * own);
    }
  }

  const Batch<Acc> batch_;
  const Acc margin_;
  const bool soft_;
  const Array<const Acc> d_loss_, d_d_pos_, d_d_neg_;  // (G, N), or none
  const Array<const Acc> d_pos_, d_neg_;               // (G, N)
  const Array<const int64_t> positive_, negative_;     // (G, N)
  std::vector<Acc> weights_;                           // (G, 2 N), of the pairs
  std::vector<int64_t> starts_, pairs_;                // (G, M + 1), (G, 2 N)
};

}  // namespace

BatchHardGradients batch_hard_backward(
    const BatchHardUpstream& upstream, const BatchHardSaved& saved, const BatchHardArguments& arguments,
    BatchHardNeed need) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, arguments.features.scalar_type(), "batch_hard_backward", [&] {
        return Backward<scalar_t>(upstream, saved, arguments).run(need);
      });
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
