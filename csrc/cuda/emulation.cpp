// What is behind emulation.h. Compiled without ThreadSanitizer, so that nothing orders memory for it but what it is
// notified of (RRU_THREAD_SANITIZER); then fibers must not allocate or free memory.

#include "emulation.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <unordered_set>

#include "fibers.h"

namespace rru::emulated::dev {

namespace {

constexpr int kBoxes = 4, kSlotWords = 8;

struct Warp {
  Barrier barrier;
  uint64_t slots[2][32][kSlotWords];
  const char* operation[2] = {};
};

struct Push {
  float* to;
  float value[2];
  int count;
};

// An mbarrier of one arrival per phase.
struct Box {
  bool initialized = false;
  int64_t bytes = 0;  // expected and not received yet; negative while pushes are ahead of inbox_arm
  bool armed = false;
  int64_t phase = 0;
  char order = 0;
  std::vector<Push> late;
  Waiters waiters;
};

struct Cluster {
  Barrier barrier;
  std::vector<Cta*> ctas;
};

struct Cta {
  int index = 0, rank = 0, threads = 0, finished = 0;
  Cluster* cluster = nullptr;
  unsigned char* memory = nullptr;
  size_t bytes = 0;
  Barrier barrier;
  std::vector<Warp> warps;
  Box boxes[kBoxes];
};

Site the_sites[kMaxSites];

int site_index(const char* name, const char* kind) {
  for (int i = 0; i < kMaxSites; i++) {
    if (the_sites[i].name == nullptr) {
      the_sites[i] = {name, kind, 0};
    }
    if (std::strcmp(the_sites[i].name, name) == 0) {
      return i;
    }
  }
  fail("a kernel has more sites than the emulation has room for");
}

// Notes that the current fiber passes a site, and holds it if the adversary says so.
void pass(const char* name, const char* kind) {
  Fiber& fiber = self();
  const Adversary& a = the_adversary;
  const int index = site_index(name, kind), passes = fiber.passes[index]++;
  the_sites[index].passes = std::max(the_sites[index].passes, a.notes ? passes + 1 : 0);
  if (a.cta == fiber.cta->index && a.pass == passes && (a.warp < 0 || a.warp == fiber.thread / 32) && a.hold == name) {
    fiber.waits_at = name;
    scheduler.held.push_back(&fiber);
    yield();
    fiber.waits_at = nullptr;
  }
}

// Publishes this lane's words to its warp; returns all lanes' words once they have published theirs.
const uint64_t (*exchange(const char* operation, const uint64_t* words, int count))[kSlotWords] {
  Fiber& fiber = self();
  Warp& warp = fiber.cta->warps[fiber.thread / 32];
  const int turn = static_cast<int>(warp.barrier.generation & 1);
  if (warp.barrier.arrived == 0) {
    warp.operation[turn] = operation;
  } else if (std::strcmp(warp.operation[turn], operation) != 0) {
    fail(std::string("lanes of a warp run ") + operation + " and " + warp.operation[turn] + " at once");
  }
  std::copy_n(words, count, warp.slots[turn][fiber.thread % 32]);
  await(warp.barrier, arrive(warp.barrier, 32), operation);
  return warp.slots[turn];
}

// A value with an error of up to `most` ulp.
float approximated(float value, int most) {
  uint32_t& noise = the_adversary.noise;
  if (noise == 0 || !std::isfinite(value)) {
    return value;
  }
  noise = noise * 1664525u + 1013904223u;
  const int ulp = static_cast<int>(noise >> 16) % (2 * most + 1) - most;
  return value * (1 + static_cast<float>(ulp) * std::numeric_limits<float>::epsilon());
}

// Words of global memory that the launch reads by load_const, and that it writes. Not under ThreadSanitizer, for which
// fibers must not allocate.
std::unordered_set<uintptr_t> read_only, written;

// Adds the words of an access to a set; returns true if one of them is in the other.
bool note(
    [[maybe_unused]] const void* p, [[maybe_unused]] size_t bytes, [[maybe_unused]] std::unordered_set<uintptr_t>& to,
    [[maybe_unused]] const std::unordered_set<uintptr_t>& other) {
#if !defined(RRU_THREAD_SANITIZER)
  const auto address = reinterpret_cast<uintptr_t>(p);
  for (uintptr_t word = address / 4; word <= (address + bytes - 1) / 4; word++) {
    to.insert(word);
    if (other.count(word) > 0) {
      return true;
    }
  }
#endif
  return false;
}

void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    fail("an address is not a multiple of the " + std::to_string(bytes) + " bytes that are accessed at once");
  }
}

