// What the launchers of refine's kernels share: plans and limits.
#pragma once

#include <bit>
#include <string>

#include "refine_clip.h"

namespace rru::RRU_PLATFORM {

template <class C>
void set_plan(Plan& plan, const RefineSizes& a) {
  const int n = ctas_of(a.channels, C::kChannels);
  plan.layout = packed_layout<C>(a.channels, a.w_c == Dtype::float32);
  plan.log2_ctas = std::countr_zero(static_cast<unsigned>(n));
  plan.log2_rows = std::countr_zero(static_cast<unsigned>(C::kD / n));
  plan.per_position = 1 / static_cast<float>(a.positions);
  plan.per_d = 1 / static_cast<float>(a.d);
}

inline std::string over(const char* name, int value, int limit) {
  return value <= limit ? "" : name + (" of " + std::to_string(value)) + ", at most " + std::to_string(limit);
}

// The size that no cut carries, or "".
inline std::string too_large(const RefineSizes& a) {
  for (const std::string& reason :
       {over("C", a.channels, kMaxChannels), over("H * W", a.positions, kMaxPositions), over("D", a.d, kMaxD),
        over("A", a.num_attn, kMaxAttn)}) {
    if (!reason.empty()) {
      return reason;
    }
  }
  return "";
}

}  // namespace rru::RRU_PLATFORM
