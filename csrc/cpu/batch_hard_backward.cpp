// Backward of rru_fast::batch_hard: an active anchor moves itself and its two partners, nobody else.
//
// Anchor and partner are moved alike, so each pair is an edge of a graph, listed at both its ends; a task then gathers
// all edges of a feature, in the order of their anchors. Nothing is scattered: no atomics, and threads change nothing.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "batch_hard.h"

namespace rru {
namespace CPU_CAPABILITY {

namespace {

template <typename T>
class Backward {
  using Acc = at::opmath_type<T>;

 public:
  Backward(
      const Tensor& d_loss, const Tensor& features, const Tensor& d_pos, const Tensor& d_neg, const Tensor& positive,
      const Tensor& negative, double margin, bool soft, bool cosine)
      : G_(features.size(0)),
        N_(features.size(1)),
        D_(features.size(2)),
        margin_(static_cast<Acc>(margin)),
        soft_(soft),
        cosine_(cosine),
        f_(features),
        d_loss_(d_loss),
        d_pos_(d_pos),
        d_neg_(d_neg),
        positive_(positive),
        negative_(negative),
        starts_(at::empty({G_, N_ + 1}, positive.options())),
        others_(at::empty({G_, 4 * N_}, positive.options())),
        weights_(at::empty({G_, 4 * N_}, d_loss.options())),
        d_features_(at::empty({G_, N_, D_}, features.options())) {}

  Tensor run() {
    at::parallel_for(0, G_, std::max<int64_t>(1, kGrain / N_), [&](int64_t begin, int64_t end) {
      for (int64_t group = begin; group < end; group++) {
        list(group);
      }
    });
    T* out = d_features_.mutable_data_ptr<T>();
    at::parallel_for(0, G_ * N_, std::max<int64_t>(1, kGrain / D_), [&](int64_t begin, int64_t end) {
      std::vector<Acc> sum(round_up(D_, kRow));
      for (int64_t i = begin; i < end; i++) {
        gather(i / N_, i % N_, sum.data());
        store(sum.data(), D_, out + i * D_);
      }
    });
    return d_features_;
  }

 private:
  static constexpr int64_t kGrain = 8192;  // values: less is not worth a thread

  // Calls visit(anchor, partner, weight) for each pair of the group that pulls; NaN does.
  template <typename F>
  void each_pair(int64_t group, const F& visit) const {
    const int64_t first = group * N_;
    for (int64_t a = first; a < first + N_; a++) {
      const Acc far = d_pos_.const_data_ptr<Acc>()[a], near = d_neg_.const_data_ptr<Acc>()[a], gap = far - near;
      const Acc slope = soft_ ? 1 / (1 + std::exp(-gap)) : margin_ + gap <= 0 ? Acc(0) : Acc(1);
      const Acc pull = d_loss_.const_data_ptr<Acc>()[a] * slope;
      const auto pair = [&](int64_t partner, Acc weight, Acc distance) {
        if (!cosine_) {
          weight *= (distance > kClosest ? Acc(1) : Acc(0)) / distance;
        }
        if (partner >= 0 && weight != 0) {
          visit(a - first, partner, weight);
        }
      };
      pair(positive_.const_data_ptr<int64_t>()[a], pull, far);
      pair(negative_.const_data_ptr<int64_t>()[a], -pull, near);
    }
  }

  // The group's edges sorted by feature: those of n lie from starts[n] to starts[n + 1].
  void list(int64_t group) {
    int64_t* starts = starts_.mutable_data_ptr<int64_t>() + group * (N_ + 1);
    int64_t* others = others_.mutable_data_ptr<int64_t>() + group * 4 * N_;
    Acc* weights = weights_.template mutable_data_ptr<Acc>() + group * 4 * N_;
    const auto put = [&](int64_t end, int64_t other, Acc weight) {
      others[--starts[end]] = other;
      weights[starts[end]] = weight;
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
    // Filled from behind, each list's end moves down to its start; gather reads it backwards, in the anchors' order.
    each_pair(group, [&](int64_t anchor, int64_t partner, Acc weight) {
      put(anchor, partner, weight);
      put(partner, anchor, weight);
    });
  }

  // sum (D,) = the gradient of one feature.
  void gather(int64_t group, int64_t n, Acc* sum) const {
    const int64_t* starts = starts_.const_data_ptr<int64_t>() + group * (N_ + 1);
    const int64_t* others = others_.const_data_ptr<int64_t>() + group * 4 * N_;
    const Acc* weights = weights_.template const_data_ptr<Acc>() + group * 4 * N_;
    const Acc* self = f_.row(group, n);
    std::fill(sum, sum + D_, Acc(0));
    for (int64_t e = starts[n + 1] - 1; e >= starts[n]; e--) {
      const Acc weight = weights[e];
      const Acc* other = f_.row(group, others[e]);
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
  const Features<Acc> f_;
  const Tensor d_loss_, d_pos_, d_neg_, positive_, negative_;  // (G, N), contiguous
  const Tensor starts_, others_, weights_;                     // (G, N + 1), (G, 4 N), (G, 4 N)
  const Tensor d_features_;                                    // (G, N, D)
};

}  // namespace

Tensor batch_hard_backward(
    const Tensor& d_loss, const Tensor& features, const Tensor& d_pos, const Tensor& d_neg, const Tensor& positive,
    const Tensor& negative, double margin, bool soft, bool cosine) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, features.scalar_type(), "batch_hard_backward", [&] {
        return Backward<scalar_t>(d_loss, features, d_pos, d_neg, positive, negative, margin, soft, cosine).run();
      });
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
