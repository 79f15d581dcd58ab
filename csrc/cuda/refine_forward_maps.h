// The maps in training mode: S blended, eq. 5, stored, and pooled into strips, eq. 9; X_t read, and A written for the
// product, in one pass over a CTA's channels.
#pragma once

#include "refine_forward_gate.h"

namespace rru::RRU_PLATFORM {

// S of this CTA's channels. A thread has a tile of 8 positions of every kStep-th channel. Arrays are registers: loops
// over them are unrolled.
template <class C>
class ForwardMaps {
  using At = ForwardMemory<C>;
  static constexpr Operands kOperands = C::kOperands;
  static constexpr int kBatches = C::kChannels * C::kTiles / C::kThreads;
  static constexpr int kStep = C::kThreads / C::kTiles;
  static constexpr int kUnits = 8 * C::kMapElement / 16;  // of 16 bytes, of a tile
  static constexpr int kInFlight = 2;                     // batches that are read ahead
  static constexpr int kInRegisters = kBatches - At::kSharedBatches;

 public:
  DEVICE ForwardMaps(const ForwardClip<C>& clip, const ForwardGate<C>& gate)
      : clip_(clip), gate_(gate), tile_(clip.t % C::kTiles), first_(clip.t / C::kTiles) {
    UNROLL for (int b = 0; b < kBatches; b++) {
      Batch batch;
      read(batch, 0, b);
      float s[8];
      to_floats(s, batch.x);
      put(b, s);
    }
  }

  // Makes S_{t-1}, stores it, adds it to the strips, and writes A_t = X_t - S_{t-1}, if there is a frame t.
  DEVICE void advance(int t) {
    first_ = anew(first_);
    tile_ = anew(tile_);
    float z_s[8];
    UNROLL for (int i = 0; i < 8; i++) {
      z_s[i] = gate_.z_s()[8 * tile_ + i];
    }
    Batch batches[kBatches];
    UNROLL for (int b = 0; b < kInFlight && b < kBatches; b++) {
      read(batches[b], t, b);
    }
    UNROLL for (int b = 0; b < kBatches; b++) {
      fence_schedule();
      if (b + kInFlight < kBatches) {
        read(batches[b + kInFlight], t, b + kInFlight);
      }
      float s[8], x[8];
      get(s, b);
      blend(s, b, z_s, t > 1);
      put(b, s);
      write(s, t - 1, b);
      add_to_strips(s, b, batches[b].strips, t == 1);
      to_floats(x, batches[b].x);
      write_difference(b, x, s);
    }
  }

  // Brings a frame closer, 128 bytes at a time.
  DEVICE void prefetch(int t) const {
    constexpr int kTilesAtOnce = 128 / (8 * C::kMapElement);
    UNROLL for (int b = 0; b < kBatches; b++) {
      if (t < clip_.a.frames && tile_ % kTilesAtOnce == 0 && has_tile(b)) {
        prefetch_l2(x_at(t, b));
      }
    }
  }

  // Adds up the strips' parts.
  DEVICE void finish() const {
    sync("parts of strips are written");
    const int width = clip_.a.width, height = clip_.a.positions / width;
    for (int i = clip_.t; i < C::kChannels * height; i += C::kThreads) {
      const int c = i / height, row = i % height, channel = clip_.rank * C::kChannels + c;
      float sum = 0.f;
      for (int tile = row * width / 8; tile <= ((row + 1) * width - 1) / 8; tile++) {
        sum += load(strip_parts(c, tile) + row - 8 * tile / width);
      }
      if (channel < clip_.a.channels) {
        store(clip_.a.strips + (static_cast<int64_t>(clip_.index) * clip_.a.channels + channel) * height + row, sum);
      }
    }
  }

 private:
  // What comes from global memory for a batch.
  struct Batch {
    uint4 x[kUnits];
    float strips[2];  // the first parts
  };

