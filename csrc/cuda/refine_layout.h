// How refine_eval's work is cut, and how refine_pack lays out its weights for that.
#pragma once

#include <algorithm>

#include "device.h"
#include "kernels.h"

namespace rru::RRU_PLATFORM {

using namespace dev;

// Operands of the products with W.
enum class Operands { bf16, f16, tf32, tf32x3, fp32 };

constexpr bool is_16_bit(Operands operands) {
  return operands == Operands::bf16 || operands == Operands::f16;
}

// A CTA has WARPS warps, two threads for each of its channels, and TILES tiles of 8 positions. A cluster has one clip.
template <Operands OPERANDS, int WARPS, int TILES>
struct Cut {
  static constexpr bool k16Bit = is_16_bit(OPERANDS);
  static constexpr int kThreads = 32 * WARPS;
  static constexpr int kChannels = 16 * WARPS;  // of a CTA
  static constexpr int kD = 32 * WARPS;         // gate channels, at most; a warp multiplies 32 of them
  static constexpr int kAttn = 16 * WARPS;      // attention units, at most
  static constexpr int kP = 8 * TILES;          // positions, at most
  static constexpr int kRun = kP / 2;           // positions of a thread, of one channel
  static constexpr int kStride = kP + 8;        // elements of a row of the A tile: no bank conflicts
  static constexpr int kElement = k16Bit ? 2 : 4;  // bytes
  static constexpr int kDepth = k16Bit ? 16 : 8;   // channels of one matrix instruction
  static constexpr int kSlices = kChannels / kDepth;
  // The last slices of W are in shared memory, the first in registers; in fp32, whose products need no fragments, four
  // lanes would hold the same, and they are read from L2 at every frame.
  static constexpr bool kFma = OPERANDS == Operands::fp32;
  static constexpr int kSlicesFirst = k16Bit ? kSlices : std::max(1, kSlices / 5);
  static constexpr int kSlicesShared = kSlices - kSlicesFirst;
  // 16-byte units of packed weights.
  static constexpr int kSliceUnits = 2 * WARPS * 32;  // of a slice of W, by lane of a tile of 16 rows; fp32: by row
  static constexpr int kWs1 = TILES;                  // per thread: half of the positions of one attention unit
  static constexpr int kPasses = std::max(1, TILES / WARPS);
  static constexpr int kWs2 = kPasses * WARPS;        // per thread: a quarter of the units of one position per pass
};

// Offsets of packed weights, in units of 16 bytes.
struct PackedLayout {
  int w, norm, w_s1, w_s2, w_c, end;
  int w_c_units;  // of one rank
  bool w_c_is_float;
};

// CTAs of a cluster: a power of 2.
inline int ctas_of(int channels, int channels_of_cta) {
  int n = 1;
  while (n * channels_of_cta < channels) {
    n *= 2;
  }
  return n;
}

template <class C>
PackedLayout packed_layout(int channels, bool w_c_is_float) {
  const int n = ctas_of(channels, C::kChannels);
  PackedLayout l{};
  l.w_c_is_float = w_c_is_float;
  l.w_c_units = C::kThreads * (C::kD / 2) * (w_c_is_float ? 4 : 2) / 16;
  l.norm = l.w + n * C::kSlices * C::kSliceUnits;
  l.w_s1 = l.norm + 2 * C::kD / 4;
  l.w_s2 = l.w_s1 + C::kWs1 * C::kThreads;
  l.w_c = l.w_s2 + C::kWs2 * C::kThreads;
  l.end = l.w_c + n * l.w_c_units;
  return l;
}

// The template's arguments for a call.
struct Shape {
  Operands operands;
  int warps, tiles;
};

inline Operands operands_of(Dtype dtype, Float32 float32) {
  return dtype == Dtype::bfloat16 ? Operands::bf16
      : dtype == Dtype::float16   ? Operands::f16
      : float32 == Float32::ieee  ? Operands::fp32
      : float32 == Float32::tf32  ? Operands::tf32
                                  : Operands::tf32x3;
}

// Larger gates, maps and channels than these are not carried.
constexpr int kMaxCluster = 16, kMaxChannels = 2048, kMaxD = 256, kMaxAttn = 128, kMaxPositions = 64;

// A GPU has one number of warps. Emulated, few threads are faster, and a real warp count remains for large sizes.
template <class Sizes>
Shape shape_of(const Sizes& s) {
  int warps = 8;
#ifndef __CUDACC__
  for (const int few : {2, 1}) {
    const bool fits = ctas_of(s.channels, 16 * few) <= kMaxCluster;
    warps = fits && s.d <= 32 * few && s.num_attn <= 16 * few ? few : warps;
  }
#endif
  return {operands_of(s.dtype, s.float32), warps, s.positions <= 32 ? 4 : 8};
}

// Calls `f` with the Cut of a shape.
template <class F>
auto with_cut(Shape shape, F f) {
  const auto with_warps = [&]<Operands O, int TILES>() {
#ifndef __CUDACC__
    if (shape.warps == 1) {
      return f.template operator()<O, 1, TILES>();
    }
    if (shape.warps == 2) {
      return f.template operator()<O, 2, TILES>();
    }
#endif
    return f.template operator()<O, 8, TILES>();
  };
  const auto with_tiles = [&]<Operands O>() {
    return shape.tiles == 4 ? with_warps.template operator()<O, 4>() : with_warps.template operator()<O, 8>();
  };
  switch (shape.operands) {
    case Operands::bf16:
      return with_tiles.template operator()<Operands::bf16>();
    case Operands::f16:
      return with_tiles.template operator()<Operands::f16>();
    case Operands::tf32:
      return with_tiles.template operator()<Operands::tf32>();
    case Operands::tf32x3:
      return with_tiles.template operator()<Operands::tf32x3>();
    default:
      return with_tiles.template operator()<Operands::fp32>();
  }
}

template <Operands OPERANDS>
DEVICE float low_half(uint32_t pair) {
  return OPERANDS == Operands::f16 ? f16_low(pair) : bf16_low(pair);
}
template <Operands OPERANDS>
DEVICE float high_half(uint32_t pair) {
  return OPERANDS == Operands::f16 ? f16_high(pair) : bf16_high(pair);
}
template <Operands OPERANDS>
DEVICE uint32_t pack_halves(float low, float high) {
  return OPERANDS == Operands::f16 ? pack_f16(low, high) : pack_bf16(low, high);
}

// Rounds an operand of a TF32 product to nearest, ties away from 0; the low 13 bits of the result do not count. A NaN
// must not have all bits of its mantissa set, as those that a GPU computes have: see quiet().
DEVICE uint32_t round_tf32(uint32_t bits) {
  return bits + 0x1000;
}
DEVICE float quiet(float v) {
  return v != v ? uint_as_float(0x7fc00000) : v;
}

}  // namespace rru::RRU_PLATFORM
