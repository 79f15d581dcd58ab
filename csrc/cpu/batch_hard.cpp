// rru_fast::batch_hard, eq. 8 and 10: mining tile by tile, never the N x N matrix.
//
// Features are packed once, transposed, into panels (D, kWidth) of neighbours; a panel is both operands of the matrix
// product: anchors are broadcast from one, candidates loaded as vectors from another. A few anchors against a panel are
// one micro-tile; its inner products leave the registers as ranks and are mined at once. Ranks only choose the two
// partners; the distances that enter the loss are taken from the difference of the vectors, so that near points do not
// lose their digits. One task has an anchor's whole row, in one order: threads change nothing.

#include "batch_hard.h"

#include <c10/util/Unroll.h>

#include <algorithm>
#include <unordered_map>
#include <vector>

#include "parallel.h"

namespace rru {
namespace CPU_CAPABILITY {

namespace {

// A micro-tile: anchors by vectors of candidates. Its sums fill half the registers, enough to hide the latency of fma.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t kAnchors = 8;
#else
constexpr int64_t kAnchors = 4;
#endif
constexpr int64_t kVectors = 2;

// A task takes so many panels of anchors: their mining state and their panels stay in the second-level cache.
constexpr int64_t kPanels = 2;

template <typename Acc>
class Mining {
  using Vec = at::vec::Vectorized<Acc>;
  // As wide as Acc, so that one mask serves both.
  using Index = std::conditional_t<std::is_same_v<Acc, double>, int64_t, int32_t>;
  static constexpr int64_t kWidth = kVectors * Vec::size(), kBlock = kPanels * kWidth;

  // The best rank seen by each lane of a panel, and in which panel; -1 for none.
  struct alignas(64) Best {
    Acc rank[kWidth];
    Index panel[kWidth];
  };
  struct State {
    Best farthest, nearest;  // of the same label, and of another: there the rank is negated, so that more is nearer
  };
  struct Partner {
    Acc rank;
    int64_t index;
  };

  // The panels of some groups, (groups, panels, D, kWidth), and what each feature adds to the rank.
  class Packed {
   public:
    Packed(const Mining& m, int64_t groups)
        : panels_(at::empty({groups, m.panels_, m.D_, kWidth}, m.options_)),
          offsets_(at::empty({groups, m.panels_, kWidth}, m.options_)) {}

    Acc* panel(int64_t group, int64_t index) const {
      return panels_.template mutable_data_ptr<Acc>() + group * panels_.stride(0) + index * panels_.stride(1);
    }

    Acc* offset(int64_t group, int64_t index) const {
      return offsets_.template mutable_data_ptr<Acc>() + group * offsets_.stride(0) + index * kWidth;
    }

   private:
    const Tensor panels_, offsets_;
  };

 public:
  Mining(const Tensor& features, const Tensor& labels, double margin, bool soft, bool cosine)
      : G_(features.size(0)),
        N_(features.size(1)),
        D_(features.size(2)),
        panels_((N_ + kWidth - 1) / kWidth),
        margin_(static_cast<Acc>(margin)),
        soft_(soft),
        cosine_(cosine),
        f_(features),
        options_(features.options().dtype(c10::CppTypeToScalarType<Acc>::value)),
        codes_(at::empty({panels_ * kWidth}, labels.options().dtype(c10::CppTypeToScalarType<Index>::value))) {
    number(labels.const_data_ptr<int64_t>(), codes_.template mutable_data_ptr<Index>());
    d_pos_ = at::empty({G_, N_}, options_);
    d_neg_ = at::empty({G_, N_}, options_);
    loss_ = at::empty({G_, N_}, options_);
    common_ = at::empty({G_, D_}, options_);
    positive_ = at::empty({G_, N_}, labels.options());
    negative_ = at::empty({G_, N_}, labels.options());
  }

