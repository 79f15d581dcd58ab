// How the kernels of a training pass are launched: all clips that share batch statistics on the chip at once.
#pragma once

#include <stdexcept>

#include "refine_launch.h"
#include "refine_training_clip.h"

namespace rru::RRU_PLATFORM {

// Launches of a pass, a group of clips each, where no cut has all clips on the chip at once.
constexpr int kMaxLaunches = 4;

// Rows of strips that 8 positions from a multiple of 8 touch, at most.
inline int strip_rows_of(int width) {
  return width % 8 == 0 ? 1 : 8 % width == 0 ? 8 / width : 7 / width + 2;
}

// Sets how a kernel is launched if it can be in so many launches; returns the reason if not, or "".
template <class C, class KERNEL, class ARGUMENTS>
std::string plan_launches(
    KERNEL kernel, const ARGUMENTS& a, int device, size_t shared, int launches, ClusterLaunch* launch) {
  const int n = ctas_of(a.channels, C::kChannels), clips = a.clips / launches;
  if (shared > static_cast<size_t>(max_shared(device))) {
    return over("shared memory", static_cast<int>(shared), max_shared(device));
  }
  std::string reason;
  const int at_once = max_clusters(kernel, Launch{device, nullptr, n, n, C::kThreads, shared, true}, &reason);
  if (at_once == 0) {
    return reason;
  }
  if (clips > at_once) {
    return "B of " + std::to_string(a.clips) + ", at most " + std::to_string(at_once) + " clusters of " +
        std::to_string(n) + " CTAs at once on this GPU";
  }
  *launch = {n, C::kThreads, shared + kInboxBytes, C::kMultiple, launches, 0, 0};
  const int64_t all_clips = a.clips, padded_channels = n * C::kChannels;
  launch->sums = (a.frames - 1) * all_clips * C::kD * 2;
  launch->strips = all_clips * padded_channels * C::kTiles * strip_rows_of(a.width);
  return "";
}

// Finds the smallest multiple of channels a CTA with which a pass can be launched, at once if one allows that; or, other
// than 0, the one that is wanted.
// KERNELS::kernel<O, WARPS, TILES, MULTIPLE>() returns its kernel, KERNELS::shared<C>() its bytes of shared memory.
template <Pass PASS, class KERNELS, class ARGUMENTS>
std::string find_launches(const ARGUMENTS& a, int device, int multiple, ClusterLaunch* launch) {
  const bool is_tf32x3 = a.dtype == Dtype::float32 && a.float32 == Float32::tf32x3;
  std::string reason = is_tf32x3 ? "three TF32 products in training" : too_large(a);
  if (!reason.empty()) {
    return reason;
  }
  const int counts[] = {1, a.groups}, multiples[] = {1, 2, 4};
  for (const int launches : counts) {
    for (const int m : multiples) {
      const int warps = warps_of(a, m);
      if (warps == 0 || (multiple != 0 && m != multiple) || launches > kMaxLaunches) {
        continue;
      }
      reason = with_cut<PASS>(
          operands_of(a.dtype, a.float32, PASS), {warps, m}, a.positions,
          [&]<Operands O, int WARPS, int TILES, int MULTIPLE>() {
            using C = Cut<O, WARPS, TILES, MULTIPLE>;
            const auto kernel = KERNELS::template kernel<O, WARPS, TILES, MULTIPLE>();
            return plan_launches<C>(kernel, a, device, KERNELS::template shared<C>(), launches, launch);
          });
      if (reason.empty()) {
        return "";
      }
    }
  }
  return reason.empty() ? "a multiple that is not there" : reason;
}

// Launches a pass as planned.
template <Pass PASS, class KERNELS, class ARGUMENTS>
void launch_all(const ARGUMENTS& a, const ClusterLaunch& planned, int device, void* stream) {
  with_cut<PASS>(
      operands_of(a.dtype, a.float32, PASS), {planned.threads / 32, planned.multiple}, a.positions,
      [&]<Operands O, int WARPS, int TILES, int MULTIPLE>() {
        using C = Cut<O, WARPS, TILES, MULTIPLE>;
        TrainingCall<ARGUMENTS> call{a, {}};
        set_plan<C>(call.plan, a);
        call.plan.height = a.positions / a.width;
        call.plan.row = (a.positions + 7) / 8 * 8;
        call.plan.clips_per_group = a.clips / a.groups;
        call.plan.strip_rows = strip_rows_of(a.width);
        const int clips = a.clips / planned.launches, shared = static_cast<int>(planned.shared) - kInboxBytes;
        for (int i = 0; i < planned.launches; i++) {
          call.plan.first_clip = i * clips;
          const Launch l{device, stream, planned.ctas * clips, planned.ctas, planned.threads,
                         static_cast<size_t>(shared), true};
          launch(KERNELS::template kernel<O, WARPS, TILES, MULTIPLE>(), l, call);
        }
      });
}

}  // namespace rru::RRU_PLATFORM
