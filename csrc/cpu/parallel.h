// A parallel loop over independent tasks.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/ParallelGuard.h>

#include <cstdint>
#include <optional>

namespace rru {
namespace CPU_CAPABILITY {

// Calls body(i) for i in [0, tasks) on all threads. Results must not depend on which thread takes which task.
template <typename F>
inline void parallel(int64_t tasks, const F& body) {
  struct ReleaseTiles {
    ~ReleaseTiles() {
      at::native::cpublas::brgemm_release();  // the tile registers, on processors with AMX
    }
  };
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const ReleaseTiles at_exit;  // runs even if a task throws
    for (int64_t i = begin; i < end; i++) {
      body(i);
    }
  });
}

// Calls body() and returns its result, its parallel loops all in this thread if waking others would take longer.
template <typename F>
inline auto with_threads_for(int64_t multiplications, const F& body) {
  constexpr int64_t kGrain = 1 << 19;
  std::optional<c10::ParallelGuard> alone;
  if (multiplications < kGrain) {
    alone.emplace(true);  // as within a parallel loop
  }
  return body();
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
