// The gradients of rru_fast::refine, from the last frame to the first.
//
// Two sweeps a frame. One over the maps, a block of channels a task: it ends frame t + 1, whose dU is known by then
// (E = W^T dU, dX, the carry, W's gradient), and begins frame t (G, dL and its sums dz_s and dz_c). One over the gate, a
// clip a task: dz_s and dz_c to dU. Z, A and M are recomputed from X and S.

#include "refine.h"

namespace rru {
namespace CPU_CAPABILITY {

namespace {

// Channels a task has: their gradient of W, (channels, D) for each half, stays in the second-level cache.
constexpr int64_t kChannels = 64;
// Maps of fewer channels than this are cut finer, so that there are tasks for all threads.
constexpr int64_t kManyChannels = 512, kFewChannels = 16;

template <typename T, typename G>
class Backward {
  using A = Arithmetic<T>;
  using V = at::vec::Vectorized<A>;
  static constexpr int64_t kI = kInterleave<G>;

 public:
  Backward(
      const std::optional<Tensor>& d_features, const std::optional<Tensor>& d_strips, bool need_x, bool need_weights,
      const Tensor& features, const RefineSaved& saved, const RefineArguments& a)
      : s_(a),
        gate_(a, s_),
        mean_(saved.mean),
        var_(saved.var),
        u_(saved.u),
        z_s_(saved.z_s),
        z_c_(saved.z_c),
        h_(saved.h),
        training_(a.training),
        need_x_(need_x),
        need_weights_(need_weights),
        lengths_(a.lengths ? a.lengths->const_data_ptr<int64_t>() : nullptr),
        block_(s_.C >= kManyChannels ? kChannels : kFewChannels),
        blocks_((s_.C + block_ - 1) / block_),
        d_padded_(round_up(s_.D, kI)),
        x_(a.x),
        features_(features),
        state_x_(a.state_x ? *a.state_x : a.x.select(1, 0)),
        state_s_(a.state_s ? *a.state_s : a.x.select(1, 0)),
        d_features_(d_features ? *d_features : features),
        has_d_features_(d_features.has_value()) {
    const auto options = gate_.options;
    const auto operand = options.dtype(c10::CppTypeToScalarType<G>::value);
    const auto empty = [&](at::IntArrayRef shape) { return Array<A>(huge(at::empty(shape, options))); };
    const auto zeros = [&](at::IntArrayRef shape) { return Array<A>(at::zeros(shape, options)); };
    const Tensor w_t = a.w.to(options).t();
    w_t_ = Array<const G>(left_operand<G>(w_t, 1));
    if (s_.shared_first) {
      w_first_t_ = Array<const G>(left_operand<G>(w_t.narrow(0, 0, s_.C).add(w_t.narrow(0, s_.C, s_.C)), 1));
      d_w_first_ = zeros({s_.C, s_.D});
    }
    if (d_strips) {
      const Tensor frames = a.lengths ? a.lengths->to(options).view({s_.B, 1, 1}) : at::full({1}, s_.T, options);
      share_ = Array<const A>(d_strips->to(options).div(frames).div(s_.W).contiguous());
    }
    if (need_x) {
      d_x_ = Array<T>(huge(at::empty(a.x.sizes(), a.x.options())));
    }
    if (a.state_x) {
      d_state_x_ = Array<T>(at::zeros(a.state_x->sizes(), a.x.options()));
      d_state_s_ = Array<T>(at::empty(a.state_s->sizes(), a.x.options()));
    }
    g_ = empty({s_.B, s_.C, s_.P});
    d_z_c_ = empty({s_.B, s_.C});
    d_z_s_parts_ = empty({blocks_, s_.B, s_.P});
    d_y_p_ = zeros({s_.B, s_.D});
    d_y_d_ = zeros({s_.B, s_.P});
    sums_ = empty({2, s_.B, s_.D});
    means_ = zeros({2, gate_.groups, s_.D});
    d_gamma_ = zeros({s_.D});
    d_beta_ = zeros({s_.D});
    d_u_ = empty({2, s_.B, s_.D, s_.P});
    const int64_t all = s_.steps * s_.B;  // steps and clips, which the small weights' gradients are products over
    d_z_c_t_ = zeros({a.w_c ? s_.C : 0, all});
    d_z_s_t_ = zeros({a.w_s1 ? s_.P : 0, all});
    d_h_t_ = zeros({s_.A, all});
    y_p_ = zeros({all, s_.D});
    y_d_ = zeros({all, s_.P});
    ones_ = Array<const A>(at::ones({s_.P}, options));
    e_operand_ = Array<G>(at::empty({s_.B, s_.chunks, d_padded_ * kRow}, operand));
    f_operand_ = Array<G>(at::empty({s_.B, s_.chunks, d_padded_ * kRow}, operand));
    t_operand_ = Array<G>(at::empty({s_.B, s_.chunks, round_up(s_.D, kColumns) * kRow}, operand));
    d_w_t_ = zeros({s_.halves, s_.C, s_.D});
  }

