// The gate in training mode, eq. 1-4: own rows of U added up, their batch statistics, and the attention vectors.
#pragma once

#include "refine_training_clip.h"

namespace rru::RRU_PLATFORM {

using ForwardCall = TrainingCall<RefineForward>;

// Shared memory, offsets in bytes.
template <class C>
struct ForwardMemory {
  static constexpr int kA = 0;
  static constexpr int kX = kA + C::kChannels * C::kStride * C::kElement;                // X_t, if A is rounded
  static constexpr int kInboxU = kX + (C::k16Bit ? C::kChannels * C::kP * 2 : 0);
  static constexpr int kInboxV = kInboxU + 4 * C::kD * C::kP;
  static constexpr int kVectors = kInboxV + 4 * (C::kMaxCtas * C::kP + C::kD);
  static_assert(kInboxU % (4 * C::kP) == 0);
  static constexpr int kZc = Vectors<C>::kEnd;        // (kChannels,), in floats from kVectors as the next ones
  static constexpr int kNorm = kZc + C::kChannels;    // (2, kD) mean and scale of own rows
  static constexpr int kS = kVectors + 4 * (kNorm + 2 * C::kD);  // S of batches for which registers are too few
  static constexpr int kSharedBatches = C::kMultiple * C::kTiles < 32 ? 0 : C::k16Bit ? 2 : 1;
  static constexpr int kBytes = kS + 32 * kSharedBatches * C::kThreads;
};

template <class C>
using ForwardClip = Clip<ForwardCall, C, ForwardMemory<C>>;

template <class C>
class ForwardGate {
  using At = ForwardMemory<C>;
  using OwnRows = Rows<ForwardClip<C>>;
  // The spatial attention's weights are loaded while U is waited for, unless channels leave no registers for them.
  static constexpr bool kSpatialAhead = C::kMultiple * C::kTiles <= 8;

 public:
  DEVICE explicit ForwardGate(const ForwardClip<C>& clip) : clip_(clip), rows_(clip), sums_(clip), spatial_(clip) {
    for (int p = clip_.t; p < C::kP; p += C::kThreads) {
      clip_.z_s()[p] = 1.f;  // without spatial attention
    }
    for (int c = clip_.t; c < C::kChannels; c += C::kThreads) {
      z_c()[c] = 1.f;  // without channel attention
    }
  }

  // Adds up this CTA's rows of U, normalizes and pools them, and receives the pooled sums of all rows.
  DEVICE void receive(int t, int parity) {
    if (kSpatialAhead && clip_.a.spatial) {
      spatial_.load_units();
      spatial_.load_positions();
    }
    inbox_wait(kU, parity, "parts of U have arrived");
    for (int own = rows_.own; own < clip_.rows() + rows_.own; own += OwnRows::kPerPass) {
      add_up(t - 1, own);
    }
    sums_.share(t);
    set_norm(t);
    sync("the norm is known");
    Pooling<ForwardClip<C>> pooling(clip_);
    for (int own = rows_.own; own < clip_.rows() + rows_.own; own += OwnRows::kPerPass) {
      float y[4] = {};
      if (rows_.has(own)) {
        const float4 u = *shared_at<float4>(clip_.inbox_u(0, own, rows_.p));
        const float values[4] = {u.x, u.y, u.z, u.w};
        UNROLL for (int i = 0; i < 4; i++) {
          const bool counts = rows_.has_position(i) || RRU_MUTANT("positions past the last are pooled");
          y[i] = counts ? relu((values[i] - norm()[own]) * norm()[C::kD + own] + beta(rows_.index(own))) : 0.f;
        }
      }
      pooling.add(own, y);
      if (own < clip_.rows()) {
        inbox_retire(shared_at<float>(clip_.inbox_u(0, own, rows_.p)), 4);
      }
    }
    pooling.exchange(rows_, parity);
  }

  // The attention vectors, eq. 2 and 3, of pooled sums.
  DEVICE void attend(int t) {
    Pooling<ForwardClip<C>>(clip_).take();
    const int64_t step_and_clip = static_cast<int64_t>(t - 1) * clip_.a.clips + clip_.index;
    if (clip_.a.spatial) {
      if (!kSpatialAhead) {
        spatial_.load_units();
      }
      attend_units(clip_, spatial_, step_and_clip);
    }
    if (clip_.a.channel) {
      if (clip_.plan.layout.w_c_is_float) {
        attend_channels<true>(step_and_clip);
      } else {
        attend_channels<false>(step_and_clip);
      }
    }
    sync("h is written");
    if (clip_.a.spatial) {
      if (!kSpatialAhead) {
        spatial_.load_positions();
      }
      attend_positions(clip_, spatial_, step_and_clip);
    }
    sync("z_s and z_c are written");
  }

  DEVICE const float* z_s() const {
    return clip_.z_s();
  }
  DEVICE float* z_c() const {
    return clip_.vector(At::kZc);
  }

