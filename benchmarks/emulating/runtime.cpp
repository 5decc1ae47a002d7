// SPDX-License-Identifier: Apache-2.0
// Fibers for CUDA threads, the schedules that choose among them, and the places
// where they meet.
#include "internal.h"

#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <sys/mman.h>
#include <unistd.h>

#ifdef GPU_RNN_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
extern "C" void __tsan_atomic32_store(volatile int *, int, int order);
#endif

namespace cpu {

// ---- Order as ThreadSanitizer sees it ----

namespace {

#ifdef GPU_RNN_THREAD_SANITIZER
void *new_view(int block, int thread) {
  char name[64];
  snprintf(name, sizeof name, "block %d thread %d", block, thread);
  void *view = __tsan_create_fiber(0);
  __tsan_set_fiber_name(view, name);
  return view;
}
void *current_view() { return __tsan_get_current_fiber(); }
void look_through(void *view) {
  __tsan_switch_to_fiber(view, __tsan_switch_to_fiber_no_sync);
}
#else
void *new_view(int, int) { return nullptr; }
void *current_view() { return nullptr; }
void look_through(void *) {}
#endif

} // namespace

#ifdef GPU_RNN_THREAD_SANITIZER
void give_order(int &token) { __tsan_release(&token); }
void take_order(int &token) { __tsan_acquire(&token); }
void forget_order(int &token) {
  constexpr int release = 3;
  __tsan_atomic32_store(&token, 0, release); // replaces what the token held
}
#else
void give_order(int &) {}
void take_order(int &) {}
void forget_order(int &) {}
#endif

namespace {

// ---- State of the run ----

constexpr size_t STACK_BYTES = 256 * 1024;

Launch launch;
Schedule schedule;
std::vector<Block> blocks;
std::vector<Barrier> clusters;
void *starter[5];
void *starter_view;
int unfinished;
uint64_t switches, polls, polls_in_a_row;
int fence_token, end_token;
std::minstd_rand random_bits;

std::deque<Fiber *> ready, starved;
bool feeding; // the starved block may go on until all of it polls
uint64_t starved_polls;

} // namespace

const Here *here;
bool disabled[MOST_SITES], reached[MOST_SITES];

Fiber *running() { return static_cast<Fiber *>(const_cast<Here *>(here)); }

Outside::Outside() { look_through(starter_view); }
Outside::~Outside() { look_through(running()->sanitizer); }

// ---- Failing ----

void fail(const char *format, ...) {
  va_list values;
  va_start(values, format);
  fputs("cuda_cpu: ", stderr);
  vfprintf(stderr, format, values);
  fputc('\n', stderr);
  va_end(values);
  fflush(stderr);
  _exit(70); // EX_SOFTWARE; build.py reads the text
}

void require(bool holds, const char *rule) {
  if (!holds)
    fail("block %d thread %d: %s", here->block, here->thread, rule);
}

bool is_shared(const void *p, size_t bytes) {
  const char *at = static_cast<const char *>(p);
  return at >= here->shared && at + bytes <= here->shared + launch.shared_bytes;
}

bool enabled(int site) {
  require(site >= 0 && site < MOST_SITES, "a site is a number from 0 to 1023");
  reached[site] = true;
  return !disabled[site];
}

namespace {

const char *name(Kind kind) {
  constexpr const char *names[] = {
      "nothing", "block barrier", "warp barrier", "cluster barrier",
      "mma f16", "mma bf16",      "mma tf32",     "shuffle"};
  return names[static_cast<int>(kind)];
}

[[noreturn]] void fail_deadlocked() {
  int listed = 0;
  for (Block &block : blocks)
    for (Fiber &fiber : block.fibers)
      if (!fiber.done && listed++ < 8)
        fprintf(stderr, "  block %d thread %d waits: %s, site or lane %d\n",
                fiber.block, fiber.thread, name(fiber.waits_for),
                fiber.waits_at);
  fail("deadlock: %d threads wait for others that never come", unfinished);
}

// ---- Choosing who runs ----

Fiber *take_front(std::deque<Fiber *> &queue) {
  Fiber *fiber = queue.front();
  queue.pop_front();
  return fiber;
}

Fiber *choose() {
  if (ready.empty() && starved.empty())
    fail_deadlocked();
  if (schedule.order == Order::random)
    std::swap(ready.front(), ready[random_bits() % ready.size()]);
  // The starved block moves only when all others have polled for nothing.
  if (ready.empty() || polls_in_a_row > schedule.patience * ready.size()) {
    feeding = true;
    if (release_wanted() | deliver_wanted())
      polls_in_a_row = 0;
  }
  return feeding && !starved.empty() ? take_front(starved) : take_front(ready);
}

// Never inlined: __builtin_longjmp must not stand beside its setjmp.
[[noreturn, gnu::noinline]] void enter(Fiber *next) {
  here = next;
  if (next->started)
    __builtin_longjmp(next->resume, 1);
  next->started = true;
  setcontext(&next->start);
  fail("a thread could not be started");
}

// Not swapcontext, which asks the kernel to set the signal mask at every
// switch.
void switch_from(void *(&resume)[5]) {
  age_stores(++switches);
  age_sends(switches);
  Fiber *next = choose();
  if (next->started && &next->resume == &resume)
    return;
  if (__builtin_setjmp(resume) == 0)
    enter(next);
}

[[noreturn, gnu::noinline]] void end() { __builtin_longjmp(starter, 1); }

void live() { // the life of a fiber
  look_through(running()->sanitizer);
  launch.kernel->entry(launch.arguments);
  give_order(end_token);
  look_through(starter_view);
  running()->done = true;
  --running()->home->unfinished;
  if (--unfinished == 0)
    end();
  switch_from(running()->resume);
}

} // namespace

void make_ready(Fiber *fiber) {
  fiber->waits_for = Kind::none;
  bool starve =
      schedule.order == Order::starve && fiber->block == schedule.starved;
  (starve ? starved : ready).push_back(fiber);
}

void sleep_until_ready() {
  polls_in_a_row = starved_polls = 0;
  switch_from(running()->resume);
}

void poll() {
  Outside outside;
  ++polls;
  ++polls_in_a_row;
  if (feeding && here->block == schedule.starved &&
      ++starved_polls > starved.size()) {
    feeding = false;
    starved_polls = polls_in_a_row = 0;
  }
  make_ready(running());
  switch_from(running()->resume);
}

unsigned long long clock() { return polls * schedule.ns_per_poll; }

// ---- Barriers ----

namespace {

void meet(Barrier &barrier, int threads, Kind kind, int site) {
  Outside outside;
  Fiber *self = running();
  require(barrier.waiting.empty() || barrier.threads == threads,
          "threads of one barrier disagree on how many they are");
  look_through(self->sanitizer);
  if (barrier.waiting.empty())
    forget_order(barrier.token);
  give_order(barrier.token);
  look_through(starter_view);
  barrier.threads = threads;
  barrier.waiting.push_back(self);
  if (static_cast<int>(barrier.waiting.size()) < threads) {
    self->waits_for = kind;
    self->waits_at = site;
    return sleep_until_ready();
  }
  for (Fiber *fiber : barrier.waiting) {
    look_through(fiber->sanitizer);
    take_order(barrier.token);
    look_through(starter_view);
    if (fiber != self)
      make_ready(fiber);
  }
  barrier.waiting.clear();
}

} // namespace

void meet_block(int barrier, int threads, int site) {
  meet(running()->home->barriers[barrier], threads, Kind::block_barrier, site);
}

void meet_warp(int site) {
  meet(running()->warp->barrier, 32, Kind::warp_barrier, site);
}

void meet_cluster(int site) {
  meet(clusters[here->block / launch.cluster], launch.cluster * launch.threads,
       Kind::cluster_barrier, site);
}

void *in_block(void *shared, int rank) {
  require(is_shared(shared, 1), "what another block has lies in shared memory");
  require(rank >= 0 && rank < launch.cluster,
          "a rank is below the blocks of a cluster");
  const int first = here->block - here->block % launch.cluster;
  return blocks[first + rank].shared +
         (static_cast<char *>(shared) - here->shared);
}

bool has_left(int block) { return blocks[block].unfinished == 0; }

// One order over all fences: never less than PTX gives, and a lost fence is
// seen.
void fence() {
  give_order(fence_token);
  take_order(fence_token);
}

// ---- Running ----

namespace {

void prepare(Fiber &fiber, Block &block, int number, int thread) {
  static_cast<Here &>(fiber) = {thread, number, launch.threads, launch.blocks,
                                block.shared};
  fiber.home = &block;
  fiber.warp = &block.warps[thread / 32];
  fiber.warp->lanes[thread % 32] = &fiber;
  fiber.sanitizer = new_view(number, thread);
  getcontext(&fiber.start);
  void *stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED)
    fail("no memory for the stacks of %d threads",
         launch.blocks * launch.threads);
  mprotect(stack, 4096, PROT_NONE); // a stack that overflows faults
  fiber.start.uc_stack.ss_sp = stack;
  fiber.start.uc_stack.ss_size = STACK_BYTES;
  makecontext(&fiber.start, live, 0);
  make_ready(&fiber);
}

} // namespace

