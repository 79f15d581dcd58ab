// rru_fast::refine, eq. 1-5 and 9: per step, one pass over the maps and one product, fused clip by clip.
//
// The pass over frame t reads X_t, S_{t-1} and X_{t+1}, writes S_t, adds it to the strips and leaves the next frame's
// gate input V = (A; M), (A) or (X; S) in cache, where the product U = W V finds it.

#include "refine.h"

#include <ATen/Context.h>

namespace rru {
namespace CPU_CAPABILITY {

namespace {

// Channels between two products of a clip: their rows of V stay in the second-level cache.
constexpr int64_t kChannelsPerGemm = 512;
// Few clips for the threads at hand are cut into tasks of this many channels, and of this many rows of U.
constexpr int64_t kChannelTask = 64, kGateTask = 32;

template <typename T, typename Operand>
class Forward {
  using Acc = at::opmath_type<T>;
  using Vec = at::vec::Vectorized<Acc>;
  static constexpr int64_t kI = kVnni<Operand>;

 public:
  Forward(const RefineArguments& a, bool save)
      : s_(a),
        gate_(a, s_),
        training_(a.training),
        save_(save),
        x_(a.x),
        state_x_(a.state_x ? *a.state_x : a.x.select(1, 0)),
        state_s_(a.state_s ? *a.state_s : a.x.select(1, 0)),
        w_(left_operand<Operand>(a.w, s_.num_segments)),
        whole_clips_(s_.B >= 2 * at::get_num_threads()),
        depth_(round_up(whole_clips_ ? std::min(kChannelsPerGemm, s_.C) : s_.C, kI)) {
    if (s_.first_segments_equal || (s_.raw && training_)) {
      const Tensor w = a.w.to(gate_.options);
      w_sum_ = Array<const Operand>(left_operand<Operand>(w.narrow(1, 0, s_.C).add(w.narrow(1, s_.C, s_.C)), 1));
    }
    if (a.w_c) {
      w_c_t_ = Array<const Acc>(gate_.w_c.tensor().t().contiguous());
    }
    features_ = Array<T>(on_huge_pages(at::empty(a.x.sizes(), a.x.options())));
    strips_ = Array<Acc>(at::zeros({s_.B, s_.C, s_.H}, gate_.options));
    mean_ = Array<Acc>(at::zeros({training_ ? s_.T : 0, a.groups, s_.D}, gate_.options));
    var_ = Array<Acc>(at::zeros_like(mean_.tensor()));
    const int64_t slices = save ? s_.steps : std::min<int64_t>(s_.steps, 1);
    u_ = slots({slices, s_.B, s_.D, s_.P});
    z_s_ = slots({a.w_s2 ? slices : 0, s_.B, s_.P});
    z_c_ = slots({a.w_c ? slices : 0, s_.B, s_.C});
    h_ = slots({a.w_s1 ? slices : 0, s_.B, s_.num_attn});
    ones_ = Array<const Acc>(at::ones({s_.P}, gate_.options));
    y_p_ = slots({s_.B, s_.D});
    y_d_ = slots({s_.B, s_.P});
    clip_mean_ = slots({s_.B, s_.D});
    clip_m2_ = slots({s_.B, s_.D});
    const int64_t operands = whole_clips_ ? at::get_num_threads() : s_.B * s_.chunks;
    v_ = Array<Operand>(at::empty(
        {operands, s_.num_segments * depth_ * kRow}, a.x.options().dtype(c10::CppTypeToScalarType<Operand>::value)));
    if (!std::is_same_v<T, Acc>) {
      state_ = slots({s_.B, s_.C, s_.P});  // S before it is rounded to T
    }
  }

