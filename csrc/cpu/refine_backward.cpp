// The gradients of rru_fast::refine, from the last frame to the first.
//
// Two sweeps a frame. One over the maps, a block of channels a task: it ends frame t + 1, whose dU is known by then
// (E = W^T dU, dX, the carry, W's gradient), and begins frame t (G, dL and its sums dz_s and dz_c). One over the gate,
// a clip a task: dz_s and dz_c to dU. Z, A and M are recomputed from X and S.

#include "gate_backward.h"

namespace rru {
namespace CPU_CAPABILITY {

namespace {

// Channels a task has: their gradient of W, (channels, D) for each half, stays in the second-level cache.
constexpr int64_t kChannels = 64;
// Positions that W's gradient is summed over at once, of several clips where theirs are few.
constexpr int64_t kPositions = 256;
// Maps of fewer channels than this are cut finer, so that there are tasks for all threads.
constexpr int64_t kManyChannels = 512, kFewChannels = 16;

template <typename T, typename Operand>
class Backward {
  using Acc = at::opmath_type<T>;
  using Vec = at::vec::Vectorized<Acc>;
  static constexpr int64_t kI = kVnni<Operand>;

 public:
  Backward(
      const std::optional<Tensor>& d_features, const std::optional<Tensor>& d_strips, bool need_x, bool need_weights,
      const Tensor& features, const RefineSaved& saved, const RefineArguments& a)
      : s_(a),
        need_x_(need_x),
        need_weights_(need_weights),
        block_(s_.C >= kManyChannels ? kChannels : kFewChannels),
        blocks_((s_.C + block_ - 1) / block_),
        gate_(a, saved, s_, blocks_),
        z_s_(saved.z_s),
        z_c_(saved.z_c),
        x_(a.x),
        features_(features),
        state_x_(a.state_x ? *a.state_x : a.x.select(1, 0)),
        state_s_(a.state_s ? *a.state_s : a.x.select(1, 0)),
        d_features_(d_features ? *d_features : features),
        has_d_features_(d_features.has_value()) {
    const auto options = gate_.options();
    const auto zeros = [&](at::IntArrayRef shape) { return Array<Acc>(at::zeros(shape, options)); };
    const Tensor w_t = a.w.to(options).t();
    w_t_ = Array<const Operand>(left_operand<Operand>(w_t, 1));
    d_w_t_ = zeros({s_.num_segments, s_.C, s_.D});
    if (s_.first_segments_equal) {
      w_sum_t_ = Array<const Operand>(left_operand<Operand>(w_t.narrow(0, 0, s_.C).add(w_t.narrow(0, s_.C, s_.C)), 1));
      d_w_sum_ = zeros({s_.C, s_.D});
    }
    if (d_strips) {
      d_strips_mean_ = Array<const Acc>(d_strips->to(options).div(s_.elements_per_strip(a, options)).contiguous());
    }
    if (need_x) {
      d_x_ = Array<T>(on_huge_pages(at::empty(a.x.sizes(), a.x.options())));
    }
    if (a.state_x) {
      d_state_x_ = Array<T>(at::zeros(a.state_x->sizes(), a.x.options()));
      d_state_s_ = Array<T>(at::empty(a.state_s->sizes(), a.x.options()));
    }
    if (!g_in_d_x()) {
      g_ = Array<Acc>(on_huge_pages(at::empty({s_.B, s_.C, s_.P}, options)));
    }
    ones_ = Array<const Acc>(at::ones({s_.P}, options));
    tiles_ = Array<uint8_t>(at::empty({at::get_num_threads(), sizeof(Tile)}, options.dtype(at::kByte)));
  }

  Tensors9 run(const RefineArguments& a) {
    for (int64_t t = s_.T - 1; t >= s_.start - 1; t--) {
      parallel(blocks_, [&](int64_t block) { sweep_maps(block, t); });
      if (t >= s_.start) {
        gate_.sweep(t);
      }
    }
    if (s_.first_segments_equal) {
      d_w_t_.tensor().add_(d_w_sum_.tensor());
    }
    const auto none = [&] { return at::empty({0}, a.x.options()); };
    Tensors9 result{
        need_x_ ? d_x_.tensor() : none(), none(), none(), none(), none(), none(), none(), none(), none()};
    if (need_weights_) {
      std::get<1>(result) =
          d_w_t_.tensor().view({s_.num_segments * s_.C, s_.D}).t().to(a.w.scalar_type()).contiguous();
      std::get<2>(result) = gate_.d_gamma.tensor().to(a.gamma.scalar_type());
      std::get<3>(result) = gate_.d_beta.tensor().to(a.beta.scalar_type());
      if (a.w_s1) {
        std::get<4>(result) = gate_.d_w_s1(*a.w_s1);
        std::get<5>(result) = gate_.d_w_s2(*a.w_s2);
      }
      if (a.w_c) {
        std::get<6>(result) = gate_.d_w_c(*a.w_c);
      }
    }
    if (a.state_x) {
      std::get<7>(result) = d_state_x_.tensor();
      std::get<8>(result) = d_state_s_.tensor();
    }
    return result;
  }

