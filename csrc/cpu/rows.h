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

#include "multiply.h"

namespace rru {
namespace CPU_CAPABILITY {

// The arithmetic dtype of maps stored as T.
template <typename T>
using Arithmetic = std::conditional_t<std::is_same_v<T, double>, double, float>;

// A row holds at most this many positions. Rows are worked on in whole vectors: a buffer of kRow is always enough, and
// what lies past a row's end is zero.
constexpr int64_t kRow = kColumns;

// Row lengths are rounded up to this where rows lie one under the other: a vector of any capability.
constexpr int64_t kAlign = 16;

template <typename A>
struct alignas(64) Row {
  A values[kRow];
};

// Rows of neighbouring channels, gathered together: where a map's positions lie apart, its channels often follow each
// other, and a cache line holds this many of them.
constexpr int64_t kLines = 16;

template <typename A>
struct alignas(64) Lines {
  A values[kLines * kRow];
  const void* of = nullptr;  // the first element gathered
};

// A large tensor nobody has written to yet, on huge pages where the system gives them: a fresh page costs a fault.
inline Tensor huge(const Tensor& fresh) {
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

// n contiguous values as a row of A: the values themselves where that needs no work, else `buffer`.
template <typename A, typename T>
inline const A* load(const T* from, int64_t n, A* buffer) {
  if constexpr (std::is_same_v<A, T>) {
    if (n % kAlign == 0) {
      return from;
    }
    std::memcpy(buffer, from, n * sizeof(A));
    std::fill(buffer + n, buffer + round_up(n, kAlign), A(0));
  } else {
    using V = at::vec::Vectorized<T>;
    for (int64_t i = 0; i < n; i += V::size()) {
      const V wide = i + V::size() <= n ? V::loadu(from + i) : V::loadu(from + i, n - i);
      const auto [low, high] = at::vec::convert_to_float<T>(wide);
      low.store(buffer + i);
      high.store(buffer + i + V::size() / 2);
    }
  }
  return buffer;
}

// The first n values of a row, stored as T.
template <typename A, typename T>
inline void store(const A* row, int64_t n, T* to) {
  if constexpr (std::is_same_v<A, T>) {
    using V = at::vec::Vectorized<A>;
    int64_t i = 0;
    for (; i + V::size() <= n; i += V::size()) {  // a row is too short to call memcpy for
      V::loadu(row + i).store(to + i);
    }
    if (i < n) {
      V::loadu(row + i, n - i).store(to + i, n - i);
    }
  } else {
    using V = at::vec::Vectorized<T>;
    using VA = at::vec::Vectorized<A>;
    for (int64_t i = 0; i < n; i += V::size()) {
      const V narrow = at::vec::convert_from_float<T>(VA::loadu(row + i), VA::loadu(row + i + VA::size()));
      if (i + V::size() <= n) {
        narrow.store(to + i);
      } else {
        narrow.store(to + i, n - i);
      }
    }
  }
}

// Maps (B, T, C, H, W), or (B, C, H, W) as one frame, of any strides.
template <typename T>
class Maps {
 public:
  explicit Maps(const at::Tensor& maps)
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
  template <typename A>
  const A* row(int64_t clip, int64_t frame, int64_t channel, int64_t p0, int64_t n, Lines<A>& lines) const {
    if (run_) {
      return load(data_ + clip * clip_ + frame * frame_ + channel * channel_ + p0, n, lines.values);
    }
    return gather(clip, frame, channel, p0, n, lines);
  }

 private:
  template <typename A>
  C10_NOINLINE const A* gather(
      int64_t clip, int64_t frame, int64_t channel, int64_t p0, int64_t n, Lines<A>& lines) const {
    const int64_t first = channel / kLines * kLines, count = std::min(kLines, channels_ - first);
    int64_t h = p0 / width_, w = p0 % width_;
    const T* maps = data_ + clip * clip_ + frame * frame_ + first * channel_;
    if (lines.of != maps + h * row_ + w * column_) {
      lines.of = maps + h * row_ + w * column_;
      std::fill(lines.values, lines.values + kLines * kRow, A(0));
      for (int64_t i = 0; i < n; i++) {
        const T* from = maps + h * row_ + w * column_;
        for (int64_t line = 0; line < count; line++) {
          lines.values[line * kRow + i] = static_cast<A>(from[line * channel_]);
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

// Rows k to k + kInterleave of a right operand with leading dimension ld; `rows` lie kRow apart.
template <typename G>
inline void put_rows(const Sum<G>* rows, G* operand, int64_t k, int64_t ld, int64_t n) {
  if constexpr (kInterleave<G> == 1) {
    store(rows, n, operand + k * ld);
  } else {
    auto* pairs = reinterpret_cast<uint32_t*>(operand + k * ld);  // a pair has the size of one word
    for (int64_t i = 0; i < n; i++) {
      pairs[i] = bfloat16_bits(rows[i]) | bfloat16_bits(rows[kRow + i]) << 16;
    }
  }
}

template <typename A>
inline A total(at::vec::Vectorized<A> v) {
  return at::vec::vec_reduce_all<A>([](auto a, auto b) { return a + b; }, v);
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