void receive(Box& box, int count) {
  box.bytes -= static_cast<int64_t>(sizeof(float)) * count;
  if (box.armed && box.bytes < 0) {
    fail("an inbox has received more bytes than it expects");
  }
}

void complete(Box& box) {
  if (box.armed && box.bytes == 0) {
    box.armed = false;
    ++box.phase;
    wake(box.waiters);
  }
}

void deliver_late(Box& box) {
  for (; !box.late.empty(); box.late.pop_back()) {
    const Push& push = box.late.back();
    std::copy_n(push.value, push.count, push.to);
    receive(box, push.count);
  }
}

void run_fiber() {
  enter_fiber();
  acquire(&scheduler.begin);
  pass("begin", "begin");
  (*scheduler.kernel)();
  release(&scheduler.end);
  ++self().cta->finished;
  self().done = true;
  for (;;) {
    yield();
  }
}

// Runs whole clusters, CTAs `first` to `end` (exclusive), at once.
std::string run_clusters(int first, int end, int size, int threads, size_t bytes, const std::function<void()>& kernel) {
  static std::vector<std::unique_ptr<char[]>> stacks;  // kept from launch to launch
  Scheduler& s = scheduler;
  std::vector<Fiber> fibers(static_cast<size_t>(end - first) * threads);
  std::vector<std::unique_ptr<Cluster>> clusters;
  std::vector<std::unique_ptr<Cta>> ctas;
  std::vector<std::unique_ptr<float4[]>> memory;
  for (int i = first; i < end; i++) {
    if (i % size == 0) {
      clusters.push_back(std::make_unique<Cluster>());
      clusters.back()->barrier.waiters.reserve(static_cast<size_t>(size) * threads);
    }
    memory.push_back(std::make_unique<float4[]>((bytes + sizeof(float4) - 1) / sizeof(float4)));
    ctas.push_back(std::make_unique<Cta>());
    Cta& cta = *ctas.back();
    cta.index = i;
    cta.rank = i % size;
    cta.threads = threads;
    cta.cluster = clusters.back().get();
    cta.memory = reinterpret_cast<unsigned char*>(memory.back().get());
    cta.bytes = bytes;
    std::memset(cta.memory, 0xff, bytes);
    cta.warps.resize(threads / 32);
    for (Warp& warp : cta.warps) {
      warp.barrier.waiters.reserve(32);
    }
    cta.barrier.waiters.reserve(threads);
    for (Box& box : cta.boxes) {
      box.waiters.reserve(threads);
    }
    cta.cluster->ctas.push_back(&cta);
  }
  while (stacks.size() < fibers.size()) {
    stacks.emplace_back(new char[kStack]);
  }
  s.ready.assign(fibers.size() + 1, nullptr);
  s.first = s.count = 0;
  s.held.clear();
  s.held.reserve(fibers.size());
  s.flag_waiters.clear();
  s.flag_waiters.reserve(fibers.size());
  s.error.clear();
  s.kernel = &kernel;
  s.current = &s.host;
  s.host.done = false;
#if defined(RRU_THREAD_SANITIZER)
  s.host.tsan = __tsan_get_current_fiber();
#endif
  name_all(fibers);
  for (size_t i = 0; i < fibers.size(); i++) {
    fibers[i].cta = ctas[i / threads].get();
    fibers[i].thread = static_cast<int>(i % threads);
    fibers[i].stack = stacks[i].get();
    start(fibers[i]);
  }
  release(&s.begin);
  yield();
  acquire(&s.end);
  std::string error = s.error;
  if (error.empty() && !std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.done; })) {
    error = where_they_wait(fibers);
  }
  return error;
}

