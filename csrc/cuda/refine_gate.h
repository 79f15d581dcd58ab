// What the gates of all passes share: the rows of U that a CTA owns, sums over them, and the spatial attention.
#pragma once

#include "refine_clip.h"

namespace rru::RRU_PLATFORM {

// The rows of U that this CTA owns, (rows, P): a thread has 4 positions of every kPerPass-th one.
template <class CLIP>
class Rows {
  using C = typename CLIP::C;

 public:
  static constexpr int kGroups = 2 * C::kTiles;  // lanes that share a row
  static constexpr int kPerPass = C::kThreads / kGroups;

  DEVICE explicit Rows(const CLIP& clip) : p(4 * (clip.t % kGroups)), own(clip.t / kGroups), clip_(clip) {}

  DEVICE int index(int own_row) const {
    return clip_.rank * clip_.rows() + own_row;
  }
  DEVICE bool has(int own_row) const {
    return own_row < clip_.rows() && index(own_row) < clip_.a.d;
  }
  DEVICE bool has_position(int i) const {
    return p + i < clip_.a.positions;
  }

  // Reads, or writes, this thread's positions of a row of one step of a tensor like U, as far as they are there.
  DEVICE void read(float (&v)[4], const float* from, int step, int own_row) const {
    from += clip_.u_offset(step, index(own_row), p);
    UNROLL for (int i = 0; i < 4; i++) {
      v[i] = has_position(i) ? load(from + i) : 0.f;
    }
  }
  DEVICE void write(const float (&v)[4], float* to, int step, int own_row) const {
    to += clip_.u_offset(step, index(own_row), p);
    UNROLL for (int i = 0; i < 4; i++) {
      if (has_position(i)) {
        store(to + i, v[i]);
      }
    }
  }

  // Adds the parts of U from all CTAs, in the order of ranks.
  DEVICE void add_parts(float (&u)[4], int own_row) const {
    const int sources = has_position(0) ? clip_.ctas() : 0;  // positions past the last tile are not pushed
    UNROLL_BY_4 for (int source = 0; source < sources; source++) {
      const float4 part = *shared_at<float4>(clip_.inbox_u(source, own_row, p));
      u[0] += part.x;
      u[1] += part.y;
      u[2] += part.z;
      u[3] += part.w;
    }
  }

  // The parts of U from `first` on have been read or do not count.
  DEVICE void drop_parts(int own_row, int first) const {
    for (int source = first; source < clip_.ctas() && own_row < clip_.rows(); source++) {
      inbox_retire(shared_at<float>(clip_.inbox_u(source, own_row, p)), 4);
    }
  }

  // The sum over all positions of a row.
  DEVICE static float sum(float v) {
    UNROLL for (int mask = kGroups / 2; mask > 0; mask /= 2) {
      v += shfl_xor(v, mask);
    }
    return v;
  }

  // Sets the partials to this warp's sums over its rows.
  DEVICE void sum_rows(float (&sums)[4]) const {
    UNROLL for (int mask = kGroups; mask < 32; mask *= 2) {
      UNROLL for (int i = 0; i < 4; i++) {
        sums[i] += shfl_xor(sums[i], mask);
      }
    }
    if (clip_.lane < kGroups) {
      reinterpret_cast<float4*>(clip_.partials() + clip_.warp * C::kP)[clip_.lane] =
          make_float4(sums[0], sums[1], sums[2], sums[3]);
    }
  }

  const int p;    // the first position of this thread
  const int own;  // its row of the first pass

 private:
  const CLIP& clip_;
};

// A position's sum of all warps' partials.
template <class CLIP>
DEVICE float sum_partials(const CLIP& clip, int position) {
  float sum = 0.f;
  UNROLL for (int warp = 0; warp < CLIP::C::kWarps; warp++) {
    sum += clip.partials()[warp * CLIP::C::kP + position];
  }
  return sum;
}

// Y pooled over positions and over gate channels, by all CTAs for all. Inbox V holds kP + rows floats of each CTA.
template <class CLIP>
class Pooling {
  using C = typename CLIP::C;
  using OwnRows = Rows<CLIP>;

 public:
  DEVICE explicit Pooling(const CLIP& clip) : clip_(clip) {}

  // Takes a row in, 0 where there is none.
  DEVICE void add(int own_row, const float (&y)[4]) {
    const float mean = OwnRows::sum((y[0] + y[1]) + (y[2] + y[3]));
    if (own_row < clip_.rows()) {
      for (int to = clip_.t % OwnRows::kGroups; to < clip_.ctas(); to += OwnRows::kGroups) {
        push(peer(to), inbox(clip_.rank) + 4 * (C::kP + own_row), mean * clip_.plan.per_position, kV);
      }
    }
    UNROLL for (int i = 0; i < 4; i++) {
      sums_[i] += y[i];
    }
  }

