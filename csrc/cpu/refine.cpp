// rru_fast::refine, eq. 1-5 and 9: per step one pass over the maps and one matrix product, fused per clip.
//
// The pass over frame t reads X_t, S_{t-1} and X_{t+1}, writes S_t, adds it to the strips and leaves the rows of the
// next frame's gate input in cache, where the transition's product reads them.

#include "refine_batch_norm.h"
#include "refine_blend.h"
#include "refine_transition.h"

namespace rru {
namespace CPU_CAPABILITY {

namespace {

// Channels per product of the transition: their rows of the gate's input stay in the second-level cache.
constexpr int64_t kChannelsPerGemm = 512;
// Where clips are too few for the threads, tasks have this many channels, or this many rows of U.
constexpr int64_t kChannelsPerTask = 64, kGateChannelsPerTask = 32;

template <typename T, typename Operand>
class Forward {
  using Acc = at::opmath_type<T>;

 public:
  Forward(const RefineArguments& a, bool save)
      : sizes_(a),
        training_(a.training),
        gate_(a, sizes_),
        statistics_(a, gate_),
        activations_(a, sizes_, save),
        transition_(a, sizes_),
        blend_(a, sizes_, activations_),
        clip_per_task_(sizes_.B >= 2 * at::get_num_threads()),
        segment_rows_(round_up(clip_per_task_ ? std::min(kChannelsPerGemm, sizes_.C) : sizes_.C, kVnni<Operand>)),
        input_(Array<Operand>::empty(
            {clip_per_task_ ? at::get_num_threads() : sizes_.B * sizes_.num_chunks,
             sizes_.num_segments * segment_rows_ * kMaxRow})),
        y_p_(Array<Acc>::zeros({sizes_.B, sizes_.D})),
        y_d_(Array<Acc>::zeros({sizes_.B, sizes_.P})) {
    if (a.w_c) {
      w_c_t_ = Array<const Acc>(gate_.w_c.tensor().t().contiguous());
    }
  }

  RefineOutputs run(const RefineArguments& a) {
    if (sizes_.raw && training_) {
      add_first_frame_statistics();
    }
    advance(sizes_.first_step - 1);
    for (int64_t t = sizes_.first_step; t < sizes_.T; t++) {
      attention(t);
      advance(t);
    }
    const Tensor positions = sizes_.elements_per_strip(a, Array<Acc>::kDtype);
    const auto& act = activations_;
    return {
        .saved =
            {.features = blend_.features.tensor(),
             .mean = statistics_.mean.tensor(),
             .var = statistics_.var.tensor(),
             .u = act.saved(act.u),
             .z_s = act.saved(act.z_s),
             .z_c = act.saved(act.z_c),
             .h = act.saved(act.h)},
        .strips = blend_.strips.tensor().div(positions).to(a.x.scalar_type())};
  }

 private:
  // With raw inputs the gate sees (X_1, X_1) at frame 0. Only its batch statistics are used.
  void add_first_frame_statistics() {
    const auto u = Array<Acc>::empty({sizes_.B, sizes_.D, sizes_.P});
    parallel(sizes_.B, [&](int64_t clip) {
      const auto input = Array<Operand>::empty({round_up(sizes_.C, kVnni<Operand>) * kMaxRow});
      for (int64_t q = 0; q < sizes_.num_chunks; q++) {
        blend_.pack_first_frame(clip, sizes_.chunk(q), input());
        transition_.multiply_equal_segments(sizes_.chunk(q), input(), u(clip));
      }
      statistics_.add(clip, u(clip));
    });
    statistics_.merge(0);
  }

  // z_s and z_c of frame t, eq. 2 and 3, given its U.
  void attention(int64_t t) {
    if (training_) {
      statistics_.merge(t);
    }
    const auto& act = activations_;
    parallel(sizes_.B, [&](int64_t clip) {
      if (!sizes_.has_frame(clip, t)) {
        return;
      }
      gate_.pool(clip, act.at(act.u, t, clip), y_p_(clip), y_d_(clip));
      if (act.z_s) {
        gate_.spatial_attention(y_d_(clip), act.at(act.h, t, clip), act.at(act.z_s, t, clip));
      }
    });
    if (act.z_c) {
      parallel_gemm(sizes_.B, sizes_.C, sizes_.D, y_p_(), sizes_.D, w_c_t_(), act.at(act.z_c, t, 0));
    }
  }