  DEVICE int own_channel(int b) const {
    return first_ + kStep * b;
  }
  DEVICE int channel(int b) const {
    return clip_.rank * C::kChannels + own_channel(b);
  }
  DEVICE bool has_tile(int b) const {
    return channel(b) < clip_.a.channels && 8 * tile_ < clip_.plan.row;
  }
  DEVICE const uint4* x_at(int t, int b) const {
    const Maps& x = clip_.a.x;
    const int64_t offset = clip_.index * x.clip + t * x.frame + channel(b) * x.channel + 8 * tile_;
    return reinterpret_cast<const uint4*>(static_cast<const char*>(x.data) + offset * C::kMapElement);
  }
  DEVICE unsigned char* difference(int b) const {
    return shared_at<unsigned char>(At::kA + (own_channel(b) * C::kStride + 8 * tile_) * C::kElement);
  }
  // The half of a tile in fp32 that every second group of 4 lanes takes first: else two lanes would share each bank.
  DEVICE int swapped() const {
    return clip_.t / 4 % 2;
  }
  DEVICE uint4* own_x(int b) const {
    return shared_at<uint4>(At::kX + (own_channel(b) * C::kP + 8 * tile_) * 2);
  }
  DEVICE float* strip_parts(int c, int tile) const {
    const int64_t channel = (static_cast<int64_t>(clip_.index) * clip_.ctas() + clip_.rank) * C::kChannels + c;
    return clip_.a.scratch.strips + (channel * C::kTiles + tile) * clip_.plan.strip_rows;
  }

  // S of a batch: in registers, or in shared memory where these are too few.
  DEVICE float4* shared_s(int b) const {
    return shared_at<float4>(At::kS) + 2 * (b - kInRegisters) * C::kThreads + clip_.t;
  }
  DEVICE void get(float (&s)[8], int b) const {
    if (b < kInRegisters) {
      UNROLL for (int i = 0; i < 8; i++) {
        s[i] = s_[b][i];
      }
    } else {
      const float4 low = shared_s(b)[0], high = shared_s(b)[C::kThreads];
      const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      UNROLL for (int i = 0; i < 8; i++) {
        s[i] = values[i];
      }
    }
  }
  DEVICE void put(int b, const float (&s)[8]) {
    if (b < kInRegisters) {
      UNROLL for (int i = 0; i < 8; i++) {
        s_[b][i] = s[i];
      }
    } else {
      shared_s(b)[0] = make_float4(s[0], s[1], s[2], s[3]);
      shared_s(b)[C::kThreads] = make_float4(s[4], s[5], s[6], s[7]);
    }
  }

  // Zeros where there is nothing.
  DEVICE void read(Batch& batch, int t, int b) const {
    const bool there = t < clip_.a.frames && has_tile(b);
    UNROLL for (int i = 0; i < kUnits; i++) {
      batch.x[i] = there ? load_stream(x_at(t, b) + i) : make_uint4(0, 0, 0, 0);
    }
    const float* parts = strip_parts(own_channel(b), tile_);
    UNROLL for (int i = 0; i < 2; i++) {
      batch.strips[i] = t > 1 && i < clip_.plan.strip_rows ? load(parts + i) : 0.f;
    }
  }

