// The pass over the maps, backward, row by row: G_t, dL, dX_t and the carry.
//
// Z, A_t and M_t are recomputed from X and S.
#pragma once

#include <ATen/ops/ones.h>

#include <optional>

#include "refine_gate.h"
#include "refine_transition_backward.h"
#include "strided_maps.h"

namespace rru {
namespace CPU_CAPABILITY {

template <typename T, typename Operand>
class MapsBackward {
  using Acc = at::opmath_type<T>;
  using Vec = at::vec::Vectorized<Acc>;
  using Transition = TransitionBackward<Operand>;
  using Tile = typename Transition::Tile;

 public:
  // Where strided maps are gathered; one buffer per tensor.
  struct Buffers {
    GatherBuffer<Acc> x, x_previous, s_previous, d_features;
  };

  Array<T> d_x, d_state_x, d_state_s;  // empty where not needed

  MapsBackward(
      const RefineUpstream& upstream, const RefineSaved& saved, const RefineArguments& a, RefineNeed need,
      const Sizes& sizes, const Transition& transition)
      : sizes_(sizes),
        need_(need),
        transition_(transition),
        x_(a.x),
        features_(saved.features),
        state_x_(as_strided_maps<T>(a.state_x)),
        state_s_(as_strided_maps<T>(a.state_s)),
        d_features_(as_strided_maps<T>(upstream.d_features)),
        z_s_(saved.z_s),
        z_c_(saved.z_c),
        ones_(at::ones({sizes.P}, Array<Acc>::kDtype)) {
    if (upstream.d_strips) {
      const Tensor d_strips = upstream.d_strips->to(Array<Acc>::kDtype);
      d_strips_ = Array<const Acc>(d_strips.div(sizes.elements_per_strip(a, Array<Acc>::kDtype)).contiguous());
    }
    if (need.x) {
      d_x = Array<T>::empty(a.x.sizes());
    }
    if (a.state_x) {
      d_state_x = Array<T>::zeros(a.state_x->sizes());
      d_state_s = Array<T>::empty(a.state_s->sizes());
    }
    if (!(std::is_same_v<T, Acc> && need.x)) {
      g_ = Array<Acc>::empty({sizes.B, sizes.C, sizes.P});
    }
  }

  // One channel of frame t, given the carry to it in g_t: completes G_t and, where the frame passes the gate, adds dL
  // to dz_s, which starts at the chunk's first position, and to the channel's dz_c.
  void start_row(
      int64_t clip, const Chunk& chunk, int64_t t, int64_t c, Buffers& buffers, Acc* g_t, Acc* d_z_s,
      Acc& d_z_c) const {
    const int64_t n = chunk.n;
    const bool has_frame = sizes_.has_frame(clip, t);
    if (has_frame) {
      add_upstream(clip, chunk, t, c, buffers, g_t);
    }
    if (t < sizes_.first_step) {
      if (need_.x) {
        store(g_t, n, d_x(clip, t, c) + chunk.p0);
      }
      return;
    }
    Vec sum_d_z_c(0);
    if (has_frame) {
      const Acc *x = x_.row(clip, t, c, chunk.p0, n, buffers.x), *z_s = spatial(clip, t, chunk);
      const Acc* s = previous(features_, state_s_, clip, t, c, chunk, buffers.s_previous);
      const Vec z_c = channel(clip, t, c);
      for (int64_t i = 0; i < n; i += Vec::size()) {
        const int64_t count = std::min<int64_t>(Vec::size(), n - i);
        const Vec z_s_i = Vec::loadu(z_s + i, count), z = sigmoid(z_c * z_s_i);
        const Vec whole = Vec::loadu(g_t + i) * (Vec::loadu(x + i) - Vec::loadu(s + i)) * z * (Vec(1) - z);
        const Vec d_l = count == Vec::size() ? whole : Vec::set(Vec(0), whole, count);
        sum_d_z_c = at::vec::fmadd(d_l, z_s_i, sum_d_z_c);
        at::vec::fmadd(d_l, z_c, Vec::loadu(d_z_s + i, count)).store(d_z_s + i, count);
      }
    }
    store(g_t, n, g(clip, t, c) + chunk.p0);
    d_z_c = (chunk.p0 == 0 ? Acc(0) : d_z_c) + reduce_add<Acc>(sum_d_z_c);
  }