  Tensors5 run() {
    const int64_t blocks = (panels_ + kPanels - 1) / kPanels;
    // A group of one block is its task's alone, which packs it into memory that stays in its cache.
    if (blocks == 1) {
      at::parallel_for(0, G_, 1, [&](int64_t begin, int64_t end) {
        const Packed packed(*this, 1);
        for (int64_t group = begin; group < end; group++) {
          find_common_part(group);
          for (int64_t index = 0; index < panels_; index++) {
            pack(group, index, packed.panel(0, index), packed.offset(0, index));
          }
          mine(group, 0, packed.panel(0, 0), packed.offset(0, 0));
        }
      });
    } else {
      const Packed packed(*this, G_);
      parallel(G_, [&](int64_t group) { find_common_part(group); });
      parallel(G_ * panels_, [&](int64_t i) {
        const int64_t group = i / panels_, index = i % panels_;
        pack(group, index, packed.panel(group, index), packed.offset(group, index));
      });
      parallel(G_ * blocks, [&](int64_t i) {
        const int64_t group = i / blocks;
        mine(group, i % blocks * kBlock, packed.panel(group, 0), packed.offset(group, 0));
      });
    }
    return {loss_, d_pos_, d_neg_, positive_, negative_};
  }

 private:
  // Labels as small numbers from 0 in order of appearance, -1 past the end.
  void number(const int64_t* labels, Index* codes) {
    std::unordered_map<int64_t, Index> known;
    for (int64_t n = 0; n < N_; n++) {
      codes[n] = known.try_emplace(labels[n], static_cast<Index>(known.size())).first->second;
      if (second_ < 0 && codes[n] > 0) {
        second_ = n;
      }
    }
    std::fill(codes + N_, codes + panels_ * kWidth, Index(-1));
  }

  const Index* codes() const {
    return codes_.template const_data_ptr<Index>();
  }

  Acc* common_part(int64_t group) const {
    return common_.template mutable_data_ptr<Acc>() + group * D_;
  }

  // A vector that most of a group's features share, or 0. Distances do not change when it is subtracted, but the rank
  // no longer cancels. It is the median of three medians of three features, where its square is 16 times that of their
  // range: outliers neither shift nor hide it, and NaN compares false.
  void find_common_part(int64_t group) const {
    Acc* common = common_part(group);
    const Acc* rows[9];
    for (int64_t i = 0; i < 9; i++) {
      rows[i] = f_.row(group, i * N_ / 9);
    }
    const auto median = [](Vec a, Vec b, Vec c) {
      return at::vec::maximum(at::vec::minimum(a, b), at::vec::minimum(at::vec::maximum(a, b), c));
    };
    Vec range2(0), shared2(0);
    for (int64_t d = 0; !cosine_ && d < D_; d += Vec::size()) {
      const int64_t count = std::min<int64_t>(Vec::size(), D_ - d);
      Vec m[3];
      c10::ForcedUnroll<3>{}([&](auto i) {
        m[i] = median(
            Vec::loadu(rows[i] + d, count), Vec::loadu(rows[i + 3] + d, count), Vec::loadu(rows[i + 6] + d, count));
      });
      const Vec range = at::vec::maximum(at::vec::maximum(m[0], m[1]), m[2]) -
          at::vec::minimum(at::vec::minimum(m[0], m[1]), m[2]);
      const Vec middle = median(m[0], m[1], m[2]);
      middle.store(common + d, count);
      range2 = at::vec::fmadd(range, range, range2);
      shared2 = at::vec::fmadd(middle, middle, shared2);
    }
    if (cosine_ || !(16 * reduce_add<Acc>(range2) < reduce_add<Acc>(shared2))) {
      std::fill_n(common, D_, Acc(0));
    }
  }

