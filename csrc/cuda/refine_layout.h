// How the work of refine's kernels is cut, and how refine_pack lays out their weights for that.
#pragma once

#include <algorithm>
#include <iterator>

#include "device.h"
#include "kernels.h"

namespace rru::RRU_PLATFORM {

using namespace dev;

// Operands of the products with W, and maps of the same dtype but for tf32_of_f16: gradients of 16-bit maps overflow
// fp16.
enum class Operands { bf16, f16, tf32, tf32x3, fp32, tf32_of_f16 };

constexpr bool is_16_bit(Operands operands) {
  return operands == Operands::bf16 || operands == Operands::f16;
}

// A CTA has WARPS warps, MULTIPLE times 16 channels for each of them, and TILES tiles of 8 positions. A cluster has one
// clip.
template <Operands OPERANDS, int WARPS, int TILES, int MULTIPLE = 1>
struct Cut {
  static constexpr Operands kOperands = OPERANDS;
  static constexpr int kWarps = WARPS, kTiles = TILES, kMultiple = MULTIPLE;
  static constexpr bool k16Bit = is_16_bit(OPERANDS);
  static constexpr bool k16BitMaps = k16Bit || OPERANDS == Operands::tf32_of_f16;
  static constexpr int kThreads = 32 * WARPS;
  static constexpr int kChannels = 16 * WARPS * MULTIPLE;  // of a CTA
  static constexpr int kMaxCtas = 16 / MULTIPLE;           // of a cluster
  static constexpr int kD = 32 * WARPS;            // gate channels, at most
  static constexpr int kAttn = 16 * WARPS;         // attention units, at most
  static constexpr int kP = 8 * TILES;             // positions, at most
  static constexpr int kRun = kP / 2;              // half of them
  static constexpr int kStride = kP + 8;           // elements of an operand's row in shared memory: no bank conflicts
  static constexpr int kElement = k16Bit ? 2 : 4;  // bytes of an operand
  static constexpr int kMapElement = k16BitMaps ? 2 : 4;
  static constexpr int kDepth = k16Bit ? 16 : 8;   // terms of one matrix instruction
  static constexpr int kSlices = kChannels / kDepth;
  static constexpr int kSlicesD = kD / kDepth;     // of the backward's product
  // In refine_eval the last slices of W are in shared memory, the first in registers; in fp32, whose products need no
  // fragments, four lanes would hold the same, and they are read from L2 at every frame.
  static constexpr bool kFma = OPERANDS == Operands::fp32;
  static constexpr int kSlicesFirst = k16Bit ? kSlices : std::max(1, kSlices / 5);
  static constexpr int kSlicesShared = kSlices - kSlicesFirst;
  // 16-byte units of packed weights.
  static constexpr int kSliceUnits = 2 * WARPS * 32;  // of a slice of W, by lane of a tile of 16 rows; fp32: by row
  static constexpr int kAhead = 4;                    // slices after the last one that are read, and not used
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
  l.w_c_units = C::kChannels * C::kD * (w_c_is_float ? 4 : 2) / 16;
  l.norm = l.w + (n * C::kSlices + C::kAhead) * C::kSliceUnits;
  l.w_s1 = l.norm + 2 * C::kD / 4;
  l.w_s2 = l.w_s1 + C::kWs1 * C::kThreads;
  l.w_c = l.w_s2 + C::kWs2 * C::kThreads;
  l.end = l.w_c + n * l.w_c_units;
  return l;
}

// Larger gates, maps and channels than these are not carried.
constexpr int kMaxCluster = 16, kMaxChannels = 2048, kMaxD = 256, kMaxAttn = 128, kMaxPositions = 64;

// The operands of a pass's products.
inline Operands operands_of(Dtype dtype, Float32 float32, Pass pass) {
  if (dtype == Dtype::float32) {
    return float32 == Float32::ieee ? Operands::fp32
        : float32 == Float32::tf32  ? Operands::tf32
                                    : Operands::tf32x3;
  }
  return dtype == Dtype::bfloat16  ? Operands::bf16
      : pass == Pass::backward ? Operands::tf32_of_f16
                               : Operands::f16;
}

// Warps of a CTA, and multiples of its channels. A GPU has one number of warps; emulated, few threads are faster.
struct Size {
  int warps, multiple;
};
#if defined(__CUDACC__)
constexpr Size kSizes[] = {{8, 1}, {8, 2}, {8, 4}};
#elif defined(RRU_FEW_WARPS)
constexpr Size kSizes[] = {{1, 1}, {1, 4}, {2, 1}, {2, 2}};
#else
constexpr Size kSizes[] = {{1, 1}, {1, 4}, {2, 1}, {2, 2}, {8, 1}, {8, 2}, {8, 4}};
#endif

// Calls `f` with the Cut's arguments of a call: its operands, warps, tiles and multiple.
template <Pass PASS, class F>
auto with_cut(Operands operands, Size size, int positions, F f) {
  const auto with_size = [&]<Operands O, int TILES, int I>(const auto& self) {
    constexpr Size kSize = kSizes[I];
    if constexpr (I + 1 < static_cast<int>(std::size(kSizes))) {
      if (kSize.warps != size.warps || kSize.multiple != size.multiple) {
        return self.template operator()<O, TILES, I + 1>(self);
      }
    }
    // refine_eval has one multiple.
    return f.template operator()<O, kSize.warps, TILES, PASS == Pass::eval ? 1 : kSize.multiple>();
  };
  const auto with_operands = [&]<Operands O>() {
    return positions <= 32 ? with_size.template operator()<O, 4, 0>(with_size)
                           : with_size.template operator()<O, 8, 0>(with_size);
  };
  switch (operands) {
    case Operands::bf16:
      return with_operands.template operator()<Operands::bf16>();
    case Operands::tf32:
      return with_operands.template operator()<Operands::tf32>();
    case Operands::tf32x3:  // of eval mode alone
      return with_operands.template operator()<PASS == Pass::eval ? Operands::tf32x3 : Operands::tf32>();
    case Operands::fp32:
      return with_operands.template operator()<Operands::fp32>();
    default:
      return with_operands.template operator()<PASS == Pass::backward ? Operands::tf32_of_f16 : Operands::f16>();
  }
}

// Warps for these sizes: the fewest that there are.
template <class Sizes>
int warps_of(const Sizes& s, int multiple) {
  for (const Size size : kSizes) {
    const bool fits = ctas_of(s.channels, 16 * size.warps * size.multiple) <= kMaxCluster / size.multiple;
    if (size.multiple == multiple && fits && s.d <= 32 * size.warps && s.num_attn <= 16 * size.warps) {
      return size.warps;
    }
  }
  return 0;
}

template <Operands OPERANDS>
constexpr bool kIsF16 = OPERANDS == Operands::f16 || OPERANDS == Operands::tf32_of_f16;

template <Operands OPERANDS>
DEVICE float low_half(uint32_t pair) {
  return kIsF16<OPERANDS> ? f16_low(pair) : bf16_low(pair);
}
template <Operands OPERANDS>
DEVICE float high_half(uint32_t pair) {
  return kIsF16<OPERANDS> ? f16_high(pair) : bf16_high(pair);
}
template <Operands OPERANDS>
DEVICE uint32_t pack_halves(float low, float high) {
  return kIsF16<OPERANDS> ? pack_f16(low, high) : pack_bf16(low, high);
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
