// The gate in the backward: from dz_s and dz_c through the attention, the ReLU and the norm to dU, for all CTAs.
#pragma once

#include "refine_training_clip.h"

namespace rru::RRU_PLATFORM {

using BackwardCall = TrainingCall<RefineBackward>;

// Shared memory, offsets in bytes. Vectors of the forward hold gradients: dz_s for the pooled means, (W_c^T dz_c) / P
// for the means over positions, dh for h.
template <class C>
struct BackwardMemory {
  static constexpr int kDu = 0;                                      // (kD, kStride) an operand
  static constexpr int kG = kDu + C::kD * C::kStride * C::kElement;  // (kChannels, kP), by thread
  static constexpr int kInboxV = kG + C::kChannels * C::kP * 4;      // (n, kP + kD)
  static constexpr int kVectors = kInboxV + 4 * C::kMaxCtas * (C::kP + C::kD);
  static constexpr int kDzc = Vectors<C>::kEnd;       // (kChannels,), in floats as the next ones
  static constexpr int kA = kDzc + C::kChannels;      // (kP,) (W_s1^T dh) / D
  static constexpr int kMeans = kA + C::kP;           // (2, kD) means of dY and dY Uhat, own rows
  static constexpr int kStripOf = kMeans + 2 * C::kD; // (kP,) row of the strips, by position
  static constexpr int kBytes = kVectors + 4 * (kStripOf + C::kP);
};

template <class C>
struct BackwardClip : Clip<BackwardCall, C, BackwardMemory<C>> {
  using At = BackwardMemory<C>;
  using Clip<BackwardCall, C, At>::Clip;

  DEVICE float* d_z_s() const {
    return this->pooled();
  }
  DEVICE float* b() const {
    return this->means();
  }
  DEVICE float* d_z_c() const {
    return this->vector(At::kDzc);
  }
  DEVICE float* a_of_d_y() const {
    return this->vector(At::kA);
  }
  DEVICE int* strip_of() const {
    return shared_at<int>(At::kVectors) + At::kStripOf;
  }
};

template <class C>
class BackwardGate {
  using At = BackwardMemory<C>;
  using OwnRows = Rows<BackwardClip<C>>;

 public:
  DEVICE explicit BackwardGate(const BackwardClip<C>& clip) : clip_(clip), rows_(clip), sums_(clip), spatial_(clip) {
    for (int p = clip_.t; p < C::kP; p += C::kThreads) {
      clip_.a_of_d_y()[p] = 0.f;  // without spatial attention
    }
    clip_.b()[clip_.t] = 0.f;  // without channel attention
  }

  // z_s of a frame, for all threads after a barrier.
  DEVICE void read_z_s(int t) const {
    for (int p = clip_.t; p < C::kP; p += C::kThreads) {
      const bool there = p < clip_.a.positions;
      clip_.z_s()[p] = !clip_.a.spatial ? 1.f : there ? load_const(clip_.a.z_s + at(t) * clip_.a.positions + p) : 0.f;
    }
  }

  // Sums dz_s and W_c^T dz_c over all CTAs' channels.
  DEVICE void exchange(int t, int parity) {
    if (clip_.a.channel) {
      const float part = clip_.plan.layout.w_c_is_float ? through_channels<true>() : through_channels<false>();
      for (int to = 0; to < clip_.ctas(); to++) {
        push(peer(to), inbox(clip_.rank) + 4 * (C::kP + clip_.t), part, kV);
      }
    }
    for (int i = clip_.t; clip_.a.spatial && i < C::kP * clip_.ctas(); i += C::kThreads) {
      push(peer(i / C::kP), inbox(clip_.rank) + 4 * (i % C::kP), sum_partials(clip_, i % C::kP), kV);
    }
    if (clip_.t == 0) {
      const int floats = (clip_.a.spatial ? C::kP : 0) + (clip_.a.channel ? C::kD : 0);
      inbox_arm(kV, 4 * clip_.ctas() * floats, "sums over channels are expected");
    }
    inbox_wait(kV, parity, "sums over channels have arrived");
    for (int p = clip_.t; clip_.a.spatial && p < C::kP; p += C::kThreads) {
      const float sum = take(p);
      clip_.d_z_s()[p] = sum;
      if (clip_.a.d_z_s != nullptr && clip_.rank == 0 && p < clip_.a.positions) {
        store(clip_.a.d_z_s + at(t) * clip_.a.positions + p, sum);
      }
    }
    if (clip_.a.channel) {
      clip_.b()[clip_.t] = take(C::kP + clip_.t) * clip_.plan.per_position;
    }
    sync("sums over channels are added");
  }

