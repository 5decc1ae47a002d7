// SPDX-License-Identifier: Apache-2.0
// What every exchange has in common: the sites of its synchronisation, what
// ends a wait that has no end, and the word that stands for none.
#pragma once
#include "group.cuh"

constexpr Word EMPTY = ~static_cast<Word>(0); // NaN
constexpr int POLLS = 1024;                   // between looks at the clock
// Deadlines that a wait for publication 0 may take: its member may not have
// started yet, where another kernel holds the multiprocessors (NCCL's, waiting
// for a process that is late). Who collected it knows that all have.
constexpr unsigned ARRIVAL = 60;

enum Site {
  JOIN,
  WITHIN,
  PUBLISH,
  COLLECT,
  EMPTYING,
  EMPTIED,
  SEND_SUMS,
  COLLECT_SUMS,
  EMPTYING_SUMS,
  COUNT_BLOCK,
  COUNT_ADD,
  COUNT_WAIT,
  COUNT_WARP,
  LEFT,
  LEAVE,
  END_BLOCK,
  END_COUNT,
  END_WARP,
  BEGIN,
  EXPECT,
  EXPECT_AGAIN,
  SEND,
  ARRIVED,
  END,
  FAIL // GPU only: groups that give up in the same instant all store a word,
       // which the host reads whole and which any of them may have written.
};

// What ends a wait that has no end. A thread that gives up waits no more and
// runs through its steps on empty words, which are NaN, so that every barrier
// is still met by all. A cell may hide a NaN, so at the end all outputs of the
// launch are spoilt.
struct Watch {
  unsigned *left;            // set by the first who gives up; all others follow
  unsigned *ended;           // blocks that are through
  unsigned long long *error; // in the host's memory
  unsigned long long limit, started;
  int launch, group, polls; // launch: the launcher's name for it, not 0
  bool alive;

  DEVICE void start() { polls = 0; }

  DEVICE void poll(int number) {
    poll_pause();
    if (++polls % POLLS)
      return;
    const unsigned long long now = clock_ns();
    if (polls == POLLS)
      started = now;
    if (load_relaxed<LEFT>(left)) {
      alive = false;
    } else if (now - started > (number ? limit : ARRIVAL * limit)) {
      alive = false;
      store_relaxed<LEAVE>(left, 1u);
      store_relaxed<FAIL>(error, report(number));
    }
  }

  DEVICE unsigned long long report(int number) const {
    return static_cast<unsigned long long>(launch) << 48 |
           static_cast<unsigned long long>(group & 0xffff) << 32 |
           static_cast<unsigned>(number / HOPS);
  }

  // After a thread's last store: are these the threads that spoil the outputs?
  // One warp of the last block, if anybody gave up.
  DEVICE bool spoils() const {
    if constexpr (MEMBERS == 1)
      return false;
    block_sync<END_BLOCK>();
    if (warp())
      return false;
    unsigned answer = 0;
    if (lane() == 0 && add_acquire_release<END_COUNT>(ended, 1u) + 1 ==
                           static_cast<unsigned>(grid_blocks()))
      answer = *left;
    warp_sync<END_WARP>(0xffffffffu);
    return shuffle(answer, 0);
  }
};