 private:
  // Whether M's half of W sends something to dX at frame t: dU_t - dU_{t+1}, without the first where it is shared.
  bool has_motion(int64_t t) const {
    return s_.motion && (!s_.segments_equal(t) || t + 1 < s_.T);
  }

  // Whether G_t waits for its dU where dX_t will be.
  bool g_in_d_x() const {
    return std::is_same_v<T, Acc> && need_x_;
  }
  Acc* g(int64_t clip, int64_t t, int64_t c) const {
    if constexpr (std::is_same_v<T, Acc>) {
      if (need_x_) {
        return d_x_(clip, t, c);
      }
    }
    return g_(clip, c);
  }

  // What a block of channels needs while a clip's chunk is worked on.
  struct alignas(64) Tile {
    Acc e[kChannels * kRow], f[kChannels * kRow];  // W^T dU by segments
    // V as left operand of W's gradient, for rows `from` to `from + rows` of its right operand.
    Operand first[kChannels * kPositions], second[kChannels * kPositions];
    int64_t from, rows;
  };

  // What the maps of a clip's chunk are gathered into where they have to be.
  struct Reading {
    GatherBuffer<Acc> x, past_x, past_s, d;
  };

  void sweep_maps(int64_t block, int64_t t) {
    const int64_t c0 = block * block_, c1 = std::min(c0 + block_, s_.C), next = t + 1;
    Acc* d_z_s = gate_.d_z_s_parts(block);
    std::fill(d_z_s, d_z_s + s_.B * s_.P, Acc(0));
    Tile* tile = reinterpret_cast<Tile*>(tiles_(at::get_thread_num()));
    tile->from = tile->rows = 0;
    for (int64_t clip = 0; clip < s_.B; clip++) {
      const bool has_next = next < s_.T && next >= s_.start, ends = has_next && s_.has_frame(clip, next);
      for (int64_t q = 0; q < s_.chunks; q++) {
        const Chunk chunk = s_.chunk(q);
        if (ends) {
          transition_backward(clip, q, next, c0, c1, *tile);
          if (const int64_t row = clip * gate_.depth + chunk.p0;
              row != tile->from + tile->rows || tile->rows + kRow > kPositions) {
            add_weight_gradient(next, c0, c1, *tile);
            tile->from = row;
          }
        }
        Reading begun, ended;
        for (int64_t c = c0; c < c1; c++) {
          Row<Acc> g;
          if (ends) {
            end_row(clip, chunk, next, c, c - c0, ended, *tile, g.values);
          } else {
            std::fill(g.values, g.values + chunk.ld, Acc(0));
            if (has_next && need_x_) {  // past the clip's length
              std::fill(d_x_(clip, next, c) + chunk.p0, d_x_(clip, next, c) + chunk.p0 + chunk.n, T(0));
            }
          }
          if (t >= 0) {
            begin_row(clip, chunk, t, c, begun, g.values, d_z_s + clip * s_.P + chunk.p0);
          } else {
            store(g.values, chunk.n, d_state_s_(clip, c) + chunk.p0);
          }
        }
        if (ends) {
          tile->rows += round_up(chunk.n, kI);
        }
        if (t < 0 && s_.motion && ends) {
          end_state_x(clip, q, c0, c1, *tile);
        }
      }
    }
    add_weight_gradient(next, c0, c1, *tile);
  }

  // tile.e, tile.f = W^T dU_t for channels c0 to c1, by segments.
  void transition_backward(int64_t clip, int64_t q, int64_t t, int64_t c0, int64_t c1, Tile& tile) const {
    const Chunk chunk = s_.chunk(q);
    const int64_t depth = round_up(s_.D, kI);
    const auto product_of = [&](const auto& w_t, int64_t row, const Array<Operand>& operands, Acc* out) {
      gemm<Operand>(c1 - c0, chunk.n, depth, w_t(row), depth, operands(clip, q), chunk.ld, out, kRow, false);
    };
    if (need_x_ || !s_.raw) {
      product_of(s_.segments_equal(t) ? w_sum_t_ : w_t_, c0, gate_.e_operand, tile.e);
    }
    if (s_.raw) {
      product_of(w_t_, s_.C + c0, gate_.e_operand, tile.f);
    } else if (need_x_ && has_motion(t)) {
      product_of(w_t_, s_.C + c0, gate_.f_operand, tile.f);
    }
  }

