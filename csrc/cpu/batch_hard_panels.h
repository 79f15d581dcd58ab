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

// Finds a vector (D,) that most of a group's features share, or 0: subtracting it leaves distances as they are, and
// ranks no longer cancel. It is the median of three medians of three features, used where its square exceeds 16 times
// that of their range: outliers neither shift nor hide it, and NaN compares false.
template <typename Acc>
inline void find_shared_vector(const Features<Acc>& features, int64_t group, Acc* shared) {
  using Vec = at::vec::Vectorized<Acc>;
  const Acc* rows[9];
  for (int64_t i = 0; i < 9; i++) {
    rows[i] = features.row(group, i * features.size / 9);
  }
  const auto median = [](Vec a, Vec b, Vec c) {
    return at::vec::maximum(at::vec::minimum(a, b), at::vec::minimum(at::vec::maximum(a, b), c));
  };
  Vec range2(0), shared2(0);
  for (int64_t d = 0; d < features.depth; d += Vec::size()) {
    const int64_t count = std::min<int64_t>(Vec::size(), features.depth - d);
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
  if (!(16 * reduce_add<Acc>(range2) < reduce_add<Acc>(shared2))) {
    std::fill_n(shared, features.depth, Acc(0));
  }
}

// to (columns, kWidth) = the transpose of `lanes` rows, `stride` apart; elements past the last row are not written.
template <typename Acc>
inline void transpose(const Acc* from, int64_t stride, int64_t lanes, int64_t columns, Acc* to) {
  constexpr int64_t kN = kWidth<Acc>, kBlock = 16;
  for (int64_t n = 0; n < lanes; n += kBlock) {
    for (int64_t d = 0; d < columns; d += kBlock) {
      const int64_t rows = std::min(kBlock, lanes - n), width = std::min(kBlock, columns - d);
      const Acc* source = from + n * stride + d;
      Acc* target = to + d * kN + n;
      if constexpr (std::is_same_v<Acc, float>) {
        if (rows == kBlock && width == kBlock) {
          at::vec::transpose_mxn<float, kBlock, kBlock>(source, stride, target, kN);
        } else {
          at::vec::transpose_mxn<float>(source, stride, target, kN, static_cast<int>(rows), static_cast<int>(width));
        }
      } else {
        for (int64_t i = 0; i < rows; i++) {
          for (int64_t j = 0; j < width; j++) {
            target[j * kN + i] = source[i * stride + j];
          }
        }
      }
    }
  }
}

// Packs features n0 to n0 + kWidth, zero past the last one: for cosine normalized, given the group's norms (N,), else
// (norms null) less its shared vector (D,). `offsets`, unless null, gets what each adds to a rank: |b|^2, summed in the
// order of the inner products, or 0 for cosine.
template <typename Acc>
inline void pack(
    const Features<Acc>& features, int64_t group, int64_t n0, const Acc* shared, const Acc* norms, Acc* panel,
    Acc* offsets) {
  using Vec = at::vec::Vectorized<Acc>;
  constexpr int64_t kN = kWidth<Acc>, kDepth = 64;  // rows of a panel that stay in the first-level cache
  const int64_t lanes = std::min(kN, features.size - n0), depth = features.depth;
  Acc inverse[kN] = {};
  for (int64_t lane = 0; norms && lane < lanes; lane++) {
    inverse[lane] = Length<Acc>(norms[n0 + lane]).inverse;
  }
  const Vec zero(0), scales[kVectors] = {Vec::loadu(inverse), Vec::loadu(inverse + Vec::size())};
  Vec sums[kVectors] = {zero, zero};
  const Acc* rows = features.row(group, n0);
  const int64_t stride = lanes > 1 ? features.row(group, n0 + 1) - rows : 0;
  for (int64_t d0 = 0; d0 < depth; d0 += kDepth) {
    const int64_t columns = std::min(kDepth, depth - d0);
    if (lanes < kN) {
      std::fill_n(panel + d0 * kN, columns * kN, Acc(0));
    }
    transpose(rows + d0, stride, lanes, columns, panel + d0 * kN);
    for (int64_t d = d0; d < d0 + columns; d++) {
      c10::ForcedUnroll<kVectors>{}([&](auto v) {
        Acc* values = panel + d * kN + v * Vec::size();
        const Vec loaded = Vec::loadu(values);
        // Infinity becomes NaN.
        const Vec packed = norms ? loaded * scales[v] : at::vec::fmadd(loaded, zero, loaded - Vec(shared[d]));
        packed.store(values);
        sums[v] = at::vec::fmadd(packed, packed, sums[v]);
      });
    }
  }
  for (int64_t v = 0; offsets && v < kVectors; v++) {
    (norms ? zero : sums[v]).store(offsets + v * Vec::size());
  }
}

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
