// SPDX-License-Identifier: Apache-2.0
// What the files of the runtime share. None of them is built with a sanitizer.
#pragma once

#include <deque>
#include <random>
#include <ucontext.h>
#include <vector>

#include "runtime.h"

namespace cpu {

struct Block;
struct Fiber;

struct PendingCopy {
  Copy copy;
  int group;
};

// Who has arrived at a barrier, and the order that it hands from thread to
// thread.
struct Barrier {
  std::vector<Fiber *> waiting;
  int threads = 0;
  int token = 0; // ThreadSanitizer knows it by its address
};

struct Warp {
  Fiber *lanes[32];
  void *operands[32];
  int arrived = 0;
  Kind kind = Kind::none;
  Barrier barrier;
};

struct Fiber : Here {
  Block *home;
  Warp *warp;
  ucontext_t start;
  void *resume[5]; // of __builtin_setjmp
  bool started = false;
  void *sanitizer = nullptr; // ThreadSanitizer's view of this thread
  Kind waits_for = Kind::none;
  int waits_at = 0; // a site, or the barrier's number
  bool done = false;
  std::deque<PendingCopy> copies;
  int groups = 0; // of copies, committed so far
};

struct Block {
  char *shared;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barriers[16];
  int unfinished; // threads
};

enum class Order { round_robin, random, starve };

constexpr uint64_t NEVER = ~0ull; // unless somebody waits for it

struct Schedule {
  Order order;
  uint64_t seed;
  int starved;       // a block
  uint64_t patience; // polls in vain of each other thread before that one moves
  uint64_t ns_per_poll;
  uint64_t latest; // most switches that a relaxed store may wait, or NEVER
};

struct Launch {
  const Kernel *kernel;
  void *const *arguments;
  int blocks, threads, cluster; // blocks of a cluster
  size_t shared_bytes;
};

// The code of the runtime runs under the name of the thread that started it:
// what it does to its own memory is then never part of a CUDA thread's story.
struct Outside {
  Outside();
  ~Outside();
};

[[noreturn]] void fail(const char *format, ...);
void run(const Launch &launch, const Schedule &schedule);
Fiber *running();
void sleep_until_ready(); // the caller has noted what it waits for
void make_ready(Fiber *fiber);

bool has_left(int block);

// What ThreadSanitizer takes for order, from whoever gives to whoever takes, in
// the view of the thread that runs.
void give_order(int &token);
void take_order(int &token);
void forget_order(int &token);

extern bool disabled[], reached[];
constexpr int MOST_SITES = 1024;

// Memory that leaves a block late. No sanitizer sees the write.
void write_word(void *p, uint64_t bits, size_t bytes);
void start_stores(int blocks, uint64_t latest, uint64_t seed);
void age_stores(uint64_t now); // in switches
bool release_wanted();         // when nobody can go on; true: some left
void finish_all_stores();

// Words that another block sends.
void start_sends(uint64_t latest, uint64_t seed);
void age_sends(uint64_t now);
bool deliver_wanted(); // as release_wanted
void deliver_all();

} // namespace cpu