  Tensors9 run(const RefineArguments& a) {
    for (int64_t t = s_.T - 1; t >= s_.start - 1; t--) {
      parallel(blocks_, [&](int64_t block) { sweep_maps(block, t); });
      if (t >= s_.start) {
        sweep_gate(t);
      }
    }
    if (s_.shared_first) {
      d_w_t_.tensor().add_(d_w_first_.tensor());
    }
    const auto none = [&] { return at::empty({0}, a.x.options()); };
    Tensors9 result{
        need_x_ ? d_x_.tensor() : none(), none(), none(), none(), none(), none(), none(), none(), none()};
    if (need_weights_) {
      // (left (M, all) right (all, N)), in the weight's dtype
      const auto product_of = [&](const Array<A>& left, const A* right, const Tensor& weight) {
        const Array<A> out(at::zeros(weight.sizes(), gate_.options));
        if (const int64_t all = s_.steps * s_.B; all > 0) {
          product(weight.size(0), weight.size(1), all, left(), all, right, out());
        }
        return out.tensor().to(weight.scalar_type());
      };
      std::get<1>(result) =
          d_w_t_.tensor().view({s_.halves * s_.C, s_.D}).t().to(a.w.scalar_type()).contiguous();
      std::get<2>(result) = d_gamma_.tensor().to(a.gamma.scalar_type());
      std::get<3>(result) = d_beta_.tensor().to(a.beta.scalar_type());
      if (a.w_s1) {
        std::get<4>(result) = product_of(d_h_t_, y_d_(), *a.w_s1);
        std::get<5>(result) = product_of(d_z_s_t_, h_(), *a.w_s2);
      }
      if (a.w_c) {
        std::get<6>(result) = product_of(d_z_c_t_, y_p_(), *a.w_c);
      }
    }
    if (a.state_x) {
      std::get<7>(result) = d_state_x_.tensor();
      std::get<8>(result) = d_state_s_.tensor();
    }
    return result;
  }

 private:
  bool alive(int64_t clip, int64_t t) const {
    return lengths_ == nullptr || t < lengths_[clip];
  }

  // A clip's part of what forward kept of frame t, (N, B, ...).
  const A* kept(const Array<const A>& slices, int64_t t, int64_t clip) const {
    return slices(t - s_.start, clip);
  }

  bool shares_product(int64_t t) const {
    return s_.shared_first && t == s_.start;
  }

  // Whether M's half of W sends something to dX at frame t: dU_t - dU_{t+1}, without the first where it is shared.
  bool has_motion(int64_t t) const {
    return s_.motion && (!shares_product(t) || t + 1 < s_.T);
  }

  // What a block of channels needs while a clip's chunk is worked on.
  struct Tile {
    A e[kChannels * kRow], f[kChannels * kRow];           // W^T dU by halves
    G first[kChannels * kRow], second[kChannels * kRow];  // V, as left operand of W's gradient
  };

  // What the maps of a clip's chunk are gathered into where they have to be.
  struct Reading {
    Lines<A> x, past_x, past_s, d;
  };

