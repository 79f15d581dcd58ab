// Fibers of one CPU thread, and what they wait at; included by emulation.cpp alone.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "emulation.h"

#if defined(RRU_THREAD_SANITIZER)
#include <sanitizer/tsan_interface.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace rru::emulated::dev {

namespace {

constexpr size_t kStack = 256 * 1024;
constexpr int kMaxSites = 64;

struct Cta;

struct Fiber {
  ucontext_t context{};
  char* stack = nullptr;
  Cta* cta = nullptr;
  int thread = 0;
  int passes[kMaxSites] = {};
  const char* waits_at = nullptr;
  int64_t cluster_generation = -1;
  bool done = false;
  void* tsan = nullptr;
};

using Waiters = std::vector<Fiber*>;  // with room for all that may wait

struct Barrier {
  int arrived = 0;
  int64_t generation = 0;
  char order[2] = {};  // by whose addresses ThreadSanitizer knows two consecutive generations
  Waiters waiters;
};

struct Scheduler {
  std::vector<Fiber*> ready;  // a ring
  size_t first = 0, count = 0;
  Waiters held;
  Waiters flag_waiters;  // at any flag
  Fiber* current = nullptr;
  Fiber host;
  std::string error;
  const std::function<void()>* kernel = nullptr;
  char begin = 0, end = 0;  // what orders the host's memory before the kernel's, and after
};

Scheduler scheduler;
#if defined(__SANITIZE_ADDRESS__)
const void* host_stack;
size_t host_stack_bytes;
#endif
Adversary the_adversary;

void release([[maybe_unused]] char* order) {
#if defined(RRU_THREAD_SANITIZER)
  __tsan_release(order);
#endif
}

void acquire([[maybe_unused]] char* order) {
#if defined(RRU_THREAD_SANITIZER)
  __tsan_acquire(order);
#endif
}

Fiber& self() {
  return *scheduler.current;
}

void make_ready(Fiber* fiber) {
  Scheduler& s = scheduler;
  s.ready[(s.first + s.count++) % s.ready.size()] = fiber;
}

Fiber* take_ready() {
  Scheduler& s = scheduler;
  --s.count;
  if (the_adversary.last_first) {
    return s.ready[(s.first + s.count) % s.ready.size()];
  }
  Fiber* fiber = s.ready[s.first];
  s.first = (s.first + 1) % s.ready.size();
  return fiber;
}

void switch_to(Fiber* next) {
  Fiber* previous = scheduler.current;
  scheduler.current = next;
#if defined(RRU_THREAD_SANITIZER)
  __tsan_switch_to_fiber(next->tsan, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(__SANITIZE_ADDRESS__)
  const bool to_host = next == &scheduler.host;
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(
      previous->done ? nullptr : &fake, to_host ? host_stack : next->stack, to_host ? host_stack_bytes : kStack);
  swapcontext(&previous->context, &next->context);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  swapcontext(&previous->context, &next->context);
#endif
}

// Runs another fiber; the current one runs again once it is ready. The host runs when no fiber can.
void yield() {
  Scheduler& s = scheduler;
  if (s.count == 0 && s.error.empty()) {
    std::for_each(s.held.begin(), s.held.end(), make_ready);
    s.held.clear();
  }
  Fiber* next = s.count > 0 && s.error.empty() ? take_ready() : &s.host;
  if (next != s.current) {
    switch_to(next);
  }
}

[[noreturn]] void fail(const std::string& reason) {
  scheduler.error = reason;
  for (;;) {
    yield();
  }
}

void wait(Waiters& waiters, const char* site) {
  self().waits_at = site;
  waiters.push_back(&self());
  yield();
  self().waits_at = nullptr;
}

void wake(Waiters& waiters) {
  std::for_each(waiters.begin(), waiters.end(), make_ready);
  waiters.clear();
}

// Arrives at a barrier of `count` fibers; returns the generation to wait for.
int64_t arrive(Barrier& barrier, int count) {
  const int64_t generation = barrier.generation;
  if (++barrier.arrived == count) {
    barrier.arrived = 0;
    ++barrier.generation;
    wake(barrier.waiters);
  }
  return generation;
}

void await(Barrier& barrier, int64_t generation, const char* site) {
  while (barrier.generation == generation) {
    wait(barrier.waiters, site);
  }
}

// What a fiber runs.
void run_fiber();

// Tells AddressSanitizer that a fiber runs on its own stack.
void enter_fiber() {
#if defined(__SANITIZE_ADDRESS__)
  const void* stack;
  size_t bytes;
  __sanitizer_finish_switch_fiber(nullptr, &stack, &bytes);
  if (host_stack == nullptr) {  // the host runs the first fiber
    host_stack = stack;
    host_stack_bytes = bytes;
  }
#endif
}

// Makes a new fiber ready.
void start(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  makecontext(&fiber.context, run_fiber, 0);
  make_ready(&fiber);
}

// Gives fibers what ThreadSanitizer knows them by: kept from launch to launch, since making it takes longer than most.
void name_all([[maybe_unused]] std::vector<Fiber>& fibers) {
#if defined(RRU_THREAD_SANITIZER)
  static std::vector<void*> known;
  while (known.size() < fibers.size()) {
    known.push_back(__tsan_create_fiber(0));
  }
  for (size_t i = 0; i < fibers.size(); i++) {
    fibers[i].tsan = known[i];
  }
#endif
}

std::string where_they_wait(const std::vector<Fiber>& fibers) {
  std::map<std::string, int> counts;
  for (const Fiber& fiber : fibers) {
    if (!fiber.done) {
      ++counts[fiber.waits_at == nullptr ? "nowhere" : fiber.waits_at];
    }
  }
  std::string text = "deadlock:";
  for (const auto& [site, count] : counts) {
    text += " " + std::to_string(count) + " threads wait at '" + site + "'";
  }
  return text;
}

}  // namespace
}  // namespace rru::emulated::dev
