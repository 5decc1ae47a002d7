// SPDX-License-Identifier: Apache-2.0
// Values in memory: whole and partial vectors, and room for a call.
#include <stdlib.h>
#include <string.h>

enum { ALIGNMENT = 64 }; // bytes: the widest vector

// A whole vector is one instruction; a size that is not known is a call.
static inline real load(const scalar *from, long count) {
  real value = {0};
  if (__builtin_expect(count >= LANES, 1))
    memcpy(&value, from, sizeof value);
  else
    memcpy(&value, from, sizeof(scalar) * count);
  return value;
}

static inline void store(scalar *to, real value, long count) {
  if (__builtin_expect(count >= LANES, 1))
    memcpy(to, &value, sizeof value);
  else
    memcpy(to, &value, sizeof(scalar) * count);
}

static inline void add_to(scalar *to, real value, long count) {
  store(to, load(to, count) + value, count);
}

// The lanes whose bytes, 0 or 1, are 1.
static inline truth set_lanes(const uint8_t *from, long count) {
  typedef uint8_t each __attribute__((vector_size(LANES)));
  each value = {0};
  if (__builtin_expect(count >= LANES, 1))
    memcpy(&value, from, sizeof value);
  else
    memcpy(&value, from, count);
  return -__builtin_convertvector(value, truth);
}

static inline long divided_up(long number, long by) {
  return (number + by - 1) / by;
}

// The whole vectors that hold so many values.
static inline long whole(long count) {
  return divided_up(count, LANES) * LANES;
}

static scalar *allocate(long count) {
  const size_t bytes = (count + LANES) * sizeof(scalar);
  return aligned_alloc(ALIGNMENT, (bytes + ALIGNMENT - 1) & -ALIGNMENT);
}

// A block of memory begins with how many values it holds: both change hands at
// once.
typedef union {
  long count;
  char aligned[ALIGNMENT];
} block;

// What calls leave for the next one: to ask the system for memory and to touch
// it takes longer than many a call. Of each kind one block, which is in one
// place at a time: here, or with whoever took it.
enum { OF_WEIGHTS, OF_STATES, KINDS };
enum { MOST = 1 << 21 }; // values of a block that is left
static block *spare[KINDS];

static scalar *take(int kind, long count) {
  block *taken = __atomic_exchange_n(&spare[kind], 0, __ATOMIC_ACQ_REL);
  if (taken && taken->count < count) {
    free(taken);
    taken = 0;
  }
  if (!taken) {
    taken = (block *)allocate(sizeof(block) / sizeof(scalar) + count);
    if (taken)
      taken->count = count;
  }
  return taken ? (scalar *)(taken + 1) : 0;
}

static void give(int kind, scalar *values) {
  block *given = values ? (block *)values - 1 : 0;
  if (given && given->count <= MOST)
    given = __atomic_exchange_n(&spare[kind], given, __ATOMIC_ACQ_REL);
  free(given);
}
