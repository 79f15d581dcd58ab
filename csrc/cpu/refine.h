// What refine and its backward share: sizes, weights in the arithmetic dtype, and the gate after its transition.
//
// Letters as in the paper: B clips, T frames, C channels, P = H W positions, D gate channels, A attention units.
// Positions are taken in chunks of at most kRow. U of a clip lies chunk after chunk, each a matrix (D, n).
#pragma once

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/ones.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>

#include <array>
#include <cmath>
#include <utility>

#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace rru {
namespace CPU_CAPABILITY {

struct Chunk {
  int64_t p0, n, ld;  // first position, number of them, and that rounded up to whole vectors
};

// Calls body(h, i, count) for each map row h that a chunk touches: `count` positions from chunk.p0 + i on lie in it.
// At the paper's width the count is known to the compiler.
template <typename F>
inline void each_map_row(const Chunk& chunk, int64_t width, const F& body) {
  if (width == 8) {
    for (int64_t i = 0; i < chunk.n; i += 8) {
      body((chunk.p0 + i) / 8, i, std::integral_constant<int64_t, 8>());
    }
    return;
  }
  for (int64_t i = 0, end; i < chunk.n; i = end) {
    const int64_t h = (chunk.p0 + i) / width;
    end = std::min(chunk.n, (h + 1) * width - chunk.p0);
    body(h, i, end - i);
  }
}

// 1 / (1 + exp(-logits)), eq. 4; NaN where the logits are.
template <typename Vec>
inline Vec sigmoid(const Vec& logits) {
  const Vec one(1);
  if constexpr (std::is_same_v<Vec, at::vec::Vectorized<float>>) {
    // Within 2e-7 of the exponential, relative, but a number even of what is none.
    return Vec::blendv(one / (one + logits.neg().exp_u20()), logits, logits != logits);
  } else {
    return one / (one + logits.neg().exp());
  }
}

// sum over i of a[i] b[i]
template <typename Acc>
inline Acc dot(const Acc* a, const Acc* b, int64_t n) {
  using Vec = at::vec::Vectorized<Acc>;
  Vec sum(0);
  int64_t i = 0;
  for (; i + Vec::size() <= n; i += Vec::size()) {
    sum = at::vec::fmadd(Vec::loadu(a + i), Vec::loadu(b + i), sum);
  }
  Acc rest = 0;
  for (; i < n; i++) {
    rest += a[i] * b[i];
  }
  return reduce_add<Acc>(sum) + rest;
}

// y += factor x
template <typename Acc>
inline void add_scaled(Acc* y, Acc factor, const Acc* x, int64_t n) {
  for (int64_t i = 0; i < n; i++) {
    y[i] += factor * x[i];
  }
}

struct Sizes {
  int64_t B, T, C, H, W, P, D, num_attn;
  int64_t chunks, start, steps;  // start: the first frame that goes through the gate; steps of recurrence
  bool motion, raw;              // what the gate sees beside A_t: M_t, or X_t and S_{t-1} instead
  bool first_segments_equal;     // A = M at the first step, since S_1 = X_1: one product serves both segments of W
  int64_t num_segments;          // of W's columns
  const int64_t* lengths;        // (B,), or null where every clip has T frames

  explicit Sizes(const RefineArguments& a)
      : B(a.x.size(0)),
        T(a.x.size(1)),
        C(a.x.size(2)),
        H(a.x.size(3)),
        W(a.x.size(4)),
        P(H * W),
        D(a.w.size(0)),
        num_attn(a.w_s1 ? a.w_s1->size(0) : 0),
        chunks((P + kRow - 1) / kRow),
        start(a.state_s ? 0 : 1),
        steps(T - start),
        motion(a.inputs == Inputs::appearance_motion),
        raw(a.inputs == Inputs::raw),
        first_segments_equal(motion && start == 1),
        num_segments(a.inputs == Inputs::appearance ? 1 : 2),
        lengths(a.lengths ? a.lengths->const_data_ptr<int64_t>() : nullptr) {}

