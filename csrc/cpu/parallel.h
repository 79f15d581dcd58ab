// A parallel loop over independent tasks.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <cstdint>

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

}  // namespace CPU_CAPABILITY
}  // namespace rru
