// The backward of refine in training mode, from the last frame to the first in one launch: a clip per cluster, all
// clips at once. What follows from dU of all frames, the gradient of W and what reaches X through the motion, is left
// to products after it.
//
// CTA `rank` of a cluster has the channels that it has in refine_forward.cu. Per frame it sends its part of dz_s and of
// W_c^T dz_c to all; each makes dU of the rows that it owns, and sends them to all; each multiplies its columns of W_a
// with all rows. The carry stays in the registers of that product's sums.

#include "refine_backward_gate.h"
#include "refine_backward_maps.h"
#include "refine_training_launch.h"

namespace rru::RRU_PLATFORM {

namespace {

template <class C>
DEVICE void run(const BackwardCall& call) {
  const BackwardClip<C> clip(call, call.plan.first_clip);
  if (clip.t == 0) {
    inbox_init(2);
  }
  BackwardGate<C> gate(clip);
  BackwardMaps<C> maps(clip);
  cluster_arrive("inboxes are initialized");
  cluster_wait("inboxes are initialized");
  for (int t = call.a.frames - 1; t > 0; t--) {
    const int parity = (call.a.frames - 1 - t) & 1;
    gate.read_z_s(t);
    sync("z_s is read");
    maps.begin(t);
    sync("dU is multiplied, and gradients of logits are written");
    gate.drop();
    gate.exchange(t, parity);
    gate.attend(t);
    gate.send(t, parity);
    maps.multiply();
    maps.end(t);
  }
  maps.finish();
}

template <Operands OPERANDS, int WARPS, int TILES, int MULTIPLE>
RRU_GLOBAL(32 * WARPS) refine_backward_kernel(const RRU_PARAMETER BackwardCall call) {
#ifdef RRU_HAS_CLUSTERS
  run<Cut<OPERANDS, WARPS, TILES, MULTIPLE>>(call);
#endif
}

struct Kernels {
  template <Operands OPERANDS, int WARPS, int TILES, int MULTIPLE>
  static auto kernel() {
    return &refine_backward_kernel<OPERANDS, WARPS, TILES, MULTIPLE>;
  }
  template <class C>
  static size_t shared() {
    return BackwardMemory<C>::kBytes;
  }
};

}  // namespace

std::string refine_backward_lacks(const RefineBackward& a, int device, int multiple, ClusterLaunch* launch) {
  return find_launches<Pass::backward, Kernels>(a, device, multiple, launch);
}

void refine_backward(const RefineBackward& a, const ClusterLaunch& planned, int device, void* stream) {
  launch_all<Pass::backward, Kernels>(a, planned, device, stream);
}

}  // namespace rru::RRU_PLATFORM