  // Whether a clip has a frame t.
  bool has_frame(int64_t clip, int64_t t) const {
    return lengths == nullptr || t < lengths[clip];
  }

  bool segments_equal(int64_t t) const {
    return first_segments_equal && t == start;
  }

  // T W of eq. 9, by clip where they are of different lengths.
  Tensor elements_per_strip(const RefineArguments& a, const at::TensorOptions& options) const {
    return a.lengths ? a.lengths->to(options).mul(W).view({B, 1, 1}) : at::full({1}, T * W, options);
  }

  Chunk chunk(int64_t q) const {
    const int64_t p0 = q * kRow, n = std::min(kRow, P - p0);
    return {p0, n, round_up(n, kAlign)};
  }
};

// A contiguous tensor with its address at hand: asking a tensor for it costs more than a row of arithmetic.
template <typename E>
class Array {
 public:
  Array() = default;
  explicit Array(Tensor tensor) : tensor_(std::move(tensor)) {
    if constexpr (std::is_const_v<E>) {
      data_ = tensor_.const_data_ptr<std::remove_const_t<E>>();
    } else {
      data_ = tensor_.mutable_data_ptr<E>();
    }
    for (size_t i = 0; i < std::min<size_t>(tensor_.dim(), 3); i++) {
      strides_[i] = tensor_.stride(i);
    }
  }

  E* operator()(int64_t i = 0, int64_t j = 0, int64_t k = 0) const {
    return data_ + i * strides_[0] + j * strides_[1] + k * strides_[2];
  }
  // Whether there is anything in it: the variant has it.
  explicit operator bool() const {
    return tensor_.defined() && tensor_.numel() > 0;
  }
  const Tensor& tensor() const {
    return tensor_;
  }

 private:
  Tensor tensor_;
  E* data_ = nullptr;
  std::array<int64_t, 3> strides_{};
};

// The gate's weights in the arithmetic dtype, and what it computes of U.
template <typename Acc>
struct Gate {
  const Sizes& s;
  const int64_t groups;  // of clips, with statistics of their own
  const Ranks ranks;     // those that a single group's statistics are shared with
  const at::TensorOptions options;  // of the arithmetic dtype
  const Array<const Acc> gamma, beta, w_s1, w_s2, w_c;
  const Acc eps;
  const Array<Acc> mean, r;  // (groups, D): what U is normalised by at the step under way; r = 1 / sqrt(var + eps)

  Gate(const RefineArguments& a, const Sizes& sizes)
      : s(sizes),
        groups(a.training ? a.groups : 1),
        ranks(a.ranks),
        options(a.x.options().dtype(c10::CppTypeToScalarType<Acc>::value)),
        gamma(weight(a.gamma)),
        beta(weight(a.beta)),
        w_s1(weight(a.w_s1)),
        w_s2(weight(a.w_s2)),
        w_c(weight(a.w_c)),
        eps(static_cast<Acc>(a.eps)),
        mean(at::empty({groups, s.D}, options)),
        r(at::empty({groups, s.D}, options)) {
    if (!a.training) {
      use(weight(a.running_mean)(), weight(a.running_var)());
    }
  }

  Array<const Acc> weight(const std::optional<Tensor>& tensor) const {
    return tensor ? Array<const Acc>(tensor->to(options).contiguous()) : Array<const Acc>();
  }

  // Normalise by these statistics, (groups, D), from here on.
  void use(const Acc* new_mean, const Acc* var) const {
    for (int64_t i = 0; i < groups * s.D; i++) {
      mean()[i] = new_mean[i];
      r()[i] = 1 / std::sqrt(var[i] + eps);
    }
  }

  int64_t group(int64_t clip) const {
    return clip / (s.B / groups);
  }

