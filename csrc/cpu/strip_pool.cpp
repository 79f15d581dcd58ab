// rru_fast::strip_pool, eq. 9 alone: the mean over frames and columns, in one pass over S.

#include <ATen/Dispatch.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "array.h"
#include "kernels.h"
#include "parallel.h"
#include "strided_maps.h"

namespace rru {
namespace CPU_CAPABILITY {

namespace {

// Positions per task, over as many channels as have them: their maps of one frame fit the first-level cache.
constexpr int64_t kPositionsPerTask = 2048;
// An element takes as long as so many multiplications of a matrix product.
constexpr int64_t kWork = 8;

// Calls body(clip, c0, c1) in parallel for each clip and block of channels.
template <typename F>
void each_block(int64_t clips, int64_t channels, int64_t positions, const F& body) {
  const int64_t block = std::max<int64_t>(1, kPositionsPerTask / positions), blocks = (channels + block - 1) / block;
  parallel(clips * blocks, [&](int64_t task) {
    const int64_t c0 = task % blocks * block;
    body(task / blocks, c0, std::min(channels, c0 + block));
  });
}

template <typename T>
Tensor forward(const Tensor& s) {
  using Acc = at::opmath_type<T>;
  const int64_t B = s.size(0), frames = s.size(1), C = s.size(2), H = s.size(3), W = s.size(4), P = H * W;
  const StridedMaps<T> maps(s);
  const auto strips = Array<T>::empty({B, C, H});
  each_block(B, C, P, [&](int64_t clip, int64_t c0, int64_t c1) {
    // In fp64: the pass is bound by memory bandwidth, and a long video loses no digits.
    std::vector<double> sums((c1 - c0) * P);  // (channels, P), over frames
    for (int64_t t = 0; t < frames; t++) {
      for (int64_t p0 = 0; p0 < P; p0 += kMaxRow) {
        const int64_t n = std::min(kMaxRow, P - p0);
        GatherBuffer<Acc> buffer;
        for (int64_t c = c0; c < c1; c++) {
          const Acc* row = maps.row(clip, t, c, p0, n, buffer);
          double* sum = sums.data() + (c - c0) * P + p0;
          for (int64_t p = 0; p < n; p++) {
            sum[p] += row[p];
          }
        }
      }
    }
    const double count = static_cast<double>(frames * W);
    const double* sum = sums.data();
    for (T* strip = strips(clip, c0); strip < strips(clip, c1); strip++, sum += W) {
      double total = 0;
      for (int64_t w = 0; w < W; w++) {
        total += sum[w];
      }
      *strip = static_cast<T>(static_cast<Acc>(total / count));
    }
  });
  return strips.tensor();
}

template <typename T>
Tensor backward(const Tensor& d_strips, int64_t frames, int64_t width) {
  using Acc = at::opmath_type<T>;
  const int64_t B = d_strips.size(0), C = d_strips.size(1), H = d_strips.size(2), P = H * width;
  const auto d_s = Array<T>::empty({B, frames, C, H, width});
  const auto dense = Array<const T>::from(d_strips);
  each_block(B, C, P, [&](int64_t clip, int64_t c0, int64_t c1) {
    std::vector<T> maps((c1 - c0) * P);  // equal for all frames
    T* row = maps.data();
    for (const T* d = dense(clip, c0); d < dense(clip, c1); d++, row += width) {
      std::fill(row, row + width, static_cast<T>(static_cast<Acc>(*d) / static_cast<Acc>(frames * width)));
    }
    for (int64_t t = 0; t < frames; t++) {
      std::memcpy(d_s(clip, t, c0), maps.data(), maps.size() * sizeof(T));
    }
  });
  return d_s.tensor();
}

}  // namespace

Tensor strip_pool(const Tensor& s) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, s.scalar_type(), "strip_pool",
      [&] { return with_threads_for(kWork * s.numel(), [&] { return forward<scalar_t>(s); }); });
}

Tensor strip_pool_backward(const Tensor& d_strips, int64_t frames, int64_t width) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, d_strips.scalar_type(), "strip_pool_backward", [&] {
    const int64_t work = kWork * d_strips.numel() * frames * width;
    return with_threads_for(work, [&] { return backward<scalar_t>(d_strips, frames, width); });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