  // dh, and (W_s1^T dh) / D.
  DEVICE void attend(int t) {
    if (!clip_.a.spatial) {
      return;
    }
    spatial_.load_units();
    spatial_.units(clip_.d_z_s(), [&](int unit, float sum) {
      const bool there = unit < clip_.a.num_attn;
      const float d_h = there && load_const(clip_.a.h + at(t) * clip_.a.num_attn + unit) > 0.f ? sum : 0.f;
      clip_.hidden()[unit] = d_h;
      if (clip_.a.d_h != nullptr && clip_.rank == 0 && there) {
        store(clip_.a.d_h + at(t) * clip_.a.num_attn + unit, d_h);
      }
    });
    sync("dh is written");
    spatial_.load_positions();
    spatial_.positions(clip_.hidden(), [&](int p, float sum) { clip_.a_of_d_y()[p] = sum * clip_.plan.per_d; });
    sync("dY's part by position is written");
  }

  // dU of own rows, through the norm, pushed to all CTAs.
  DEVICE void send(int t, int parity) {
    float y_sums[4] = {};
    for (int own = rows_.own; own < clip_.rows() + rows_.own; own += OwnRows::kPerPass) {
      const Row r = read_row(t, own);
      const float dy = OwnRows::sum((r.dy[0] + r.dy[1]) + (r.dy[2] + r.dy[3]));
      const float dy_uhat = OwnRows::sum(
          (r.dy[0] * r.uhat[0] + r.dy[1] * r.uhat[1]) + (r.dy[2] * r.uhat[2] + r.dy[3] * r.uhat[3]));
      if (own < clip_.rows() && rows_.p == 0) {
        sums_.set(t - 1, own, float2{dy, dy_uhat});
      }
      if (clip_.a.y_channels != nullptr) {
        const float y = OwnRows::sum((r.y[0] + r.y[1]) + (r.y[2] + r.y[3]));
        if (rows_.has(own) && rows_.p == 0) {
          store(clip_.a.y_channels + at(t) * clip_.a.d + rows_.index(own), y * clip_.plan.per_position);
        }
        UNROLL for (int i = 0; i < 4; i++) {
          y_sums[i] += r.y[i];
        }
      }
    }
    if (clip_.a.y_positions != nullptr) {
      rows_.sum_rows(y_sums);
    }
    sums_.share(clip_.a.frames - t);
    set_means(t);
    for (int p = clip_.t; clip_.a.y_positions != nullptr && p < clip_.a.positions; p += C::kThreads) {
      const int64_t to = (at(t) * clip_.ctas() + clip_.rank) * clip_.a.positions + p;
      store(clip_.a.y_positions + to, sum_partials(clip_, p));
    }
    sync("means of dY are known");
    for (int own = rows_.own; own < clip_.rows() + rows_.own; own += OwnRows::kPerPass) {
      const Row r = read_row(t, own);
      float d_u[4] = {};
      if (rows_.has(own)) {
        UNROLL for (int i = 0; i < 4; i++) {
          const float d_y = r.dy[i] - means()[own] - r.uhat[i] * means()[C::kD + own];
          d_u[i] = rows_.has_position(i) ? r.scale * d_y : 0.f;
        }
        rows_.write(d_u, clip_.a.du, t - 1, own);
      }
      if (own < clip_.rows() && rows_.p < clip_.plan.row) {
        send_row(rows_.index(own), d_u);
      }
    }
    if (clip_.t == 0) {
      inbox_arm(kU, C::kD * clip_.plan.row * C::kElement, "dU is expected");
    }
    inbox_wait(kU, parity, "dU has arrived");
  }

  // The rows of dU have been multiplied, or do not count.
  DEVICE void drop() const {
    for (int i = clip_.t; i < C::kD * C::kStride * C::kElement / 4; i += C::kThreads) {
      inbox_retire(shared_at<float>(At::kDu) + i, 1);
    }
  }

 private:
  // 4 positions of an own row, 0 where there is none.
  struct Row {
    float uhat[4], y[4], dy[4];
    float scale;  // gamma r
  };

