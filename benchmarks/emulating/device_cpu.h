// SPDX-License-Identifier: Apache-2.0
// The CPU's half of kernels/cuda/device.cuh: the same functions in the same
// order. This text is compiled with the kernel, under its sanitizer, so that
// what a CUDA thread does to memory is seen as that thread's deed; meeting
// other threads is left to runtime.cpp, which no sanitizer watches.
//
// With its site disabled (see README.md) a barrier, fence or wait does nothing,
// a copy never arrives, bytes are not announced, or are counted before they are
// there, and any other function only moves its data.
#pragma once

#include <cmath>
#include <cstring>

#include "runtime.h"

inline unsigned __float_as_uint(float x) { return cpu::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return cpu::bit_cast<float>(x); }
inline int __float_as_int(float x) { return cpu::bit_cast<int>(x); }
inline float __int_as_float(int x) { return cpu::bit_cast<float>(x); }
template <class T> T min(T a, T b) { return b < a ? b : a; }
template <class T> T max(T a, T b) { return a < b ? b : a; }

// ---- Indices ----

DEVICE int thread_index() { return cpu::here->thread; }
DEVICE int block_index() { return cpu::here->block; }
DEVICE int block_threads() { return cpu::here->threads; }
DEVICE int grid_blocks() { return cpu::here->blocks; }
DEVICE int lane() { return cpu::here->thread % 32; }
DEVICE int warp() { return cpu::here->thread / 32; }

// ---- Shared memory ----

DEVICE char *shared_memory() { return cpu::here->shared; }

// ---- Barriers ----

template <int SITE> DEVICE void block_sync() {
  if (cpu::enabled(SITE))
    cpu::meet_block(0, cpu::here->threads, SITE);
}

template <int SITE> DEVICE void named_sync(int id, int threads) {
  cpu::require(id >= 1 && id <= 15 && threads > 0 && threads % 32 == 0,
               "a named barrier takes an id of 1 to 15 and whole warps");
  if (cpu::enabled(SITE))
    cpu::meet_block(id, threads, SITE);
}

template <int SITE> DEVICE void warp_sync(unsigned mask) {
  cpu::require(mask == 0xffffffffu, "warp_sync takes the full mask");
  if (cpu::enabled(SITE))
    cpu::meet_warp(SITE);
}

// ---- Global memory seen by other blocks ----

template <int SITE, class T> DEVICE T load_relaxed(const T *p) {
  cpu::require_word(p);
  if (!cpu::enabled(SITE))
    return *p;
  cpu::Word<T> word = __atomic_load_n(cpu::word(p), __ATOMIC_RELAXED);
  word = static_cast<cpu::Word<T>>(cpu::forward(p, word));
  return cpu::bit_cast<T>(word);
}

template <int SITE, class T> DEVICE void store_relaxed(T *p, T value) {
  cpu::require_word(p);
  if (cpu::enabled(SITE))
    cpu::store_late(p, value);
  else
    *p = value;
}

template <int SITE> DEVICE unsigned load_acquire(const unsigned *p) {
  cpu::require_word(p);
  unsigned word = cpu::enabled(SITE) ? __atomic_load_n(p, __ATOMIC_ACQUIRE)
                                     : __atomic_load_n(p, __ATOMIC_RELAXED);
  return static_cast<unsigned>(cpu::forward(p, word));
}

template <int SITE> DEVICE void store_release(unsigned *p, unsigned value) {
  cpu::require_word(p);
  if (!cpu::enabled(SITE))
    return cpu::store_late(p, value);
  cpu::finish_stores();
  __atomic_store_n(p, value, __ATOMIC_RELEASE);
}

template <int SITE> DEVICE void add_release(unsigned *p, unsigned value) {
  cpu::require_word(p);
  if (!cpu::enabled(SITE)) {
    __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
    return;
  }
  cpu::finish_stores();
  __atomic_fetch_add(p, value, __ATOMIC_RELEASE);
}

template <int SITE>
DEVICE unsigned add_acquire_release(unsigned *p, unsigned value) {
  cpu::require_word(p);
  if (!cpu::enabled(SITE))
    return __atomic_fetch_add(p, value, __ATOMIC_RELAXED);
  cpu::finish_stores();
  return __atomic_fetch_add(p, value, __ATOMIC_ACQ_REL);
}

template <int SITE> DEVICE void fence() {
  if (!cpu::enabled(SITE))
    return;
  cpu::finish_stores();
  cpu::fence();
}

// ---- Clusters ----

template <int SITE> DEVICE void cluster_sync() {
  if (!cpu::enabled(SITE))
    return;
  cpu::finish_stores();
  cpu::meet_cluster(SITE);
}

struct alignas(8) Arrivals {
  unsigned long long state; // only shows the sanitizer who comes before whom
};

DEVICE void arrivals_start(Arrivals *arrivals, int count) {
  cpu::require(cpu::is_shared(arrivals, 8) && cpu::aligned(arrivals, 8),
               "arrivals are counted in 8 aligned bytes of shared memory");
  arrivals->state = 0;
  cpu::start_arrivals(arrivals, count);
}

