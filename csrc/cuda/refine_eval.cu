// refine in eval mode, eq. 1-5 and 9, all frames in one launch: a clip per cluster, its state on chip.
//
// CTA `rank` of a cluster has kChannels channels: its S in registers, its columns of W in shared memory and registers.
// Per frame it multiplies them with A = X - S into a part of U, all D rows; pushes the rows to the CTAs that own them,
// which add the parts in the order of ranks, normalize and pool; and the pooled sums come back to all. Every CTA then
// computes z_s, and z_c of its own channels, and blends.

#include <stdexcept>

#include "refine_eval_blend.h"
#include "refine_eval_gate.h"
#include "refine_launch.h"
#include "refine_transition.h"

namespace rru::RRU_PLATFORM {

namespace {

template <class C>
DEVICE void run(const EvalCall& call) {
  const RefineEval& a = call.a;
  EvalClip<C> clip(call);
  const int length = a.lengths == nullptr ? a.frames : static_cast<int>(load_const(a.lengths + clip.index));
  const int end = length < a.end ? length : a.end;
  if (clip.t == 0) {
    inbox_init(2);
  }
  ResidentTransition<EvalClip<C>> transition(clip);
  EvalGate<C> gate(clip);
  EvalBlend<C> maps(clip);
  cluster_arrive("inboxes are initialized");
  cluster_wait("inboxes are initialized");
  const int gated = a.first == 0 && !a.has_state ? 1 : a.first;  // the first frame with a gate
  if (gated > a.first && end > 0) {
    maps.store_features(0);
  }
  if (gated < end) {
    maps.load_x(gated);
  }
  for (int t = gated; t < end; t++) {
    maps.take_x();
    maps.write_difference();
    sync("the A tile is written");
    transition.multiply();
    gate.receive(t, (t - gated) & 1, [&] {
      if (t + 1 < end) {
        maps.load_x(t + 1);
      }
    });
    gate.attend(t);
    maps.blend();
    maps.store_features(t);
  }
  maps.finish(end);
}

template <Operands OPERANDS, int WARPS, int TILES>
RRU_GLOBAL(32 * WARPS) refine_eval_kernel(const RRU_PARAMETER EvalCall call) {
#ifdef RRU_HAS_CLUSTERS
  run<Cut<OPERANDS, WARPS, TILES>>(call);
#endif
}

bool is_vector(const Maps& maps, int positions, int at_once, int element) {
  const auto fits = [&](int64_t stride) { return stride * element % 16 == 0; };
  return maps.data == nullptr ||
      (maps.position == 1 && positions == at_once && fits(maps.clip) && fits(maps.frame) && fits(maps.channel) &&
       reinterpret_cast<uintptr_t>(maps.data) % 16 == 0);
}

// Sets the plan of a call and how it is launched.
template <class C>
void make_plan(EvalCall& call, Launch& l) {
  const RefineEval& a = call.a;
  EvalPlan& p = call.plan;
  set_plan<C>(p, a);
  p.vector = is_vector(a.x, a.positions, C::kP, C::kElement) && is_vector(a.state, a.positions, C::kP, C::kElement);
  p.run_rows = (C::kRun - 1) / a.width + 2;
  p.run_column = C::kRun % a.width;
  const int strips = 4 * 2 * p.run_rows * C::kChannels, w_c = 16 * p.layout.w_c_units, n = 1 << p.log2_ctas;
  p.w_c_shared = C::k16Bit && a.channel && EvalMemory<C>::kWc + w_c + strips <= max_shared(l.device);
  p.strips = EvalMemory<C>::kWc + (p.w_c_shared ? w_c : 0);
  l = {l.device, l.stream, n * a.clips, n, C::kThreads, static_cast<size_t>(p.strips + strips)};
}

// Calls `f` with a kernel, its launch and its arguments, if these sizes are carried; returns the reason if not, or "".
template <class F>
std::string with_kernel(const RefineEval& a, int device, void* stream, F f) {
  if (std::string reason = too_large(a); !reason.empty()) {
    return reason;
  }
  const Size size{warps_of(a, 1), 1};
  return with_cut<Pass::eval>(
      operands_of(a.dtype, a.float32, Pass::eval), size, a.positions, [&]<Operands O, int WARPS, int TILES, int>() {
        EvalCall call{a, {}};
        Launch l{device, stream, 0, 0, 0, 0};
        make_plan<Cut<O, WARPS, TILES>>(call, l);
        if (l.shared > static_cast<size_t>(max_shared(device))) {
          return over("shared memory", static_cast<int>(l.shared), max_shared(device));
        }
        std::string reason;
        if (max_clusters(&refine_eval_kernel<O, WARPS, TILES>, l, &reason) > 0) {
          f(&refine_eval_kernel<O, WARPS, TILES>, l, call);
        }
        return reason;
      });
}

}  // namespace

std::string refine_eval_lacks(const RefineEval& arguments, int device, ClusterLaunch* launch) {
  return with_kernel(arguments, device, nullptr, [&](auto, const Launch& l, const EvalCall&) {
    *launch = {l.cluster, l.threads, l.shared + kInboxBytes, 1, 1, 0, 0};
  });
}

void refine_eval(const RefineEval& arguments, int device, void* stream) {
  const std::string lacks = with_kernel(
      arguments, device, stream, [](auto kernel, const Launch& l, const EvalCall& call) { launch(kernel, l, call); });
  if (!lacks.empty()) {
    throw std::runtime_error(lacks);
  }
}

}  // namespace rru::RRU_PLATFORM
