// The maps in the backward: G_t from the carry and the outputs' gradients, dz_s and dz_c from it, and dX_t.
#pragma once

#include "refine_backward_gate.h"
#include "refine_product.h"

namespace rru::RRU_PLATFORM {

// A warp has 16 kMultiple channels, as the fragments of E = W_a^T dU: a thread two positions of each tile of 8 in 2
// kMultiple channels. E's sums hold the carry, negated, from one frame to the next. Arrays are registers: loops over
// them are unrolled.
template <class C>
class BackwardMaps {
  using At = BackwardMemory<C>;
  static constexpr int kM = C::kMultiple;
  static constexpr int kRing = 2;  // slices of W that are loaded ahead

 public:
  DEVICE explicit BackwardMaps(const BackwardClip<C>& clip) : clip_(clip) {
    auto* strip = clip_.strip_of();
    for (int p = clip_.t; p < C::kP; p += C::kThreads) {
      strip[p] = p < clip_.a.positions ? p / clip_.a.width : 0;
    }
  }

  // G_t, kept on chip, and its part in dz_s and dz_c; leaves -(1 - Z_t) G_t in the sums.
  DEVICE void begin(int t) {
    lane_ = anew(clip_.lane);
    float d_z_s[C::kTiles][2] = {};
    UNROLL for (int m = 0; m < kM; m++) {
      UNROLL for (int i = 0; i < 2; i++) {
        fence_schedule();
        const float z_c = saved_z_c(t, m, i);
        const char *x_row = row(clip_.a.x, t, m, i), *s_row = row(clip_.a.features, t - 1, m, i);
        const Upstream d_row = upstream(t, m, i);
        const bool has_channel = channel(m, i) < clip_.a.channels;
        float d_z_c = 0.f;
        UNROLL for (int tile = 0; tile < C::kTiles; tile++) {
          const float2 x = read(x_row, tile), s = read(s_row, tile), d = read(d_row, tile);
          float g[2];
          UNROLL for (int e = 0; e < 2; e++) {
            const float z_s = clip_.z_s()[position(tile) + e];
            const bool there = has_channel && position(tile) + e < clip_.a.positions;
            g[e] = there ? (e == 0 ? d.x : d.y) - sums_[m][tile][2 * i + e] : 0.f;
            const float z = div_(1.f, 1.f + exp_(-z_c * z_s));
            const float a = e == 0 ? x.x - s.x : x.y - s.y, d_logit = g[e] * a * (z * (1.f - z));
            d_z_s[tile][e] += d_logit * z_c;
            d_z_c += d_logit * z_s;
            sums_[m][tile][2 * i + e] = (z - 1.f) * g[e];
          }
          *own_g(m, i, tile) = float2{g[0], g[1]};
        }
        leave_d_z_c(t, m, i, d_z_c);
      }
    }
    UNROLL for (int tile = 0; tile < C::kTiles; tile++) {
      UNROLL for (int e = 0; e < 2; e++) {
        UNROLL for (int mask = 4; mask < 32; mask *= 2) {
          d_z_s[tile][e] += shfl_xor(d_z_s[tile][e], mask);
        }
        if (clip_.lane < 4) {
          clip_.partials()[clip_.warp * C::kP + 8 * tile + 2 * clip_.lane + e] = d_z_s[tile][e];
        }
      }
    }
  }

