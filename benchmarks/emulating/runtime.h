// SPDX-License-Identifier: Apache-2.0
// What runtime.cpp offers to device_cpu.h and to the kernels' entry points.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace cpu {

// ---- Where the running CUDA thread is ----

struct Here {
  int thread, block, threads, blocks;
  char *shared;
};
extern const Here *here;

void require(bool holds,
             const char *rule); // ends the run, naming thread and rule
bool is_shared(const void *p, size_t bytes);
inline bool aligned(const void *p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

bool enabled(int site); // also notes that the site was reached

// ---- Waiting ----

void meet_block(int barrier, int threads, int site);
void meet_warp(int site);
void poll();
unsigned long long clock();

// ---- Words that blocks exchange ----

template <size_t BYTES> struct WordOf;
template <> struct WordOf<4> {
  using type = uint32_t;
};
template <> struct WordOf<8> {
  using type = uint64_t;
};
template <class T> using Word = typename WordOf<sizeof(T)>::type;

template <class T> Word<T> *word(T *p) {
  return reinterpret_cast<Word<T> *>(p);
}
template <class T> const Word<T> *word(const T *p) {
  return reinterpret_cast<const Word<T> *>(p);
}
template <class T> void require_word(const T *p) {
  require(aligned(p, sizeof(T)) && !is_shared(p, 1),
          "an exchanged word is aligned and global");
}

template <class To, class From> To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

// A block's relaxed stores leave it late and in any order, unless a release or
// a fence of that block comes first: as they may on a GPU.
void queue_store(void *p, uint64_t bits, size_t bytes);
uint64_t forward(const void *p, uint64_t in_memory); // as this block sees it
void finish_stores();
void fence();

template <class T> void store_late(T *p, T value) {
  // Changes nothing, but shows the store to the sanitizer as this thread's.
  __atomic_fetch_or(word(p), 0, __ATOMIC_RELAXED);
  queue_store(p, bit_cast<Word<T>>(value), sizeof value);
}

// ---- Clusters ----

void meet_cluster(int site);
void *in_block(void *shared, int rank); // what lies there in another block

// Arrivals by the address of what counts them.
void start_arrivals(void *arrivals, int count);
void arrive(void *arrivals, long long bytes);
bool has_ended(void *arrivals, int parity);

// A word on its way to another block, late and in any order. Its bytes are
// counted when it is there or, not `whole`, at once and in no order.
void send(void *to, uint64_t bits, size_t bytes, void *arrivals, bool whole);

// ---- Asynchronous copies of one thread ----

struct Copy {
  void *to;
  const void *from; // null: zeros
};

void push_copy(Copy copy);
void commit_copies();
// The next copy that does not belong to the newest `pending` groups.
bool pop_copy(int pending, Copy &copy);

// ---- Whole warps ----

enum class Kind {
  none,
  block_barrier,
  warp_barrier,
  cluster_barrier,
  mma_f16,
  mma_bf16,
  mma_tf32,
  shuffle
};

void mma(Kind kind, float (&d)[4], const unsigned (&a)[4],
         const unsigned (&b)[2]);
unsigned shuffle(unsigned value, int source);

float float_from_f16(uint16_t bits);
uint16_t f16_from_float(float x);
uint16_t bf16_from_float(float x);

// A result as far from the exact one as `bound` allows, relative to it; this
// way or that, by the last bit of x. Subnormal ones are 0.
float off_by(double exact, float x, double bound);

// ---- Entry points ----

using Entry = void (*)(void *const *arguments);

struct Kernel {
  Kernel(const char *name, int parameters, Entry entry);
  const char *name;
  int parameters;
  Entry entry;
  Kernel *next;
};

template <class... P> constexpr int count_parameters(void (*)(P...)) {
  return sizeof...(P);
}

template <class... P, size_t... I>
void call(void (*kernel)(P...), void *const *arguments,
          std::index_sequence<I...>) {
  kernel(*static_cast<P *>(arguments[I])...);
}

template <class... P> void call(void (*kernel)(P...), void *const *arguments) {
  call(kernel, arguments, std::index_sequence_for<P...>());
}

} // namespace cpu

#define CPU_KERNEL(NAME)                                                       \
  static cpu::Kernel cpu_kernel_##NAME(                                        \
      #NAME, cpu::count_parameters(NAME),                                      \
      [](void *const *arguments) { cpu::call(NAME, arguments); });