 private:
  DEVICE float* norm() const {
    return clip_.vector(At::kNorm);
  }
  DEVICE float beta(int row) const {
    return load_const(reinterpret_cast<const float*>(clip_.packed(clip_.plan.layout.norm)) + C::kD + row);
  }

  // Makes U of an own row, in place of its part from CTA 0, and leaves its mean and its squared differences' sum.
  DEVICE void add_up(int step, int own) {
    float u[4] = {};
    if (rows_.has(own)) {
      if (clip_.a.u != nullptr) {
        rows_.read(u, clip_.a.u, step, own);
      }
      rows_.add_parts(u, own);
      if (clip_.a.u_out != nullptr) {
        rows_.write(u, clip_.a.u_out, step, own);
      }
    }
    float sum = 0.f, square = 0.f;
    UNROLL for (int i = 0; i < 4; i++) {
      sum += rows_.has_position(i) ? u[i] : 0.f;
    }
    const float mean = OwnRows::sum(sum) * clip_.plan.per_position;
    UNROLL for (int i = 0; i < 4; i++) {
      square += rows_.has_position(i) ? (u[i] - mean) * (u[i] - mean) : 0.f;
    }
    square = OwnRows::sum(square);
    rows_.drop_parts(own, 1);
    if (own < clip_.rows()) {
      *shared_at<float4>(clip_.inbox_u(0, own, rows_.p)) = make_float4(u[0], u[1], u[2], u[3]);
      if (rows_.p == 0) {
        sums_.set(step, own, float2{mean, square});
      }
    }
  }

  // Batch statistics of own rows, for the norm and for the running statistics.
  DEVICE void set_norm(int t) {
    const float count = sums_.count(), positions = static_cast<float>(clip_.a.positions);
    const float mean =
        sums_.add(t - 1, [](float2 v) { return v.x; }) / static_cast<float>(clip_.plan.clips_per_group);
    const float square = sums_.add(
        t - 1, [&](float2 v) { return v.y + positions * (v.x - mean) * (v.x - mean); });
    const int row = sums_.row();
    if (sums_.is_first_of_row()) {
      const float var = square / count;
      const float gamma = load_const(reinterpret_cast<const float*>(clip_.packed(clip_.plan.layout.norm)) + row);
      norm()[sums_.own_row()] = mean;
      norm()[C::kD + sums_.own_row()] = gamma / sqrtf(var + clip_.a.eps);
      if (sums_.is_first_clip() && row < clip_.a.d) {
        const int64_t to = (static_cast<int64_t>(t) * clip_.a.groups + sums_.group()) * clip_.a.d + row;
        store(clip_.a.mean + to, mean);
        store(clip_.a.var + to, var);
      }
    }
  }

  // z_c of this CTA's channels, eq. 3, by a warp each, from rows of w_c that come from L2.
  template <bool FLOAT>
  DEVICE void attend_channels(int64_t step_and_clip) {
    constexpr int kPerUnit = FLOAT ? 4 : 8, kUnits = C::kD / kPerUnit, kPerLane = (kUnits + 31) / 32;
    float4 means[kPerLane][kPerUnit / 4];
    UNROLL for (int i = 0; i < kPerLane; i++) {
      UNROLL for (int j = 0; j < kPerUnit / 4; j++) {
        const int unit = clip_.lane + 32 * i;
        means[i][j] = unit < kUnits ? reinterpret_cast<const float4*>(clip_.means())[unit * kPerUnit / 4 + j]
                                    : make_float4(0.f, 0.f, 0.f, 0.f);
      }
    }
    const uint4* w_c = clip_.packed(clip_.plan.layout.w_c) + clip_.rank * clip_.plan.layout.w_c_units;
    UNROLL_BY_4 for (int c = clip_.warp; c < C::kChannels; c += C::kWarps) {
      float sum = 0.f;
      UNROLL for (int i = 0; i < kPerLane; i++) {
        const int unit = clip_.lane + 32 * i;
        if (unit < kUnits) {
          sum += dot_unit<C, FLOAT>(load_const(w_c + c * kUnits + unit), means[i]);
        }
      }
      UNROLL for (int mask = 16; mask > 0; mask /= 2) {
        sum += shfl_xor(sum, mask);
      }
      if (clip_.lane == 0) {
        z_c()[c] = sum;
        const int channel = clip_.rank * C::kChannels + c;
        if (clip_.a.z_c != nullptr && channel < clip_.a.channels) {
          store(clip_.a.z_c + step_and_clip * clip_.a.channels + channel, sum);
        }
      }
    }
  }

  const ForwardClip<C>& clip_;
  const OwnRows rows_;
  const GroupSums<ForwardClip<C>> sums_;
  SpatialProducts<ForwardClip<C>> spatial_;
};

}  // namespace rru::RRU_PLATFORM
