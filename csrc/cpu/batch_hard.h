// Features and distances of batch_hard, forward and backward: G groups (strips) of features of width D.
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/Unroll.h>

#include <cmath>
#include <limits>
#include <optional>

#include "array.h"
#include "kernels.h"
#include "rows.h"

namespace rru {
namespace CPU_CAPABILITY {

// Euclidean distances are sqrt(max(d2, kMinDistance2)). Up to kMinDistance, that floor with rounding, their gradient
// is 0: coincident points have gradient 0.
constexpr double kMinDistance2 = 1e-12;
constexpr double kMinDistance = 1e-6 * (1 + 1e-6);

// Vectors are normalized as f / max(|f|, kMinNorm).
constexpr double kMinNorm = 1e-12;

// The sum of term(d, count) over vectors of a row of length D, in four chains to hide the latency of fma: term adds its
// vector to the sum it gets.
template <typename Acc, typename F>
inline Acc sum_over_row(int64_t depth, const F& add) {
  using Vec = at::vec::Vectorized<Acc>;
  constexpr int64_t kChains = 4;
  Vec sums[kChains] = {Vec(0), Vec(0), Vec(0), Vec(0)};
  int64_t d = 0;
  for (; d + kChains * Vec::size() <= depth; d += kChains * Vec::size()) {
    c10::ForcedUnroll<kChains>{}([&](auto i) { sums[i] = add(sums[i], d + i * Vec::size(), Vec::size()); });
  }
  for (; d < depth; d += Vec::size()) {
    sums[0] = add(sums[0], d, std::min<int64_t>(Vec::size(), depth - d));
  }
  return reduce_add<Acc>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// Features (G, N, D) as rows of Acc: copied only where the dtype differs or the last dimension is strided.
template <typename Acc>
class Features {
  using Vec = at::vec::Vectorized<Acc>;

 public:
  explicit Features(const Tensor& features)
      : size(features.size(1)),
        depth(features.size(2)),
        tensor_(in_rows(features)),
        data_(tensor_.const_data_ptr<Acc>()),
        group_stride_(tensor_.stride(0)),
        row_stride_(tensor_.stride(1)) {}

  const int64_t size, depth;  // N, D

  const Acc* row(int64_t group, int64_t n) const {
    return data_ + group * group_stride_ + n * row_stride_;
  }

  // |f| of every feature, (G, N).
  Array<Acc> norms() const {
    const int64_t groups = tensor_.size(0);
    const auto found = Array<Acc>::empty({groups, size});
    constexpr int64_t kGrain = 1 << 15;  // elements; fewer are not worth a thread
    at::parallel_for(0, groups * size, std::max<int64_t>(1, kGrain / depth), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) {
        const Acc* values = row(i / size, i % size);
        found()[i] = std::sqrt(sum_over_row<Acc>(depth, [&](Vec sum, int64_t d, int64_t count) {
          const Vec v = Vec::loadu(values + d, count);
          return at::vec::fmadd(v, v, sum);
        }));
      }
    });
    return found;
  }

 private:
  static Tensor in_rows(const Tensor& features) {
    const auto dtype = Array<Acc>::kDtype;
    if (features.scalar_type() == dtype && (features.stride(2) == 1 || features.size(2) == 1)) {
      return features;
    }
    return at::empty(features.sizes(), dtype).copy_(features);
  }

  const Tensor tensor_;
  const Acc* const data_;
  const int64_t group_stride_, row_stride_;
};

// The features of one call, G groups (strips) of N anchors and M candidates of width D, and their norms for cosine.
template <typename Acc>
struct Batch {
  const int64_t G, N, M, D;
  const bool cosine;
  const Features<Acc> anchors;
  const std::optional<Features<Acc>> gallery;
  const Features<Acc>& candidates;          // the gallery, or the anchors themselves
  const Array<Acc> norms, candidate_norms;  // (G, N), (G, M); for cosine only

  explicit Batch(const BatchHardArguments& a)
      : G(a.features.size(0)),
        N(a.features.size(1)),
        M(a.candidates().size(1)),
        D(a.features.size(2)),
        cosine(a.cosine),
        anchors(a.features),
        gallery(a.gallery ? std::make_optional<Features<Acc>>(*a.gallery) : std::nullopt),
        candidates(gallery ? *gallery : anchors),
        norms(cosine ? anchors.norms() : Array<Acc>()),
        candidate_norms(cosine && gallery ? gallery->norms() : norms) {}
  Batch(const Batch&) = delete;  // `candidates` refers to another member
};

// A vector's length and what follows from it for the cosine. Vectors shorter than kMinNorm do not reach length 1, and
// those whose square overflows become 0.
template <typename Acc>
struct Length {
  Acc inverse;     // 1 / max(|f|, kMinNorm); NaN stays NaN
  Acc square;      // of the normalized vector: 1, but for the vectors above
  bool projected;  // the gradient has no part along the vector

  explicit Length(Acc norm) {
    const bool is_short = norm <= Acc(kMinNorm), overflows = norm == std::numeric_limits<Acc>::infinity();
    inverse = 1 / (is_short ? Acc(kMinNorm) : norm);
    square = is_short ? norm * inverse * (norm * inverse) : overflows ? Acc(0) : Acc(1);
    projected = !is_short && !overflows;
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace rru
