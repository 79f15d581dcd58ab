// Mining of batch_hard: the hardest positive and negative of an anchor, over panels of ranked candidates.
#pragma once

#include <limits>
#include <type_traits>
#include <unordered_map>

#include "batch_hard_panels.h"

namespace rru {
namespace CPU_CAPABILITY {

// Lane indices as wide as Acc, so that one mask serves both.
template <typename Acc>
using LaneIndex = std::conditional_t<std::is_same_v<Acc, double>, int64_t, int32_t>;

// Labels as consecutive integers from 0, in order of appearance; -1 past the last feature.
template <typename Acc>
class LabelCodes {
  using Code = LaneIndex<Acc>;

 public:
  // labels: int64, contiguous; padded_size: the number of codes, at least as many as labels.
  LabelCodes(const Tensor& labels, int64_t padded_size) : codes_(Array<Code>::empty({padded_size})) {
    const int64_t size = labels.size(0);
    const int64_t* values = labels.const_data_ptr<int64_t>();
    std::unordered_map<int64_t, Code> seen;
    for (int64_t n = 0; n < size; n++) {
      codes_()[n] = seen.try_emplace(values[n], static_cast<Code>(seen.size())).first->second;
      if (second_ < 0 && codes_()[n] > 0) {
        second_ = n;
      }
    }
    std::fill(codes_() + size, codes_() + padded_size, Code(-1));
  }

  const Code* data() const {
    return codes_();
  }

  // The index of a feature with another label than feature n's; -1 if all have the same.
  int64_t index_of_other(int64_t n) const {
    return second_ < 0 ? -1 : codes_()[n] == 0 ? second_ : 0;
  }

 private:
  const Array<Code> codes_;
  int64_t second_ = -1;  // the first feature with a label other than the first's
};

template <typename Acc>
struct Partner {
  Acc rank;
  int64_t index;
};

// The hardest partners of one anchor among the candidates seen so far. A rank is -2 ab + |b|^2, which is the squared
// distance up to a constant of the anchor, or -ab for cosine.
template <typename Acc>
class HardestPartners {
  using Index = LaneIndex<Acc>;
  static constexpr int64_t kN = kWidth<Acc>;

 public:
  HardestPartners() {
    for (Best* best : {&farthest_, &nearest_}) {
      std::fill_n(best->rank, kN, -std::numeric_limits<Acc>::infinity());
      std::fill_n(best->panel, kN, Index(-1));
    }
  }

  // Adds the candidates of one panel: their inner products with the anchor, offsets and label codes; `code` is the
  // anchor's.
  void add(const Acc* products, const Acc* offsets, const Index* codes, Index code, int64_t panel, bool cosine) {
    const Acc scale = cosine ? Acc(-1) : Acc(-2);
    const Index index = static_cast<Index>(panel);
    // Branchless, so that the compiler vectorizes it. A number beats only a smaller one, and NaN beats any number, as
    // in torch.max and torch.min.
    const auto update = [index](bool eligible, Acc value, Best& best, int64_t lane) {
      const Acc old = best.rank[lane];
      const bool better = eligible & ((value > old) | ((value != value) & (old == old)));
      best.rank[lane] = better ? value : old;
      best.panel[lane] = better ? index : best.panel[lane];
    };
    for (int64_t lane = 0; lane < kN; lane++) {
      const Acc value = scale * products[lane] + offsets[lane];
      const bool same = codes[lane] == code;
      update(same, value, farthest_, lane);
      update(!same & (codes[lane] >= 0), -value, nearest_, lane);
    }
  }

  // The hardest of all lanes; index `fallback` where every rank is -inf.
  Partner<Acc> positive(int64_t fallback) const {
    return best_lane(farthest_, fallback);
  }
  Partner<Acc> negative(int64_t fallback) const {
    return best_lane(nearest_, fallback);
  }

 private:
  // The best rank seen by each lane, and the panel it was in; -1 for none.
  struct alignas(64) Best {
    Acc rank[kN];
    Index panel[kN];
  };

  // Ties go to the lowest index.
  static Partner<Acc> best_lane(const Best& best, int64_t fallback) {
    Partner<Acc> found{-std::numeric_limits<Acc>::infinity(), -1};
    for (int64_t lane = 0; lane < kN; lane++) {
      const Acc value = best.rank[lane];
      const int64_t index = best.panel[lane] * kN + lane;
      if (best.panel[lane] < 0) {
        continue;
      }
      const bool tie = value == found.rank || (value != value && found.rank != found.rank);
      const bool better = value > found.rank || (value != value && found.rank == found.rank);
      if (better || (tie && index < found.index)) {
        found = {value, index};
      }
    }
    return found.index < 0 ? Partner<Acc>{found.rank, fallback} : found;
  }

  Best farthest_, nearest_;  // with the anchor's label, and without it: there ranks are negated, so that more is nearer
};

}  // namespace CPU_CAPABILITY
}  // namespace rru
