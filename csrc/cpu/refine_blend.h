// The pass over the maps, forward: S_t of eq. 5, the strips of eq. 9, and the gate's input for frame t + 1.
#pragma once

#include <ATen/ops/ones.h>

#include <optional>

#include "array.h"
#include "refine_gate.h"
#include "strided_maps.h"

namespace rru {
namespace CPU_CAPABILITY {

template <typename T, typename Operand>
class Blend {
  using Acc = at::opmath_type<T>;
  using Vec = at::vec::Vectorized<Acc>;
  static constexpr int64_t kPack = kVnni<Operand>;  // channels packed together

 public:
  const Array<T> features;  // (B, T, C, H, W), S
  const Array<Acc> strips;  // (B, C, H), sums of S over frames and columns

  Blend(const RefineArguments& a, const Sizes& sizes, const GateActivations<Acc>& activations)
      : features(Array<T>::empty(a.x.sizes())),
        strips(Array<Acc>::zeros({sizes.B, sizes.C, sizes.H})),
        sizes_(sizes),
        activations_(activations),
        x_(a.x),
        state_x_(as_strided_maps<T>(a.state_x)),
        state_s_(as_strided_maps<T>(a.state_s)),
        ones_(at::ones({sizes.P}, Array<Acc>::kDtype)) {
    if (!std::is_same_v<T, Acc>) {
      s_ = Array<Acc>::empty({sizes.B, sizes.C, sizes.P});
    }
  }

  // S_t for channels c0 to c1 of one clip's chunk, and their rows of the gate's input for frame t + 1: the first
  // segment's from `input` on, the second's segment_rows below. At t = -1, S is the state.
  void advance(
      int64_t clip, const Chunk& chunk, int64_t t, int64_t c0, int64_t c1, Operand* input, int64_t segment_rows) const {
    alignas(64) Acc first[kPack * kMaxRow], second[kPack * kMaxRow];
    Buffers buffers;
    for (int64_t c = c0; c < c1; c += kPack) {
      for (int64_t i = 0; i < kPack; i++) {
        if (c + i < c1) {
          advance_row(clip, chunk, t, c + i, buffers, first + i * kMaxRow, second + i * kMaxRow);
        } else {
          std::fill(first + i * kMaxRow, first + (i + 1) * kMaxRow, Acc(0));
          std::fill(second + i * kMaxRow, second + (i + 1) * kMaxRow, Acc(0));
        }
      }
      if (sizes_.has_frame(clip, t + 1)) {
        pack_rows(first, input, c - c0, chunk.ld, chunk.n);
        if (sizes_.num_segments == 2 && !sizes_.segments_equal(t + 1)) {
          pack_rows(second, input + segment_rows * chunk.ld, c - c0, chunk.ld, chunk.n);
        }
      }
    }
  }

  // The rows of X_1 for one clip's chunk: with raw inputs, both segments of the gate's input at frame 0.
  void pack_first_frame(int64_t clip, const Chunk& chunk, Operand* input) const {
    Row<Acc> rows[kPack];
    GatherBuffer<Acc> buffer;
    for (int64_t c = 0; c < sizes_.C; c += kPack) {
      for (int64_t i = 0; i < kPack; i++) {
        if (c + i < sizes_.C) {
          store(x_.row(clip, 0, c + i, chunk.p0, chunk.n, buffer), chunk.n, rows[i].values);
        } else {
          std::fill(rows[i].values, rows[i].values + kMaxRow, Acc(0));
        }
      }
      pack_rows(rows[0].values, input, c, chunk.ld, chunk.n);
    }
  }

 private:
  // Where strided maps are gathered; one buffer per tensor.
  struct Buffers {
    GatherBuffer<Acc> x, x_next, s_previous;
  };

  // One channel's S_t, and its rows of both segments of the gate's input for frame t + 1.
  void advance_row(
      int64_t clip, const Chunk& chunk, int64_t t, int64_t c, Buffers& buffers, Acc* first, Acc* second) const {
    const int64_t p0 = chunk.p0, n = chunk.n, next = t + 1;
    T* out = t < 0 ? nullptr : features(clip, t, c) + p0;
    if (!sizes_.has_frame(clip, t)) {
      std::fill(out, out + n, T(0));
      return;
    }
    Row<Acc> s;
    const Acc* x = t < 0 ? state_x_->row(clip, 0, c, p0, n, buffers.x) : x_.row(clip, t, c, p0, n, buffers.x);
    if (t < sizes_.first_step) {
      const Acc* initial = t < 0 ? state_s_->row(clip, 0, c, p0, n, buffers.s_previous) : x;
      store(initial, chunk.ld, s.values);
    } else {
      Row<Acc> buffer;
      const Acc* previous = previous_s(clip, t, c, p0, n, buffers.s_previous, buffer.values);
      const Acc* z_s = (activations_.z_s ? activations_.at(activations_.z_s, t, clip) : ones_()) + p0;
      const Vec z_c(activations_.z_c ? activations_.at(activations_.z_c, t, clip)[c] : Acc(1));
      for (int64_t i = 0; i < n; i += Vec::size()) {
        const Vec a = Vec::loadu(x + i) - Vec::loadu(previous + i);
        const Vec z = sigmoid(z_c * Vec::loadu(z_s + i, std::min<int64_t>(Vec::size(), n - i)));
        at::vec::fmadd(z, a, Vec::loadu(previous + i)).store(s.values + i);  // eq. 5
      }
    }
    if (out != nullptr) {
      store(s.values, n, out);
      add_to_strips(s.values, chunk, strips(clip, c));
    }
    if (!std::is_same_v<T, Acc>) {
      store(s.values, n, s_(clip, c) + p0);
    }
    if (sizes_.has_frame(clip, next)) {
      const Acc* x_next = x_.row(clip, next, c, p0, n, buffers.x_next);
      for (int64_t i = 0; i < n; i += Vec::size()) {
        const Vec x_i = Vec::loadu(x_next + i), s_i = Vec::loadu(s.values + i);
        (sizes_.raw ? x_i : x_i - s_i).store(first + i);
        (sizes_.raw ? s_i : x_i - Vec::loadu(x + i)).store(second + i);
      }
    }
  }

  // A row of S_{t-1}, before rounding to T.
  const Acc* previous_s(
      int64_t clip, int64_t t, int64_t c, int64_t p0, int64_t n, GatherBuffer<Acc>& gathered, Acc* buffer) const {
    if constexpr (std::is_same_v<T, Acc>) {
      if (t == 0) {
        return state_s_->row(clip, 0, c, p0, n, gathered);
      }
      return load(features(clip, t - 1, c) + p0, n, buffer);
    } else {
      return load(s_(clip, c) + p0, n, buffer);
    }
  }

  // Adds a row's sums over columns to its channel's strips (H,), eq. 9.
  void add_to_strips(const Acc* row, const Chunk& chunk, Acc* channel_strips) const {
    each_map_row(chunk, sizes_.W, [&](int64_t h, int64_t i, auto count) {
      Acc sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t w = 0; w < count; w++) {
        sum += row[i + w];
      }
      channel_strips[h] += sum;
    });
  }

  const Sizes& sizes_;
  const GateActivations<Acc>& activations_;
  const StridedMaps<T> x_;
  const std::optional<StridedMaps<T>> state_x_, state_s_;
  const Array<const Acc> ones_;  // z_s of a variant without spatial attention
  Array<Acc> s_;                 // (B, C, P), the last S before rounding, where T is narrower than Acc
};

}  // namespace CPU_CAPABILITY
}  // namespace rru