  // Adds E = W_a^T dU to the sums.
  DEVICE void multiply() {
    fence_schedule();  // lanes that have waited for an inbox may be apart
    const uint4* w = clip_.packed(clip_.plan.layout.w) + clip_.rank * C::kSlicesD * C::kChannels * 2;
    if constexpr (C::kFma) {
      constexpr int kPart = C::kTiles / 2;
      // Each tile of rows in sums of its own, which are added once: fp32 loses a digit if every term is added to the
      // carry.
      UNROLL for (int m = 0; m < kM; m++) {
        UNROLL for (int first = 0; first < C::kTiles; first += kPart) {
          float part[1][kPart][4] = {};
          const int lane = anew(clip_.lane);
          NO_UNROLL for (int k = 0; k < C::kSlicesD; k++) {
            multiply_slice_fp32<C>(
                part, At::kDu, k, 8 * first, lane, 16 * (kM * clip_.warp + m), C::kChannels,
                [&](int i) { return load_const(w + k * C::kChannels * 2 + i); });
          }
          UNROLL for (int tile = 0; tile < kPart; tile++) {
            UNROLL for (int i = 0; i < 4; i++) {
              sums_[m][first + tile][i] += part[0][tile][i];
            }
          }
        }
      }
    } else {
      w += clip_.warp * C::kSlicesD * kM * 32 + clip_.lane;
      uint4 ring[kRing][kM];
      UNROLL for (int k = 0; k < kRing; k++) {
        load_slice(ring[k], w, k);
      }
      NO_UNROLL for (int k = 0; k < C::kSlicesD; k += kRing) {
        UNROLL for (int i = 0; i < kRing; i++) {
          multiply_slice<C>(sums_, ring[i], At::kDu, k + i, 0, clip_.lane);
          load_slice(ring[i], w, k + i + kRing);  // also past the last one: a condition would delay it
          fence_schedule();
        }
      }
    }
  }

  // dX_t = G_t + E - (1 - Z_t) G_t.
  DEVICE void end(int t) {
    if (clip_.a.d_x == nullptr) {
      return;
    }
    lane_ = anew(clip_.lane);
    UNROLL for (int m = 0; m < kM; m++) {
      UNROLL for (int i = 0; i < 2; i++) {
        char* to = d_x_row(t, m, i);
        UNROLL for (int tile = 0; tile < C::kTiles; tile++) {
          const float2 g = *own_g(m, i, tile);
          write(to, tile, g.x + sums_[m][tile][2 * i], g.y + sums_[m][tile][2 * i + 1]);
        }
      }
    }
  }

  // dX of frame 0, which has no gate: G.
  DEVICE void finish() const {
    if (clip_.a.d_x == nullptr) {
      return;
    }
    UNROLL for (int m = 0; m < kM; m++) {
      UNROLL for (int i = 0; i < 2; i++) {
        char* to = d_x_row(0, m, i);
        const Upstream d_row = upstream(0, m, i);
        UNROLL for (int tile = 0; tile < C::kTiles; tile++) {
          const float2 d = read(d_row, tile);
          const bool low = position(tile) < clip_.a.positions, high = position(tile) + 1 < clip_.a.positions;
          write(
              to, tile, low ? d.x - sums_[m][tile][2 * i] : 0.f, high ? d.y - sums_[m][tile][2 * i + 1] : 0.f);
        }
      }
    }
  }

 private:
  DEVICE int own_channel(int m, int i) const {
    return (clip_.warp * kM + m) * 16 + lane_ / 4 + 8 * i;
  }
  DEVICE int channel(int m, int i) const {
    return clip_.rank * C::kChannels + own_channel(m, i);
  }
  DEVICE int position(int tile) const {
    return 8 * tile + lane_ % 4 * 2;
  }
  // Private to a thread: no bank conflicts.
  DEVICE float2* own_g(int m, int i, int tile) const {
    return shared_at<float2>(At::kG) + ((2 * m + i) * C::kTiles + tile) * C::kThreads + clip_.t;
  }

