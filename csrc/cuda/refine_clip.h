// One CTA's part of a clip, as the phases of a frame see it: where its numbers are, and what a launch is made of.
#pragma once

#include "refine_layout.h"

namespace rru::RRU_PLATFORM {

// What follows from a call's sizes. Kernels read it from constant memory: none of it takes a register.
struct Plan {
  PackedLayout layout;
  int log2_ctas, log2_rows;  // of a cluster; of U's rows that a CTA owns
  float per_position, per_d;
};

// Inboxes: rows of U or dU, and sums from all CTAs.
constexpr int kU = 0, kV = 1;

// Vectors in shared memory, offsets in floats.
template <class C>
struct Vectors {
  static constexpr int kPooled = 0;                                        // (kP,)
  static constexpr int kMeans = kPooled + C::kP;                           // (kD,)
  static constexpr int kHidden = kMeans + C::kD;                           // (kAttn,)
  static constexpr int kZs = kHidden + C::kAttn;                           // (kP,)
  static constexpr int kPartials = kZs + C::kP;                            // (WARPS, kP)
  static constexpr int kEnd = kPartials + C::kWarps * C::kP;
};

// CALL has a call's arguments `a` and its `plan`; MEMORY offsets in shared memory, in bytes: of inbox U, inbox V and
// the vectors, kInboxU, kInboxV and kVectors.
template <class CALL, class CUT, class MEMORY>
struct Clip {
  using C = CUT;
  using At = MEMORY;

  DEVICE explicit Clip(const CALL& call, int first_clip)
      : a(call.a),
        plan(call.plan),
        t(thread()),
        lane(t % 32),
        warp(t / 32),
        rank(dev::rank()),
        index(first_clip + (cta() >> plan.log2_ctas)) {}

  DEVICE int ctas() const {
    return 1 << plan.log2_ctas;
  }
  DEVICE int rows() const {
    return 1 << plan.log2_rows;
  }

  DEVICE const uint4* packed(int offset) const {
    return static_cast<const uint4*>(a.packed) + offset;
  }

  // Offset of a row of U, (N, B, D, P), from a position.
  DEVICE int64_t u_offset(int step, int row, int p) const {
    return ((static_cast<int64_t>(step) * a.clips + index) * a.d + row) * a.positions + p;
  }

  // Offset of 2 or 4 positions of a row that this CTA owns, in a source's part of U. Swizzled by tiles of 8 positions,
  // so that neither pushes nor reads conflict on banks.
  DEVICE int inbox_u(int source, int own_row, int p) const {
    return At::kInboxU + 4 * (((source << plan.log2_rows) + own_row) * C::kP + (p ^ own_row % C::kTiles * 8));
  }

  DEVICE float* vector(int offset) const {
    return shared_at<float>(At::kVectors) + offset;
  }
  DEVICE float* pooled() const {  // (kP,) mean of Y over gate channels
    return vector(Vectors<C>::kPooled);
  }
  DEVICE float* means() const {  // (kD,) mean of Y over positions
    return vector(Vectors<C>::kMeans);
  }
  DEVICE float* hidden() const {  // (kAttn,)
    return vector(Vectors<C>::kHidden);
  }
  DEVICE float* z_s() const {  // (kP,)
    return vector(Vectors<C>::kZs);
  }
  DEVICE float* partials() const {  // (WARPS, kP) a warp's sums by position
    return vector(Vectors<C>::kPartials);
  }

  const decltype(CALL::a)& a;
  const decltype(CALL::plan)& plan;
  const int t, lane, warp;  // thread of the CTA, and its place in it
  const int rank;           // of the CTA in its cluster
  const int index;          // of the clip
};

DEVICE float relu(float v) {
  return v < 0.f ? 0.f : v;  // NaN stays
}

DEVICE float dot(const uint4& w, const float4& v) {
  return uint_as_float(w.x) * v.x + uint_as_float(w.y) * v.y + uint_as_float(w.z) * v.z + uint_as_float(w.w) * v.w;
}

// A unit of packed weights, 4 in fp32 or 8 in 16 bits, times a vector.
template <class C, bool FLOAT>
DEVICE float dot_unit(const uint4& w, const float4* v) {
  if constexpr (FLOAT) {
    return dot(w, v[0]);
  } else {
    constexpr Operands O = C::kOperands;
    const float4 first = v[0], second = v[1];
    float sum = low_half<O>(w.x) * first.x + high_half<O>(w.x) * first.y;
    sum += low_half<O>(w.y) * first.z + high_half<O>(w.y) * first.w;
    sum += low_half<O>(w.z) * second.x + high_half<O>(w.z) * second.y;
    return sum + (low_half<O>(w.w) * second.z + high_half<O>(w.w) * second.w);
  }
}

}  // namespace rru::RRU_PLATFORM
