// The gate, eq. 1-4, of U's parts: own rows added up, normalized and pooled, and the attention vectors.
#pragma once

#include "refine_clip.h"

namespace rru::RRU_PLATFORM {

// The gate of a frame. Arrays are registers: loops over them are unrolled.
template <Operands OPERANDS, int WARPS, int TILES>
class Gate {
  using C = Cut<OPERANDS, WARPS, TILES>;
  using At = Shared<C>;
  static constexpr int kGroups = 2 * TILES;  // lanes that share a row of U, 4 positions each
  static constexpr int kRowsPerPass = C::kThreads / kGroups;

 public:
  // Brings w_c on chip, where there is room.
  DEVICE explicit Gate(Clip<OPERANDS, WARPS, TILES>& clip) : clip_(clip) {
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
    const int group = clip_.t % kGroups, p = 4 * group;
    // All that the wait for U can hide.
    Row r = read_row(t, clip_.t / kGroups, p);
    if (clip_.a.spatial) {
      UNROLL for (int i = 0; i < C::kWs1; i++) {
        w_s1_[i] = load_const(clip_.packed(clip_.plan.layout.w_s1) + i * C::kThreads + clip_.t);
      }
      UNROLL for (int i = 0; i < C::kWs2; i++) {
        w_s2_[i] = load_const(clip_.packed(clip_.plan.layout.w_s2) + i * C::kThreads + clip_.t);
      }
    }
    prefetch();
    inbox_wait(kU, parity, "parts of U have arrived");
    float4 sums = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int first = 0; first < clip_.rows(); first += kRowsPerPass) {
      const int own = first + clip_.t / kGroups;
      if (first > 0) {
        r = read_row(t, own, p);
      }
      const float4 y = has_row(own) ? activate(t, own, p, r) : make_float4(0.f, 0.f, 0.f, 0.f);
      drop(own, p);
      float mean = (y.x + y.y) + (y.z + y.w);
      UNROLL for (int mask = kGroups / 2; mask > 0; mask /= 2) {
        mean += shfl_xor(mean, mask);
      }
      if (own < clip_.rows()) {
        for (int to = group; to < clip_.ctas(); to += kGroups) {
          push(peer(to), clip_.inbox_v(clip_.rank) + 4 * (C::kP + own), mean * clip_.plan.per_position, kV);
        }
      }
      sums = make_float4(sums.x + y.x, sums.y + y.y, sums.z + y.z, sums.w + y.w);
    }
    UNROLL for (int mask = kGroups; mask < 32; mask *= 2) {
      sums = make_float4(
          sums.x + shfl_xor(sums.x, mask), sums.y + shfl_xor(sums.y, mask), sums.z + shfl_xor(sums.z, mask),
          sums.w + shfl_xor(sums.w, mask));
    }
    if (clip_.lane < kGroups) {
      reinterpret_cast<float4*>(clip_.partials() + clip_.warp * C::kP)[group] = sums;
    }
    sync("U is read, and the sums of each warp are written");
    for (int i = clip_.t; i < C::kP * clip_.ctas(); i += C::kThreads) {
      const int position = i % C::kP;
      float sum = 0.f;
      UNROLL for (int warp = 0; warp < WARPS; warp++) {
        sum += clip_.partials()[warp * C::kP + position];
      }
      push(peer(i / C::kP), clip_.inbox_v(clip_.rank) + 4 * position, sum, kV);
    }
    if (clip_.t == 0) {
      inbox_arm(kV, 4 * (clip_.ctas() * C::kP + C::kD), "pooled sums are expected");
    }
    inbox_wait(kV, parity, "pooled sums have arrived");
  }

  // The attention vectors, eq. 2 and 3, of pooled sums.
  DEVICE void attend(int t) {
    for (int p = clip_.t; p < C::kP; p += C::kThreads) {
      float sum = 0.f;
      for (int i = 0; i < clip_.ctas(); i++) {
        const int source = RRU_MUTANT("sums begin at the own rank") ? (clip_.rank + i) & (clip_.ctas() - 1) : i;
        float* from = shared_at<float>(clip_.inbox_v(source)) + p;
        sum += *from;
        inbox_retire(from, 1);
      }
      clip_.pooled()[p] = sum * clip_.plan.per_d;
    }
    // kD = kThreads
    const int source = clip_.t >> clip_.plan.log2_rows, own = clip_.t & (clip_.rows() - 1);
    float* from = shared_at<float>(clip_.inbox_v(source)) + C::kP + own;
    clip_.means()[clip_.t] = *from;
    inbox_retire(from, 1);
    sync("pooled means are written");
    const int64_t step = static_cast<int64_t>(t - (clip_.a.has_state ? 0 : 1)) * clip_.a.clips + clip_.index;
    if (clip_.a.spatial) {
      const auto* half = reinterpret_cast<const float4*>(clip_.pooled() + clip_.position);
      float sum = 0.f;
      UNROLL for (int i = 0; i < C::kWs1; i++) {
        sum += dot(w_s1_[i], half[i]);
      }
      sum = relu(sum + shfl_xor(sum, 1));
      if (clip_.t % 2 == 0) {
        clip_.hidden()[clip_.t / 2] = sum;
        if (clip_.a.h != nullptr && clip_.rank == 0 && clip_.t / 2 < clip_.a.num_attn) {
          store(clip_.a.h + step * clip_.a.num_attn + clip_.t / 2, sum);
        }
      }
    }
    clip_.z_c = 1.f;
    if (clip_.a.channel) {
      const float half = clip_.plan.layout.w_c_is_float ? channel_logit<true>() : channel_logit<false>();
      clip_.z_c = half + shfl_xor(half, 1);
      if (clip_.a.z_c != nullptr && clip_.t % 2 == 0 && clip_.channel < clip_.a.channels) {
        store(clip_.a.z_c + step * clip_.a.channels + clip_.channel, clip_.z_c);
      }
    }
    sync("h is written");
    if (clip_.a.spatial) {
      const auto* quarter = reinterpret_cast<const float4*>(clip_.hidden() + clip_.t % 4 * C::kAttn / 4);
      UNROLL for (int pass = 0; pass < C::kPasses; pass++) {
        const int p = pass * 8 * WARPS + clip_.t / 4;
        float sum = 0.f;
        UNROLL for (int i = 0; i < WARPS; i++) {
          sum += dot(w_s2_[pass * WARPS + i], quarter[i]);
        }
        sum += shfl_xor(sum, 1);
        sum += shfl_xor(sum, 2);
        if (clip_.t % 4 == 0 && p < C::kP) {
          clip_.z_s()[p] = sum;
          if (clip_.a.z_s != nullptr && clip_.rank == 0 && p < clip_.a.positions) {
            store(clip_.a.z_s + step * clip_.a.positions + p, sum);
          }
        }
      }
    }
    sync("z_s is written");
  }

