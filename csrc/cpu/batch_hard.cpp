// rru_fast::batch_hard, eq. 8 and 10: mining tile by tile; the N x N matrix of distances is never formed.
//
// Features are packed once into panels. A micro-tile is a few anchors by one panel: its inner products leave the
// registers as ranks and are mined at once. Ranks only choose the two partners; the distances that enter the loss are
// computed from differences of features, so that near points lose no digits. One task has the whole row of an anchor,
// in one order, so results do not depend on the number of threads.

#include "batch_hard.h"

#include <cmath>
#include <limits>
#include <vector>

#include "batch_hard_mining.h"
#include "batch_hard_panels.h"
#include "parallel.h"

namespace rru {
namespace CPU_CAPABILITY {

namespace {

// Panels of anchors per task: they and their mining state stay in the second-level cache.
constexpr int64_t kPanelsPerTask = 2;

template <typename Acc>
class Forward {
  using Vec = at::vec::Vectorized<Acc>;
  static constexpr int64_t kN = kWidth<Acc>, kAnchorsPerTask = kPanelsPerTask * kN;

 public:
  explicit Forward(const BatchHardArguments& a)
      : G_(a.features.size(0)),
        N_(a.features.size(1)),
        D_(a.features.size(2)),
        num_panels_((N_ + kN - 1) / kN),
        margin_(static_cast<Acc>(a.margin)),
        soft_(a.soft),
        cosine_(a.cosine),
        features_(a.features),
        codes_(a.labels, num_panels_ * kN),
        packer_(a, features_),
        loss_(Array<Acc>::empty({G_, N_})),
        d_pos_(Array<Acc>::empty({G_, N_})),
        d_neg_(Array<Acc>::empty({G_, N_})),
        positive_(Array<int64_t>::empty({G_, N_})),
        negative_(Array<int64_t>::empty({G_, N_})) {}

  BatchHardOutputs run() const {
    const int64_t tasks = (num_panels_ + kPanelsPerTask - 1) / kPanelsPerTask;
    if (tasks == 1) {
      // One task per group: each thread packs into panels of its own, which stay in its cache.
      at::parallel_for(0, G_, 1, [&](int64_t begin, int64_t end) {
        const Panels<Acc> panels(1, num_panels_, D_);
        for (int64_t group = begin; group < end; group++) {
          packer_.find_shared_vector(group);
          for (int64_t index = 0; index < num_panels_; index++) {
            packer_.pack(group, index, panels.values(0, index), panels.offsets(0, index));
          }
          mine(group, 0, panels.values(), panels.offsets());
        }
      });
    } else {
      const Panels<Acc> panels(G_, num_panels_, D_);
      parallel(G_, [&](int64_t group) { packer_.find_shared_vector(group); });
      parallel(G_ * num_panels_, [&](int64_t i) {
        const int64_t group = i / num_panels_, index = i % num_panels_;
        packer_.pack(group, index, panels.values(group, index), panels.offsets(group, index));
      });
      parallel(G_ * tasks, [&](int64_t i) {
        const int64_t group = i / tasks;
        mine(group, i % tasks * kAnchorsPerTask, panels.values(group), panels.offsets(group));
      });
    }
    return {
        .loss = loss_.tensor(),
        .saved = {
            .d_pos = d_pos_.tensor(),
            .d_neg = d_neg_.tensor(),
            .positive = positive_.tensor(),
            .negative = negative_.tensor()}};
  }

 private:
  // One task's anchors, from a0 on: their partners among all of the group, given its panels, and their losses.
  void mine(int64_t group, int64_t a0, const Acc* panels, const Acc* offsets) const {
    const int64_t a1 = std::min(N_, a0 + kAnchorsPerTask);
    std::vector<HardestPartners<Acc>> hardest(a1 - a0);
    const auto* codes = codes_.data();
    alignas(64) Acc products[kAnchors * kN];
    for (int64_t j = 0; j < num_panels_; j++) {
      for (int64_t a = a0; a < a1; a += kAnchors) {
        multiply_tile(D_, panels + a / kN * D_ * kN + a % kN, panels + j * D_ * kN, products);
        for (int64_t i = a; i < std::min(a1, a + kAnchors); i++) {
          hardest[i - a0].add(products + (i - a) * kN, offsets + j * kN, codes + j * kN, codes[i], j, cosine_);
        }
      }
    }
    for (int64_t a = a0; a < a1; a++) {
      finish(group, a, hardest[a - a0]);
    }
  }

  // Stores an anchor's partners, distances and loss.
  void finish(int64_t group, int64_t a, const HardestPartners<Acc>& hardest) const {
    // Overflow may leave every rank at -inf; then any partner with the right label is as good.
    const Partner<Acc> positive = hardest.positive(a), negative = hardest.negative(codes_.index_of_other(a));
    const Acc far = distance(group, a, positive);
    const Acc near = negative.index < 0 ? std::numeric_limits<Acc>::infinity() : distance(group, a, negative);
    const Acc gap = far - near;
    d_pos_(group)[a] = far;
    d_neg_(group)[a] = near;
    positive_(group)[a] = positive.index;
    negative_(group)[a] = negative.index;
    loss_(group)[a] = soft_ ? softplus(gap) : hinge(margin_ + gap);
  }

  // The distance from anchor a to its partner; NaN where the rank is, even if the difference is not.
  Acc distance(int64_t group, int64_t a, const Partner<Acc>& partner) const {
    if (partner.rank != partner.rank) {
      return partner.rank;
    }
    constexpr int64_t kChains = 4;  // independent sums, to hide the latency of fma
    const Acc *x = features_.row(group, a), *y = features_.row(group, partner.index);
    Vec sums[kChains] = {Vec(0), Vec(0), Vec(0), Vec(0)};
    const auto add = [&](Vec& sum, int64_t d, int64_t count) {
      const Vec left = Vec::loadu(x + d, count), right = Vec::loadu(y + d, count);
      const Vec difference = left - right;
      sum = cosine_ ? at::vec::fmadd(left, right, sum) : at::vec::fmadd(difference, difference, sum);
    };
    int64_t d = 0;
    for (; d + kChains * Vec::size() <= D_; d += kChains * Vec::size()) {
      c10::ForcedUnroll<kChains>{}([&](auto i) { add(sums[i], d + i * Vec::size(), Vec::size()); });
    }
    for (; d < D_; d += Vec::size()) {
      add(sums[0], d, std::min<int64_t>(Vec::size(), D_ - d));
    }
    const Acc sum = reduce_add<Acc>((sums[0] + sums[1]) + (sums[2] + sums[3]));
    return cosine_ ? 1 - sum : std::sqrt(sum < kMinDistance2 ? static_cast<Acc>(kMinDistance2) : sum);
  }

  static Acc hinge(Acc x) {
    return x < 0 ? Acc(0) : x;  // NaN remains
  }

  static Acc softplus(Acc x) {
    return x > 20 ? x : std::log1p(std::exp(x));  // with torch's threshold
  }

  const int64_t G_, N_, D_, num_panels_;
  const Acc margin_;
  const bool soft_, cosine_;
  const Features<Acc> features_;
  const LabelCodes<Acc> codes_;
  const PanelPacker<Acc> packer_;
  const Array<Acc> loss_, d_pos_, d_neg_;     // (G, N)
  const Array<int64_t> positive_, negative_;  // (G, N)
};

}  // namespace

BatchHardOutputs batch_hard(const BatchHardArguments& arguments) {
  return arguments.features.scalar_type() == at::kDouble ? Forward<double>(arguments).run()
                                                         : Forward<float>(arguments).run();
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
