// One CTA's part of a clip, as the phases of a frame see it: where its numbers are, and what a launch is made of.
#pragma once

#include "refine_layout.h"

namespace rru::RRU_PLATFORM {

// What follows from a call's sizes. Kernels read it from constant memory: none of it takes a register.
struct Plan {
  PackedLayout layout;
  int log2_ctas, log2_rows;  // of a cluster; of U's rows that a CTA owns
  int run_rows;              // rows of strips that a thread's run of positions touches, at most
  int run_column;            // column of a second thread's first position
  int strips;                // offset in shared memory
  float per_position, per_d;
  bool vector;               // X is read, and S written, 16 bytes at a time
  bool w_c_shared;           // w_c is kept in shared memory, else read from L2 at every frame
};

struct Call {
  RefineEval a;
  Plan plan;
};

// Inboxes: parts of U for this CTA's rows, and pooled sums from all CTAs.
constexpr int kU = 0, kV = 1;

// Shared memory, offsets in bytes. After it come w_c, if it is shared, and the strips.
template <class C>
struct Shared {
  static constexpr int kW = 0;
  static constexpr int kA = kW + 16 * C::kSlicesShared * C::kSliceUnits;
  static constexpr int kInboxU = kA + C::kChannels * C::kStride * C::kElement;
  static constexpr int kInboxV = kInboxU + 4 * C::kD * C::kP;
  static constexpr int kVectors = kInboxV + 4 * (kMaxCluster * C::kP + C::kD);
  static_assert(kInboxU % (4 * C::kP) == 0);
  static constexpr int kWc = kVectors + 4 * (2 * C::kP + C::kD + C::kAttn + C::kThreads / 32 * C::kP);
};

DEVICE float relu(float v) {
  return v < 0.f ? 0.f : v;  // NaN stays
}

template <Operands OPERANDS, int WARPS, int TILES>
struct Clip {
  using C = Cut<OPERANDS, WARPS, TILES>;
  using At = Shared<C>;

  DEVICE explicit Clip(const Call& call)
      : a(call.a),
        plan(call.plan),
        t(thread()),
        lane(t % 32),
        warp(t / 32),
        rank(dev::rank()),
        index(cta() >> plan.log2_ctas),
        channel(rank * C::kChannels + t / 2),
        position(t % 2 * C::kRun) {}

  DEVICE int ctas() const {
    return 1 << plan.log2_ctas;
  }
  DEVICE int rows() const {
    return 1 << plan.log2_rows;
  }

  DEVICE const uint4* packed(int offset) const {
    return static_cast<const uint4*>(a.packed) + offset;
  }

  // Positions of this thread's run that there are; 0 for a channel that is not there.
  DEVICE int count() const {
    const int left = a.positions - position;
    return channel >= a.channels || left < 0 ? 0 : left < C::kRun ? left : C::kRun;
  }

  // Offset of this thread's run in frame t of contiguous maps (B, F, C, P).
  DEVICE int64_t run_offset(int t, int frames) const {
    return ((static_cast<int64_t>(index) * frames + t) * a.channels + channel) * a.positions + position;
  }

  DEVICE int64_t u_offset(int t, int row, int p) const {
    return ((static_cast<int64_t>(t - a.u_first) * a.clips + index) * a.d + row) * a.positions + p;
  }

  // Offset of 2 or 4 positions of a row that this CTA owns, in a source's part of U. Swizzled by tiles of 8 positions,
  // so that neither pushes nor reads conflict on banks.
  DEVICE int inbox_u(int source, int own_row, int p) const {
    return At::kInboxU + 4 * (((source << plan.log2_rows) + own_row) * C::kP + (p ^ own_row % TILES * 8));
  }
  DEVICE int inbox_v(int source) const {
    return At::kInboxV + 4 * source * (C::kP + rows());
  }

  DEVICE float* pooled() const {  // (kP,) mean of Y over gate channels
    return shared_at<float>(At::kVectors);
  }
  DEVICE float* means() const {  // (kD,) mean of Y over positions
    return pooled() + C::kP;
  }
  DEVICE float* hidden() const {  // (kAttn,)
    return means() + C::kD;
  }
  DEVICE float* z_s() const {  // (kP,)
    return hidden() + C::kAttn;
  }
  DEVICE float* partials() const {  // (WARPS, kP) sums of Y over a warp's rows
    return z_s() + C::kP;
  }
  DEVICE float& strip(int run_row) const {
    return shared_at<float>(plan.strips)[(t % 2 * plan.run_rows + run_row) * C::kChannels + t / 2];
  }

  const RefineEval& a;
  const Plan& plan;
  const int t, lane, warp;      // thread of the CTA, and its place in it
  const int rank;               // of the CTA in its cluster
  const int index;              // of the clip
  const int channel, position;  // of this thread's run of positions: two threads have a channel
  float z_c = 1.f;              // channel attention logit of this thread's channel
};

}  // namespace rru::RRU_PLATFORM
