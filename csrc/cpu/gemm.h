// Matrix products: oneDNN's micro-kernels through ATen, and loops where oneDNN has no kernel.
#pragma once

#include <ATen/OpMathType.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <exception>
#include <type_traits>
#include <vector>

#include "parallel.h"

namespace rru {
namespace CPU_CAPABILITY {

// Rows of a right operand that are interleaved element by element (VNNI layout): bf16 instructions multiply pairs.
template <typename Operand>
constexpr int64_t kVnni = std::is_same_v<Operand, c10::BFloat16> ? 2 : 1;

// Columns per tile of a right operand: as many as the micro-kernels' registers hold.
constexpr int64_t kTileN = 64;

// K is summed in blocks of this size, and then over blocks: one chain of additions over K loses twice the digits.
constexpr int64_t kBlockK = 256;

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// R rows of C (N) = A (K) B (K, N), or C += A B, summed in order of K: BLAS may sum in another order when the number
// of threads changes.
template <int64_t R, typename Acc>
inline void gemm_rows(
    int64_t n, int64_t k, const Acc* a, int64_t lda, const Acc* b, int64_t ldb, Acc* c, int64_t ldc, bool accumulate) {
  using Vec = at::vec::Vectorized<Acc>;
  for (int64_t j = 0; j < n; j += Vec::size()) {
    const int64_t count = std::min<int64_t>(Vec::size(), n - j);
    Vec sums[R];
    for (int64_t r = 0; r < R; r++) {
      sums[r] = accumulate ? Vec::loadu(c + r * ldc + j, count) : Vec(0);
    }
    for (int64_t i = 0; i < k; i++) {
      const Vec right = count == Vec::size() ? Vec::loadu(b + i * ldb + j) : Vec::loadu(b + i * ldb + j, count);
      for (int64_t r = 0; r < R; r++) {
        sums[r] = at::vec::fmadd(Vec(a[r * lda + i]), right, sums[r]);
      }
    }
    for (int64_t r = 0; r < R; r++) {
      sums[r].store(c + r * ldc + j, count);
    }
  }
}

// C (M, N) = A (M, K) B (K, N), or C += A B, by loops.
template <typename Acc>
inline void gemm_by_loops(
    int64_t m, int64_t n, int64_t k, const Acc* a, int64_t lda, const Acc* b, int64_t ldb, Acc* c, int64_t ldc,
    bool accumulate) {
  constexpr int64_t kRows = 8;
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows) {
    gemm_rows<kRows>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
  }
  for (; i < m; i++) {
    gemm_rows<1>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, accumulate);
  }
}

// The same for bf16 operands, B in VNNI layout: converted to fp32, which is exact.
inline void gemm_by_loops(
    int64_t m, int64_t n, int64_t k, const c10::BFloat16* a, int64_t lda, const c10::BFloat16* b, int64_t ldb, float* c,
    int64_t ldc, bool accumulate) {
  constexpr int64_t kPair = kVnni<c10::BFloat16>;
  std::vector<float> left(m * k), right(k * n);
  for (int64_t i = 0; i < m; i++) {
    std::copy_n(a + i * lda, k, left.data() + i * k);
  }
  for (int64_t i = 0; i < k; i++) {
    for (int64_t j = 0; j < n; j++) {
      right[i * n + j] = b[(i / kPair * ldb + j) * kPair + i % kPair];
    }
  }
  gemm_by_loops(m, n, k, left.data(), k, right.data(), n, c, ldc, accumulate);
}

// C (M, N) = A (M, K) B (K, N), or C += A B, on the calling thread; row-major with leading dimensions lda, ldb, ldc.
// K is a multiple of kVnni<Operand>, and B is in VNNI layout: with v = kVnni<Operand>, element (k, n) of B is at
// (k / v * ldb + n) * v + k % v.
template <typename Operand>
inline void gemm(
    int64_t m, int64_t n, int64_t k, const Operand* a, int64_t lda, const Operand* b, int64_t ldb,
    at::opmath_type<Operand>* c, int64_t ldc, bool accumulate) {
  if constexpr (std::is_same_v<Operand, double>) {
    gemm_by_loops(m, n, k, a, lda, b, ldb, c, ldc, accumulate);
  } else {
    for (int64_t k0 = 0; k0 < k; k0 += kBlockK) {
      const int64_t block = std::min(kBlockK, k - k0);
      const bool accumulate_block = accumulate || k0 > 0;
      try {
        at::native::cpublas::brgemm(
            m, n, block, lda, ldb, ldc, accumulate_block, a + k0, b + k0 * ldb, c, /*is_vnni=*/kVnni<Operand> > 1);
      } catch (const std::exception&) {  // dnnl::error or c10::Error: no kernel of this size; nothing was written
        gemm_by_loops(m, n, block, a + k0, lda, b + k0 * ldb, ldb, c, ldc, accumulate_block);
      }
    }
  }
}

// C (M, N) = A (M, K) B (K, N) for small A, on all threads, one tile of columns per task.
template <typename Acc>
void parallel_gemm(int64_t m, int64_t n, int64_t k, const Acc* a, int64_t lda, const Acc* b, Acc* c) {
  parallel((n + kTileN - 1) / kTileN, [&](int64_t tile) {
    const int64_t n0 = tile * kTileN;
    gemm<Acc>(m, std::min(kTileN, n - n0), k, a, lda, b + n0, n, c + n0, n, false);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