  DEVICE static void to_floats(float (&v)[8], const uint4 (&units)[kUnits]) {
    UNROLL for (int i = 0; i < kUnits; i++) {
      const uint32_t words[4] = {units[i].x, units[i].y, units[i].z, units[i].w};
      UNROLL for (int j = 0; j < 4; j++) {
        if constexpr (C::k16BitMaps) {
          v[2 * j] = low_half<kOperands>(words[j]);
          v[2 * j + 1] = high_half<kOperands>(words[j]);
        } else {
          v[4 * i + j] = uint_as_float(words[j]);
        }
      }
    }
  }
  DEVICE static void to_units(uint4 (&units)[kUnits], const float (&v)[8]) {
    UNROLL for (int i = 0; i < kUnits; i++) {
      uint32_t words[4];
      UNROLL for (int j = 0; j < 4; j++) {
        if constexpr (C::k16BitMaps) {
          words[j] = pack_halves<kOperands>(v[2 * j], v[2 * j + 1]);
        } else {
          words[j] = float_as_uint(v[4 * i + j]);
        }
      }
      units[i] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }

  // S = S + Z A, of the frame whose A is in the tile, in fp32: rounded, it is formed again of X.
  DEVICE void blend(float (&s)[8], int b, const float (&z_s)[8], bool is_gated) const {
    float a[8];
    if constexpr (C::k16Bit) {
      const uint4 x[kUnits] = {*own_x(b)};
      to_floats(a, x);
      UNROLL for (int i = 0; i < 8; i++) {
        a[i] -= s[i];
      }
    } else {
      const auto* from = reinterpret_cast<const float4*>(difference(b));
      const float4 first = from[swapped()], second = from[1 - swapped()];
      const float4 low = swapped() == 0 ? first : second, high = swapped() == 0 ? second : first;
      const float values[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
      UNROLL for (int i = 0; i < 8; i++) {
        a[i] = values[i];
      }
    }
    const float z_c = gate_.z_c()[own_channel(b)];
    UNROLL for (int i = 0; i < 8; i++) {
      const float change = div_(1.f, 1.f + exp_(-z_c * z_s[i])) * a[i];
      s[i] += is_gated ? change : 0.f;
    }
    if (C::k16Bit && RRU_MUTANT("S is kept in 16 bits")) {
      uint4 units[kUnits];
      to_units(units, s);
      to_floats(s, units);
    }
  }

  // Writes a tile of S_t.
  DEVICE void write(const float (&s)[8], int t, int b) const {
    const int64_t frame = static_cast<int64_t>(clip_.index) * clip_.a.frames + t;
    const int64_t to = (frame * clip_.a.channels + channel(b)) * clip_.plan.row + 8 * tile_;
    auto* units_at = reinterpret_cast<uint4*>(static_cast<char*>(clip_.a.features) + to * C::kMapElement);
    uint4 units[kUnits];
    to_units(units, s);
    UNROLL for (int i = 0; i < kUnits; i++) {
      if (has_tile(b)) {
        store_stream(units_at + i, units[i]);
      }
    }
  }

  // Adds S to this thread's parts of the strips, of which `first` are the first.
  DEVICE void add_to_strips(const float (&s)[8], int b, const float (&first)[2], bool is_first) const {
    float* parts = strip_parts(own_channel(b), tile_);
    const int column = 8 * tile_ % clip_.a.width;
    NO_UNROLL for (int row = 0; row < clip_.plan.strip_rows; row++) {
      const int begin = row * clip_.a.width - column, end = begin + clip_.a.width;
      float sum = 0.f;
      UNROLL for (int i = 0; i < 8; i++) {
        sum += begin <= i && i < end ? s[i] : 0.f;
      }
      const float before = row == 0 ? first[0] : row == 1 ? first[1] : is_first ? 0.f : load(parts + row);
      store(parts + row, before + sum);
    }
  }

  DEVICE void write_difference(int b, const float (&x)[8], const float (&s)[8]) const {
    float a[8];
    UNROLL for (int i = 0; i < 8; i++) {
      a[i] = x[i] - s[i];
    }
    if constexpr (C::k16Bit) {
      uint4 units[kUnits];
      to_units(units, a);
      *reinterpret_cast<uint4*>(difference(b)) = units[0];
      to_units(units, x);
      *own_x(b) = units[0];
    } else {
      auto* to = reinterpret_cast<float4*>(difference(b));
      const float4 low = make_float4(quiet(a[0]), quiet(a[1]), quiet(a[2]), quiet(a[3]));
      const float4 high = make_float4(quiet(a[4]), quiet(a[5]), quiet(a[6]), quiet(a[7]));
      to[swapped()] = swapped() == 0 ? low : high;
      to[1 - swapped()] = swapped() == 0 ? high : low;
    }
  }

  const ForwardClip<C>& clip_;
  const ForwardGate<C>& gate_;
  int tile_, first_;
  float s_[kInRegisters][8];
};

}  // namespace rru::RRU_PLATFORM