 private:
  // What 4 positions from p of an own row begin with: W_m M_t, and the row's norm.
  struct Row {
    float u[4];
    float scale, shift;
  };

  DEVICE bool has_row(int own) const {
    return own < clip_.rows() && clip_.rank * clip_.rows() + own < clip_.a.d;
  }

  DEVICE Row read_row(int t, int own, int p) const {
    const int row = clip_.rank * clip_.rows() + own;
    Row r{};
    if (has_row(own)) {
      const auto* norm = reinterpret_cast<const float*>(clip_.packed(clip_.plan.layout.norm));
      r.scale = load_const(norm + row);
      r.shift = load_const(norm + C::kD + row);
      if (clip_.a.u != nullptr) {
        const float* from = clip_.a.u + clip_.u_offset(t, row, p);
        UNROLL for (int i = 0; i < 4; i++) {
          r.u[i] = p + i < clip_.a.positions ? dev::load(from + i) : 0.f;
        }
      }
    }
    return r;
  }

  // Y of 4 positions of a row, 0 past the last one.
  DEVICE float4 activate(int t, int own, int p, const Row& r) {
    float4 u = make_float4(r.u[0], r.u[1], r.u[2], r.u[3]);
    const int sources = p < clip_.a.positions ? clip_.ctas() : 0;  // positions past the last tile are not pushed
    UNROLL_BY_4 for (int source = 0; source < sources; source++) {
      const float4 part = *shared_at<float4>(clip_.inbox_u(source, own, p));
      u = make_float4(u.x + part.x, u.y + part.y, u.z + part.z, u.w + part.w);
    }
    float values[4] = {u.x, u.y, u.z, u.w};
    UNROLL for (int i = 0; i < 4; i++) {
      const bool is_there = p + i < clip_.a.positions;
      if (is_there && clip_.a.u_out != nullptr) {
        store(clip_.a.u_out + clip_.u_offset(t, clip_.rank * clip_.rows() + own, p) + i, values[i]);
      }
      const bool counts = is_there || RRU_MUTANT("positions past the last are pooled");
      values[i] = counts ? relu(values[i] * r.scale + r.shift) : 0.f;
    }
    return make_float4(values[0], values[1], values[2], values[3]);
  }

  // 4 positions of an own row, in all parts of U, have been read or do not count.
  DEVICE void drop(int own, int p) {
    for (int source = 0; source < clip_.ctas() && own < clip_.rows(); source++) {
      inbox_retire(shared_at<float>(clip_.inbox_u(source, own, p)), 4);
    }
  }

  DEVICE static float dot(const uint4& w, const float4& v) {
    return uint_as_float(w.x) * v.x + uint_as_float(w.y) * v.y + uint_as_float(w.z) * v.z + uint_as_float(w.w) * v.w;
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
      const auto* v = reinterpret_cast<const float4*>(mean + kPerUnit * i);
      if constexpr (FLOAT) {
        sum += dot(w, v[0]);
      } else {
        const float4 first = v[0], second = v[1];
        sum += low_half<OPERANDS>(w.x) * first.x + high_half<OPERANDS>(w.x) * first.y;
        sum += low_half<OPERANDS>(w.y) * first.z + high_half<OPERANDS>(w.y) * first.w;
        sum += low_half<OPERANDS>(w.z) * second.x + high_half<OPERANDS>(w.z) * second.y;
        sum += low_half<OPERANDS>(w.w) * second.z + high_half<OPERANDS>(w.w) * second.w;
      }
    }
    return sum;
  }

  Clip<OPERANDS, WARPS, TILES>& clip_;
  uint4 w_s1_[C::kWs1], w_s2_[C::kWs2];
};

}  // namespace rru::RRU_PLATFORM
