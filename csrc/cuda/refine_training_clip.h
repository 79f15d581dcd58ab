// One CTA's part of a clip in a training pass, and what the clips of a group exchange.
#pragma once

#include "refine_gate.h"

namespace rru::RRU_PLATFORM {

struct TrainingPlan : Plan {
  int first_clip;       // of the launch
  int clips_per_group;  // that share batch statistics
  int height;           // H
  int row;              // elements of a channel's row of maps: P, or the next multiple of 8 with zeros
  int strip_rows;       // rows of strips that a tile of 8 positions touches, at most
};

template <class ARGUMENTS>
struct TrainingCall {
  ARGUMENTS a;
  TrainingPlan plan;
};

// Two sums over a clip's positions of each gate channel, and their sums over the clips of a group, which need no
// barrier of all CTAs: those of one rank own the same rows in each clip.
template <class CLIP>
class GroupSums {
  using C = typename CLIP::C;

 public:
  DEVICE explicit GroupSums(const CLIP& clip) : clip_(clip) {}

  // Leaves the sums of an own row: a step has a place of its own, so that none is written while others read it.
  DEVICE void set(int step, int own_row, float2 sums) const {
    store(at(step, clip_.index, own_row), sums);
  }

  // Waits until all clips of the group have left those of `done` steps. By all threads.
  DEVICE void share(int done) const {
    sync("sums of own rows are stored");
    if (clip_.t == 0) {
      flag_set(flag(clip_.index), done, "the clip's sums are stored");
    }
    const int first = RRU_MUTANT("another group is waited for") ? 0 : first_clip();
    for (int i = clip_.t; i < clip_.plan.clips_per_group; i += C::kThreads) {
      flag_wait(flag(first + i), done, "the group's sums are stored");
    }
    sync("the group's sums can be read");
  }

  // This thread's row, of which it adds every n-th clip, n CTAs of a cluster: kThreads = kD = n rows.
  DEVICE int own_row() const {
    return clip_.t >> clip_.plan.log2_ctas;
  }
  DEVICE bool is_first_of_row() const {
    return (clip_.t & (clip_.ctas() - 1)) == 0;
  }
  DEVICE int row() const {
    return clip_.rank * clip_.rows() + own_row();
  }
  // The sum over the group of what `f` returns for a clip's sums, in a fixed order.
  template <class F>
  DEVICE float add(int step, F f) const {
    float sum = 0.f;
    UNROLL_BY_8 for (int i = clip_.t & (clip_.ctas() - 1); i < clip_.plan.clips_per_group; i += clip_.ctas()) {
      sum += f(load(at(step, first_clip() + i, own_row())));
    }
    for (int mask = clip_.ctas() / 2; mask > 0; mask /= 2) {
      sum += shfl_xor(sum, mask);
    }
    return sum;
  }

  DEVICE int group() const {
    return clip_.index / clip_.plan.clips_per_group;
  }
  DEVICE bool is_first_clip() const {
    return clip_.index == first_clip();
  }
  DEVICE float count() const {
    return static_cast<float>(clip_.plan.clips_per_group * clip_.a.positions);
  }

 private:
  DEVICE int first_clip() const {
    return group() * clip_.plan.clips_per_group;
  }
  DEVICE float2* at(int step, int clip, int own_row) const {
    const int64_t place = static_cast<int64_t>(RRU_MUTANT("a place is used again") ? 0 : step) * clip_.a.clips + clip;
    return reinterpret_cast<float2*>(clip_.a.scratch.sums) + place * C::kD + clip_.rank * clip_.rows() + own_row;
  }
  DEVICE uint32_t* flag(int clip) const {  // 128 bytes apart
    return clip_.a.scratch.flags + (clip * kMaxCluster + clip_.rank) * 32;
  }

  const CLIP& clip_;
};

}  // namespace rru::RRU_PLATFORM