  // Calls body(d, chunk, i, count, uhat, y) for each gate channel and chunk of a clip, vector by vector: uhat and y
  // are vectors at positions chunk.p0 + i and following, `count` of them within the chunk. u: the clip's U.
  template <typename F>
  void each(int64_t clip, const Acc* u, const F& body) const {
    using Vec = at::vec::Vectorized<Acc>;
    const Acc *mu = mean(group(clip)), *rs = r(group(clip)), *g = gamma(), *b = beta();
    for (int64_t q = 0; q < s.chunks; q++) {
      const Chunk chunk = s.chunk(q);
      for (int64_t d = 0; d < s.D; d++) {
        const Acc* row = u + s.D * chunk.p0 + d * chunk.n;
        for (int64_t i = 0; i < chunk.n; i += Vec::size()) {
          const int64_t count = std::min<int64_t>(Vec::size(), chunk.n - i);
          const Vec uhat = (Vec::loadu(row + i, count) - Vec(mu[d])) * Vec(rs[d]);
          const Vec pre = at::vec::fmadd(uhat, Vec(g[d]), Vec(b[d]));
          body(d, chunk, i, count, uhat, relu(pre));
        }
      }
    }
  }

  // max(v, 0), and NaN where v is.
  static at::vec::Vectorized<Acc> relu(const at::vec::Vectorized<Acc>& v) {
    using Vec = at::vec::Vectorized<Acc>;
    return at::vec::clamp_min(v, Vec(0));
  }

  // h (A,) and z_s (P,) of eq. 2, from y_d (P,), the mean of Y over gate channels.
  void spatial(const Acc* y_d, Acc* h, Acc* z_s) const {
    for (int64_t a = 0; a < s.num_attn; a++) {
      const Acc pre = dot(w_s1(a), y_d, s.P);
      h[a] = pre < 0 ? Acc(0) : pre;
    }
    for (int64_t p = 0; p < s.P; p++) {
      z_s[p] = dot(w_s2(p), h, s.num_attn);
    }
  }

  // Means of Y of one clip: y_p (D,) over positions for eq. 3, y_d (P,) over gate channels for eq. 2.
  void pool(int64_t clip, const Acc* u, Acc* y_p, Acc* y_d) const {
    using Vec = at::vec::Vectorized<Acc>;
    std::fill(y_d, y_d + s.P, Acc(0));
    std::fill(y_p, y_p + s.D, Acc(0));
    each(clip, u, [&](int64_t d, const Chunk& chunk, int64_t i, int64_t count, const Vec&, const Vec& y) {
      Acc* at = y_d + chunk.p0 + i;
      (Vec::loadu(at, count) + y).store(at, count);
      y_p[d] += reduce_add<Acc>(Vec::set(Vec(0), y, count));
    });
    for (int64_t d = 0; d < s.D; d++) {
      y_p[d] /= static_cast<Acc>(s.P);
    }
    for (int64_t p = 0; p < s.P; p++) {
      y_d[p] /= static_cast<Acc>(s.D);
    }
  }
};

// W (M, K segments) as left operand: dtype Operand, contiguous, each segment's K columns rounded up to kVnni with zeros.
template <typename Operand>
Tensor left_operand(const Tensor& w, int64_t num_segments) {
  const auto type = c10::CppTypeToScalarType<Operand>::value;
  const int64_t rows = w.size(0), k = w.size(1) / num_segments;
  if (k % kVnni<Operand> == 0) {
    return w.to(type).contiguous();
  }
  const Tensor padded = at::zeros({rows, num_segments, round_up(k, kVnni<Operand>)}, w.options().dtype(type));
  padded.narrow(2, 0, k).copy_(w.reshape({rows, num_segments, k}));
  return padded;
}

// Columns n0 to n0 + n of C = A B for small A, one tile a task: B (K, N) in the arithmetic dtype.
template <typename Acc>
void parallel_gemm(int64_t m, int64_t n, int64_t k, const Acc* a, int64_t lda, const Acc* b, Acc* c) {
  parallel((n + kTileN - 1) / kTileN, [&](int64_t tile) {
    const int64_t n0 = tile * kTileN;
    gemm<Acc>(m, std::min(kTileN, n - n0), k, a, lda, b + n0, n, c + n0, n, false);
  });
}

// Calls f with the types that serve x: T stored, Operand multiplied. A machine without bfloat16 products multiplies float.
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

}  // namespace CPU_CAPABILITY
}  // namespace rru