  Tensors8 run(const RefineArguments& a) {
    if (s_.raw && training_) {
      // The gate sees (X_1, X_1) at frame 0: nothing comes of it but its statistics.
      const Array<Acc> u = slots({s_.B, s_.D, s_.P});
      parallel(s_.B, [&](int64_t clip) {
        opening(clip, u(clip));
        clip_statistics(clip, u(clip));
      });
      merge_statistics(0);
    }
    advance(s_.start - 1);
    for (int64_t t = s_.start; t < s_.T; t++) {
      attention(t);
      advance(t);
    }
    const Tensor strips = strips_.tensor().div(s_.elements_per_strip(a, gate_.options)).to(a.x.scalar_type());
    const auto saved = [&](const Array<Acc>& slices) {
      return save_ ? slices.tensor() : slices.tensor().narrow(0, 0, 0).clone();
    };
    return {
        features_.tensor(), strips, mean_.tensor(), var_.tensor(), saved(u_), saved(z_s_), saved(z_c_), saved(h_)};
  }

 private:
  // Scratch, or what is kept; zero where padding would otherwise leave it unwritten.
  Array<Acc> slots(at::IntArrayRef shape) const {
    return Array<Acc>(on_huge_pages(s_.lengths ? at::zeros(shape, gate_.options) : at::empty(shape, gate_.options)));
  }

  // A clip's part of what frame t keeps; the one slice there is where nothing is kept.
  Acc* at(const Array<Acc>& slices, int64_t t, int64_t clip) const {
    return slices(save_ ? t - s_.start : 0, clip);
  }

  // S_t for all clips, and the next frame's U with its statistics.
  void advance(int64_t t) {
    const int64_t next = t + 1;
    const auto has_next = [&](int64_t clip) { return next < s_.T && s_.has_frame(clip, next); };
    if (whole_clips_) {
      parallel(s_.B, [&](int64_t clip) {
        Operand* v = v_(at::get_thread_num());
        for (int64_t q = 0; q < s_.chunks; q++) {
          for (int64_t c0 = 0; c0 < s_.C; c0 += kChannelsPerGemm) {
            const int64_t c1 = std::min(c0 + kChannelsPerGemm, s_.C);
            blend(clip, s_.chunk(q), t, c0, c1, v);
            if (has_next(clip)) {
              add_transition(clip, s_.chunk(q), next, c0, c1, v, 0, s_.D);
            }
          }
        }
        if (training_ && next < s_.T) {
          clip_statistics(clip, at(u_, next, clip));
        }
      });
      return;
    }
    const auto operand = [&](int64_t clip, int64_t q) {
      return v_(clip * s_.chunks + q);
    };
    const int64_t blocks = (s_.C + kChannelTask - 1) / kChannelTask, tiles = (s_.D + kGateTask - 1) / kGateTask;
    parallel(s_.B * blocks, [&](int64_t task) {
      const int64_t clip = task / blocks, c0 = task % blocks * kChannelTask, c1 = std::min(c0 + kChannelTask, s_.C);
      for (int64_t q = 0; q < s_.chunks; q++) {
        blend(clip, s_.chunk(q), t, c0, c1, operand(clip, q) + c0 * s_.chunk(q).ld);
      }
    });
    if (next >= s_.T) {
      return;
    }
    parallel(s_.B * s_.chunks * tiles, [&](int64_t task) {
      const int64_t clip = task / tiles / s_.chunks, q = task / tiles % s_.chunks, d0 = task % tiles * kGateTask;
      for (int64_t c0 = 0; c0 < s_.C && has_next(clip); c0 += kChannelsPerGemm) {
        const int64_t c1 = std::min(c0 + kChannelsPerGemm, s_.C), d1 = std::min(d0 + kGateTask, s_.D);
        add_transition(clip, s_.chunk(q), next, c0, c1, operand(clip, q) + c0 * s_.chunk(q).ld, d0, d1);
      }
    });
    if (training_) {
      parallel(s_.B, [&](int64_t clip) { clip_statistics(clip, at(u_, next, clip)); });
    }
  }

