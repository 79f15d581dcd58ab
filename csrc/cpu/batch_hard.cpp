// rru_fast::batch_hard, eq. 8 and 10: mining tile by tile; the N x M matrix of distances is never formed.
//
// Features are packed once into panels, for cosine as unit vectors. A micro-tile is a few anchors by one panel of
// candidates: its inner products leave the registers as ranks and are mined at once. Ranks only choose the two
// partners; the distances that enter the loss are computed from differences of features, so that near points lose no
// digits. One task has the whole row of an anchor, in one order, so results do not depend on the number of threads.

#include "batch_hard.h"

#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "batch_hard_mining.h"
#include "batch_hard_panels.h"
#include "parallel.h"

namespace rru {
namespace CPU_CAPABILITY {

namespace {

template <typename Acc>
class Forward {
  using Vec = at::vec::Vectorized<Acc>;
  static constexpr int64_t kN = kWidth<Acc>;
  // Anchors per task at most: they and their mining state stay in the second-level cache.
  static constexpr int64_t kAnchorsPerTask = 2 * kN;
  // Multiplications that are worth a second thread.
  static constexpr int64_t kGrain = 1 << 17;

 public:
  explicit Forward(const BatchHardArguments& a)
      : batch_(a),
        panels_(panels_of(batch_.M)),
        anchor_panels_(a.gallery ? panels_of(batch_.N) : 0),
        margin_(static_cast<Acc>(a.margin)),
        soft_(a.soft),
        codes_(a, panels_ * kN),
        loss_(Array<Acc>::empty({batch_.G, batch_.N})),
        d_pos_(Array<Acc>::empty({batch_.G, batch_.N})),
        d_neg_(Array<Acc>::empty({batch_.G, batch_.N})),
        positive_(Array<int64_t>::empty({batch_.G, batch_.N})),
        negative_(Array<int64_t>::empty({batch_.G, batch_.N})) {}

