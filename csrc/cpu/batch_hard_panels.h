// Panels of features for the matrix products of batch_hard's mining.
//
// A panel, (D, kWidth), is the transpose of kWidth neighboring features, and serves as both operands: anchors are
// broadcast from one panel, candidates loaded as vectors from another.
#pragma once

#include <c10/util/Unroll.h>

#include <algorithm>

#include "batch_hard.h"
#include "rows.h"

namespace rru {
namespace CPU_CAPABILITY {

// A micro-tile has kAnchors by kVectors vectors of candidates. Its sums fill half the registers, enough to hide the
// latency of fma.
#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t kAnchors = 8;
#else
constexpr int64_t kAnchors = 4;
#endif
constexpr int64_t kVectors = 2;

template <typename Acc>
constexpr int64_t kWidth = kVectors * at::vec::Vectorized<Acc>::size();

// Storage for the panels of some groups, and for what each candidate adds to the rank.
template <typename Acc>
struct Panels {
  const Array<Acc> values, offsets;  // (groups, panels, D, kWidth), (groups, panels, kWidth)

  Panels(int64_t groups, int64_t panels, int64_t depth)
      : values(Array<Acc>::empty({groups, panels, depth, kWidth<Acc>})),
        offsets(Array<Acc>::empty({groups, panels, kWidth<Acc>})) {}
};

template <typename Acc>
class PanelPacker {
  using Vec = at::vec::Vectorized<Acc>;
  static constexpr int64_t kN = kWidth<Acc>;

 public:
  PanelPacker(const BatchHardArguments& a, const Features<Acc>& features)
      : N_(a.features.size(1)),
        D_(a.features.size(2)),
        cosine_(a.cosine),
        features_(features),
        shared_(Array<Acc>::empty({a.features.size(0), D_})) {}

  // Finds the vector that most of a group's features share, or 0: subtracting it leaves distances as they are, and the
  // rank no longer cancels. It is the median of three medians of three features, used where its square exceeds 16 times
  // that of their range: outliers neither shift nor hide it, and NaN compares false.
  void find_shared_vector(int64_t group) const {
    Acc* shared = shared_(group);
    const Acc* rows[9];
    for (int64_t i = 0; i < 9; i++) {
      rows[i] = features_.row(group, i * N_ / 9);
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
      middle.store(shared + d, count);
      range2 = at::vec::fmadd(range, range, range2);
      shared2 = at::vec::fmadd(middle, middle, shared2);
    }
    if (cosine_ || !(16 * reduce_add<Acc>(range2) < reduce_add<Acc>(shared2))) {
      std::fill_n(shared, D_, Acc(0));
    }
  }

  // Packs one panel, zero past the last feature, and its offsets: |b|^2, summed in the order of the inner products, or
  // 0 for cosine.
  void pack(int64_t group, int64_t index, Acc* panel, Acc* offsets) const {
    const int64_t n0 = index * kN, n = std::min(kN, N_ - n0);
    constexpr int64_t kDepth = 64;  // transposed within the first-level cache
    const Acc* shared = shared_(group);
    for (int64_t d0 = 0; d0 < D_; d0 += kDepth) {
      for (int64_t lane = 0; lane < n; lane++) {
        const Acc* row = features_.row(group, n0 + lane);
        for (int64_t d = d0; d < std::min(D_, d0 + kDepth); d++) {
          panel[d * kN + lane] = row[d] - shared[d] + 0 * row[d];  // infinity becomes NaN
        }
      }
    }
    for (int64_t d = 0; n < kN && d < D_; d++) {
      std::fill(panel + d * kN + n, panel + (d + 1) * kN, Acc(0));
    }
    Vec sums[kVectors] = {Vec(0), Vec(0)};
    for (int64_t d = 0; !cosine_ && d < D_; d++) {
      for (int64_t v = 0; v < kVectors; v++) {
        const Vec values = Vec::loadu(panel + d * kN + v * Vec::size());
        sums[v] = at::vec::fmadd(values, values, sums[v]);
      }
    }
    for (int64_t v = 0; v < kVectors; v++) {
      sums[v].store(offsets + v * Vec::size());
    }
  }

 private:
  const int64_t N_, D_;
  const bool cosine_;
  const Features<Acc>& features_;
  const Array<Acc> shared_;  // (G, D)
};

// products (kAnchors, kWidth) = inner products of the first kAnchors lanes of one panel with all lanes of another.
template <typename Acc>
inline void multiply_tile(int64_t depth, const Acc* anchors, const Acc* candidates, Acc* products) {
  using Vec = at::vec::Vectorized<Acc>;
  constexpr int64_t kN = kWidth<Acc>;
  Vec sums[kAnchors][kVectors];
  c10::ForcedUnroll<kAnchors>{}([&](auto i) { sums[i][0] = sums[i][1] = Vec(0); });
  for (int64_t d = 0; d < depth; d++, anchors += kN, candidates += kN) {
    const Vec first = Vec::loadu(candidates), second = Vec::loadu(candidates + Vec::size());
    c10::ForcedUnroll<kAnchors>{}([&](auto i) {
      const Vec anchor(anchors[i]);
      sums[i][0] = at::vec::fmadd(anchor, first, sums[i][0]);
      sums[i][1] = at::vec::fmadd(anchor, second, sums[i][1]);
    });
  }
  c10::ForcedUnroll<kAnchors>{}([&](auto i) {
    sums[i][0].store(products + i * kN);
    sums[i][1].store(products + i * kN + Vec::size());
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
