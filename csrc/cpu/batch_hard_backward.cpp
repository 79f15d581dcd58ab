// Backward of rru_fast::batch_hard: gradients are nonzero only for active anchors and their two partners.
//
// The gradients of an anchor and of its partner have the same form, so each pair is an edge of a graph, listed at both
// ends. A task sums all edges of one feature, in the order of their anchors. Nothing is scattered: there are no atomics,
// and results do not depend on the number of threads.

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "batch_hard.h"
#include "rows.h"

namespace rru {
namespace CPU_CAPABILITY {

namespace {

template <typename T>
class Backward {
  using Acc = at::opmath_type<T>;

 public:
  Backward(const Tensor& d_loss, const BatchHardSaved& saved, const BatchHardArguments& a)
      : G_(a.features.size(0)),
        N_(a.features.size(1)),
        D_(a.features.size(2)),
        margin_(static_cast<Acc>(a.margin)),
        soft_(a.soft),
        cosine_(a.cosine),
        features_(a.features),
        d_loss_(d_loss),
        d_pos_(saved.d_pos),
        d_neg_(saved.d_neg),
        positive_(saved.positive),
        negative_(saved.negative),
        starts_(Array<int64_t>::empty({G_, N_ + 1})),
        neighbors_(Array<int64_t>::empty({G_, 4 * N_})),
        weights_(Array<Acc>::empty({G_, 4 * N_})),
        d_features_(Array<T>::empty({G_, N_, D_})) {}

  Tensor run() const {
    at::parallel_for(0, G_, std::max<int64_t>(1, kGrain / N_), [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; group++) {
        list_edges(group);
      }
    });
    at::parallel_for(0, G_ * N_, std::max<int64_t>(1, kGrain / D_), [&](int64_t begin, int64_t end) {
      std::vector<Acc> sum(round_up(D_, kMaxRow));
      for (int64_t i = begin; i < end; i++) {
        sum_edges(i / N_, i % N_, sum.data());
        store(sum.data(), D_, d_features_(i / N_, i % N_));
      }
    });
    return d_features_.tensor();
  }

 private:
  static constexpr int64_t kGrain = 8192;  // elements; fewer are not worth a thread

  // Calls visit(anchor, partner, weight) for each pair of the group with a nonzero or NaN gradient.
  template <typename F>
  void each_pair(int64_t group, const F& visit) const {
    for (int64_t anchor = 0; anchor < N_; anchor++) {
      const Acc far = d_pos_(group)[anchor], near = d_neg_(group)[anchor], gap = far - near;
      const Acc slope = soft_ ? 1 / (1 + std::exp(-gap)) : margin_ + gap <= 0 ? Acc(0) : Acc(1);
      const Acc d_gap = d_loss_(group)[anchor] * slope;
      const auto pair = [&](int64_t partner, Acc weight, Acc distance) {
        if (!cosine_) {
          weight *= (distance > kMinDistance ? Acc(1) : Acc(0)) / distance;
        }
        if (partner >= 0 && weight != 0) {
          visit(anchor, partner, weight);
        }
      };
      pair(positive_(group)[anchor], d_gap, far);
      pair(negative_(group)[anchor], -d_gap, near);
    }
  }

  // Lists the group's edges by feature: those of feature n are from starts[n] to starts[n + 1].
  void list_edges(int64_t group) const {
    int64_t *starts = starts_(group), *neighbors = neighbors_(group);
    Acc* weights = weights_(group);
    const auto put = [&](int64_t feature, int64_t neighbor, Acc weight) {
      neighbors[--starts[feature]] = neighbor;
      weights[starts[feature]] = weight;
    };
    std::fill(starts, starts + N_ + 1, 0);
    each_pair(group, [&](int64_t anchor, int64_t partner, Acc) {
      starts[anchor]++;
      starts[partner]++;
    });
    int64_t end = 0;
    for (int64_t n = 0; n <= N_; n++) {
      end += starts[n];
      starts[n] = end;
    }
    // Lists are filled backwards, which moves each end down to its start; sum_edges reads them backwards, in the order
    // of the anchors.
    each_pair(group, [&](int64_t anchor, int64_t partner, Acc weight) {
      put(anchor, partner, weight);
      put(partner, anchor, weight);
    });
  }

  // sum (D,) = the gradient of feature n.
  void sum_edges(int64_t group, int64_t n, Acc* sum) const {
    const int64_t *starts = starts_(group), *neighbors = neighbors_(group);
    const Acc *weights = weights_(group), *self = features_.row(group, n);
    std::fill(sum, sum + D_, Acc(0));
    for (int64_t e = starts[n + 1] - 1; e >= starts[n]; e--) {
      const Acc weight = weights[e];
      const Acc* other = features_.row(group, neighbors[e]);
      if (cosine_) {
        for (int64_t d = 0; d < D_; d++) {
          sum[d] -= weight * other[d];
        }
      } else {
        for (int64_t d = 0; d < D_; d++) {
          sum[d] += weight * (self[d] - other[d]);
        }
      }
    }
  }

  const int64_t G_, N_, D_;
  const Acc margin_;
  const bool soft_, cosine_;
  const Features<Acc> features_;
  const Array<const Acc> d_loss_, d_pos_, d_neg_;   // (G, N)
  const Array<const int64_t> positive_, negative_;  // (G, N)
  const Array<int64_t> starts_, neighbors_;         // (G, N + 1); (G, 4 N), two edges per anchor, each at both ends
  const Array<Acc> weights_;                        // (G, 4 N), of the neighbors
  const Array<T> d_features_;                       // (G, N, D)
};

}  // namespace

Tensor batch_hard_backward(const Tensor& d_loss, const BatchHardSaved& saved, const BatchHardArguments& arguments) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, arguments.features.scalar_type(), "batch_hard_backward", [&] {
        return Backward<scalar_t>(d_loss, saved, arguments).run();
      });
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