  // One channel of frame t, given its W^T dU_t in row `index` of the tile: dX_t, the carry to frame t - 1, and V_t as
  // row `index` of the tile's left operands.
  void finish_row(
      int64_t clip, const Chunk& chunk, int64_t t, int64_t c, int64_t index, Buffers& buffers, Tile& tile,
      Acc* carry) const {
    const int64_t n = chunk.n;
    const Acc *first = tile.d_first + index * kMaxRow, *second = tile.d_second + index * kMaxRow;
    const Acc* z_s = spatial(clip, t, chunk);
    const Vec z_c = channel(clip, t, c);
    const bool to_x = need_.x, motion = transition_.has_motion(t);
    Row<Acc> buffer, d_x_row;
    const Acc* g_t = load(g(clip, t, c) + chunk.p0, n, buffer.values);
    for (int64_t i = 0; i < n; i += Vec::size()) {
      const Vec z = sigmoid(z_c * Vec::loadu(z_s + i, std::min<int64_t>(Vec::size(), n - i)));
      const Vec g_i = Vec::loadu(g_t + i), zg = z * g_i;
      if (sizes_.raw) {
        (g_i - zg + Vec::loadu(second + i)).store(carry + i);
        if (to_x) {
          (zg + Vec::loadu(first + i)).store(d_x_row.values + i);
        }
      } else {
        const Vec e_i = Vec::loadu(first + i);
        (g_i - zg - e_i).store(carry + i);
        if (to_x) {
          (motion ? zg + e_i + Vec::loadu(second + i) : zg + e_i).store(d_x_row.values + i);
        }
      }
    }
    if (to_x) {
      store(d_x_row.values, n, d_x(clip, t, c) + chunk.p0);
    }
    if (need_.weights) {
      put_input(clip, chunk, t, c, index, buffers, tile);
    }
  }

  // Zero gradient for a frame past the clip's length.
  void clear_row(int64_t clip, const Chunk& chunk, int64_t t, int64_t c) const {
    if (need_.x) {
      std::fill(d_x(clip, t, c) + chunk.p0, d_x(clip, t, c) + chunk.p0 + chunk.n, T(0));
    }
  }

  // The frame before the first, the state: through the motion d_state_x = -W_m^T dU_0; d_state_s is the carry.
  void finish_state_x(int64_t clip, int64_t q, int64_t c0, int64_t c1, Tile& tile) const {
    const Chunk chunk = sizes_.chunk(q);
    transition_.motion_gradient(clip, q, c0, c1, tile);
    for (int64_t c = c0; c < c1; c++) {
      Acc* row = tile.d_second + (c - c0) * kMaxRow;
      for (int64_t i = 0; i < chunk.n; i++) {
        row[i] = -row[i];
      }
      store(row, chunk.n, d_state_x(clip, c) + chunk.p0);
    }
  }
  void finish_state_s(int64_t clip, const Chunk& chunk, int64_t c, const Acc* carry) const {
    store(carry, chunk.n, d_state_s(clip, c) + chunk.p0);
  }

