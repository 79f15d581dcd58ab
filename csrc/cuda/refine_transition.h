// The transition's product: this CTA's part of U = W A, whose rows it pushes to the CTAs that own them.
#pragma once

#include "refine_product.h"

namespace rru::RRU_PLATFORM {

// Pushes a part of U, rows [32 warp, + 32) and tiles of 8 positions from FIRST, to the owners of its rows.
template <int FIRST, class CLIP, int COUNT>
DEVICE void push_rows(const CLIP& clip, const float (&part)[2][COUNT][4]) {
  UNROLL for (int m = 0; m < 2; m++) {
    UNROLL for (int i = 0; i < 2; i++) {
      const int row = 32 * clip.warp + 16 * m + 8 * i + clip.lane / 4;
      const Peer owner = peer(row >> clip.plan.log2_rows);
      const int offset = clip.inbox_u(clip.rank, row & (clip.rows() - 1), clip.lane % 4 * 2);
      UNROLL for (int tile = 0; tile < COUNT; tile++) {
        if (8 * (FIRST + tile) < clip.a.positions) {  // by exclusive or: a tile's 32 bytes are aligned
          push(owner, offset ^ 32 * (FIRST + tile), float2{part[m][tile][2 * i], part[m][tile][2 * i + 1]}, kU);
        }
      }
    }
  }
}

template <class CLIP>
DEVICE void expect_rows(const CLIP& clip) {
  if (clip.t == 0) {
    inbox_arm(kU, CLIP::C::kD * ((clip.a.positions + 7) / 8 * 8) * 4, "parts of U are expected");
  }
}

// With W on chip, CLIP::At::kW. Arrays are registers: loops over them are unrolled.
template <class CLIP>
class ResidentTransition {
  using C = typename CLIP::C;
  using At = typename CLIP::At;

 public:
  // Brings the weights on chip.
  DEVICE explicit ResidentTransition(const CLIP& clip) : clip_(clip) {
    const uint4* w = clip_.packed(clip_.plan.layout.w) + clip_.rank * C::kSlices * C::kSliceUnits;
    UNROLL for (int k = 0; k < C::kSlicesFirst && !C::kFma; k++) {
      UNROLL for (int m = 0; m < 2; m++) {
        w_[k][m] = load_const(w + (k * 2 * C::kWarps + 2 * clip_.warp + m) * 32 + clip_.lane);
      }
    }
    for (int i = clip_.t; i < C::kSlicesShared * C::kSliceUnits; i += C::kThreads) {
      shared_at<uint4>(At::kW)[i] = load_const(w + C::kSlicesFirst * C::kSliceUnits + i);
    }
  }

  // Multiplies and pushes half of the positions after the other.
  DEVICE void multiply() {
    multiply_half<0>();
    multiply_half<C::kTiles / 2>();
    expect_rows(clip_);
  }

 private:
  template <int FIRST>
  DEVICE void multiply_half() {
    float part[2][C::kTiles / 2][4] = {};
    if constexpr (C::kFma) {
      const auto multiply = [&](int k, auto w) {
        multiply_slice_fp32<C>(part, At::kA, k, 8 * FIRST, clip_.lane, 32 * clip_.warp, C::kD, w);
      };
      const uint4* w = clip_.packed(clip_.plan.layout.w) + clip_.rank * C::kSlices * C::kSliceUnits;
      for (int k = 0; k < C::kSlicesFirst; k++) {
        multiply(k, [&](int i) { return load_const(w + k * C::kSliceUnits + i); });
      }
      for (int k = C::kSlicesFirst; k < C::kSlices; k++) {
        const uint4* own = shared_at<uint4>(At::kW) + (k - C::kSlicesFirst) * C::kSliceUnits;
        multiply(k, [&](int i) { return own[i]; });
      }
    } else {
      UNROLL for (int k = 0; k < C::kSlices; k++) {
        uint4 w[2];
        UNROLL for (int m = 0; m < 2; m++) {
          if (k < C::kSlicesFirst) {
            w[m] = w_[k < C::kSlicesFirst ? k : 0][m];
          } else {
            const int tile = (k - C::kSlicesFirst) * 2 * C::kWarps + 2 * clip_.warp + m;
            w[m] = shared_at<uint4>(At::kW)[tile * 32 + clip_.lane];
          }
        }
        multiply_slice<C>(part, w, At::kA, k, 8 * FIRST, clip_.lane);
      }
    }
    push_rows<FIRST>(clip_, part);
  }

  const CLIP& clip_;
  uint4 w_[C::kSlicesFirst][2];
};

// With W streamed from L2 into registers, a few slices ahead: more channels than shared memory has room for.
template <class CLIP>
class StreamedTransition {
  using C = typename CLIP::C;
  using At = typename CLIP::At;
  static constexpr int kRing = C::kSlices < C::kAhead ? C::kSlices : C::kAhead;
  static_assert(C::kSlices % kRing == 0);

 public:
  DEVICE explicit StreamedTransition(const CLIP& clip) : clip_(clip) {}

  DEVICE void multiply() {
    float part[2][C::kTiles][4] = {};
    const uint4* w = clip_.packed(clip_.plan.layout.w) + clip_.rank * C::kSlices * C::kSliceUnits;
    if constexpr (C::kFma) {
      NO_UNROLL for (int k = 0; k < C::kSlices; k++) {
        multiply_slice_fp32<C>(part, At::kA, k, 0, clip_.lane, 32 * clip_.warp, C::kD, [&](int i) {
          return load_const(w + k * C::kSliceUnits + i);
        });
      }
    } else {
      w += 64 * clip_.warp + clip_.lane;
      uint4 ring[kRing][2];
      UNROLL for (int k = 0; k < kRing; k++) {
        load_slice(ring[k], w, k);
      }
      NO_UNROLL for (int k = 0; k < C::kSlices; k += kRing) {
        UNROLL for (int i = 0; i < kRing; i++) {
          multiply_slice<C>(part, ring[i], At::kA, k + i, 0, clip_.lane);
          load_slice(ring[i], w, k + i + kRing);  // also past the last one: a condition would delay it
          fence_schedule();
        }
      }
    }
    push_rows<0>(clip_, part);
    expect_rows(clip_);
  }

 private:
  DEVICE static void load_slice(uint4 (&w)[2], const uint4* from, int k) {
    UNROLL for (int m = 0; m < 2; m++) {
      w[m] = load(from + k * C::kSliceUnits + 32 * m);
    }
  }

  const CLIP& clip_;
};

}  // namespace rru::RRU_PLATFORM
