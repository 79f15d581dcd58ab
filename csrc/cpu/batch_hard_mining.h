// Mining of batch_hard: the hardest positive and negative of an anchor, over panels of ranked candidates.
#pragma once

#include <limits>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "batch_hard_panels.h"

namespace rru {
namespace CPU_CAPABILITY {

// Lane indices as wide as Acc, so that one mask serves both.
template <typename Acc>
using LaneIndex = std::conditional_t<std::is_same_v<Acc, double>, int64_t, int32_t>;

// Labels of anchors and candidates as consecutive integers, in the candidates' order of appearance; -1 past the last
// one.
template <typename Acc>
class LabelCodes {
  using Code = LaneIndex<Acc>;

 public:
  // padded_size: the number of candidates' codes, at least as many as there are candidates.
  LabelCodes(const BatchHardArguments& a, int64_t padded_size) : candidates_(padded_size, Code(-1)) {
    std::unordered_map<int64_t, Code> seen;
    const auto encode = [&](const Tensor& labels, Code* codes) {
      const int64_t* values = labels.const_data_ptr<int64_t>();
      for (int64_t n = 0; n < labels.size(0); n++) {
        codes[n] = seen.try_emplace(values[n], static_cast<Code>(seen.size())).first->second;
      }
    };
    encode(a.candidate_labels(), candidates_.data());
    for (int64_t m = 0; m < a.candidate_labels().size(0); m++) {
      if (candidates_[m] == static_cast<Code>(first_.size())) {
        first_.push_back(m);
      }
    }
    if (a.gallery) {
      anchors_.resize(a.labels.size(0));
      encode(a.labels, anchors_.data());
    }
  }

  const Code* candidates() const {
    return candidates_.data();
  }
  Code anchor(int64_t n) const {
    return anchors_.empty() ? candidates_[n] : anchors_[n];
  }

  // The index of a candidate with the code; -1 if there is none.
  int64_t same(Code code) const {
    return code < static_cast<Code>(first_.size()) ? first_[code] : -1;
  }
  // The index of a candidate with another code; -1 if there is none.
  int64_t other(Code code) const {
    return code != 0 ? 0 : first_.size() > 1 ? first_[1] : -1;
  }

 private:
  std::vector<Code> candidates_, anchors_;  // the latter only with a gallery
  std::vector<int64_t> first_;              // for each code the first candidate that has it
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