  // This thread's first pair of positions of a channel in a frame; null if there is none.
  DEVICE const char* row(const Maps& maps, int t, int m, int i) const {
    if (maps.data == nullptr || channel(m, i) >= clip_.a.channels) {
      return nullptr;
    }
    const int64_t from = clip_.index * maps.clip + t * maps.frame + channel(m, i) * maps.channel + position(0);
    return static_cast<const char*>(maps.data) + from * C::kMapElement;
  }
  DEVICE char* d_x_row(int t, int m, int i) const {
    if (channel(m, i) >= clip_.a.channels) {
      return nullptr;
    }
    const int64_t frame = static_cast<int64_t>(clip_.index) * clip_.a.frames + t;
    const int64_t to = (frame * clip_.a.channels + channel(m, i)) * clip_.plan.row + position(0);
    return static_cast<char*>(clip_.a.d_x) + to * C::kMapElement;
  }

  // Two positions of a tile.
  DEVICE float2 read(const char* row, int tile) const {
    if (row == nullptr || 8 * tile >= clip_.plan.row) {
      return float2{0.f, 0.f};
    }
    const char* address = row + 8 * tile * C::kMapElement;
    if constexpr (C::k16BitMaps) {
      const uint32_t pair = load_const(reinterpret_cast<const uint32_t*>(address));
      return float2{low_half<C::kOperands>(pair), high_half<C::kOperands>(pair)};
    } else {
      return load_const(reinterpret_cast<const float2*>(address));
    }
  }
  DEVICE void write(char* row, int tile, float low, float high) const {
    if (row == nullptr || 8 * tile >= clip_.plan.row) {
      return;
    }
    char* address = row + 8 * tile * C::kMapElement;
    if constexpr (C::k16BitMaps) {
      store_stream(reinterpret_cast<uint32_t*>(address), pack_halves<C::kOperands>(low, high));
    } else {
      store_stream(reinterpret_cast<float2*>(address), float2{low, high});
    }
  }

  // The gradient that reaches S_t from the outputs.
  struct Upstream {
    const char* features;
    const float* strips;
  };
  DEVICE Upstream upstream(int t, int m, int i) const {
    Upstream d{row(clip_.a.d_features, t, m, i), nullptr};
    if (clip_.a.d_strips != nullptr && channel(m, i) < clip_.a.channels) {
      const int64_t index = static_cast<int64_t>(clip_.index) * clip_.a.channels + channel(m, i);
      d.strips = clip_.a.d_strips + index * clip_.plan.height;
    }
    return d;
  }
  DEVICE float2 read(const Upstream& from, int tile) const {
    float2 d = read(from.features, tile);
    if (from.strips != nullptr) {
      d.x += load_const(from.strips + clip_.strip_of()[position(tile)]);
      d.y += load_const(from.strips + clip_.strip_of()[position(tile) + 1]);
    }
    return d;
  }

  DEVICE float saved_z_c(int t, int m, int i) const {
    if (!clip_.a.channel) {
      return 1.f;
    }
    return channel(m, i) < clip_.a.channels ? load_const(clip_.a.z_c + z_c_offset(t, m, i)) : 0.f;
  }
  DEVICE int64_t z_c_offset(int t, int m, int i) const {
    return (static_cast<int64_t>(t - 1) * clip_.a.clips + clip_.index) * clip_.a.channels + channel(m, i);
  }

  DEVICE void leave_d_z_c(int t, int m, int i, float d_z_c) const {
    d_z_c += shfl_xor(d_z_c, 1);
    d_z_c += shfl_xor(d_z_c, 2);
    if (clip_.a.channel && lane_ % 4 == 0) {
      clip_.d_z_c()[own_channel(m, i)] = d_z_c;
      if (clip_.a.d_z_c != nullptr && channel(m, i) < clip_.a.channels) {
        store(clip_.a.d_z_c + z_c_offset(t, m, i), d_z_c);
      }
    }
  }

  DEVICE static void load_slice(uint4 (&w)[kM], const uint4* from, int k) {
    UNROLL for (int m = 0; m < kM; m++) {
      w[m] = load(from + (k * kM + m) * 32);
    }
  }

  const BackwardClip<C>& clip_;
  int lane_ = clip_.lane;
  float sums_[kM][C::kTiles][4] = {};
};

}  // namespace rru::RRU_PLATFORM
