// refine in training mode, eq. 1-5 and 9, all frames in one launch: a clip per cluster, all clips at once.
//
// As refine_eval.cu, with up to four times the channels a CTA, so that all clips fit on the chip: S in registers, but W
// and w_c stream from L2. U's batch statistics are merged by the CTAs of one rank of all clips, which own the same
// rows.

#include "refine_forward_gate.h"
#include "refine_forward_maps.h"
#include "refine_training_launch.h"
#include "refine_transition.h"

namespace rru::RRU_PLATFORM {

namespace {

template <class C>
DEVICE void run(const ForwardCall& call) {
  const ForwardClip<C> clip(call, call.plan.first_clip);
  if (clip.t == 0) {
    inbox_init(2);
  }
  StreamedTransition<ForwardClip<C>> transition(clip);
  ForwardGate<C> gate(clip);
  ForwardMaps<C> maps(clip, gate);
  cluster_arrive("inboxes are initialized");
  cluster_wait("inboxes are initialized");
  for (int t = 1;; t++) {
    maps.advance(t);
    if (t == call.a.frames) {
      break;
    }
    sync("the A tile is written");
    transition.multiply();
    maps.prefetch(t + 1);
    gate.receive(t, (t - 1) & 1);
    gate.attend(t);
  }
  maps.finish();
}

template <Operands OPERANDS, int WARPS, int TILES, int MULTIPLE>
RRU_GLOBAL(32 * WARPS) refine_forward_kernel(const RRU_PARAMETER ForwardCall call) {
#ifdef RRU_HAS_CLUSTERS
  run<Cut<OPERANDS, WARPS, TILES, MULTIPLE>>(call);
#endif
}

struct Kernels {
  template <Operands OPERANDS, int WARPS, int TILES, int MULTIPLE>
  static auto kernel() {
    return &refine_forward_kernel<OPERANDS, WARPS, TILES, MULTIPLE>;
  }
  template <class C>
  static size_t shared() {
    return ForwardMemory<C>::kBytes;
  }
};

}  // namespace

std::string refine_forward_lacks(const RefineForward& a, int device, int multiple, ClusterLaunch* launch) {
  return find_launches<Pass::forward, Kernels>(a, device, multiple, launch);
}

void refine_forward(const RefineForward& a, const ClusterLaunch& planned, int device, void* stream) {
  launch_all<Pass::forward, Kernels>(a, planned, device, stream);
}

}  // namespace rru::RRU_PLATFORM
