// One loop over independent tasks.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>

#include <cstdint>

namespace rru {
namespace CPU_CAPABILITY {

// Calls body(i) for every i of 0 to tasks, on as many threads as there are. Which thread takes which changes nothing.
template <typename F>
inline void parallel(int64_t tasks, const F& body) {
  struct Tiles {
    ~Tiles() {
      at::native::cpublas::brgemm_release();  // the matrix tiles, where the processor has such registers
    }
  };
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const Tiles released;  // also if a task throws
    for (int64_t i = begin; i < end; i++) {
      body(i);
    }
  });
}

}  // namespace CPU_CAPABILITY
}  // namespace rru