  // One panel, zeros past the end, and what its features add to the rank: |b|^2, summed as the inner products are.
  void pack(int64_t group, int64_t index, Acc* panel, Acc* offset) const {
    const int64_t n0 = index * kWidth, n = std::min(kWidth, N_ - n0);
    constexpr int64_t kDepth = 64;  // transposed within the first-level cache
    const Acc* common = common_part(group);
    for (int64_t d0 = 0; d0 < D_; d0 += kDepth) {
      for (int64_t lane = 0; lane < n; lane++) {
        const Acc* row = f_.row(group, n0 + lane);
        for (int64_t d = d0; d < std::min(D_, d0 + kDepth); d++) {
          panel[d * kWidth + lane] = row[d] - common[d] + 0 * row[d];  // an infinite one is NaN
        }
      }
    }
    for (int64_t d = 0; n < kWidth && d < D_; d++) {
      std::fill(panel + d * kWidth + n, panel + (d + 1) * kWidth, Acc(0));
    }
    Vec sums[kVectors] = {Vec(0), Vec(0)};
    for (int64_t d = 0; !cosine_ && d < D_; d++) {
      for (int64_t v = 0; v < kVectors; v++) {
        const Vec values = Vec::loadu(panel + d * kWidth + v * Vec::size());
        sums[v] = at::vec::fmadd(values, values, sums[v]);
      }
    }
    for (int64_t v = 0; v < kVectors; v++) {
      sums[v].store(offset + v * Vec::size());
    }
  }

  // A block of anchors from a0 on: their partners among all of the group, given its panels, and their losses.
  void mine(int64_t group, int64_t a0, const Acc* panels, const Acc* offsets) {
    const int64_t a1 = std::min(N_, a0 + kBlock);
    std::vector<State> states(a1 - a0);
    for (State& state : states) {
      for (Best* best : {&state.farthest, &state.nearest}) {
        std::fill_n(best->rank, kWidth, -std::numeric_limits<Acc>::infinity());
        std::fill_n(best->panel, kWidth, Index(-1));
      }
    }
    alignas(64) Acc products[kAnchors * kWidth];
    for (int64_t j = 0; j < panels_; j++) {
      for (int64_t a = a0; a < a1; a += kAnchors) {
        multiply_tile(panels + a / kWidth * D_ * kWidth + a % kWidth, panels + j * D_ * kWidth, products);
        for (int64_t i = a; i < std::min(a1, a + kAnchors); i++) {
          rank(products + (i - a) * kWidth, offsets + j * kWidth, codes() + j * kWidth, codes()[i], j, states[i - a0]);
        }
      }
    }
    for (int64_t a = a0; a < a1; a++) {
      finish(group, a, states[a - a0]);
    }
  }

  // products (kAnchors, kWidth) = inner products of the first kAnchors lanes of one panel with all of another.
  void multiply_tile(const Acc* anchors, const Acc* candidates, Acc* products) const {
    Vec sums[kAnchors][kVectors];
    c10::ForcedUnroll<kAnchors>{}([&](auto i) { sums[i][0] = sums[i][1] = Vec(0); });
    for (int64_t d = 0; d < D_; d++, anchors += kWidth, candidates += kWidth) {
      const Vec first = Vec::loadu(candidates), second = Vec::loadu(candidates + Vec::size());
      c10::ForcedUnroll<kAnchors>{}([&](auto i) {
        const Vec anchor(anchors[i]);
        sums[i][0] = at::vec::fmadd(anchor, first, sums[i][0]);
        sums[i][1] = at::vec::fmadd(anchor, second, sums[i][1]);
      });
    }
    c10::ForcedUnroll<kAnchors>{}([&](auto i) {
      sums[i][0].store(products + i * kWidth);
      sums[i][1].store(products + i * kWidth + Vec::size());
    });
  }

