// Sizes of one call of refine, and the chunks in which its kernels process the positions of a map.
//
// U of one clip, (D, P), is stored chunk by chunk, each chunk as a matrix (D, n).
#pragma once

#include <ATen/ops/full.h>

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "kernels.h"
#include "rows.h"

namespace rru {
namespace CPU_CAPABILITY {

struct Chunk {
  int64_t p0, n, ld;  // first position, number of positions (at most kMaxRow), n rounded up to kRowAlign
};

// Calls body(h, i, count) for each map row h that a chunk overlaps: positions chunk.p0 + i to chunk.p0 + i + count are
// in row h. At the paper's width, 8, count is a compile-time constant.
template <typename F>
inline void each_map_row(const Chunk& chunk, int64_t width, const F& body) {
  if (width == 8) {
    for (int64_t i = 0; i < chunk.n; i += 8) {
      body((chunk.p0 + i) / 8, i, std::integral_constant<int64_t, 8>());
    }
    return;
  }
  for (int64_t i = 0, end; i < chunk.n; i = end) {
    const int64_t h = (chunk.p0 + i) / width;
    end = std::min(chunk.n, (h + 1) * width - chunk.p0);
    body(h, i, end - i);
  }
}

struct Sizes {
  int64_t B, T, C, H, W, P, D, num_attn;
  int64_t num_chunks;
  int64_t first_step;         // the first frame that passes the gate: 0 with a state, else 1
  int64_t num_steps;          // frames from first_step on
  bool motion, raw;           // the gate's second input is M_t; its inputs are X_t and S_{t-1}
  bool first_segments_equal;  // A_t = M_t at the first step, since S_1 = X_1: one product with W_a + W_m is enough
  int64_t num_segments;       // gate inputs, each with C columns of W
  const int64_t* lengths;     // (B,), or null where every clip has T frames

  explicit Sizes(const RefineArguments& a)
      : B(a.x.size(0)),
        T(a.x.size(1)),
        C(a.x.size(2)),
        H(a.x.size(3)),
        W(a.x.size(4)),
        P(H * W),
        D(a.w.size(0)),
        num_attn(a.w_s1 ? a.w_s1->size(0) : 0),
        num_chunks((P + kMaxRow - 1) / kMaxRow),
        first_step(a.state_s ? 0 : 1),
        num_steps(T - first_step),
        motion(a.inputs == Inputs::appearance_motion),
        raw(a.inputs == Inputs::raw),
        first_segments_equal(motion && first_step == 1),
        num_segments(a.inputs == Inputs::appearance ? 1 : 2),
        lengths(a.lengths ? a.lengths->const_data_ptr<int64_t>() : nullptr) {}

  bool has_frame(int64_t clip, int64_t t) const {
    return t < (lengths == nullptr ? T : lengths[clip]);
  }

  bool segments_equal(int64_t t) const {
    return first_segments_equal && t == first_step;
  }

  // Of all products U = W V.
  int64_t multiplications() const {
    return B * T * D * C * num_segments * P;
  }

  Chunk chunk(int64_t q) const {
    const int64_t p0 = q * kMaxRow, n = std::min(kMaxRow, P - p0);
    return {p0, n, round_up(n, kRowAlign)};
  }

  // T W of eq. 9, per clip where lengths differ; broadcasts against (B, C, H).
  Tensor elements_per_strip(const RefineArguments& a, at::ScalarType dtype) const {
    return a.lengths ? a.lengths->to(dtype).mul(W).view({B, 1, 1}) : at::full({1}, T * W, dtype);
  }
};

}  // namespace CPU_CAPABILITY
}  // namespace rru