// d += a b of fragments as the PTX ISA lays them out; `value` reads an element of an operand's word.
template <int K, int PER_WORD, class Value>
void mma(const char* name, float (&d)[4], uint4 a, uint32_t b0, uint32_t b1, Value value) {
  const uint64_t words[6] = {a.x, a.y, a.z, a.w, b0, b1};
  const auto* lanes = exchange(name, words, 6);
  const int lane = thread() % 32;
  for (int i = 0; i < 4; i++) {
    const int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
    for (int k = 0; k < K; k++) {  // four lanes hold half of the k
      const int of_lane = k % (K / 2) / PER_WORD, half = k / (K / 2), part = k % PER_WORD;
      const auto left = static_cast<uint32_t>(lanes[row % 8 * 4 + of_lane][row / 8 + 2 * half]);
      const auto right = static_cast<uint32_t>(lanes[column * 4 + of_lane][4 + half]);
      d[i] += value(left, part) * value(right, part);
    }
  }
}

}  // namespace

Adversary& adversary() {
  return the_adversary;
}

std::vector<Site> sites() {
  std::vector<Site> noted;
  std::copy_if(the_sites, the_sites + kMaxSites, std::back_inserter(noted), [](const Site& s) { return s.passes > 0; });
  return noted;
}

void forget_sites() {
  std::fill(the_sites, the_sites + kMaxSites, Site{});
}

int thread() {
  return self().thread;
}

int cta() {
  return self().cta->index;
}

int rank() {
  return self().cta->rank;
}

int cluster_size() {
  return static_cast<int>(self().cta->cluster->ctas.size());
}

unsigned char* smem() {
  return self().cta->memory;
}

void sync(const char* site) {
  Cta& cta = *self().cta;
  if (the_adversary.omit != site) {
    char* order = &cta.barrier.order[cta.barrier.generation & 1];
    release(order);
    await(cta.barrier, arrive(cta.barrier, cta.threads), site);
    acquire(order);
  }
  pass(site, "sync");
}

void cluster_arrive(const char* site) {
  Fiber& fiber = self();
  Cluster& cluster = *fiber.cta->cluster;
  if (fiber.cluster_generation >= 0) {
    fail("cluster_arrive twice without cluster_wait");
  }
  if (the_adversary.omit != site) {
    release(&cluster.barrier.order[cluster.barrier.generation & 1]);
    fiber.cluster_generation = arrive(cluster.barrier, cluster_size() * fiber.cta->threads);
  }
}

void cluster_wait(const char* site) {
  Fiber& fiber = self();
  Barrier& barrier = fiber.cta->cluster->barrier;
  if (the_adversary.omit != site) {
    if (fiber.cluster_generation < 0) {
      fail("cluster_wait without cluster_arrive");
    }
    await(barrier, fiber.cluster_generation, site);
    acquire(&barrier.order[fiber.cluster_generation & 1]);
    fiber.cluster_generation = -1;
  }
  pass(site, "cluster");
}

void inbox_init(int count) {
  if (count > kBoxes) {
    fail("inbox_init: got more inboxes than there is room for");
  }
  for (int box = 0; box < count; box++) {
    self().cta->boxes[box].initialized = true;
  }
}

void inbox_arm(int box, int bytes, const char* site) {
  Box& own = self().cta->boxes[box];
  if (!own.initialized) {
    fail("inbox_arm: the inbox is not initialized");
  }
  if (own.armed) {
    fail("inbox_arm: the phase before is not complete");
  }
  own.armed = true;
  own.bytes += bytes - (the_adversary.shorten == site ? 4 * cluster_size() : 0);
  receive(own, 0);
  complete(own);
  pass(site, "arm");
}

void inbox_wait(int box, int parity, const char* site) {
  if (the_adversary.replace == site) {
    return sync("in place of an inbox");
  }
  Box& own = self().cta->boxes[box];
  if (the_adversary.omit != site) {
    while ((own.phase & 1) == parity) {
      deliver_late(own);
      complete(own);
      if ((own.phase & 1) == parity) {
        wait(own.waiters, site);
      }
    }
    acquire(&own.order);
  }
  pass(site, "inbox");
}

void flag_set(uint32_t* flag, uint32_t value, const char* site) {
  detail::check_store(flag, sizeof(uint32_t));
  if (the_adversary.omit != site) {
    *flag = value;
    if (the_adversary.relax != site) {
      release(reinterpret_cast<char*>(flag));
    }
    wake(scheduler.flag_waiters);
  }
  pass(site, "set");
}

void flag_wait(const uint32_t* flag, uint32_t value, const char* site) {
  detail::check_load(flag, sizeof(uint32_t), false);
  if (the_adversary.omit != site) {
    while (*flag < value) {
      wait(scheduler.flag_waiters, site);
    }
    acquire(reinterpret_cast<char*>(const_cast<uint32_t*>(flag)));
  }
  pass(site, "flag");
}

