// SPDX-License-Identifier: Apache-2.0
// The smallest recurrence that needs every kind of synchronisation, to test the
// runtime with: h[t][b][i] = h[t-1][b+1][W-1-i] / 2 + x[t][b][i].
// Block b owns row b, and W is a block's number of threads: each number comes
// from another thread of another block. One kernel for each way to pass it on.
#include "device.cuh"

enum Site {
  FLAG_SEE,
  FLAG_SEEN,
  FLAG_WRITTEN,
  FLAG_SEND,
  COUNT_SEE,
  COUNT_SEEN,
  COUNT_WRITTEN,
  COUNT_SEND,
  FENCE_SEE,
  FENCE_AFTER,
  FENCE_SEEN,
  FENCE_WRITTEN,
  FENCE_BEFORE,
  FENCE_SEND,
  WORD_SEE,
  WORD_SEND,
  STAGE_FIRST,
  STAGE_NEXT,
  STAGE_WAIT,
  STAGE_ARRIVED,
  WARP_WRITTEN,
};

struct Place {
  int rows, width, row, column;

  DEVICE int flag(int t) const { return t * rows + row; }
  DEVICE int own(int t) const { return flag(t) * width + column; }
  DEVICE int before_flag(int t) const {
    return (t - 1) * rows + (row + 1) % rows;
  }
  DEVICE int before(int t) const {
    return before_flag(t) * width + width - 1 - column;
  }
};

DEVICE Place place() {
  return {grid_blocks(), block_threads(), block_index(), thread_index()};
}

// 0.1 s is far above what any test waits.
DEVICE bool too_late(unsigned long long start) {
  poll_pause();
  return clock_ns() - start > 100000000;
}

extern "C" __global__ void by_flag(const float *x, float *h, unsigned *flags,
                                   int steps) {
  Place p = place();
  unsigned long long start = clock_ns();
  for (int t = 0; t < steps; ++t) {
    if (t > 0 && thread_index() == 0)
      while (load_acquire<FLAG_SEE>(flags + p.before_flag(t)) == 0)
        if (too_late(start))
          return;
    block_sync<FLAG_SEEN>();
    h[p.own(t)] = (t > 0 ? 0.5f * h[p.before(t)] : 0.0f) + x[p.own(t)];
    block_sync<FLAG_WRITTEN>();
    if (thread_index() == 0)
      store_release<FLAG_SEND>(flags + p.flag(t), 1u);
  }
}

extern "C" __global__ void by_counter(const float *x, float *h, unsigned *count,
                                      int steps) {
  Place p = place();
  unsigned long long start = clock_ns();
  for (int t = 0; t < steps; ++t) {
    if (thread_index() == 0)
      while (load_acquire<COUNT_SEE>(count) < unsigned(t * p.rows))
        if (too_late(start))
          return;
    block_sync<COUNT_SEEN>();
    h[p.own(t)] = (t > 0 ? 0.5f * h[p.before(t)] : 0.0f) + x[p.own(t)];
    block_sync<COUNT_WRITTEN>();
    if (thread_index() == 0)
      add_release<COUNT_SEND>(count, 1u);
  }
}

extern "C" __global__ void by_fence(const float *x, float *h, unsigned *flags,
                                    int steps) {
  Place p = place();
  unsigned long long start = clock_ns();
  for (int t = 0; t < steps; ++t) {
    if (t > 0 && thread_index() == 0) {
      while (load_relaxed<FENCE_SEE>(flags + p.before_flag(t)) == 0)
        if (too_late(start))
          return;
      fence<FENCE_AFTER>();
    }
    block_sync<FENCE_SEEN>();
    h[p.own(t)] = (t > 0 ? 0.5f * h[p.before(t)] : 0.0f) + x[p.own(t)];
    block_sync<FENCE_WRITTEN>();
    if (thread_index() == 0) {
      fence<FENCE_BEFORE>();
      store_relaxed<FENCE_SEND>(flags + p.flag(t), 1u);
    }
  }
}

// The data is its own flag: h begins as NaN.
extern "C" __global__ void by_word(const float *x, float *h, int steps) {
  Place p = place();
  unsigned long long start = clock_ns();
  for (int t = 0; t < steps; ++t) {
    float before = 0.0f;
    if (t > 0)
      do
        before = load_relaxed<WORD_SEE>(h + p.before(t));
      while (before != before && !too_late(start));
    store_relaxed<WORD_SEND>(h + p.own(t), 0.5f * before + x[p.own(t)]);
  }
}

// One block alone: x comes by asynchronous copies, h goes through shared
// memory; both have two slots, so one barrier a step is enough.
extern "C" __global__ void by_stage(const float *x, float *h, int steps) {
  Place p = place();
  float *x_slots = reinterpret_cast<float *>(shared_memory()); // (2, W)
  float *h_slots = x_slots + 2 * p.width;                      // (2, W)
  bool copies = 4 * p.column < p.width; // 16 bytes a thread
  if (copies)
    copy_async_16<STAGE_FIRST>(x_slots + 4 * p.column, x + 4 * p.column, true);
  copy_async_commit();
  for (int t = 0; t < steps; ++t) {
    copy_async_wait<0, STAGE_WAIT>();
    named_sync<STAGE_ARRIVED>(1, p.width);
    float *x_next = x_slots + (t + 1) % 2 * p.width + 4 * p.column;
    if (copies && t + 1 < steps)
      copy_async_16<STAGE_NEXT>(x_next, x + (t + 1) * p.width + 4 * p.column,
                                true);
    copy_async_commit();
    float *h_before = h_slots + (t + 1) % 2 * p.width;
    float before = t > 0 ? h_before[p.width - 1 - p.column] : 0.0f;
    float now = 0.5f * before + x_slots[t % 2 * p.width + p.column];
    h_slots[t % 2 * p.width + p.column] = now;
    h[p.own(t)] = now;
  }
}

// One warp alone.
extern "C" __global__ void by_warp(const float *x, float *h, int steps) {
  Place p = place();
  float *slots = reinterpret_cast<float *>(shared_memory()); // (2, 32)
  for (int t = 0; t < steps; ++t) {
    float before = t > 0 ? slots[(t + 1) % 2 * 32 + 31 - p.column] : 0.0f;
    float now = 0.5f * before + x[p.own(t)];
    slots[t % 2 * 32 + p.column] = now;
    h[p.own(t)] = now;
    warp_sync<WARP_WRITTEN>(0xffffffff);
  }
}
