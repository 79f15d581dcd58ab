// The primitives of device.h on a CPU, to test kernels without a GPU: every CUDA thread is a fiber of one CPU thread.
//
// Fibers switch only where they wait, so that a run is deterministic and its schedule can be as hostile as a test
// wants: a warp or a whole CTA is held behind a chosen wait until nothing else can run. A deadlock is an error, not a
// hang. Shared memory begins as NaN. ThreadSanitizer takes each fiber for a thread; only what orders memory on a GPU
// orders it here, barriers and inboxes, and neither a switch nor a shuffle does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "emulated_numbers.h"

#define DEVICE inline
#define RRU_PARAMETER
#define RRU_HAS_CLUSTERS
#define UNROLL
#define UNROLL_BY_4
#define UNROLL_BY_8
#define NO_UNROLL
#define RRU_GLOBAL(threads) void
#define RRU_MUTANT(name) (::rru::emulated::dev::adversary().mutant == name)

namespace rru::emulated::dev {

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};

// What a test does to the launches that follow. A site is the label of a synchronization in a kernel's source.
struct Adversary {
  std::string omit;         // the site of a synchronization that is left out
  std::string replace;      // the site of an inbox_wait that becomes a barrier of the CTA
  std::string shorten;      // the site of an inbox_arm that expects 4 bytes less from each CTA
  std::string relax;        // the site of a flag_set that orders no memory
  std::string mutant;       // a defect that the kernel's source names with RRU_MUTANT
  std::string hold;         // the site behind which fibers are held
  int cta = -1, warp = -1;  // of the held fibers; a warp of -1 is the whole CTA
  int pass = -1;            // how often they have passed the site before
  bool late = false;        // pushes arrive when their inbox is waited for, the last first
  bool last_first = false;  // of the fibers that can run, the last runs first
  bool notes = true;        // sites that are passed are noted
  uint32_t noise = 0;       // seed of the error of approximate functions, as CUDA documents it; 0: they are exact
};

// A site that a kernel has passed.
struct Site {
  const char* name = nullptr;
  const char* kind = nullptr;  // "begin", "sync", "cluster", "inbox", "arm", "set" or "flag"
  int passes = 0;              // of one thread, at most
};

Adversary& adversary();
std::vector<Site> sites();  // that launches have passed since forget_sites
void forget_sites();

int thread();
int cta();
int rank();
int cluster_size();
unsigned char* smem();

void sync(const char* site);
void cluster_arrive(const char* site);
void cluster_wait(const char* site);
void inbox_init(int count);
void inbox_arm(int box, int bytes, const char* site);
void inbox_wait(int box, int parity, const char* site);
void flag_set(uint32_t* flag, uint32_t value, const char* site);
void flag_wait(const uint32_t* flag, uint32_t value, const char* site);
float shfl_xor(float value, int mask);
void mma_bf16(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1);
void mma_f16(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1);
void mma_tf32(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1);
float exp_(float v);
float div_(float a, float b);

namespace detail {

// Where a push goes; null if the adversary delays it.
float* push_target(int rank, int offset, const float* value, int count, int box);
void push_done(int rank, int count, int box);
// The address that each lane of the warp gives.
void exchange_addresses(const void* mine, const void* (&all)[32]);
// Raises what goes wrong.
void run(int ctas, int cluster, int threads, size_t bytes, const std::function<void()>& kernel, bool together);
// Fail unless an access is aligned, within shared memory, and no const load is of memory that the launch writes.
void check_shared(int offset, size_t bytes);
void check_load(const void* p, size_t bytes, bool is_const);
void check_store(const void* p, size_t bytes);

}  // namespace detail

inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}

struct Peer {
  int rank;
};
inline Peer peer(int rank) {
  return {rank};
}
template <int COUNT>
inline void push(Peer peer, int offset, const float (&values)[COUNT], int box) {
  if (float* to = detail::push_target(peer.rank, offset, values, COUNT, box)) {
    for (int i = 0; i < COUNT; i++) {
      to[i] = values[i];
    }
    detail::push_done(peer.rank, COUNT, box);
  }
}
inline void push(Peer peer, int offset, float value, int box) {
  const float values[] = {value};
  push(peer, offset, values, box);
}
inline void push(Peer peer, int offset, float2 value, int box) {
  const float values[] = {value.x, value.y};
  push(peer, offset, values, box);
}
// Data that has been read becomes NaN, so that it is not taken for the next step's.
inline void inbox_retire(float* p, int count) {
  for (int i = 0; i < count; i++) {
    p[i] = std::numeric_limits<float>::quiet_NaN();
  }
}

inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  const void* rows[32];
  detail::exchange_addresses(row, rows);
  const int lane = thread() % 32;
  for (int i = 0; i < 4; i++) {
    const auto* first = static_cast<const uint16_t*>(rows[8 * i + 2 * (lane % 4)]);
    const auto* second = static_cast<const uint16_t*>(rows[8 * i + 2 * (lane % 4) + 1]);
    r[i] = first[lane / 4] | static_cast<uint32_t>(second[lane / 4]) << 16;
  }
}

template <class T>
inline T* shared_at(int offset) {
  detail::check_shared(offset, sizeof(T));
  return reinterpret_cast<T*>(smem() + offset);
}

template <class T>
inline T load_const(const T* p) {
  detail::check_load(p, sizeof(T), true);
  return *p;
}
template <class T>
inline T load_stream(const T* p) {
  detail::check_load(p, sizeof(T), false);
  return *p;
}
template <class T>
inline void store_stream(T* p, T v) {
  detail::check_store(p, sizeof(T));
  *p = v;
}
template <class T>
inline T load(const T* p) {
  detail::check_load(p, sizeof(T), false);
  return *p;
}
template <class T>
inline void store(T* p, T v) {
  detail::check_store(p, sizeof(T));
  *p = v;
}

inline void prefetch_l2(const void*) {}
inline void fence_schedule() {}
inline int anew(int v) {
  return v;
}

// Where and how a kernel is launched.
struct Launch {
  int device;     // of the tensors
  void* stream;   // a cudaStream_t
  int ctas;       // a multiple of the cluster's
  int cluster;    // CTAs of a cluster
  int threads;    // of a CTA
  size_t shared;  // bytes of shared memory of a CTA
  bool together = false;  // all CTAs at once: they wait for each other
};

// Bytes of shared memory that a GPU's inboxes take, and that a CTA has left on compute capability 9.0.
constexpr int kInboxBytes = 256;
inline int max_shared(int) {
  return 232448 - kInboxBytes;
}

// Clusters that can be on the chip at once, as an H100 was measured to hold of 132 CTAs.
template <class Arguments>
inline int max_clusters(void (*)(Arguments), const Launch& l, std::string* reason) {
  reason->clear();
  return l.cluster == 16 ? 7 : l.cluster == 8 ? 15 : l.cluster == 4 ? 30 : 132 / l.cluster;
}

// Runs a kernel, one cluster after another or all together. Raises what goes wrong.
template <class Arguments>
inline void launch(void (*kernel)(Arguments), const Launch& l, const Arguments& arguments) {
  detail::run(l.ctas, l.cluster, l.threads, l.shared, [&] { kernel(arguments); }, l.together);
}

}  // namespace rru::emulated::dev
