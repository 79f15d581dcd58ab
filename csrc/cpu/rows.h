// Runs of positions: maps of any strides and dtype read into rows of the arithmetic dtype, and rows written back.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "gemm.h"

namespace rru {
namespace CPU_CAPABILITY {

// A row holds at most this many positions. Rows are worked on in whole vectors: a buffer of kRow is always enough, and
// what lies past a row's end is zero.
constexpr int64_t kRow = kTileN;

// Row lengths are rounded up to this where rows lie one under the other: a vector of any capability.
constexpr int64_t kAlign = 16;

template <typename Acc>
struct alignas(64) Row {
  Acc values[kRow];
};

// Rows of neighbouring channels, gathered together: where a map's positions lie apart, its channels often follow each
// other, and a cache line holds this many of them.
constexpr int64_t kGatherChannels = 16;

template <typename Acc>
struct alignas(64) GatherBuffer {
  Acc values[kGatherChannels * kRow];
  const void* of = nullptr;  // the first element gathered
};

// A large tensor nobody has written to yet, on huge pages where the system gives them: a fresh page costs a fault.
inline Tensor on_huge_pages(const Tensor& fresh) {
#if defined(__linux__)
  constexpr uintptr_t page = 2 << 20;
  const auto begin = round_up(reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr()), page);
  const auto end = (reinterpret_cast<uintptr_t>(fresh.mutable_data_ptr()) + fresh.nbytes()) / page * page;
  if (end > begin + 4 * page) {
    madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: refusal is no error
  }
#endif
  return fresh;
}

// n contiguous values as a row of Acc: the values themselves where that needs no work, else `buffer`.
template <typename Acc, typename T>
inline const Acc* load(const T* from, int64_t n, Acc* buffer) {
  if constexpr (std::is_same_v<Acc, T>) {
    if (n % kAlign == 0) {
      return from;
    }
    std::memcpy(buffer, from, n * sizeof(Acc));
    std::fill(buffer + n, buffer + round_up(n, kAlign), Acc(0));
  } else {
    using Vec = at::vec::Vectorized<T>;
    for (int64_t i = 0; i < n; i += Vec::size()) {
      const Vec wide = i + Vec::size() <= n ? Vec::loadu(from + i) : Vec::loadu(from + i, n - i);
      const auto [low, high] = at::vec::convert_to_float<T>(wide);
      low.store(buffer + i);
      high.store(buffer + i + Vec::size() / 2);
    }
  }
  return buffer;
}

// The first n values of a row, stored as T.
template <typename Acc, typename T>
inline void store(const Acc* row, int64_t n, T* to) {
  if constexpr (std::is_same_v<Acc, T>) {
    using Vec = at::vec::Vectorized<Acc>;
    int64_t i = 0;
    for (; i + Vec::size() <= n; i += Vec::size()) {  // a row is too short to call memcpy for
      Vec::loadu(row + i).store(to + i);
    }
    if (i < n) {
      Vec::loadu(row + i, n - i).store(to + i, n - i);
    }
  } else {
    using Vec = at::vec::Vectorized<T>;
    using AccVec = at::vec::Vectorized<Acc>;
    for (int64_t i = 0; i < n; i += Vec::size()) {
      const Vec narrow =
          at::vec::convert_from_float<T>(AccVec::loadu(row + i), AccVec::loadu(row + i + AccVec::size()));
      if (i + Vec::size() <= n) {
        narrow.store(to + i);
      } else {
        narrow.store(to + i, n - i);
      }
    }
  }
}

// StridedMaps (B, T, C, H, W), or (B, C, H, W) as one frame, of any strides.
template <typename T>
class StridedMaps {
 public:
  explicit StridedMaps(const at::Tensor& maps)
      : data_(maps.const_data_ptr<T>()), channels_(maps.size(-3)), width_(maps.size(-1)) {
    const auto strides = maps.strides();
    const auto dims = maps.dim();
    column_ = strides[dims - 1];
    row_ = strides[dims - 2];
    channel_ = strides[dims - 3];
    frame_ = dims == 5 ? strides[1] : 0;
    clip_ = strides[0];
    const bool columns_follow = column_ == 1 || width_ == 1;
    const bool rows_follow = row_ == width_ || maps.size(-2) == 1;
    run_ = columns_follow && rows_follow;
  }

  // Positions p0 to p0 + n of one channel's map. Where they do not follow each other they are gathered into `lines`,
  // which the calls for the next channels find again; no copy of the whole is made.
  template <typename Acc>
  const Acc* row(int64_t clip, int64_t frame, int64_t channel, int64_t p0, int64_t n, GatherBuffer<Acc>& lines) const {
    if (run_) {
      return load(data_ + clip * clip_ + frame * frame_ + channel * channel_ + p0, n, lines.values);
    }
    return gather(clip, frame, channel, p0, n, lines);
  }

 private:
  template <typename Acc>
  C10_NOINLINE const Acc* gather(
      int64_t clip, int64_t frame, int64_t channel, int64_t p0, int64_t n, GatherBuffer<Acc>& lines) const {
    const int64_t first = channel / kGatherChannels * kGatherChannels;
    const int64_t count = std::min(kGatherChannels, channels_ - first);
    int64_t h = p0 / width_, w = p0 % width_;
    const T* maps = data_ + clip * clip_ + frame * frame_ + first * channel_;
    if (lines.of != maps + h * row_ + w * column_) {
      lines.of = maps + h * row_ + w * column_;
      std::fill(lines.values, lines.values + kGatherChannels * kRow, Acc(0));
      for (int64_t i = 0; i < n; i++) {
        const T* from = maps + h * row_ + w * column_;
        for (int64_t line = 0; line < count; line++) {
          lines.values[line * kRow + i] = static_cast<Acc>(from[line * channel_]);
        }
        if (++w == width_) {
          w = 0;
          h++;
        }
      }
    }
    return lines.values + (channel - first) * kRow;
  }

  const T* data_;
  int64_t channels_, width_, column_, row_, channel_, frame_, clip_;
  bool run_;  // whether a map's positions follow each other in memory
};

inline uint32_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  return value != value ? 0x7fc0 : rounded;
}

// Rows k to k + kVnni of a right operand with leading dimension ld; `rows` lie kRow apart.
template <typename Operand>
inline void pack_rows(const at::opmath_type<Operand>* rows, Operand* operand, int64_t k, int64_t ld, int64_t n) {
  if constexpr (kVnni<Operand> == 1) {
    store(rows, n, operand + k * ld);
  } else {
    auto* pairs = reinterpret_cast<uint32_t*>(operand + k * ld);  // a pair has the size of one word
    for (int64_t i = 0; i < n; i++) {
      pairs[i] = bfloat16_bits(rows[i]) | bfloat16_bits(rows[kRow + i]) << 16;
    }
  }
}

template <typename Acc>
inline Acc reduce_add(at::vec::Vectorized<Acc> v) {
  return at::vec::vec_reduce_all<Acc>([](auto a, auto b) { return a + b; }, v);
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