  void sweep_maps(int64_t block, int64_t t) {
    const int64_t c0 = block * block_, c1 = std::min(c0 + block_, s_.C), next = t + 1;
    A* d_z_s = d_z_s_parts_(block);
    std::fill(d_z_s, d_z_s + s_.B * s_.P, A(0));
    const std::unique_ptr<Tile> tile(new Tile);
    for (int64_t clip = 0; clip < s_.B; clip++) {
      const bool has_next = next < s_.T && next >= s_.start, ends = has_next && alive(clip, next);
      for (int64_t q = 0; q < s_.chunks; q++) {
        const Chunk chunk = s_.chunk(q);
        if (ends) {
          multiply_w_t(clip, q, next, c0, c1, *tile);
        }
        Reading begun, ended;
        for (int64_t c = c0; c < c1; c++) {
          Row<A> g;
          if (ends) {
            end_row(clip, chunk, next, c, c - c0, ended, *tile, g.values);
          } else {
            std::fill(g.values, g.values + chunk.ld, A(0));
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
        if (ends && need_weights_) {
          multiply_v(clip, q, next, c0, c1, *tile);
        }
        if (t < 0 && s_.motion && ends) {
          end_state_x(clip, q, c0, c1, *tile);
        }
      }
    }
  }

  // tile.e, tile.f = W^T dU_t for channels c0 to c1, by halves.
  void multiply_w_t(int64_t clip, int64_t q, int64_t t, int64_t c0, int64_t c1, Tile& tile) const {
    const Chunk chunk = s_.chunk(q);
    const auto product_of = [&](const Array<const G>& w_t, int64_t row, const Array<G>& operands, A* out) {
      multiply<G>(
          c1 - c0, chunk.n, d_padded_, w_t(row), d_padded_, operands(clip, q), chunk.ld, out, kRow, false);
    };
    if (need_x_ || !s_.raw) {
      product_of(shares_product(t) ? w_first_t_ : w_t_, c0, e_operand_, tile.e);
    }
    if (s_.raw) {
      product_of(w_t_, s_.C + c0, e_operand_, tile.f);
    } else if (need_x_ && has_motion(t)) {
      product_of(w_t_, s_.C + c0, f_operand_, tile.f);
    }
  }

  // W's gradient, transposed, += V_t dU_t^T for channels c0 to c1.
  void multiply_v(int64_t clip, int64_t q, int64_t t, int64_t c0, int64_t c1, const Tile& tile) {
    const Chunk chunk = s_.chunk(q);
    const int64_t k = round_up(chunk.n, kI);
    const auto product_into = [&](const G* v, A* d_w_t) {
      for (int64_t d = 0; d < s_.D; d += kColumns) {
        multiply<G>(
            c1 - c0, std::min(kColumns, s_.D - d), k, v, kRow, t_operand_(clip, q) + d * k, kColumns, d_w_t + d, s_.D,
            true);
      }
    };
    product_into(tile.first, shares_product(t) ? d_w_first_(c0) : d_w_t_(0, c0));
    if (s_.halves == 2 && !shares_product(t)) {
      product_into(tile.second, d_w_t_(1, c0));
    }
  }

  // The frame before a chunk reaches its first step through the motion: d_state_x = -W_m^T dU_0.
  void end_state_x(int64_t clip, int64_t q, int64_t c0, int64_t c1, Tile& tile) {
    const Chunk chunk = s_.chunk(q);
    multiply<G>(
        c1 - c0, chunk.n, d_padded_, w_t_(s_.C + c0), d_padded_, e_operand_(clip, q), chunk.ld, tile.f, kRow, false);
    for (int64_t c = c0; c < c1; c++) {
      A* row = tile.f + (c - c0) * kRow;
      for (int64_t i = 0; i < chunk.n; i++) {
        row[i] = -row[i];
      }
      store(row, chunk.n, d_state_x_(clip, c) + chunk.p0);
    }
  }

  // z_s of frame t from a chunk's first position on; all ones where the variant has none. Likewise z_c of one channel.
  const A* spatial(int64_t clip, int64_t t, const Chunk& chunk) const {
    return (z_s_ ? kept(z_s_, t, clip) : ones_()) + chunk.p0;
  }
  V channel(int64_t clip, int64_t t, int64_t c) const {
    return V(z_c_ ? kept(z_c_, t, clip)[c] : A(1));
  }

  const A* past(
      const Maps<T>& maps, const Maps<T>& state, int64_t clip, int64_t t, int64_t c, const Chunk& chunk,
      Lines<A>& lines) const {
    return t == 0 ? state.row(clip, 0, c, chunk.p0, chunk.n, lines)
                  : maps.row(clip, t - 1, c, chunk.p0, chunk.n, lines);
  }

  // Row `at` of the tile at frame t: dX_t, what is carried to frame t - 1, and V_t.
  void end_row(
      int64_t clip, const Chunk& chunk, int64_t t, int64_t c, int64_t at, Reading& in, Tile& tile, A* carry) {
    const int64_t n = chunk.n;
    const A *e = tile.e + at * kRow, *f = tile.f + at * kRow, *z_s = spatial(clip, t, chunk);
    const V z_c = channel(clip, t, c);
    const bool to_x = need_x_, moves = has_motion(t);
    Row<A> g_row, d_x, row;
    const A* g = load(g_(clip, c) + chunk.p0, n, g_row.values);
    for (int64_t i = 0; i < n; i += V::size()) {
      const V z = sigmoid(z_c * V::loadu(z_s + i, std::min<int64_t>(V::size(), n - i)));
      const V g_i = V::loadu(g + i), zg = z * g_i;
      if (s_.raw) {
        (g_i - zg + V::loadu(f + i)).store(carry + i);
        if (to_x) {
          (zg + V::loadu(e + i)).store(d_x.values + i);
        }
      } else {
        const V e_i = V::loadu(e + i);
        (g_i - zg - e_i).store(carry + i);
        if (to_x) {
          (moves ? zg + e_i + V::loadu(f + i) : zg + e_i).store(d_x.values + i);
        }
      }
    }
    if (to_x) {
      store(d_x.values, n, d_x_(clip, t, c) + chunk.p0);
    }
    if (!need_weights_) {
      return;
    }
    const A* x = x_.row(clip, t, c, chunk.p0, n, in.x);
    const A* s = past(features_, state_s_, clip, t, c, chunk, in.past_s);
    for (int64_t i = 0; i < n; i += V::size()) {
      const V x_i = V::loadu(x + i);
      (s_.raw ? x_i : x_i - V::loadu(s + i)).store(row.values + i);
    }
    put_left(row.values, n, tile.first + at * kRow);
    if (s_.raw) {
      put_left(s, n, tile.second + at * kRow);
    } else if (s_.motion && !shares_product(t)) {
      const A* x_past = past(x_, state_x_, clip, t, c, chunk, in.past_x);
      for (int64_t i = 0; i < n; i += V::size()) {
        (V::loadu(x + i) - V::loadu(x_past + i)).store(row.values + i);
      }
      put_left(row.values, n, tile.second + at * kRow);
    }
  }

  // A row of a left operand, zero to the end of its interleaved columns.
  static void put_left(const A* row, int64_t n, G* to) {
    std::fill(to + n, to + round_up(n, kI), G(0));
    store(row, n, to);
  }

  // One channel of frame t, g holding what is carried to it: G_t, and where the frame has a gate, its dL summed into dz_c
  // and dz_s.
  void begin_row(int64_t clip, const Chunk& chunk, int64_t t, int64_t c, Reading& in, A* g, A* d_z_s) {
    const int64_t n = chunk.n;
    const bool lives = alive(clip, t);
    if (lives && has_d_features_) {
      const A* d = d_features_.row(clip, t, c, chunk.p0, n, in.d);
      for (int64_t i = 0; i < n; i += V::size()) {
        (V::loadu(g + i) + V::loadu(d + i)).store(g + i);
      }
    }
    if (lives && share_) {
      const A* share = share_(clip, c);
      each_map_row(chunk, s_.W, [&](int64_t h, int64_t i, auto count) {
        for (int64_t w = 0; w < count; w++) {
          g[i + w] += share[h];
        }
      });
    }
    if (t < s_.start) {
      if (need_x_) {
        store(g, n, d_x_(clip, t, c) + chunk.p0);
      }
      return;
    }
    V d_z_c(0);
    if (lives) {
      const A *x = x_.row(clip, t, c, chunk.p0, n, in.x), *z_s = spatial(clip, t, chunk);
      const A* s = past(features_, state_s_, clip, t, c, chunk, in.past_s);
      const V z_c = channel(clip, t, c);
      for (int64_t i = 0; i < n; i += V::size()) {
        const int64_t count = std::min<int64_t>(V::size(), n - i);
        const V z_s_i = V::loadu(z_s + i, count), z = sigmoid(z_c * z_s_i);
        const V whole = V::loadu(g + i) * (V::loadu(x + i) - V::loadu(s + i)) * z * (V(1) - z);
        const V d_l = count == V::size() ? whole : V::set(V(0), whole, count);
        d_z_c = at::vec::fmadd(d_l, z_s_i, d_z_c);
        at::vec::fmadd(d_l, z_c, V::loadu(d_z_s + i, count)).store(d_z_s + i, count);
      }
    }
    std::copy(g, g + n, g_(clip, c) + chunk.p0);
    A& sum = d_z_c_(clip)[c];
    sum = (chunk.p0 == 0 ? A(0) : sum) + total<A>(d_z_c);
  }

  // dz_s and dz_c of frame t to dU_t, and to the gradients of the gate's weights.
  void sweep_gate(int64_t t) {
    if (training_) {
      gate_.use(mean_(t), var_(t));
    }
    if (z_c_) {
      product(s_.B, s_.D, s_.C, d_z_c_(), s_.C, gate_.w_c(), d_y_p_());
    }
    parallel(s_.B, [&](int64_t clip) { attention_backward(clip, t); });
    merge_sums();
    parallel(s_.B, [&](int64_t clip) { norm_backward(clip, t); });
  }

  // dY of a vector: what both attentions send, where Y is above zero (or not a number).
  V d_y(int64_t clip, int64_t d, const Chunk& chunk, int64_t i, int64_t count, const V& y) const {
    const V both = V::loadu(d_y_d_(clip) + chunk.p0 + i, count) + V(d_y_p_(clip)[d] / static_cast<A>(s_.P));
    return V::set(V(0), V::blendv(both, V(0), y <= V(0)), count);
  }

  void attention_backward(int64_t clip, int64_t t) {
    A *sum_d_y = sums_(0, clip), *sum_d_y_uhat = sums_(1, clip);
    std::fill(sum_d_y, sum_d_y + s_.D, A(0));
    std::fill(sum_d_y_uhat, sum_d_y_uhat + s_.D, A(0));
    if (!alive(clip, t)) {
      return;
    }
    const int64_t column = (t - s_.start) * s_.B + clip;
    if (z_c_) {
      for (int64_t c = 0; c < s_.C; c++) {
        d_z_c_t_(c)[column] = d_z_c_(clip)[c];
      }
    }
    if (z_s_) {
      spatial_backward(clip, t, column);
    }
    gate_.pool(clip, kept(u_, t, clip), y_p_(column), y_d_(column));
    gate_.each(
        clip, kept(u_, t, clip),
        [&](int64_t d, const Chunk& chunk, int64_t i, int64_t count, const V& uhat, const V& y) {
          const V dy = d_y(clip, d, chunk, i, count, y);
          sum_d_y[d] += total<A>(dy);
          sum_d_y_uhat[d] += total<A>(V::set(V(0), dy * uhat, count));
        });
  }

  // dz_s of a clip to dh and to dY's part by position: h = relu(W_s1 mean_D Y), z_s = W_s2 h.
  void spatial_backward(int64_t clip, int64_t t, int64_t column) {
    const A* h = kept(h_, t, clip);
    std::vector<A> d_h(s_.A, A(0));
    for (int64_t p = 0; p < s_.P; p++) {
      A d_z_s = 0;
      for (int64_t block = 0; block < blocks_; block++) {
        d_z_s += d_z_s_parts_(block, clip)[p];
      }
      d_z_s_t_(p)[column] = d_z_s;
      add_scaled(d_h.data(), d_z_s, gate_.w_s2(p), s_.A);
    }
    A* d_y_d = d_y_d_(clip);
    std::fill(d_y_d, d_y_d + s_.P, A(0));
    for (int64_t a = 0; a < s_.A; a++) {
      const A d = h[a] > 0 ? d_h[a] : A(0);
      d_h_t_(a)[column] = d;
      add_scaled(d_y_d, d / static_cast<A>(s_.D), gate_.w_s1(a), s_.P);
    }
  }

  // The sums over each group's clips, in their order: gradients of beta and gamma, and what the norm takes off dY.
  void merge_sums() {
    const int64_t clips = s_.B / gate_.groups;
    for (int64_t i = 0; i < gate_.groups * s_.D; i++) {
      const int64_t first = i / s_.D * clips, d = i % s_.D;
      double sum_d_y = 0, sum_d_y_uhat = 0;
      for (int64_t clip = first; clip < first + clips; clip++) {
        sum_d_y += sums_(0, clip)[d];
        sum_d_y_uhat += sums_(1, clip)[d];
      }
      d_beta_()[d] += static_cast<A>(sum_d_y);
      d_gamma_()[d] += static_cast<A>(sum_d_y_uhat);
      if (training_) {
        means_(0)[i] = static_cast<A>(sum_d_y / (clips * s_.P));
        means_(1)[i] = static_cast<A>(sum_d_y_uhat / (clips * s_.P));
      }
    }
  }

  // dU_t = gamma r (dY - mean(dY) - Uhat mean(dY Uhat)) of a clip, and the operands made of it.
  void norm_backward(int64_t clip, int64_t t) {
    A* du = d_u_(t & 1, clip);
    if (!alive(clip, t)) {
      std::fill(du, du + s_.D * s_.P, A(0));
    } else {
      const int64_t group = gate_.group(clip);
      const A *mean = means_(0, group), *mean_uhat = means_(1, group), *r = gate_.r(group), *gamma = gate_.gamma();
      gate_.each(
          clip, kept(u_, t, clip),
          [&](int64_t d, const Chunk& chunk, int64_t i, int64_t count, const V& uhat, const V& y) {
            const V off = d_y(clip, d, chunk, i, count, y) - V(mean[d]) - uhat * V(mean_uhat[d]);
            (off * V(gamma[d] * r[d])).store(du + s_.D * chunk.p0 + d * chunk.n + i, count);
          });
    }
    const A* du_next = t + 1 < s_.T ? d_u_((t + 1) & 1, clip) : nullptr;
    for (int64_t q = 0; q < s_.chunks; q++) {
      const Chunk chunk = s_.chunk(q);
      const int64_t at = s_.D * chunk.p0;
      put_operands(clip, q, t, du + at, du_next == nullptr ? nullptr : du_next + at);
    }
  }

  // dU_t as right operand of W^T dU, its difference to the next frame's as that of W_m^T, and transposed as that of
  // V dU^T, in blocks of kColumns gate channels.
  void put_operands(int64_t clip, int64_t q, int64_t t, const A* du, const A* du_next) const {
    const Chunk chunk = s_.chunk(q);
    const int64_t n = chunk.n, depth = round_up(n, kI);
    G *e = e_operand_(clip, q), *f = f_operand_(clip, q), *transposed = t_operand_(clip, q);
    for (int64_t d = 0; d < s_.D; d += kI) {
      alignas(64) A rows[kI * kRow] = {}, differences[kI * kRow] = {};
      for (int64_t i = 0; i < kI && d + i < s_.D; i++) {
        const A *row = du + (d + i) * n, *next = du_next == nullptr ? nullptr : du_next + (d + i) * n;
        for (int64_t p = 0; p < n; p++) {
          rows[i * kRow + p] = row[p];
          differences[i * kRow + p] = (shares_product(t) ? A(0) : row[p]) - (next == nullptr ? A(0) : next[p]);
        }
      }
      put_rows(rows, e, d, chunk.ld, n);
      if (s_.motion) {
        put_rows(differences, f, d, chunk.ld, n);
      }
    }
    for (int64_t d0 = 0; d0 < s_.D; d0 += kColumns) {
      const int64_t width = std::min(kColumns, s_.D - d0);
      for (int64_t p = 0; p < depth; p += kI) {
        alignas(64) A rows[kI * kRow] = {};
        for (int64_t i = 0; i < kI && p + i < n; i++) {
          for (int64_t d = 0; d < width; d++) {
            rows[i * kRow + d] = du[(d0 + d) * n + p + i];
          }
        }
        put_rows(rows, transposed + d0 * depth, p, kColumns, width);
      }
    }
  }

  const Sizes s_;
  Gate<A> gate_;
  const Array<const A> mean_, var_, u_, z_s_, z_c_, h_;  // what forward kept
  const bool training_, need_x_, need_weights_;
  const int64_t* const lengths_;
  const int64_t block_, blocks_, d_padded_;
  const Maps<T> x_, features_, state_x_, state_s_, d_features_;
  const bool has_d_features_;
  Array<const G> w_t_, w_first_t_;
  Array<const A> share_, ones_;
  Array<T> d_x_, d_state_x_, d_state_s_;
  Array<A> d_w_t_, d_w_first_, d_gamma_, d_beta_, g_, d_u_, means_, sums_;
  Array<A> d_z_c_, d_z_s_parts_, d_y_p_, d_y_d_;         // of the frame under way
  Array<A> d_z_c_t_, d_z_s_t_, d_h_t_, y_p_, y_d_;       // of all steps
  Array<G> e_operand_, f_operand_, t_operand_;           // dU as right operands, see put_operands
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
