// Matrix products of one tile on the calling thread: oneDNN's micro-kernels through ATen, loops for what they refuse.
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

namespace rru {
namespace CPU_CAPABILITY {

// Rows of a right operand that lie interleaved, element by element: bfloat16 instructions take pairs.
template <typename Operand>
constexpr int64_t kVnni = std::is_same_v<Operand, c10::BFloat16> ? 2 : 1;

// Right operands are cut into blocks of this many columns: what the micro-kernels' registers hold.
constexpr int64_t kTileN = 64;

// Products are summed in runs of this many, and the runs then: a single chain over K loses twice the digits.
constexpr int64_t kBlockK = 256;

// R rows of C (N) = A (K) B (K, N), or C += A B: summed in order of K. BLAS may choose another for other threads.
template <int64_t R, typename Acc>
inline void gemm_rows(
    int64_t n, int64_t k, const Acc* a, int64_t lda, const Acc* b, int64_t ldb, Acc* c, int64_t ldc, bool add) {
  using Vec = at::vec::Vectorized<Acc>;
  for (int64_t j = 0; j < n; j += Vec::size()) {
    const int64_t count = std::min<int64_t>(Vec::size(), n - j);
    Vec sums[R];
    for (int64_t r = 0; r < R; r++) {
      sums[r] = add ? Vec::loadu(c + r * ldc + j, count) : Vec(0);
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
    bool add) {
  constexpr int64_t kRows = 8;
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows) {
    gemm_rows<kRows>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
  }
  for (; i < m; i++) {
    gemm_rows<1>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
  }
}

// The same for bfloat16 operands, B's rows interleaved by pairs: widened to float32, which is exact.
inline void gemm_by_loops(
    int64_t m, int64_t n, int64_t k, const c10::BFloat16* a, int64_t lda, const c10::BFloat16* b, int64_t ldb, float* c,
    int64_t ldc, bool add) {
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
  gemm_by_loops(m, n, k, left.data(), k, right.data(), n, c, ldc, add);
}

// C (M, N) = A (M, K) B (K, N), or C += A B; row-major with leading dimensions lda, ldb, ldc. K is a multiple of
// kVnni<Operand>, B's rows interleaved by it: B[k][n] lies at (k / i * ldb + n) * i + k % i.
template <typename Operand>
inline void gemm(
    int64_t m, int64_t n, int64_t k, const Operand* a, int64_t lda, const Operand* b, int64_t ldb,
    at::opmath_type<Operand>* c, int64_t ldc, bool add) {
  if constexpr (std::is_same_v<Operand, double>) {
    gemm_by_loops(m, n, k, a, lda, b, ldb, c, ldc, add);
  } else {
    for (int64_t k0 = 0; k0 < k; k0 += kBlockK) {
      const int64_t run = std::min(kBlockK, k - k0);
      const bool add_run = add || k0 > 0;
      try {
        at::native::cpublas::brgemm(
            m, n, run, lda, ldb, ldc, add_run, a + k0, b + k0 * ldb, c, /*is_vnni=*/kVnni<Operand> > 1);
      } catch (const std::exception&) {  // dnnl::error or c10::Error: no kernel of this size, and nothing is written
        gemm_by_loops(m, n, run, a + k0, lda, b + k0 * ldb, ldb, c, ldc, add_run);
      }
    }
  }
}

// True if the processor has instructions for bfloat16 products, whatever oneDNN makes of them. ATen asks for AVX-512
// alone, which Skylake, Cascade Lake and Ice Lake have without them.
inline bool processor_multiplies_bfloat16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#else
  return true;  // decided by oneDNN alone
#endif
}

// True if oneDNN has a kernel for bfloat16: ONEDNN_MAX_CPU_ISA may deny it what the processor has.
inline bool onednn_multiplies_bfloat16() {
  const c10::BFloat16 a[2] = {1.0f, 1.0f};
  c10::BFloat16 b[2 * 16];
  std::fill_n(b, 2 * 16, c10::BFloat16(1.0f));
  float c[16] = {};
  try {
    at::native::cpublas::brgemm(1, 16, 2, 2, 16, 16, false, a, b, c, /*is_vnni=*/true);
  } catch (const std::exception&) {
    return false;
  }
  at::native::cpublas::brgemm_release();
  return std::all_of(c, c + 16, [](float sum) { return sum == 2.0f; });
}

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