  // W's gradient, transposed, += V_t dU_t^T for channels c0 to c1 and the positions in the tile.
  void add_weight_gradient(int64_t t, int64_t c0, int64_t c1, Tile& tile) {
    const int64_t k = std::exchange(tile.rows, 0);
    if (k == 0 || !need_weights_) {
      return;
    }
    const auto product_into = [&](const Operand* v, Acc* d_w_t) {
      for (int64_t d = 0; d < s_.D; d += kTileN) {
        gemm<Operand>(
            c1 - c0, std::min(kTileN, s_.D - d), k, v, kPositions, gate_.t_operand(d / kTileN, tile.from), kTileN,
            d_w_t + d, s_.D, true);
      }
    };
    product_into(tile.first, s_.segments_equal(t) ? d_w_sum_(c0) : d_w_t_(0, c0));
    if (s_.num_segments == 2 && !s_.segments_equal(t)) {
      product_into(tile.second, d_w_t_(1, c0));
    }
  }

  // The frame before a chunk reaches its first step through the motion: d_state_x = -W_m^T dU_0.
  void end_state_x(int64_t clip, int64_t q, int64_t c0, int64_t c1, Tile& tile) {
    const Chunk chunk = s_.chunk(q);
    const int64_t depth = round_up(s_.D, kI);
    gemm<Operand>(
        c1 - c0, chunk.n, depth, w_t_(s_.C + c0), depth, gate_.e_operand(clip, q), chunk.ld, tile.f, kRow, false);
    for (int64_t c = c0; c < c1; c++) {
      Acc* row = tile.f + (c - c0) * kRow;
      for (int64_t i = 0; i < chunk.n; i++) {
        row[i] = -row[i];
      }
      store(row, chunk.n, d_state_x_(clip, c) + chunk.p0);
    }
  }

  // z_s of frame t from a chunk's first position on; all ones where the variant has none. Likewise z_c of one channel.
  const Acc* spatial(int64_t clip, int64_t t, const Chunk& chunk) const {
    return (z_s_ ? z_s_(t - s_.start, clip) : ones_()) + chunk.p0;
  }
  Vec channel(int64_t clip, int64_t t, int64_t c) const {
    return Vec(z_c_ ? z_c_(t - s_.start, clip)[c] : Acc(1));
  }

  const Acc* past(
      const StridedMaps<T>& maps, const StridedMaps<T>& state, int64_t clip, int64_t t, int64_t c, const Chunk& chunk,
      GatherBuffer<Acc>& lines) const {
    return t == 0 ? state.row(clip, 0, c, chunk.p0, chunk.n, lines)
                  : maps.row(clip, t - 1, c, chunk.p0, chunk.n, lines);
  }

  // Row `at` of the tile at frame t: dX_t, what is carried to frame t - 1, and V_t.
  void end_row(
      int64_t clip, const Chunk& chunk, int64_t t, int64_t c, int64_t at, Reading& in, Tile& tile, Acc* carry) {
    const int64_t n = chunk.n;
    const Acc *e = tile.e + at * kRow, *f = tile.f + at * kRow, *z_s = spatial(clip, t, chunk);
    const Vec z_c = channel(clip, t, c);
    const bool to_x = need_x_, moves = has_motion(t);
    Row<Acc> g_row, d_x, row;
    const Acc* g_t = load(g(clip, t, c) + chunk.p0, n, g_row.values);
    for (int64_t i = 0; i < n; i += Vec::size()) {
      const Vec z = sigmoid(z_c * Vec::loadu(z_s + i, std::min<int64_t>(Vec::size(), n - i)));
      const Vec g_i = Vec::loadu(g_t + i), zg = z * g_i;
      if (s_.raw) {
        (g_i - zg + Vec::loadu(f + i)).store(carry + i);
        if (to_x) {
          (zg + Vec::loadu(e + i)).store(d_x.values + i);
        }
      } else {
        const Vec e_i = Vec::loadu(e + i);
        (g_i - zg - e_i).store(carry + i);
        if (to_x) {
          (moves ? zg + e_i + Vec::loadu(f + i) : zg + e_i).store(d_x.values + i);
        }
      }
    }
    if (to_x) {
      store(d_x.values, n, d_x_(clip, t, c) + chunk.p0);
    }
    if (!need_weights_) {
      return;
    }
    const Acc* x = x_.row(clip, t, c, chunk.p0, n, in.x);
    const Acc* s = past(features_, state_s_, clip, t, c, chunk, in.past_s);
    for (int64_t i = 0; i < n; i += Vec::size()) {
      const Vec x_i = Vec::loadu(x + i);
      (s_.raw ? x_i : x_i - Vec::loadu(s + i)).store(row.values + i);
    }
    pack_left(row.values, n, tile.first + at * kPositions + tile.rows);
    if (s_.raw) {
      pack_left(s, n, tile.second + at * kPositions + tile.rows);
    } else if (s_.motion && !s_.segments_equal(t)) {
      const Acc* x_past = past(x_, state_x_, clip, t, c, chunk, in.past_x);
      for (int64_t i = 0; i < n; i += Vec::size()) {
        (Vec::loadu(x + i) - Vec::loadu(x_past + i)).store(row.values + i);
      }
      pack_left(row.values, n, tile.second + at * kPositions + tile.rows);
    }
  }

