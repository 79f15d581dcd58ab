// Matrix products of one tile on the calling thread, through ATen: oneDNN's micro-kernels, or BLAS for double.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/mm.h>
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

// C (M, N) = A (M, K) B (K, N), or C += A B; row-major with leading dimensions lda, ldb, ldc. K is a multiple of
// kInterleave<G>, B's rows interleaved by it: B[k][n] lies at (k / i * ldb + n) * i + k % i.
template <typename G>
inline void multiply(
    int64_t m, int64_t n, int64_t k, const G* a, int64_t lda, const G* b, int64_t ldb, Sum<G>* c, int64_t ldc, bool add) {
  if constexpr (std::is_same_v<G, double>) {
    const auto matrix = [](const double* data, int64_t rows, int64_t columns, int64_t ld) {
      return at::from_blob(const_cast<double*>(data), {rows, columns}, {ld, 1}, at::kDouble);
    };
    at::Tensor result = matrix(c, m, n, ldc);
    if (add) {
      result.addmm_(matrix(a, m, k, lda), matrix(b, k, n, ldb));
    } else {
      at::mm_out(result, matrix(a, m, k, lda), matrix(b, k, n, ldb));
    }
  } else {
    for (int64_t k0 = 0; k0 < k; k0 += kRun) {
      at::native::cpublas::brgemm(
          m, n, std::min(kRun, k - k0), lda, ldb, ldc, add || k0 > 0, a + k0, b + k0 * ldb, c,
          /*is_vnni=*/kInterleave<G> > 1);
    }
  }
}

// Whether this machine multiplies bfloat16 as it is; found by trying, once.
inline bool multiplies_bfloat16() {
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
