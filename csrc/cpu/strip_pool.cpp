// rru_fast::strip_pool, eq. 9 alone: the mean over time and width, one pass over S.

#include <ATen/Dispatch.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace rru {
namespace CPU_CAPABILITY {

namespace {

// A task is a clip and a block of channels, so many that their maps of one frame lie in the first-level cache.
constexpr int64_t kBlock = 2048;  // positions

int64_t block_of_channels(int64_t positions) {
  return std::max<int64_t>(1, kBlock / positions);
}

// Calls body(clip, c0, c1) for each clip and block of channels.
template <typename F>
void each_block(int64_t clips, int64_t channels, int64_t block, const F& body) {
  const int64_t blocks = (channels + block - 1) / block;
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
  const Tensor strips = at::empty({B, C, H}, s.options());
  T* out = strips.mutable_data_ptr<T>();
  const int64_t block = block_of_channels(P);
  each_block(B, C, block, [&](int64_t clip, int64_t c0, int64_t c1) {
    // In double: memory sets the pace, and a long video loses no digits.
    std::vector<double> sums((c1 - c0) * P);  // (channels, P), over frames
    for (int64_t t = 0; t < frames; t++) {
      for (int64_t p0 = 0; p0 < P; p0 += kRow) {
        const int64_t n = std::min(kRow, P - p0);
        GatherBuffer<Acc> lines;
        for (int64_t c = c0; c < c1; c++) {
          const Acc* row = maps.row(clip, t, c, p0, n, lines);
          double* sum = sums.data() + (c - c0) * P + p0;
          for (int64_t p = 0; p < n; p++) {
            sum[p] += row[p];
          }
        }
      }
    }
    const double count = static_cast<double>(frames * W);
    const double* sum = sums.data();
    for (T* strip = out + (clip * C + c0) * H; strip < out + (clip * C + c1) * H; strip++, sum += W) {
      double total = 0;
      for (int64_t w = 0; w < W; w++) {
        total += sum[w];
      }
      *strip = static_cast<T>(static_cast<Acc>(total / count));
    }
  });
  return strips;
}

template <typename T>
Tensor backward(const Tensor& d_strips, int64_t frames, int64_t width) {
  using Acc = at::opmath_type<T>;
  const int64_t B = d_strips.size(0), C = d_strips.size(1), H = d_strips.size(2), P = H * width;
  const Tensor d_s = on_huge_pages(at::empty({B, frames, C, H, width}, d_strips.options()));
  const Tensor dense = d_strips.contiguous();
  const T* in = dense.const_data_ptr<T>();
  T* out = d_s.mutable_data_ptr<T>();
  const int64_t block = block_of_channels(P);
  each_block(B, C, block, [&](int64_t clip, int64_t c0, int64_t c1) {
    std::vector<T> maps((c1 - c0) * P);  // the same for every frame
    T* row = maps.data();
    for (const T* d = in + (clip * C + c0) * H; d < in + (clip * C + c1) * H; d++, row += width) {
      std::fill(row, row + width, static_cast<T>(static_cast<Acc>(*d) / static_cast<Acc>(frames * width)));
    }
    for (int64_t t = 0; t < frames; t++) {
      std::memcpy(out + ((clip * frames + t) * C + c0) * P, maps.data(), maps.size() * sizeof(T));
    }
  });
  return d_s;
}

}  // namespace

Tensor strip_pool(const Tensor& s) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, s.scalar_type(), "strip_pool", [&] { return forward<scalar_t>(s); });
}

Tensor strip_pool_backward(const Tensor& d_strips, int64_t frames, int64_t width) {
  return AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, d_strips.scalar_type(), "strip_pool_backward", [&] {
    return backward<scalar_t>(d_strips, frames, width);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