  // Rows d0 to d1 of U_t += W V for channels c0 to c1, whose rows of V begin at v.
  void add_transition(
      int64_t clip, const Chunk& chunk, int64_t t, int64_t c0, int64_t c1, const Operand* v, int64_t d0, int64_t d1) {
    const int64_t num_segments = s_.segments_equal(t) ? 1 : s_.num_segments;
    const Operand* w = s_.segments_equal(t) ? w_sum_() : w_();
    const int64_t k = round_up(s_.C, kI), ldw = num_segments * k;
    Acc* u = at(u_, t, clip) + s_.D * chunk.p0 + d0 * chunk.n;
    for (int64_t half = 0; half < num_segments; half++) {
      gemm<Operand>(
          d1 - d0, chunk.n, round_up(c1 - c0, kI), w + d0 * ldw + half * k + c0, ldw,
          v + half * depth_ * chunk.ld, chunk.ld, u, chunk.n, c0 > 0 || half > 0);
    }
  }

  // What the maps of a clip's chunk are gathered into where they have to be.
  struct Reading {
    GatherBuffer<Acc> x, next, past;
  };

  // S_t for channels c0 to c1, and their rows of frame t + 1's operand from v on.
  void blend(int64_t clip, const Chunk& chunk, int64_t t, int64_t c0, int64_t c1, Operand* v) {
    alignas(64) Acc first[kI * kRow], second[kI * kRow];
    Reading reading;
    for (int64_t c = c0; c < c1; c += kI) {
      for (int64_t i = 0; i < kI; i++) {
        if (c + i < c1) {
          blend_row(clip, chunk, t, c + i, reading, first + i * kRow, second + i * kRow);
        } else {
          std::fill(first + i * kRow, first + (i + 1) * kRow, Acc(0));
          std::fill(second + i * kRow, second + (i + 1) * kRow, Acc(0));
        }
      }
      if (t + 1 < s_.T && s_.has_frame(clip, t + 1)) {
        pack_rows(first, v, c - c0, chunk.ld, chunk.n);
        if (s_.num_segments == 2 && !s_.segments_equal(t + 1)) {
          pack_rows(second, v + depth_ * chunk.ld, c - c0, chunk.ld, chunk.n);
        }
      }
    }
  }

  // One channel's S_t; its rows of V_{t+1} into first and second.
  void blend_row(int64_t clip, const Chunk& chunk, int64_t t, int64_t c, Reading& in, Acc* first, Acc* second) {
    const int64_t p0 = chunk.p0, n = chunk.n, next = t + 1;
    T* out = t < 0 ? nullptr : features_(clip, t, c) + p0;
    if (!s_.has_frame(clip, t)) {
      std::fill(out, out + n, T(0));
      return;
    }
    Row<Acc> s;
    const Acc* x = t < 0 ? state_x_.row(clip, 0, c, p0, n, in.x) : x_.row(clip, t, c, p0, n, in.x);
    if (t < s_.start) {
      const Acc* begin = t < 0 ? state_s_.row(clip, 0, c, p0, n, in.past) : x;
      store(begin, chunk.ld, s.values);
    } else {
      Row<Acc> past_row;
      const Acc* past = past_s(clip, t, c, p0, n, in.past, past_row.values);
      const Acc* z_s = (z_s_ ? at(z_s_, t, clip) : ones_()) + p0;
      const Vec z_c(z_c_ ? at(z_c_, t, clip)[c] : Acc(1));
      for (int64_t i = 0; i < n; i += Vec::size()) {
        const Vec a = Vec::loadu(x + i) - Vec::loadu(past + i);
        const Vec z = sigmoid(z_c * Vec::loadu(z_s + i, std::min<int64_t>(Vec::size(), n - i)));
        at::vec::fmadd(z, a, Vec::loadu(past + i)).store(s.values + i);  // eq. 5
      }
    }
    if (out != nullptr) {
      store(s.values, n, out);
      add_to_strips(s.values, chunk, strips_(clip, c));
    }
    if (!std::is_same_v<T, Acc>) {
      store(s.values, n, state_(clip, c) + p0);
    }
    if (next < s_.T && s_.has_frame(clip, next)) {
      const Acc* x_next = x_.row(clip, next, c, p0, n, in.next);
      for (int64_t i = 0; i < n; i += Vec::size()) {
        const Vec coming = Vec::loadu(x_next + i), refined = Vec::loadu(s.values + i);
        (s_.raw ? coming : coming - refined).store(first + i);
        (s_.raw ? refined : coming - Vec::loadu(x + i)).store(second + i);
      }
    }
  }