  BatchHardOutputs run() const {
    const int64_t threads = at::get_num_threads(), all_panels = panels_ + anchor_panels_;
    const int64_t size = candidate_elements() + anchor_panels_ * batch_.D * kN;
    const int64_t per_group = batch_.N * batch_.M * batch_.D;  // multiplications
    if (batch_.N <= kAnchorsPerTask && (batch_.G >= threads || batch_.G * per_group <= kGrain)) {
      // One task per group: each thread packs into panels of its own, which stay in its cache.
      at::parallel_for(0, batch_.G, std::max<int64_t>(1, kGrain / per_group), [&](int64_t begin, int64_t end) {
        const auto panels = Array<Acc>::empty({size});
        std::vector<Acc> shared(batch_.D);
        for (int64_t group = begin; group < end; group++) {
          find_shared(group, shared.data());
          for (int64_t i = 0; i < all_panels; i++) {
            pack_one(group, i, shared.data(), panels());
          }
          mine(group, 0, batch_.N, panels());
        }
      });
    } else {
      const Array<Acc> panels = Array<Acc>::empty({batch_.G, size}), shared = Array<Acc>::empty({batch_.G, batch_.D});
      parallel(batch_.G, [&](int64_t group) { find_shared(group, shared(group)); });
      parallel(batch_.G * all_panels, [&](int64_t i) {
        const int64_t group = i / all_panels;
        pack_one(group, i % all_panels, shared(group), panels(group));
      });
      const int64_t share = round_up((batch_.G * batch_.N + threads - 1) / threads, kAnchors);
      const int64_t anchors = std::min(share, kAnchorsPerTask), tasks = (batch_.N + anchors - 1) / anchors;
      parallel(batch_.G * tasks, [&](int64_t i) {
        const int64_t group = i / tasks, a0 = i % tasks * anchors;
        mine(group, a0, std::min(batch_.N, a0 + anchors), panels(group));
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
  static int64_t panels_of(int64_t size) {
    return (size + kN - 1) / kN;
  }

  // A group has the candidates' panels (panels, D, kN), their offsets (panels, kN), and with a gallery the anchors'
  // panels.
  int64_t candidate_elements() const {
    return panels_ * (batch_.D + 1) * kN;
  }

  void find_shared(int64_t group, Acc* shared) const {
    if (!batch_.cosine) {
      find_shared_vector(batch_.candidates, group, shared);
    }
  }

  void pack_one(int64_t group, int64_t i, const Acc* shared, Acc* panels) const {
    if (i < panels_) {
      const Acc* norms = batch_.cosine ? batch_.candidate_norms(group) : nullptr;
      Acc* offsets = panels + panels_ * batch_.D * kN + i * kN;
      pack<Acc>(batch_.candidates, group, i * kN, shared, norms, panels + i * batch_.D * kN, offsets);
    } else {
      const int64_t n = i - panels_;
      const Acc* norms = batch_.cosine ? batch_.norms(group) : nullptr;
      Acc* panel = panels + candidate_elements() + n * batch_.D * kN;
      pack<Acc>(batch_.anchors, group, n * kN, shared, norms, panel, nullptr);
    }
  }

  // The partners of anchors a0 to a1 among all candidates of the group, given its panels, and their losses.
  void mine(int64_t group, int64_t a0, int64_t a1, const Acc* panels) const {
    std::vector<HardestPartners<Acc>> hardest(a1 - a0);
    const Acc* offsets = panels + panels_ * batch_.D * kN;
    const Acc* anchors = batch_.gallery ? panels + candidate_elements() : panels;
    const auto* codes = codes_.candidates();
    alignas(64) Acc products[kAnchors * kN];
    for (int64_t j = 0; j < panels_; j++) {
      for (int64_t a = a0; a < a1; a += kAnchors) {
        multiply_tile(batch_.D, anchors + a / kN * batch_.D * kN + a % kN, panels + j * batch_.D * kN, products);
        for (int64_t i = a; i < std::min(a1, a + kAnchors); i++) {
          hardest[i - a0].add(
              products + (i - a) * kN, offsets + j * kN, codes + j * kN, codes_.anchor(i), j, batch_.cosine);
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
    const auto code = codes_.anchor(a);
    const Partner<Acc> positive = hardest.positive(codes_.same(code)), negative = hardest.negative(codes_.other(code));
    constexpr Acc inf = std::numeric_limits<Acc>::infinity();
    const Acc far = positive.index < 0 ? -inf : distance(group, a, positive);
    const Acc near = negative.index < 0 ? inf : distance(group, a, negative);
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
    const Acc *x = batch_.anchors.row(group, a), *y = batch_.candidates.row(group, partner.index);
    if (!batch_.cosine) {
      const Acc square = sum_over_row<Acc>(batch_.D, [&](Vec sum, int64_t d, int64_t count) {
        const Vec difference = Vec::loadu(x + d, count) - Vec::loadu(y + d, count);
        return at::vec::fmadd(difference, difference, sum);
      });
      return std::sqrt(square < kMinDistance2 ? static_cast<Acc>(kMinDistance2) : square);
    }
    // 1 - cos(x, y) from the difference of unit vectors keeps the digits of near parallel ones.
    const Length<Acc> of_x(batch_.norms(group)[a]), of_y(batch_.candidate_norms(group)[partner.index]);
    const Vec scale_x(of_x.inverse), scale_y(of_y.inverse);
    const Acc square = sum_over_row<Acc>(batch_.D, [&](Vec sum, int64_t d, int64_t count) {
      const Vec difference = Vec::loadu(x + d, count) * scale_x - Vec::loadu(y + d, count) * scale_y;
      return at::vec::fmadd(difference, difference, sum);
    });
    return square / 2 + (1 - (of_x.square + of_y.square) / 2);
  }

  static Acc hinge(Acc x) {
    return x < 0 ? Acc(0) : x;  // NaN remains
  }

  static Acc softplus(Acc x) {
    return x > 20 ? x : std::log1p(std::exp(x));  // with torch's threshold
  }

  const Batch<Acc> batch_;
  const int64_t panels_, anchor_panels_;  // of the candidates; of the anchors, if they are not the candidates
  const Acc margin_;
  const bool soft_;
  const LabelCodes<Acc> codes_;
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
