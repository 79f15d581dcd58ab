// Small kernels, each with one defect that the emulation has to report, and one without.
//
//   emulator KERNEL     prints what the emulation says; "" if it finds nothing

#include "cuda/device.h"

#include <cstdio>
#include <map>
#include <stdexcept>
#include <string>

using namespace rru::emulated::dev;

namespace {

struct Arguments {
  float* out;
};

float& shared(int i) {
  return reinterpret_cast<float*>(smem())[i];
}

void begin() {
  if (thread() == 0) {
    inbox_init(1);
  }
  cluster_arrive("inboxes are initialized");
  cluster_wait("inboxes are initialized");
}

// Each CTA sends a number to the next one, which stores it.
void correct(const Arguments a) {
  begin();
  if (thread() == 0) {
    inbox_arm(0, 4, "a number is expected");
    push(peer((rank() + 1) % cluster_size()), 64, static_cast<float>(rank() + 1), 0);
  }
  inbox_wait(0, 0, "a number has arrived");
  if (thread() == 0) {
    a.out[cta()] = shared(16);
  }
}

void sync_of_some(const Arguments) {
  if (thread() < 32) {
    sync("for some");
  }
}

void deadlock(const Arguments) {
  begin();
  inbox_wait(0, 0, "nothing comes");
}

void too_many_bytes(const Arguments) {
  begin();
  if (thread() == 0) {
    inbox_arm(0, 4, "one number is expected");
    push(peer(rank()), 0, 1.f, 0);
    inbox_arm(0, 4, "one number is expected");
    push(peer(rank()), 0, float2{1.f, 2.f}, 0);
  }
  inbox_wait(0, 0, "a number has arrived");
}

void armed_twice(const Arguments) {
  begin();
  if (thread() == 0) {
    inbox_arm(0, 4, "first");
    inbox_arm(0, 4, "second");
  }
}

void push_to_uninitialized(const Arguments) {
  if (thread() == 0) {
    push(peer(rank()), 0, 1.f, 0);
  }
}

void push_to_returned(const Arguments) {
  begin();
  if (rank() == 0) {
    return;
  }
  sync("wait a little");
  if (thread() == 0) {
    push(peer(0), 0, 1.f, 0);
  }
}

void push_out_of_bounds(const Arguments) {
  begin();
  push(peer(rank()), 1024, 1.f, 0);
}

void push_misaligned(const Arguments) {
  begin();
  push(peer(rank()), 4, float2{1.f, 2.f}, 0);
}

void push_to_no_rank(const Arguments) {
  begin();
  push(peer(cluster_size()), 0, 1.f, 0);
}

void lanes_diverge(const Arguments) {
  if (thread() % 2 == 0) {
    shfl_xor(1.f, 1);
  } else {
    float d[4] = {};
    mma_tf32(d, uint4{}, 0, 0);
  }
}

void some_lanes(const Arguments) {
  if (thread() % 2 == 0) {
    shfl_xor(1.f, 2);
  }
}

void ldmatrix_misaligned(const Arguments) {
  uint32_t r[4];
  ldmatrix_x4_trans(r, smem() + 8);
}

void wait_without_arrive(const Arguments) {
  cluster_wait("inboxes are initialized");
}

void poisoned(const Arguments a) {
  if (thread() == 0) {
    a.out[cta()] = shared(0);
  }
}

void const_load_of_written(const Arguments a) {
  if (thread() == 0) {
    store(a.out, load_const(a.out) + 1.f);
  }
}

void const_load_after_a_store(const Arguments a) {
  if (thread() == 0) {
    store_stream(a.out, 1.f);
    store(a.out + 1, load_const(a.out));
  }
}

void misaligned_load(const Arguments a) {
  load_stream(reinterpret_cast<const float2*>(a.out + 1));
}

void misaligned_shared(const Arguments) {
  *shared_at<float4>(8) = float4{};
}

void shared_out_of_bounds(const Arguments) {
  *shared_at<float>(1024) = 0.f;
}

// Right by the order in which fibers run; a race for ThreadSanitizer.
void race(const Arguments a) {
  if (thread() == 0) {
    shared(0) = 3.f;
  }
  shfl_xor(1.f, 1);  // does not order memory
  if (thread() == 63) {
    a.out[cta()] = shared(0);
  }
}

void no_race(const Arguments a) {
  if (thread() == 0) {
    shared(0) = 3.f;
  }
  sync("a number is written");
  if (thread() == 63) {
    a.out[cta()] = shared(0);
  }
}

}  // namespace

int main(int argc, char** argv) {
  const std::map<std::string, void (*)(Arguments)> kernels{
      {"correct", correct},
      {"sync_of_some", sync_of_some},
      {"deadlock", deadlock},
      {"too_many_bytes", too_many_bytes},
      {"armed_twice", armed_twice},
      {"push_to_uninitialized", push_to_uninitialized},
      {"push_to_returned", push_to_returned},
      {"push_out_of_bounds", push_out_of_bounds},
      {"push_misaligned", push_misaligned},
      {"push_to_no_rank", push_to_no_rank},
      {"lanes_diverge", lanes_diverge},
      {"some_lanes", some_lanes},
      {"ldmatrix_misaligned", ldmatrix_misaligned},
      {"wait_without_arrive", wait_without_arrive},
      {"const_load_of_written", const_load_of_written},
      {"const_load_after_a_store", const_load_after_a_store},
      {"misaligned_load", misaligned_load},
      {"misaligned_shared", misaligned_shared},
      {"shared_out_of_bounds", shared_out_of_bounds},
      {"poisoned", poisoned},
      {"race", race},
      {"no_race", no_race}};
  if (argc < 2 || kernels.count(argv[1]) == 0) {
    return 3;
  }
  if (argc > 2) {
    adversary().hold = argv[2];
    adversary().cta = 0;
    adversary().pass = 0;
  }
  alignas(16) float out[4] = {-1.f, -1.f};
  std::string error;
  try {
    launch(kernels.at(argv[1]), Launch{0, nullptr, 2, 2, 64, 1024}, Arguments{out});
  } catch (const std::runtime_error& raised) {
    error = raised.what();
  }
  std::printf("%s|%g %g\n", error.c_str(), out[0], out[1]);
  return error.empty() ? 0 : 2;
}