  // A row of S_{t-1} in the arithmetic dtype.
  const Acc* past_s(
      int64_t clip, int64_t t, int64_t c, int64_t p0, int64_t n, GatherBuffer<Acc>& lines, Acc* buffer) const {
    if constexpr (std::is_same_v<T, Acc>) {
      if (t == 0) {
        return state_s_.row(clip, 0, c, p0, n, lines);
      }
      return load(features_(clip, t - 1, c) + p0, n, buffer);
    } else {
      return load(state_(clip, c) + p0, n, buffer);
    }
  }

  // Sums a row over its columns into the channel's strips (H,), eq. 9.
  void add_to_strips(const Acc* row, const Chunk& chunk, Acc* strips) const {
    each_map_row(chunk, s_.W, [&](int64_t h, int64_t i, auto count) {
      Acc sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t w = 0; w < count; w++) {
        sum += row[i + w];
      }
      strips[h] += sum;
    });
  }

  // U (D, P) of frame 0 for raw inputs (X_1, X_1): the segments of W add up.
  void opening(int64_t clip, Acc* u) {
    const int64_t k = round_up(s_.C, kI);
    const Array<Operand> v(at::empty({k * kRow}, v_.tensor().options()));
    Row<Acc> rows[kI];
    for (int64_t q = 0; q < s_.chunks; q++) {
      const Chunk chunk = s_.chunk(q);
      GatherBuffer<Acc> lines;
      for (int64_t c = 0; c < s_.C; c += kI) {
        for (int64_t i = 0; i < kI; i++) {
          if (c + i < s_.C) {
            const Acc* x = x_.row(clip, 0, c + i, chunk.p0, chunk.n, lines);
            store(x, chunk.n, rows[i].values);
          } else {
            std::fill(rows[i].values, rows[i].values + kRow, Acc(0));
          }
        }
        pack_rows(rows[0].values, v(), c, chunk.ld, chunk.n);
      }
      gemm<Operand>(
          s_.D, chunk.n, k, w_sum_(), k, v(), chunk.ld, u + s_.D * chunk.p0,
          chunk.n, false);
    }
  }

  // Mean of each gate channel over one clip's positions, and the sum of squares about it.
  void clip_statistics(int64_t clip, const Acc* u) {
    Acc *mean = clip_mean_(clip), *m2 = clip_m2_(clip);
    const auto sum = [&](int64_t d, const auto& of) {
      Acc result = 0;
      for (int64_t q = 0; q < s_.chunks; q++) {
        const Chunk chunk = s_.chunk(q);
        const Acc* row = u + s_.D * chunk.p0 + d * chunk.n;
        Vec partial(0);
        for (int64_t i = 0; i < chunk.n; i += Vec::size()) {
          const int64_t count = std::min<int64_t>(Vec::size(), chunk.n - i);
          partial = partial + Vec::set(Vec(0), of(Vec::loadu(row + i, count)), count);
        }
        result += reduce_add<Acc>(partial);
      }
      return result;
    };
    for (int64_t d = 0; d < s_.D; d++) {
      mean[d] = sum(d, [](const Vec& v) { return v; }) / static_cast<Acc>(s_.P);
      m2[d] = sum(d, [&](const Vec& v) { return (v - Vec(mean[d])) * (v - Vec(mean[d])); });
    }
  }