  // S_t of all clips, and the next frame's U with its clips' statistics.
  void advance(int64_t t) {
    if (clip_per_task_) {
      advance_by_clips(t);
    } else {
      advance_by_channels(t);
    }
  }

  void advance_by_clips(int64_t t) {
    const int64_t next = t + 1;
    parallel(sizes_.B, [&](int64_t clip) {
      Operand* input = input_(at::get_thread_num());
      for (int64_t q = 0; q < sizes_.num_chunks; q++) {
        const Chunk chunk = sizes_.chunk(q);
        for (int64_t c0 = 0; c0 < sizes_.C; c0 += kChannelsPerGemm) {
          const int64_t c1 = std::min(c0 + kChannelsPerGemm, sizes_.C);
          blend_.advance(clip, chunk, t, c0, c1, input, segment_rows_);
          if (sizes_.has_frame(clip, next)) {
            transition_.multiply(chunk, next, c0, c1, 0, sizes_.D, input, segment_rows_, u(next, clip));
          }
        }
      }
      if (training_ && next < sizes_.T) {
        statistics_.add(clip, u(next, clip));
      }
    });
  }

  void advance_by_channels(int64_t t) {
    const int64_t next = t + 1;
    const int64_t blocks = (sizes_.C + kChannelsPerTask - 1) / kChannelsPerTask;
    parallel(sizes_.B * blocks, [&](int64_t task) {
      const int64_t clip = task / blocks, c0 = task % blocks * kChannelsPerTask;
      for (int64_t q = 0; q < sizes_.num_chunks; q++) {
        const Chunk chunk = sizes_.chunk(q);
        Operand* input = input_(clip * sizes_.num_chunks + q) + c0 * chunk.ld;
        blend_.advance(clip, chunk, t, c0, std::min(c0 + kChannelsPerTask, sizes_.C), input, segment_rows_);
      }
    });
    if (next >= sizes_.T) {
      return;
    }
    const int64_t tiles = (sizes_.D + kGateChannelsPerTask - 1) / kGateChannelsPerTask;
    parallel(sizes_.B * sizes_.num_chunks * tiles, [&](int64_t task) {
      const int64_t clip = task / tiles / sizes_.num_chunks, q = task / tiles % sizes_.num_chunks;
      const int64_t d0 = task % tiles * kGateChannelsPerTask, d1 = std::min(d0 + kGateChannelsPerTask, sizes_.D);
      const Chunk chunk = sizes_.chunk(q);
      for (int64_t c0 = 0; c0 < sizes_.C && sizes_.has_frame(clip, next); c0 += kChannelsPerGemm) {
        const Operand* input = input_(clip * sizes_.num_chunks + q) + c0 * chunk.ld;
        const int64_t c1 = std::min(c0 + kChannelsPerGemm, sizes_.C);
        transition_.multiply(chunk, next, c0, c1, d0, d1, input, segment_rows_, u(next, clip));
      }
    });
    if (training_) {
      parallel(sizes_.B, [&](int64_t clip) { statistics_.add(clip, u(next, clip)); });
    }
  }

  Acc* u(int64_t t, int64_t clip) const {
    return activations_.at(activations_.u, t, clip);
  }

  const Sizes sizes_;
  const bool training_;
  const Gate<Acc> gate_;
  const BatchStatistics<Acc> statistics_;
  const GateActivations<Acc> activations_;
  const Transition<Operand> transition_;
  const Blend<T, Operand> blend_;
  const bool clip_per_task_;    // else clips are too few for the threads
  const int64_t segment_rows_;  // rows between the segments of the gate's input
  const Array<Operand> input_;  // the gate's input rows, by thread or by clip and chunk
  const Array<Acc> y_p_, y_d_;  // (B, D), (B, P): means of Y; zero for clips without the frame
  Array<const Acc> w_c_t_;      // (D, C)
};

}  // namespace

RefineOutputs refine(const RefineArguments& arguments, bool save) {
  return dispatch(arguments.x, [&](auto stored, auto operand) {
    return with_threads_for(Sizes(arguments).multiplications(), [&] {
      return Forward<decltype(stored), decltype(operand)>(arguments, save).run(arguments);
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
