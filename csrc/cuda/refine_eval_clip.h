// One CTA's part of a clip in eval mode: two threads have a channel.
#pragma once

#include "refine_clip.h"

namespace rru::RRU_PLATFORM {

struct EvalPlan : Plan {
  int run_rows;     // rows of strips that a thread's run of positions touches, at most
  int run_column;   // column of a second thread's first position
  int strips;       // offset in shared memory
  bool vector;      // X is read, and S written, 16 bytes at a time
  bool w_c_shared;  // w_c is kept in shared memory, else read from L2 at every frame
};

struct EvalCall {
  RefineEval a;
  EvalPlan plan;
};

// Shared memory, offsets in bytes. After it come w_c, if it is shared, and the strips.
template <class C>
struct EvalMemory {
  static constexpr int kW = 0;
  static constexpr int kA = kW + 16 * C::kSlicesShared * C::kSliceUnits;
  static constexpr int kInboxU = kA + C::kChannels * C::kStride * C::kElement;
  static constexpr int kInboxV = kInboxU + 4 * C::kD * C::kP;
  static constexpr int kVectors = kInboxV + 4 * (C::kMaxCtas * C::kP + C::kD);
  static_assert(kInboxU % (4 * C::kP) == 0);
  static constexpr int kWc = kVectors + 4 * Vectors<C>::kEnd;
};

template <class CUT>
struct EvalClip : Clip<EvalCall, CUT, EvalMemory<CUT>> {
  using C = CUT;
  using Base = Clip<EvalCall, CUT, EvalMemory<CUT>>;

  DEVICE explicit EvalClip(const EvalCall& call)
      : Base(call, 0),
        channel(this->rank * C::kChannels + this->t / 2),
        position(this->t % 2 * C::kRun) {}

  // Positions of this thread's run that there are; 0 for a channel that is not there.
  DEVICE int count() const {
    const int left = this->a.positions - position;
    return channel >= this->a.channels || left < 0 ? 0 : left < C::kRun ? left : C::kRun;
  }

  // Offset of this thread's run in frame t of contiguous maps (B, F, C, P).
  DEVICE int64_t run_offset(int t, int frames) const {
    return ((static_cast<int64_t>(this->index) * frames + t) * this->a.channels + channel) * this->a.positions +
        position;
  }

  DEVICE float& strip(int run_row) const {
    const int row = this->t % 2 * this->plan.run_rows + run_row;
    return shared_at<float>(this->plan.strips)[row * C::kChannels + this->t / 2];
  }

  const int channel, position;  // of this thread's run of positions
  float z_c = 1.f;              // channel attention logit of this thread's channel
};

}  // namespace rru::RRU_PLATFORM