  // Statistics of frame t for every group, from its clips' in their order; the gate uses them from here on.
  void merge_statistics(int64_t t) {
    const int64_t clips = s_.B / gate_.groups;
    Acc *mean = mean_(t), *var = var_(t);
    for (int64_t i = 0; i < gate_.groups * s_.D; i++) {
      const int64_t first = i / s_.D * clips, d = i % s_.D;
      const Acc *means = clip_mean_(first) + d, *m2s = clip_m2_(first) + d;
      double sum = 0, m2 = 0;
      for (int64_t clip = 0; clip < clips; clip++) {
        sum += means[clip * s_.D];
      }
      const double whole = sum / clips;
      for (int64_t clip = 0; clip < clips; clip++) {
        const double off = means[clip * s_.D] - whole;
        m2 += m2s[clip * s_.D] + s_.P * off * off;
      }
      mean[i] = static_cast<Acc>(whole);
      var[i] = static_cast<Acc>(m2 / (clips * s_.P));
    }
    if (gate_.ranks) {
      merge_ranks(mean, var);
    }
    gate_.use(mean, var);
  }

  // Statistics of all ranks from those of each, in the ranks' order: the same bits on every one.
  void merge_ranks(Acc* mean, Acc* var) {
    const Ranks& ranks = gate_.ranks;
    const Array<Acc> own(at::empty({2, s_.D}, gate_.options));
    std::copy_n(mean, s_.D, own(0));
    std::copy_n(var, s_.D, own(1));
    const Array<const Acc> all(ranks.gather(own.tensor()));
    const int64_t size = static_cast<int64_t>(ranks.counts.size());
    const auto elements = static_cast<double>(ranks.elements());
    for (int64_t d = 0; d < s_.D; d++) {
      double sum = 0, m2 = 0;
      for (int64_t rank = 0; rank < size; rank++) {
        sum += ranks.counts[rank] * static_cast<double>(all(rank, 0)[d]);
      }
      const double whole = sum / elements;
      for (int64_t rank = 0; rank < size; rank++) {
        const double off = all(rank, 0)[d] - whole;
        m2 += ranks.counts[rank] * (all(rank, 1)[d] + off * off);
      }
      mean[d] = static_cast<Acc>(whole);
      var[d] = static_cast<Acc>(m2 / elements);
    }
  }

  // z_s and z_c of frame t from its U, eq. 2 and 3.
  void attention(int64_t t) {
    if (training_) {
      merge_statistics(t);
    }
    parallel(s_.B, [&](int64_t clip) {
      if (!s_.has_frame(clip, t)) {
        return;
      }
      gate_.pool(clip, at(u_, t, clip), y_p_(clip), y_d_(clip));
      if (z_s_) {
        gate_.spatial(y_d_(clip), at(h_, t, clip), at(z_s_, t, clip));
      }
    });
    if (z_c_) {
      parallel_gemm(s_.B, s_.C, s_.D, y_p_(), s_.D, w_c_t_(), at(z_c_, t, 0));
    }
  }

  const Sizes s_;
  Gate<Acc> gate_;
  const bool training_, save_;
  const StridedMaps<T> x_, state_x_, state_s_;
  const Array<const Operand> w_;
  const bool whole_clips_;  // whether a task is a clip, or clips are too few for the threads
  const int64_t depth_;     // rows of V that lie between its segments
  Array<const Operand> w_sum_;
  Array<const Acc> w_c_t_, ones_;
  Array<T> features_;
  Array<Acc> strips_, mean_, var_, u_, z_s_, z_c_, h_, y_p_, y_d_, clip_mean_, clip_m2_, state_;
  Array<Operand> v_;
};

}  // namespace

bool multiplies_bfloat16() {
  if (!at::globalContext().userEnabledMkldnn()) {  // can change from call to call
    return false;
  }
  static const bool supported = processor_multiplies_bfloat16() && onednn_multiplies_bfloat16();
  return supported;
}

Tensors8 refine(const RefineArguments& arguments, bool save) {
  return dispatch(arguments.x, [&](auto stored, auto multiplied) {
    return Forward<decltype(stored), decltype(multiplied)>(arguments, save).run(arguments);
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