 private:
  // g_t += dS_t + dstrips / (T W)
  void add_upstream(int64_t clip, const Chunk& chunk, int64_t t, int64_t c, Buffers& buffers, Acc* g_t) const {
    if (d_features_) {
      const Acc* d = d_features_->row(clip, t, c, chunk.p0, chunk.n, buffers.d_features);
      for (int64_t i = 0; i < chunk.n; i += Vec::size()) {
        (Vec::loadu(g_t + i) + Vec::loadu(d + i)).store(g_t + i);
      }
    }
    if (d_strips_) {
      const Acc* d = d_strips_(clip, c);
      each_map_row(chunk, sizes_.W, [&](int64_t h, int64_t i, auto count) {
        const Acc value = d[h];
#pragma omp simd
        for (int64_t w = 0; w < count; w++) {
          g_t[i + w] += value;
        }
      });
    }
  }

  // V_t of one channel, both segments, as row `index` of the tile's left operands.
  void put_input(
      int64_t clip, const Chunk& chunk, int64_t t, int64_t c, int64_t index, Buffers& buffers, Tile& tile) const {
    const int64_t n = chunk.n, at = index * Transition::kMaxPositions + tile.rows;
    Row<Acc> row;
    const Acc* x = x_.row(clip, t, c, chunk.p0, n, buffers.x);
    const Acc* s = previous(features_, state_s_, clip, t, c, chunk, buffers.s_previous);
    for (int64_t i = 0; i < n; i += Vec::size()) {
      const Vec x_i = Vec::loadu(x + i);
      (sizes_.raw ? x_i : x_i - Vec::loadu(s + i)).store(row.values + i);
    }
    put_left(row.values, n, tile.first + at);
    if (sizes_.raw) {
      put_left(s, n, tile.second + at);
    } else if (sizes_.motion && !sizes_.segments_equal(t)) {
      const Acc* x_previous = previous(x_, state_x_, clip, t, c, chunk, buffers.x_previous);
      for (int64_t i = 0; i < n; i += Vec::size()) {
        (Vec::loadu(x + i) - Vec::loadu(x_previous + i)).store(row.values + i);
      }
      put_left(row.values, n, tile.second + at);
    }
  }

  // A row of a left operand, zero-padded to a multiple of kVnni columns.
  static void put_left(const Acc* row, int64_t n, Operand* to) {
    std::fill(to + n, to + round_up(n, kVnni<Operand>), Operand(0));
    store(row, n, to);
  }

  // z_s of frame t from the chunk's first position on, and z_c of one channel; ones where the variant lacks them.
  const Acc* spatial(int64_t clip, int64_t t, const Chunk& chunk) const {
    return (z_s_ ? z_s_(t - sizes_.first_step, clip) : ones_()) + chunk.p0;
  }
  Vec channel(int64_t clip, int64_t t, int64_t c) const {
    return Vec(z_c_ ? z_c_(t - sizes_.first_step, clip)[c] : Acc(1));
  }

  // A row of the previous frame's maps.
  const Acc* previous(
      const StridedMaps<T>& maps, const std::optional<StridedMaps<T>>& state, int64_t clip, int64_t t, int64_t c,
      const Chunk& chunk, GatherBuffer<Acc>& buffer) const {
    return t == 0 ? state->row(clip, 0, c, chunk.p0, chunk.n, buffer)
                  : maps.row(clip, t - 1, c, chunk.p0, chunk.n, buffer);
  }

  // One channel's G_t, stored until its dU_t is known: in place of dX_t where that has its dtype.
  Acc* g(int64_t clip, int64_t t, int64_t c) const {
    if constexpr (std::is_same_v<T, Acc>) {
      if (need_.x) {
        return d_x(clip, t, c);
      }
    }
    return g_(clip, c);
  }

  const Sizes& sizes_;
  const RefineNeed need_;
  const Transition& transition_;
  const StridedMaps<T> x_, features_;
  const std::optional<StridedMaps<T>> state_x_, state_s_, d_features_;
  const Array<const Acc> z_s_, z_c_, ones_;
  Array<const Acc> d_strips_;  // (B, C, H), divided by the elements per strip
  Array<Acc> g_;               // (B, C, P)
};

}  // namespace CPU_CAPABILITY
}  // namespace rru