  // One anchor's inner products with a panel, ranked: up to a constant of the anchor |b|^2 - 2 ab, or -ab.
  void rank(
      const Acc* products, const Acc* offset, const Index* codes, Index code, int64_t panel, State& state) const {
    const Acc scale = cosine_ ? Acc(-1) : Acc(-2);
    const Index here = static_cast<Index>(panel);
    // Branchless, as the compiler needs it for vectors. A number beats only a smaller one, NaN beats any number: as
    // torch.max and torch.min have it.
    const auto keep = [here](bool eligible, Acc value, Best& best, int64_t lane) {
      const Acc old = best.rank[lane];
      const bool better = eligible & ((value > old) | ((value != value) & (old == old)));
      best.rank[lane] = better ? value : old;
      best.panel[lane] = better ? here : best.panel[lane];
    };
    for (int64_t lane = 0; lane < kWidth; lane++) {
      const Acc value = scale * products[lane] + offset[lane];
      const bool same = codes[lane] == code;
      keep(same, value, state.farthest, lane);
      keep(!same & (codes[lane] >= 0), -value, state.nearest, lane);
    }
  }

  // The best of all lanes, ties to the lowest index; `otherwise` where every rank was -inf.
  static Partner best_lane(const Best& best, int64_t otherwise) {
    Partner found{-std::numeric_limits<Acc>::infinity(), -1};
    for (int64_t lane = 0; lane < kWidth; lane++) {
      const Acc value = best.rank[lane];
      const int64_t index = best.panel[lane] * kWidth + lane;
      if (best.panel[lane] < 0) {
        continue;
      }
      const bool tie = value == found.rank || (value != value && found.rank != found.rank);
      const bool better = value > found.rank || (value != value && found.rank == found.rank);
      if (better || (tie && index < found.index)) {
        found = {value, index};
      }
    }
    return found.index < 0 ? Partner{found.rank, otherwise} : found;
  }

  void finish(int64_t group, int64_t a, const State& state) {
    // Overflow can leave every rank at -inf. Then any partner will do that has the right label: there is another label
    // at 0 or at second_, unless there is but one.
    const Partner positive = best_lane(state.farthest, a);
    const Partner negative = best_lane(state.nearest, second_ < 0 ? -1 : codes()[a] == 0 ? second_ : 0);
    const Acc far = distance(group, a, positive);
    const Acc near = negative.index < 0 ? std::numeric_limits<Acc>::infinity() : distance(group, a, negative);
    const Acc gap = far - near;
    const int64_t at = group * N_ + a;
    d_pos_.template mutable_data_ptr<Acc>()[at] = far;
    d_neg_.template mutable_data_ptr<Acc>()[at] = near;
    positive_.mutable_data_ptr<int64_t>()[at] = positive.index;
    negative_.mutable_data_ptr<int64_t>()[at] = negative.index;
    loss_.template mutable_data_ptr<Acc>()[at] = soft_ ? softplus(gap) : hinge(margin_ + gap);
  }

  // D(anchor, partner); NaN where the rank is, which the difference alone need not show.
  Acc distance(int64_t group, int64_t a, const Partner& partner) const {
    if (partner.rank != partner.rank) {
      return partner.rank;
    }
    constexpr int64_t kChains = 4;  // of sums, to hide the latency of fma
    const Acc *x = f_.row(group, a), *y = f_.row(group, partner.index);
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
    return cosine_ ? 1 - sum : std::sqrt(sum < kFloor ? static_cast<Acc>(kFloor) : sum);
  }

  static Acc hinge(Acc x) {
    return x < 0 ? Acc(0) : x;  // NaN stays
  }

  static Acc softplus(Acc x) {
    return x > 20 ? x : std::log1p(std::exp(x));  // as torch's
  }

  const int64_t G_, N_, D_, panels_;
  const Acc margin_;
  const bool soft_, cosine_;
  const Features<Acc> f_;
  const at::TensorOptions options_;
  const Tensor codes_;   // (panels * kWidth)
  int64_t second_ = -1;  // the first feature with a label other than the first's
  Tensor d_pos_, d_neg_, loss_, positive_, negative_;  // (G, N)
  Tensor common_;                                     // (G, D)
};

}  // namespace

Tensors5 batch_hard(const Tensor& features, const Tensor& labels, double margin, bool soft, bool cosine) {
  return features.scalar_type() == at::kDouble ? Mining<double>(features, labels, margin, soft, cosine).run()
                                               : Mining<float>(features, labels, margin, soft, cosine).run();
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