  DEVICE float* means() const {
    return clip_.vector(At::kMeans);
  }
  DEVICE int64_t at(int t) const {
    return static_cast<int64_t>(t - 1) * clip_.a.clips + clip_.index;
  }
  DEVICE int inbox(int source) const {
    return At::kInboxV + 4 * source * (C::kP + C::kD);
  }

  // The sum of all CTAs' floats at a place, in the order of ranks.
  DEVICE float take(int place) const {
    float sum = 0.f;
    for (int i = 0; i < clip_.ctas(); i++) {
      float* from = shared_at<float>(inbox(i)) + place;
      sum += *from;
      inbox_retire(from, 1);
    }
    return sum;
  }

  // Gate channel t of W_c^T dz_c, over this CTA's channels.
  template <bool FLOAT>
  DEVICE float through_channels() const {
    const uint4* w_c = clip_.packed(clip_.plan.layout.w_c) + clip_.rank * clip_.plan.layout.w_c_units;
    float sums[4] = {};
    UNROLL_BY_8 for (int c = 0; c < C::kChannels; c += 4) {
      UNROLL for (int i = 0; i < 4; i++) {
        const int from = (c + i) * C::kD + clip_.t;
        float w;
        if constexpr (FLOAT) {
          w = load_const(reinterpret_cast<const float*>(w_c) + from);
        } else {
          w = low_half<C::kOperands>(load_const(reinterpret_cast<const unsigned short*>(w_c) + from));
        }
        sums[i] += w * clip_.d_z_c()[c + i];
      }
    }
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  DEVICE Row read_row(int t, int own) const {
    Row r{};
    if (rows_.has(own)) {
      const int row = rows_.index(own);
      const int64_t statistics = (static_cast<int64_t>(t) * clip_.a.groups + sums_.group()) * clip_.a.d + row;
      const float mean = load_const(clip_.a.mean + statistics);
      const float rstd = 1.f / sqrtf(load_const(clip_.a.var + statistics) + clip_.a.eps);
      const auto* norm = reinterpret_cast<const float*>(clip_.packed(clip_.plan.layout.norm));
      const float gamma = load_const(norm + row), beta = load_const(norm + C::kD + row), b = clip_.b()[row];
      float u[4];
      rows_.read(u, clip_.a.u, t - 1, own);
      r.scale = gamma * rstd;
      UNROLL for (int i = 0; i < 4; i++) {
        const float y = (u[i] - mean) * r.scale + beta;
        const bool counts = rows_.has_position(i) || RRU_MUTANT("positions past the last are pooled");
        r.uhat[i] = (u[i] - mean) * rstd;
        r.y[i] = counts ? relu(y) : 0.f;
        r.dy[i] = counts && y > 0.f ? clip_.a_of_d_y()[rows_.p + i] + b : 0.f;
      }
    }
    return r;
  }

  // Means over the group of dY and dY Uhat.
  DEVICE void set_means(int t) const {
    const float dy = sums_.add(t - 1, [](float2 v) { return v.x; });
    const float dy_uhat = sums_.add(t - 1, [](float2 v) { return v.y; });
    if (sums_.is_first_of_row()) {
      means()[sums_.own_row()] = dy / sums_.count();
      means()[C::kD + sums_.own_row()] = dy_uhat / sums_.count();
    }
  }

  // Pushes 4 positions of a row of dU to all CTAs, as an operand.
  DEVICE void send_row(int row, const float (&d_u)[4]) const {
    const int offset = At::kDu + (row * C::kStride + rows_.p) * C::kElement;
    for (int to = 0; to < clip_.ctas(); to++) {
      const Peer other = peer(to);
      if constexpr (C::k16Bit) {
        push(
            other, offset,
            float2{
                uint_as_float(pack_halves<C::kOperands>(d_u[0], d_u[1])),
                uint_as_float(pack_halves<C::kOperands>(d_u[2], d_u[3]))},
            kU);
      } else {
        push(other, offset, float2{quiet(d_u[0]), quiet(d_u[1])}, kU);
        push(other, offset + 8, float2{quiet(d_u[2]), quiet(d_u[3])}, kU);
      }
    }
  }

  const BackwardClip<C>& clip_;
  const OwnRows rows_;
  const GroupSums<BackwardClip<C>> sums_;
  SpatialProducts<BackwardClip<C>> spatial_;
};

}  // namespace rru::RRU_PLATFORM
