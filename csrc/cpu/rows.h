// Rows: runs of positions of one channel, converted between the stored dtype and the arithmetic dtype.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "gemm.h"

namespace rru {
namespace CPU_CAPABILITY {

// A row has at most this many positions. Rows are processed in whole vectors, so a buffer always has kMaxRow elements,
// zero past the row's end.
constexpr int64_t kMaxRow = kTileN;

// In a matrix of rows, row lengths are rounded up to this: the widest vector of any capability.
constexpr int64_t kRowAlign = 16;

template <typename Acc>
struct alignas(64) Row {
  Acc values[kMaxRow];
};

// n contiguous values as a row: `from` itself where no conversion or padding is needed, else `buffer`.
template <typename Acc, typename T>
inline const Acc* load(const T* from, int64_t n, Acc* buffer) {
  if constexpr (std::is_same_v<Acc, T>) {
    if (n % kRowAlign == 0) {
      return from;
    }
    std::memcpy(buffer, from, n * sizeof(Acc));
    std::fill(buffer + n, buffer + round_up(n, kRowAlign), Acc(0));
  } else {
    using Vec = at::vec::Vectorized<T>;
    for (int64_t i = 0; i < n; i += Vec::size()) {
      const Vec stored = i + Vec::size() <= n ? Vec::loadu(from + i) : Vec::loadu(from + i, n - i);
      const auto [low, high] = at::vec::convert_to_float<T>(stored);
      low.store(buffer + i);
      high.store(buffer + i + Vec::size() / 2);
    }
  }
  return buffer;
}

// Stores the first n values of a row as T.
template <typename Acc, typename T>
inline void store(const Acc* row, int64_t n, T* to) {
  if constexpr (std::is_same_v<Acc, T>) {
    using Vec = at::vec::Vectorized<Acc>;
    int64_t i = 0;
    for (; i + Vec::size() <= n; i += Vec::size()) {  // a row is too short for a call of memcpy
      Vec::loadu(row + i).store(to + i);
    }
    if (i < n) {
      Vec::loadu(row + i, n - i).store(to + i, n - i);
    }
  } else {
    using Vec = at::vec::Vectorized<T>;
    using AccVec = at::vec::Vectorized<Acc>;
    for (int64_t i = 0; i < n; i += Vec::size()) {
      const AccVec low = AccVec::loadu(row + i), high = AccVec::loadu(row + i + AccVec::size());
      const Vec rounded = at::vec::convert_from_float<T>(low, high);
      if (i + Vec::size() <= n) {
        rounded.store(to + i);
      } else {
        rounded.store(to + i, n - i);
      }
    }
  }
}

// The bits of the nearest bf16 value, ties to even.
inline uint32_t bfloat16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return value != value ? 0x7fc0 : rounded;
}

// Packs kVnni rows, kMaxRow apart, as rows k to k + kVnni of a right operand with leading dimension ld.
template <typename Operand>
inline void pack_rows(const at::opmath_type<Operand>* rows, Operand* operand, int64_t k, int64_t ld, int64_t n) {
  if constexpr (kVnni<Operand> == 1) {
    store(rows, n, operand + k * ld);
  } else {
    auto* pairs = reinterpret_cast<uint32_t*>(operand + k * ld);  // one word per pair of bf16
    for (int64_t i = 0; i < n; i++) {
      pairs[i] = bfloat16_bits(rows[i]) | bfloat16_bits(rows[kMaxRow + i]) << 16;
    }
  }
}

// The sum of a vector's elements.
template <typename Acc>
inline Acc reduce_add(at::vec::Vectorized<Acc> v) {
  return at::vec::vec_reduce_all<Acc>([](auto a, auto b) { return a + b; }, v);
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
