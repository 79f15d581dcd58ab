// Backward of rru_fast::refine, from the last frame to the first, in two sweeps per frame.
//
// The sweep over the maps has one block of channels per task: it finishes frame t + 1, whose dU is known by then
// (E = W^T dU, dX, the carry, the gradient of W), and starts frame t (G, dL and its sums dz_s and dz_c). The sweep over
// the gate has one clip per task: from dz_s and dz_c to dU.

#include "refine_gate_backward.h"
#include "refine_maps_backward.h"

namespace rru {
namespace CPU_CAPABILITY {

namespace {

// Below kManyChannels, blocks have only kFewChannels, so that there are tasks for all threads.
constexpr int64_t kManyChannels = 512, kFewChannels = 16;

template <typename T, typename Operand>
class Backward {
  using Acc = at::opmath_type<T>;
  using Maps = MapsBackward<T, Operand>;
  using Transition = TransitionBackward<Operand>;

 public:
  Backward(const RefineUpstream& upstream, const RefineSaved& saved, const RefineArguments& a, RefineNeed need)
      : sizes_(a),
        need_(need),
        block_(sizes_.C >= kManyChannels ? Transition::kMaxChannels : kFewChannels),
        blocks_((sizes_.C + block_ - 1) / block_),
        gate_(a, saved, sizes_, blocks_),
        transition_(a, need, sizes_, gate_.packed_du),
        maps_(upstream, saved, a, need, sizes_, transition_) {}

  RefineGradients run(const RefineArguments& a) {
    for (int64_t t = sizes_.T - 1; t >= sizes_.first_step - 1; t--) {
      parallel(blocks_, [&](int64_t block) { sweep_maps(block, t); });
      if (t >= sizes_.first_step) {
        gate_.step(t);
      }
    }
    RefineGradients d{.x = maps_.d_x.tensor()};
    if (need_.weights) {
      d.w = transition_.d_w(a.w);
      d.gamma = gate_.norm.d_gamma.tensor().to(a.gamma.scalar_type());
      d.beta = gate_.norm.d_beta.tensor().to(a.beta.scalar_type());
      if (a.w_s1) {
        d.w_s1 = gate_.attention.d_w_s1(*a.w_s1);
        d.w_s2 = gate_.attention.d_w_s2(*a.w_s2);
      }
      if (a.w_c) {
        d.w_c = gate_.attention.d_w_c(*a.w_c);
      }
    }
    d.state_x = maps_.d_state_x.tensor();
    d.state_s = maps_.d_state_s.tensor();
    return d;
  }

 private:
  // Finishes frame t + 1 and starts frame t for one block of channels of all clips.
  void sweep_maps(int64_t block, int64_t t) const {
    const int64_t c0 = block * block_, c1 = std::min(c0 + block_, sizes_.C), next = t + 1;
    const bool next_has_gate = next < sizes_.T && next >= sizes_.first_step;
    Acc* d_z_s = gate_.attention.d_z_s_partial(block);
    std::fill(d_z_s, d_z_s + sizes_.B * sizes_.P, Acc(0));
    auto& tile = transition_.tile();
    tile.begin = tile.rows = 0;
    for (int64_t clip = 0; clip < sizes_.B; clip++) {
      const bool finishes = next_has_gate && sizes_.has_frame(clip, next);
      for (int64_t q = 0; q < sizes_.num_chunks; q++) {
        const Chunk chunk = sizes_.chunk(q);
        if (finishes) {
          transition_.input_gradient(clip, q, next, c0, c1, tile);
          transition_.begin_chunk(clip, chunk, next, c0, c1, tile);
        }
        typename Maps::Buffers started, finished;
        for (int64_t c = c0; c < c1; c++) {
          Row<Acc> g;
          if (finishes) {
            maps_.finish_row(clip, chunk, next, c, c - c0, finished, tile, g.values);
          } else {
            std::fill(g.values, g.values + chunk.ld, Acc(0));
            if (next_has_gate) {
              maps_.clear_row(clip, chunk, next, c);
            }
          }
          if (t >= 0) {
            maps_.start_row(
                clip, chunk, t, c, started, g.values, d_z_s + clip * sizes_.P + chunk.p0,
                gate_.attention.d_z_c(clip)[c]);
          } else {
            maps_.finish_state_s(clip, chunk, c, g.values);
          }
        }
        if (finishes) {
          tile.rows += round_up(chunk.n, kVnni<Operand>);
        }
        if (t < 0 && sizes_.motion && finishes) {
          maps_.finish_state_x(clip, q, c0, c1, tile);
        }
      }
    }
    transition_.add_weight_gradient(next, c0, c1, tile);
  }

  const Sizes sizes_;
  const RefineNeed need_;
  const int64_t block_, blocks_;  // channels per block, blocks
  const GateBackward<Operand> gate_;
  const Transition transition_;
  const Maps maps_;
};

}  // namespace

RefineGradients refine_backward(
    const RefineUpstream& upstream, const RefineSaved& saved, const RefineArguments& arguments, RefineNeed need) {
  return dispatch(arguments.x, [&](auto stored, auto operand) {
    return with_threads_for(Sizes(arguments).multiplications(), [&] {
      return Backward<decltype(stored), decltype(operand)>(upstream, saved, arguments, need).run(arguments);
    });
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