  // Exchanges the sums, and waits for those of all.
  DEVICE void exchange(const OwnRows& rows, int parity) {
    rows.sum_rows(sums_);
    sync("U is read, and the sums of each warp are written");
    for (int i = clip_.t; i < C::kP * clip_.ctas(); i += C::kThreads) {
      push(peer(i / C::kP), inbox(clip_.rank) + 4 * (i % C::kP), sum_partials(clip_, i % C::kP), kV);
    }
    if (clip_.t == 0) {
      inbox_arm(kV, 4 * (clip_.ctas() * C::kP + C::kD), "pooled sums are expected");
    }
    inbox_wait(kV, parity, "pooled sums have arrived");
  }

  // Sets pooled and means.
  DEVICE void take() {
    for (int p = clip_.t; p < C::kP; p += C::kThreads) {
      float sum = 0.f;
      for (int i = 0; i < clip_.ctas(); i++) {
        const int source = RRU_MUTANT("sums begin at the own rank") ? (clip_.rank + i) & (clip_.ctas() - 1) : i;
        float* from = shared_at<float>(inbox(source)) + p;
        sum += *from;
        inbox_retire(from, 1);
      }
      clip_.pooled()[p] = sum * clip_.plan.per_d;
    }
    // kD = kThreads
    const int source = clip_.t >> clip_.plan.log2_rows, own_row = clip_.t & (clip_.rows() - 1);
    float* from = shared_at<float>(inbox(source)) + C::kP + own_row;
    clip_.means()[clip_.t] = *from;
    inbox_retire(from, 1);
    sync("pooled means are written");
  }

 private:
  DEVICE int inbox(int source) const {
    return CLIP::At::kInboxV + 4 * source * (C::kP + clip_.rows());
  }

  const CLIP& clip_;
  float sums_[4] = {};
};

// The two products of the spatial attention, (A, P) and (P, A), with a vector each. Arrays are registers: loops over
// them are unrolled.
template <class CLIP>
class SpatialProducts {
  using C = typename CLIP::C;

 public:
  DEVICE explicit SpatialProducts(const CLIP& clip) : clip_(clip) {}

  DEVICE void load_units() {
    UNROLL for (int i = 0; i < C::kWs1; i++) {
      w_1_[i] = load_const(clip_.packed(clip_.plan.layout.w_s1) + i * C::kThreads + clip_.t);
    }
  }
  DEVICE void load_positions() {
    UNROLL for (int i = 0; i < C::kWs2; i++) {
      w_2_[i] = load_const(clip_.packed(clip_.plan.layout.w_s2) + i * C::kThreads + clip_.t);
    }
  }

  // Calls `take` with each unit and its product with `in` (kP,).
  template <class F>
  DEVICE void units(const float* in, F take) const {
    const auto* half = reinterpret_cast<const float4*>(in + clip_.t % 2 * C::kRun);
    float sum = 0.f;
    UNROLL for (int i = 0; i < C::kWs1; i++) {
      sum += dot(w_1_[i], half[i]);
    }
    sum += shfl_xor(sum, 1);
    if (clip_.t % 2 == 0) {
      take(clip_.t / 2, sum);
    }
  }

  // Calls `take` with each position and its product with `in` (kAttn,).
  template <class F>
  DEVICE void positions(const float* in, F take) const {
    const auto* quarter = reinterpret_cast<const float4*>(in + clip_.t % 4 * C::kAttn / 4);
    UNROLL for (int pass = 0; pass < C::kPasses; pass++) {
      const int p = pass * 8 * C::kWarps + clip_.t / 4;
      float sum = 0.f;
      UNROLL for (int i = 0; i < C::kWarps; i++) {
        sum += dot(w_2_[pass * C::kWarps + i], quarter[i]);
      }
      sum += shfl_xor(sum, 1);
      sum += shfl_xor(sum, 2);
      if (clip_.t % 4 == 0 && p < C::kP) {
        take(p, sum);
      }
    }
  }

 private:
  const CLIP& clip_;
  uint4 w_1_[C::kWs1], w_2_[C::kWs2];
};

// Spatial attention, eq. 2, of the pooled means: h, and z_s after the next barrier, saved for the backward.
template <class CLIP>
DEVICE void attend_units(const CLIP& clip, const SpatialProducts<CLIP>& products, int64_t step_and_clip) {
  products.units(clip.pooled(), [&](int unit, float sum) {
    const float h = relu(sum);
    clip.hidden()[unit] = h;
    if (clip.a.h != nullptr && clip.rank == 0 && unit < clip.a.num_attn) {
      store(clip.a.h + step_and_clip * clip.a.num_attn + unit, h);
    }
  });
}
template <class CLIP>
DEVICE void attend_positions(const CLIP& clip, const SpatialProducts<CLIP>& products, int64_t step_and_clip) {
  products.positions(clip.hidden(), [&](int p, float sum) {
    clip.z_s()[p] = sum;
    if (clip.a.z_s != nullptr && clip.rank == 0 && p < clip.a.positions) {
      store(clip.a.z_s + step_and_clip * clip.a.positions + p, sum);
    }
  });
}

}  // namespace rru::RRU_PLATFORM
