// A parallel loop over independent tasks.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <c10/util/ParallelGuard.h>

#include <cstdint>
#include <optional>

namespace rru {
namespace CPU_CAPABILITY {

// Calls body(i) for i in [0, tasks) on all threads, within with_threads_for perhaps on this one alone. Results must not
// depend on which thread takes which task.
template <typename F>
inline void parallel(int64_t tasks, const F& body) {
  struct ReleaseTiles {
    ~ReleaseTiles() {
      at::native::cpublas::brgemm_release();  // the tile registers, on processors with AMX
    }
  };
  const int64_t grain = c10::ParallelGuard::is_enabled() ? tasks : 1;
  at::parallel_for(0, tasks, grain, [&](int64_t begin, int64_t end) {
    const ReleaseTiles at_exit;  // runs even if a task throws
    for (int64_t i = begin; i < end; i++) {
      body(i);
    }
  });
}

// Calls body() and returns its result; loops by `parallel` stay in this thread if waking others would take longer than
// so many multiplications, or additions of as many elements.
template <typename F>
inline auto with_threads_for(int64_t work, const F& body) {
  constexpr int64_t kGrain = 1 << 19;
  std::optional<c10::ParallelGuard> alone;
  if (work < kGrain) {
    alone.emplace(true);  // as within a parallel loop
  }
  return body();
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
