// The gate in eval mode, eq. 1-4: own rows of U added up, normalized and pooled, and the attention vectors.
#pragma once

#include "refine_eval_clip.h"
#include "refine_gate.h"

namespace rru::RRU_PLATFORM {

// The gate of a frame. Arrays are registers: loops over them are unrolled.
template <class C>
class EvalGate {
  using At = EvalMemory<C>;
  using OwnRows = Rows<EvalClip<C>>;

 public:
  // Brings w_c on chip, where there is room.
  DEVICE explicit EvalGate(EvalClip<C>& clip) : clip_(clip), rows_(clip), spatial_(clip) {
    if (clip_.plan.w_c_shared) {
      const int units = clip_.plan.layout.w_c_units;
      for (int i = clip_.t; i < units; i += C::kThreads) {
        shared_at<uint4>(At::kWc)[i] = load_const(clip_.packed(clip_.plan.layout.w_c) + clip_.rank * units + i);
      }
    }
    for (int p = clip_.t; p < C::kP; p += C::kThreads) {
      clip_.z_s()[p] = 1.f;  // without spatial attention
    }
  }

  // Adds up this CTA's rows of U, normalizes and pools them, and receives the pooled sums of all rows.
  template <class Prefetch>
  DEVICE void receive(int t, int parity, Prefetch prefetch) {
    // All that the wait for U can hide.
    Row r = read_row(t, rows_.own);
    if (clip_.a.spatial) {
      spatial_.load_units();
      spatial_.load_positions();
    }
    prefetch();
    inbox_wait(kU, parity, "parts of U have arrived");
    Pooling<EvalClip<C>> pooling(clip_);
    for (int first = 0; first < clip_.rows(); first += OwnRows::kPerPass) {
      const int own = first + rows_.own;
      if (first > 0) {
        r = read_row(t, own);
      }
      float y[4] = {};
      if (rows_.has(own)) {
        activate(y, t, own, r);
      }
      rows_.drop_parts(own, 0);
      pooling.add(own, y);
    }
    pooling.exchange(rows_, parity);
  }

  // The attention vectors, eq. 2 and 3, of pooled sums.
  DEVICE void attend(int t) {
    Pooling<EvalClip<C>>(clip_).take();
    const int64_t step_and_clip = static_cast<int64_t>(t - (clip_.a.has_state ? 0 : 1)) * clip_.a.clips + clip_.index;
    if (clip_.a.spatial) {
      attend_units(clip_, spatial_, step_and_clip);
    }
    clip_.z_c = 1.f;
    if (clip_.a.channel) {
      const float half = clip_.plan.layout.w_c_is_float ? channel_logit<true>() : channel_logit<false>();
      clip_.z_c = half + shfl_xor(half, 1);
      if (clip_.a.z_c != nullptr && clip_.t % 2 == 0 && clip_.channel < clip_.a.channels) {
        store(clip_.a.z_c + step_and_clip * clip_.a.channels + clip_.channel, clip_.z_c);
      }
    }
    sync("h is written");
    if (clip_.a.spatial) {
      attend_positions(clip_, spatial_, step_and_clip);
    }
    sync("z_s is written");
  }

 private:
  // What this thread's positions of an own row begin with: W_m M_t, and the row's norm.
  struct Row {
    float u[4];
    float scale, shift;
  };

  DEVICE Row read_row(int t, int own) const {
    Row r{};
    if (rows_.has(own)) {
      const auto* norm = reinterpret_cast<const float*>(clip_.packed(clip_.plan.layout.norm));
      r.scale = load_const(norm + rows_.index(own));
      r.shift = load_const(norm + C::kD + rows_.index(own));
      if (clip_.a.u != nullptr) {
        rows_.read(r.u, clip_.a.u, t - clip_.a.u_first, own);
      }
    }
    return r;
  }

  // Y of a row, 0 past the last position.
  DEVICE void activate(float (&y)[4], int t, int own, Row& r) {
    rows_.add_parts(r.u, own);
    if (clip_.a.u_out != nullptr) {
      rows_.write(r.u, clip_.a.u_out, t - clip_.a.u_first, own);
    }
    UNROLL for (int i = 0; i < 4; i++) {
      const bool counts = rows_.has_position(i) || RRU_MUTANT("positions past the last are pooled");
      y[i] = counts ? relu(r.u[i] * r.scale + r.shift) : 0.f;
    }
  }

  // Half of the sum over gate channels of w_c times the means, for this thread's channel.
  template <bool FLOAT>
  DEVICE float channel_logit() const {
    const float* mean = clip_.means() + clip_.t % 2 * (C::kD / 2);
    const uint4* from = clip_.packed(clip_.plan.layout.w_c) + clip_.rank * clip_.plan.layout.w_c_units + clip_.t;
    const uint4* own = shared_at<uint4>(At::kWc) + clip_.t;
    constexpr int kPerUnit = FLOAT ? 4 : 8;
    float sum = 0.f;
    UNROLL_BY_4 for (int i = 0; i < C::kD / 2 / kPerUnit; i++) {
      const uint4 w = clip_.plan.w_c_shared ? own[i * C::kThreads] : load_const(from + i * C::kThreads);
      sum += dot_unit<C, FLOAT>(w, reinterpret_cast<const float4*>(mean + kPerUnit * i));
    }
    return sum;
  }

  EvalClip<C>& clip_;
  const OwnRows rows_;
  SpatialProducts<EvalClip<C>> spatial_;
};

}  // namespace rru::RRU_PLATFORM