  // A row of a left operand, zero to the end of its interleaved columns.
  static void pack_left(const Acc* row, int64_t n, Operand* to) {
    std::fill(to + n, to + round_up(n, kI), Operand(0));
    store(row, n, to);
  }

  // One channel of frame t, g_t holding what is carried to it: G_t, and where the frame has a gate, its dL summed into
  // dz_c and dz_s.
  void begin_row(int64_t clip, const Chunk& chunk, int64_t t, int64_t c, Reading& in, Acc* g_t, Acc* d_z_s) {
    const int64_t n = chunk.n;
    const bool has_frame = s_.has_frame(clip, t);
    if (has_frame && has_d_features_) {
      const Acc* d = d_features_.row(clip, t, c, chunk.p0, n, in.d);
      for (int64_t i = 0; i < n; i += Vec::size()) {
        (Vec::loadu(g_t + i) + Vec::loadu(d + i)).store(g_t + i);
      }
    }
    if (has_frame && d_strips_mean_) {
      const Acc* share = d_strips_mean_(clip, c);
      each_map_row(chunk, s_.W, [&](int64_t h, int64_t i, auto count) {
        const Acc value = share[h];
#pragma omp simd
        for (int64_t w = 0; w < count; w++) {
          g_t[i + w] += value;
        }
      });
    }
    if (t < s_.start) {
      if (need_x_) {
        store(g_t, n, d_x_(clip, t, c) + chunk.p0);
      }
      return;
    }
    Vec d_z_c(0);
    if (has_frame) {
      const Acc *x = x_.row(clip, t, c, chunk.p0, n, in.x), *z_s = spatial(clip, t, chunk);
      const Acc* s = past(features_, state_s_, clip, t, c, chunk, in.past_s);
      const Vec z_c = channel(clip, t, c);
      for (int64_t i = 0; i < n; i += Vec::size()) {
        const int64_t count = std::min<int64_t>(Vec::size(), n - i);
        const Vec z_s_i = Vec::loadu(z_s + i, count), z = sigmoid(z_c * z_s_i);
        const Vec whole = Vec::loadu(g_t + i) * (Vec::loadu(x + i) - Vec::loadu(s + i)) * z * (Vec(1) - z);
        const Vec d_l = count == Vec::size() ? whole : Vec::set(Vec(0), whole, count);
        d_z_c = at::vec::fmadd(d_l, z_s_i, d_z_c);
        at::vec::fmadd(d_l, z_c, Vec::loadu(d_z_s + i, count)).store(d_z_s + i, count);
      }
    }
    store(g_t, n, g(clip, t, c) + chunk.p0);
    Acc& sum = gate_.d_z_c(clip)[c];
    sum = (chunk.p0 == 0 ? Acc(0) : sum) + reduce_add<Acc>(d_z_c);
  }

  const Sizes s_;
  const bool need_x_, need_weights_;
  const int64_t block_, blocks_;
  GateBackward<Acc, Operand> gate_;
  const Array<const Acc> z_s_, z_c_;  // what forward kept
  const StridedMaps<T> x_, features_, state_x_, state_s_, d_features_;
  const bool has_d_features_;
  Array<const Operand> w_t_, w_sum_t_;
  Array<const Acc> d_strips_mean_, ones_;
  Array<T> d_x_, d_state_x_, d_state_s_;
  Array<Acc> d_w_t_, d_w_sum_, g_;
  Array<uint8_t> tiles_;  // a Tile for each thread
};

}  // namespace

Tensors9 refine_backward(
    const std::optional<Tensor>& d_features, const std::optional<Tensor>& d_strips, bool need_x, bool need_weights,
    const Tensor& features, const RefineSaved& saved, const RefineArguments& arguments) {
  return dispatch(arguments.x, [&](auto stored, auto multiplied) {
    return Backward<decltype(stored), decltype(multiplied)>(
               d_features, d_strips, need_x, need_weights, features, saved, arguments)
        .run(arguments);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
