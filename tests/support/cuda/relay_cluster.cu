// SPDX-License-Identifier: Apache-2.0
// The recurrence of relay.cu by a cluster: each block sends its row to all
// blocks, into one of two slots, and all wait for all rows of a step.
#include "device.cuh"

enum Site {
  BEGIN,
  EXPECT,
  EXPECT_AGAIN,
  SEND,
  ARRIVED,
};

extern "C" __global__ void __cluster_dims__(3, 1, 1)
    by_cluster(const float *x, float *h, int steps) {
  const int rows = grid_blocks(), width = block_threads();
  const int row = block_index(), column = thread_index();
  float *slots = reinterpret_cast<float *>(shared_memory()); // (2, rows, W)
  Arrivals *arrivals = reinterpret_cast<Arrivals *>(slots + 2 * rows * width);
  const int bytes = rows * width * 4;
  for (int k = 0; k < 2 && column == 0; ++k) {
    arrivals_start(arrivals + k, 1);
    arrive_expecting<EXPECT>(arrivals + k, bytes);
  }
  cluster_sync<BEGIN>();
  unsigned long long start = clock_ns();
  for (int t = 0; t < steps; ++t) {
    float before = 0.0f;
    if (t > 0) {
      const int slot = (t - 1) % 2, parity = (t - 1) / 2 % 2;
      while (!arrived<ARRIVED>(arrivals + slot, parity)) {
        poll_pause();
        if (clock_ns() - start > 100000000)
          return;
      }
      if (column == 0)
        arrive_expecting<EXPECT_AGAIN>(arrivals + slot, bytes);
      before =
          slots[(slot * rows + (row + 1) % rows) * width + width - 1 - column];
    }
    const float now = 0.5f * before + x[(t * rows + row) * width + column];
    h[(t * rows + row) * width + column] = now;
    for (int rank = 0; rank < rows && t + 1 < steps; ++rank)
      store_async<SEND>(slots + (t % 2 * rows + row) * width + column, now,
                        arrivals + t % 2, rank);
  }
}

// Word and word of 64 bits of each thread, to the block behind it.
extern "C" __global__ void __cluster_dims__(3, 1, 1)
    pass_on(const float *in, float *out, const unsigned long long *in_wide,
            unsigned long long *out_wide) {
  const int k = thread_index(), place = block_index() * block_threads() + k;
  unsigned long long *wide =
      reinterpret_cast<unsigned long long *>(shared_memory());
  float *narrow = reinterpret_cast<float *>(wide + block_threads());
  Arrivals *arrivals = reinterpret_cast<Arrivals *>(narrow + block_threads());
  if (k == 0) {
    arrivals_start(arrivals, 1);
    arrive_expecting<EXPECT>(arrivals, 12 * block_threads());
  }
  cluster_sync<BEGIN>();
  const int next = (block_index() + 1) % grid_blocks();
  store_async<SEND>(narrow + k, in[place], arrivals, next);
  store_async<SEND>(wide + k, in_wide[place], arrivals, next);
  while (!arrived<ARRIVED>(arrivals, 0))
    poll_pause();
  out[place] = narrow[k];
  out_wide[place] = wide[k];
}