float shfl_xor(float value, int mask) {
  const uint64_t word = float_as_uint(value);
  return uint_as_float(static_cast<uint32_t>(exchange("shfl_xor", &word, 1)[thread() % 32 ^ mask][0]));
}

void mma_bf16(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  mma<16, 2>(
      "mma_bf16", d, a, b0, b1, [](uint32_t pair, int part) { return bf16_to_float(pair >> 16 * part & 0xffff); });
}

void mma_f16(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  mma<16, 2>(
      "mma_f16", d, a, b0, b1, [](uint32_t pair, int part) { return f16_to_float(pair >> 16 * part & 0xffff); });
}

void mma_tf32(float (&d)[4], uint4 a, uint32_t b0, uint32_t b1) {
  mma<8, 1>("mma_tf32", d, a, b0, b1, [](uint32_t word, int) { return uint_as_float(word & ~0x1fffu); });
}

float exp_(float v) {
  const float size = std::isfinite(v) ? std::min(std::fabs(v), 100.f) : 0.f;
  return approximated(std::exp(v), 2 + static_cast<int>(1.173f * size));
}

float div_(float a, float b) {
  return approximated(a / b, 2);
}

namespace detail {

float* push_target(int rank, int offset, const float* value, int count, int box) {
  const Cta& own = *self().cta;
  if (rank < 0 || rank >= cluster_size()) {
    fail("push: got rank " + std::to_string(rank) + " in a cluster of " + std::to_string(cluster_size()));
  }
  Cta& other = *own.cluster->ctas[rank];
  const int bytes = static_cast<int>(sizeof(float)) * count;
  if (offset < 0 || offset + bytes > static_cast<int>(own.bytes) || offset % bytes != 0) {
    fail("push: got an offset outside of shared memory, or not aligned: " + std::to_string(offset));
  }
  if (other.finished == other.threads) {
    fail("push to a CTA that has returned");
  }
  if (!other.boxes[box].initialized) {
    fail("push to an inbox that is not initialized");
  }
  auto* to = reinterpret_cast<float*>(other.memory + offset);
  if (!the_adversary.late) {
    return to;
  }
  Push late{to, {}, count};
  std::copy_n(value, count, late.value);
  Box& inbox = other.boxes[box];
  inbox.late.push_back(late);
  if (!inbox.waiters.empty()) {
    deliver_late(inbox);
    complete(inbox);
  }
  return nullptr;
}

void push_done(int rank, int count, int box) {
  Box& inbox = self().cta->cluster->ctas[rank]->boxes[box];
  receive(inbox, count);
  release(&inbox.order);
  complete(inbox);
}

void exchange_addresses(const void* mine, const void* (&all)[32]) {
  const auto address = reinterpret_cast<uintptr_t>(mine);
  if (address % 16 != 0) {
    fail("ldmatrix: got an address that is not a multiple of 16");
  }
  const uint64_t word = address;
  const auto* lanes = exchange("ldmatrix", &word, 1);
  for (int lane = 0; lane < 32; lane++) {
    all[lane] = reinterpret_cast<const void*>(static_cast<uintptr_t>(lanes[lane][0]));
  }
}

void run(int ctas, int cluster, int threads, size_t bytes, const std::function<void()>& kernel, bool together) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  const int at_once = together ? ctas : cluster;
  read_only.clear();
  written.clear();
  for (int first = 0; first < ctas; first += at_once) {
    if (auto error = run_clusters(first, first + at_once, cluster, threads, bytes, kernel); !error.empty()) {
      throw std::runtime_error(error);
    }
  }
}

void check_shared(int offset, size_t bytes) {
  const Cta& cta = *self().cta;
  if (offset < 0 || offset + bytes > cta.bytes || offset % bytes != 0) {
    fail("shared memory: got an offset outside of it, or not aligned: " + std::to_string(offset));
  }
}

void check_load(const void* p, size_t bytes, bool is_const) {
  check_aligned(p, bytes);
  if (is_const && note(p, bytes, read_only, written)) {
    fail("load_const of memory that the launch writes");
  }
}

void check_store(const void* p, size_t bytes) {
  check_aligned(p, bytes);
  if (note(p, bytes, written, read_only)) {
    fail("store to memory that the launch reads by load_const");
  }
}

}  // namespace detail
}  // namespace rru::emulated::dev
