// Matrix products of one tile on the calling thread: oneDNN's micro-kernels through ATen, and loops for double.
#pragma once

#include <ATen/Context.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <type_traits>

namespace rru {
namespace CPU_CAPABILITY {

// What a product of G operands is summed in.
template <typename G>
using Sum = std::conditional_t<std::is_same_v<G, double>, double, float>;

// Rows of a right operand that lie interleaved, element by element: bfloat16 instructions take pairs.
template <typename G>
constexpr int64_t kInterleave = std::is_same_v<G, c10::BFloat16> ? 2 : 1;

// Right operands are cut into blocks of this many columns: what the micro-kernels' registers hold.
constexpr int64_t kColumns = 64;

// Products are summed in runs of this many, and the runs then: a single chain over K loses twice the digits.
constexpr int64_t kRun = 256;

// R rows of C (N) = A (K) B (K, N), or C += A B, in double: BLAS may sum in another order on another number of threads.
template <int64_t R>
inline void multiply_rows(
    int64_t n, int64_t k, const double* a, int64_t lda, const double* b, int64_t ldb, double* c, int64_t ldc,
    bool add) {
  using V = at::vec::Vectorized<double>;
  for (int64_t j = 0; j < n; j += V::size()) {
    const int64_t count = std::min<int64_t>(V::size(), n - j);
    V sums[R];
    for (int64_t r = 0; r < R; r++) {
      sums[r] = add ? V::loadu(c + r * ldc + j, count) : V(0);
    }
    for (int64_t i = 0; i < k; i++) {
      const V right = count == V::size() ? V::loadu(b + i * ldb + j) : V::loadu(b + i * ldb + j, count);
      for (int64_t r = 0; r < R; r++) {
        sums[r] = at::vec::fmadd(V(a[r * lda + i]), right, sums[r]);
      }
    }
    for (int64_t r = 0; r < R; r++) {
      sums[r].store(c + r * ldc + j, count);
    }
  }
}

// C (M, N) = A (M, K) B (K, N), or C += A B; row-major with leading dimensions lda, ldb, ldc. K is a multiple of
// kInterleave<G>, B's rows interleaved by it: B[k][n] lies at (k / i * ldb + n) * i + k % i.
template <typename G>
inline void multiply(
    int64_t m, int64_t n, int64_t k, const G* a, int64_t lda, const G* b, int64_t ldb, Sum<G>* c, int64_t ldc,
    bool add) {
  if constexpr (std::is_same_v<G, double>) {
    constexpr int64_t kRows = 8;
    int64_t i = 0;
    for (; i + kRows <= m; i += kRows) {
      multiply_rows<kRows>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
    }
    for (; i < m; i++) {
      multiply_rows<1>(n, k, a + i * lda, lda, b, ldb, c + i * ldc, ldc, add);
    }
  } else {
    for (int64_t k0 = 0; k0 < k; k0 += kRun) {
      at::native::cpublas::brgemm(
          m, n, std::min(kRun, k - k0), lda, ldb, ldc, add || k0 > 0, a + k0, b + k0 * ldb, c,
          /*is_vnni=*/kInterleave<G> > 1);
    }
  }
}

// Whether bfloat16 can be multiplied as it is: the machine can, found by trying once, and oneDNN is not switched off.
inline bool multiplies_bfloat16() {
  if (!at::globalContext().userEnabledMkldnn()) {
    return false;
  }
  static const bool does = [] {
    const c10::BFloat16 a[2] = {1.0f, 1.0f};
    c10::BFloat16 b[2 * 16] = {};
    float c[16];
    try {
      multiply<c10::BFloat16>(1, 16, 2, a, 2, b, 16, c, 16, false);
    } catch (const c10::Error&) {
      return false;
    }
    return true;
  }();
  return does;
}

inline int64_t round_up(int64_t n, int64_t multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