template <int SITE>
DEVICE void arrive_expecting(Arrivals *arrivals, int bytes) {
  __atomic_fetch_or(&arrivals->state, 0, __ATOMIC_RELAXED);
  cpu::arrive(arrivals, cpu::enabled(SITE) ? bytes : 0);
}

template <int SITE> DEVICE bool arrived(Arrivals *arrivals, int parity) {
  if (!cpu::enabled(SITE))
    return true;
  __atomic_fetch_or(&arrivals->state, 0, __ATOMIC_RELAXED);
  return cpu::has_ended(arrivals, parity);
}

template <int SITE, class T>
DEVICE void store_async(T *to, T value, Arrivals *arrivals, int rank) {
  cpu::require(cpu::aligned(to, sizeof value),
               "a word that is sent is aligned");
  T *there = static_cast<T *>(cpu::in_block(to, rank));
  Arrivals *counted = static_cast<Arrivals *>(cpu::in_block(arrivals, rank));
  __atomic_fetch_or(&counted->state, 0, __ATOMIC_RELAXED);
  __atomic_fetch_or(cpu::word(there), 0, __ATOMIC_RELAXED);
  cpu::send(there, cpu::bit_cast<cpu::Word<T>>(value), sizeof value, counted,
            cpu::enabled(SITE));
}

// ---- Waiting ----

DEVICE void poll_pause() { cpu::poll(); }
DEVICE unsigned long long clock_ns() { return cpu::clock(); }

// ---- Asynchronous copies ----

// The destination is spoilt when the copy is issued and written at the wait: a
// missing wait reads NaN, and a block that still reads the old data is a race.

template <int SITE>
DEVICE void copy_async_16(void *shared, const void *global, bool valid) {
  cpu::require(cpu::is_shared(shared, 16) && cpu::aligned(shared, 16),
               "copy_async_16 writes 16 aligned bytes of shared memory");
  cpu::require(!valid || cpu::aligned(global, 16),
               "copy_async_16 reads 16 aligned bytes");
  memset(shared, 0xff, 16);
  if (cpu::enabled(SITE))
    cpu::push_copy({shared, valid ? global : nullptr});
}

DEVICE void copy_async_commit() { cpu::commit_copies(); }

template <int N, int SITE> DEVICE void copy_async_wait() {
  if (!cpu::enabled(SITE))
    return;
  for (cpu::Copy copy; cpu::pop_copy(N, copy);)
    if (copy.from)
      memcpy(copy.to, copy.from, 16);
    else
      memset(copy.to, 0, 16);
}

// ---- Matrix products ----

DEVICE void mma_f16(float (&d)[4], const unsigned (&a)[4],
                    const unsigned (&b)[2]) {
  cpu::mma(cpu::Kind::mma_f16, d, a, b);
}

DEVICE void mma_bf16(float (&d)[4], const unsigned (&a)[4],
                     const unsigned (&b)[2]) {
  cpu::mma(cpu::Kind::mma_bf16, d, a, b);
}

DEVICE void mma_tf32(float (&d)[4], const unsigned (&a)[4],
                     const unsigned (&b)[2]) {
  cpu::mma(cpu::Kind::mma_tf32, d, a, b);
}

// ---- Shuffles ----

DEVICE unsigned shuffle_xor(unsigned value, int mask) {
  cpu::require(mask >= 0 && mask < 32, "shuffle_xor takes a mask of 0 to 31");
  return cpu::shuffle(value, lane() ^ mask);
}

DEVICE unsigned shuffle(unsigned value, int source) {
  cpu::require(source >= 0 && source < 32, "shuffle takes a lane of 0 to 31");
  return cpu::shuffle(value, source);
}

// ---- Numbers ----

DEVICE float to_float(f16 x) { return cpu::float_from_f16(x.bits); }

template <class T> DEVICE T from_float(float x);
template <> DEVICE f16 from_float<f16>(float x) {
  return {cpu::f16_from_float(x)};
}
template <> DEVICE bf16 from_float<bf16>(float x) {
  return {cpu::bf16_from_float(x)};
}

DEVICE float to_tf32(float x) {
  // Half of the last kept bit is added to the magnitude: ties go away from
  // zero.
  unsigned bits = __float_as_uint(x);
  return std::isfinite(x) ? __uint_as_float((bits + 0x1000u) & ~0x1fffu) : x;
}

// ---- Special functions ----

DEVICE float exp2_approximate(float x) {
  return cpu::off_by(std::exp2(static_cast<double>(x)), x, 0x1p-22 - 0x1p-24);
}
DEVICE float reciprocal_approximate(float x) {
  return cpu::off_by(1.0 / x, x, 0x1p-24);
}
DEVICE float inverse_root_approximate(float x) {
  return cpu::off_by(1.0 / std::sqrt(static_cast<double>(x)), x,
                     0x1.12p-23 - 0x1p-24);
}
