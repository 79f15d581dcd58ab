// The transition, eq. 1: U = W V, where V are the gate's input rows, (A; M), (A) or (X; S), in segments of C rows.
#pragma once

#include <ATen/ops/zeros.h>

#include "array.h"
#include "refine_sizes.h"

namespace rru {
namespace CPU_CAPABILITY {

// W (M, num_segments K) as left operand: contiguous, each segment's K columns zero-padded to a multiple of kVnni.
template <typename Operand>
Array<const Operand> left_operand(const Tensor& w, int64_t num_segments) {
  const int64_t rows = w.size(0), k = w.size(1) / num_segments;
  if (k % kVnni<Operand> == 0) {
    return Array<const Operand>::from(w);
  }
  const Tensor padded = at::zeros({rows, num_segments, round_up(k, kVnni<Operand>)}, Array<Operand>::kDtype);
  padded.narrow(2, 0, k).copy_(w.reshape({rows, num_segments, k}));
  return Array<const Operand>(padded);
}

// Calls f(T(), Operand()): T is the dtype of x, Operand the dtype it is multiplied in. fp16 is multiplied in fp32, as
// is bf16 where the processor has no bf16 products.
template <typename F>
auto dispatch(const Tensor& x, const F& f) {
  switch (x.scalar_type()) {
    case at::kDouble:
      return f(double(), double());
    case at::kFloat:
      return f(float(), float());
    case at::kHalf:
      return f(c10::Half(), float());
    default:
      return multiplies_bfloat16() ? f(c10::BFloat16(), c10::BFloat16()) : f(c10::BFloat16(), float());
  }
}

template <typename Operand>
class Transition {
  using Acc = at::opmath_type<Operand>;

 public:
  Transition(const RefineArguments& a, const Sizes& sizes)
      : sizes_(sizes), w_(left_operand<Operand>(a.w, sizes.num_segments)) {
    if (sizes.first_segments_equal || (sizes.raw && a.training)) {
      const Tensor w = a.w.to(Array<Acc>::kDtype);
      w_sum_ = left_operand<Operand>(w.narrow(1, 0, sizes.C).add(w.narrow(1, sizes.C, sizes.C)), 1);
    }
  }

  // Rows d0 to d1 of U_t += W V for channels c0 to c1 of one clip's chunk; c0 = 0 overwrites. `u` is the clip's U,
  // `input` the rows of V for channels c0 to c1, those of the second segment segment_rows below the first's.
  void multiply(
      const Chunk& chunk, int64_t t, int64_t c0, int64_t c1, int64_t d0, int64_t d1, const Operand* input,
      int64_t segment_rows, Acc* u) const {
    const bool equal = sizes_.segments_equal(t);
    const int64_t segments = equal ? 1 : sizes_.num_segments;
    const int64_t k = round_up(sizes_.C, kVnni<Operand>), ldw = segments * k;
    const Operand* w = (equal ? w_sum_ : w_)() + d0 * ldw + c0;
    for (int64_t i = 0; i < segments; i++) {
      gemm<Operand>(
          d1 - d0, chunk.n, round_up(c1 - c0, kVnni<Operand>), w + i * k, ldw, input + i * segment_rows * chunk.ld,
          chunk.ld, u + sizes_.D * chunk.p0 + d0 * chunk.n, chunk.n, c0 > 0 || i > 0);
    }
  }

  // All of U_t for one clip's chunk where both segments of V are `input`.
  void multiply_equal_segments(const Chunk& chunk, const Operand* input, Acc* u) const {
    const int64_t k = round_up(sizes_.C, kVnni<Operand>);
    gemm<Operand>(sizes_.D, chunk.n, k, w_sum_(), k, input, chunk.ld, u + sizes_.D * chunk.p0, chunk.n, false);
  }

 private:
  const Sizes& sizes_;
  const Array<const Operand> w_;  // [W_a, W_m], W_a, or [W_x, W_p]
  Array<const Operand> w_sum_;    // the sum of both segments
};

}  // namespace CPU_CAPABILITY
}  // namespace rru