void run(const Launch &what, const Schedule &how) {
  launch = what;
  schedule = how;
  starter_view = current_view();
  random_bits.seed(how.seed + 1);
  if (launch.threads % 32 != 0 || launch.threads > 1024 || launch.threads < 32)
    fail("a block of %d threads is not one of whole warps", launch.threads);
  if (launch.cluster < 1 || launch.blocks % launch.cluster != 0)
    fail("%d blocks make no clusters of %d", launch.blocks, launch.cluster);
  unfinished = launch.blocks * launch.threads;
  start_stores(launch.blocks, how.latest, how.seed);
  start_sends(how.latest, how.seed);
  clusters.resize(launch.blocks / launch.cluster);
  blocks.resize(launch.blocks);
  for (int number = 0; number < launch.blocks; ++number) {
    Block &block = blocks[number];
    // Exact, so that AddressSanitizer knows the end.
    void *shared;
    if (posix_memalign(&shared, 128, launch.shared_bytes) != 0)
      fail("no shared memory of %zu bytes", launch.shared_bytes);
    block.shared = static_cast<char *>(shared);
    memset(block.shared, 0xff, launch.shared_bytes); // NaN in every format
    block.fibers.resize(launch.threads);
    block.warps.resize(launch.threads / 32);
    block.unfinished = launch.threads;
    for (int thread = 0; thread < launch.threads; ++thread)
      prepare(block.fibers[thread], block, number, thread);
  }
  switch_from(starter);
  take_order(end_token);
  finish_all_stores();
  deliver_all();
}

} // namespace cpu
