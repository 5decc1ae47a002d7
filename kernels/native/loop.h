// SPDX-License-Identifier: Apache-2.0
// What both time loops share: the product of a step, and the threads.
//
// Before it come functions.h, memory.h, share.h, the generated step, and what
// gpu_rnn/backends/native/text.py prints: `arguments`, STATES, PARAMS, GATES,
// RECURRENT (split gates), PLACES (of each gate its place among those, else
// -1), STAGES, FIRST (of each stage its first gate), FIRST_SPLIT, CARRIED_OF
// (of each stage how many values those before hand on beside what enters its
// product), CARRIED (the most of these), EPSILON, VECTORS and ROWS, whose
// product is the accumulators in registers, and TURNS.
//
// Every row is computed by the same operations in the same order, whatever rows
// are computed beside it: results depend neither on the number of threads nor
// on the batch.
#include <pthread.h>

enum { TILE = ROWS > 1 ? ROWS : 2 }; // sums of VECTORS vectors each

// A matrix whose rows are taken VECTORS * LANES at a time, "groups", along its
// depth: [group][depth][VECTORS][LANES]. A group holds `parts` parts, such as
// gates, of some vectors of units each.
typedef struct {
  long units, parts, depth;
  long unit_apart, part_apart, depth_apart; // in the matrix as it comes
  const scalar *matrix;                     // of the first recurrence
  long apart; // one recurrence's from the next one's
  long to;    // where it starts among the packed ones
} layout;

// The products of a step: one of each stage or, where gates have masks of their
// own, one of each gate; then the projection of h, and that of the input. Those
// that there are not have no units.
enum { PROJECTION = GATES, INPUT, PRODUCTS };

// A constant where there is one stage.
static inline int stage_of(int stage) { return STAGES == 1 ? 0 : stage; }

static inline int gates_of(int stage) {
  return FIRST[stage + 1] - FIRST[stage];
}

static inline long units_in_group(const layout *of) {
  return VECTORS / of->parts * LANES;
}

static inline long groups_of(const layout *of) {
  return divided_up(of->units, units_in_group(of));
}

static inline long packed_size(const layout *of) {
  return groups_of(of) * of->depth * VECTORS * LANES;
}

// The sum of all lanes, in as few steps that wait for each other as may be: of
// a short row they are most of what its normalisation takes.
static inline scalar total_of(real value) {
  enum { PARTS = sizeof(real) / 16, EACH = 16 / sizeof(scalar) };
  typedef scalar narrow __attribute__((vector_size(16)));
  narrow parts[PARTS];
  memcpy(parts, &value, sizeof value);
#pragma GCC unroll 8
  for (int half = PARTS / 2; half; half /= 2)
    for (int part = 0; part < half; part++)
      parts[part] += parts[part + half];
  const narrow sum = parts[0];
  return EACH == 2 ? sum[0] + sum[1]
                   : (sum[0] + sum[1 % EACH]) + (sum[2 % EACH] + sum[3 % EACH]);
}

// Lanes of a, or, from LANES on, of b.
static inline real shuffled(real a, real b, truth from) {
#ifdef __clang__
  real value;
  for (int lane = 0; lane < LANES; lane++)
    value[lane] =
        from[lane] < LANES ? a[from[lane] % LANES] : b[from[lane] % LANES];
  return value;
#else
  return __builtin_shuffle(a, b, from);
#endif
}

// Turns a square of LANES vectors.
static inline __attribute__((always_inline)) void turn(real *square) {
#pragma GCC unroll 8
  for (int step = 0; 1 << step < LANES; step++) {
    truth upper, lower;
    memcpy(&upper, TURNS[step][0], sizeof upper);
    memcpy(&lower, TURNS[step][1], sizeof lower);
#pragma GCC unroll 64
    for (int line = 0; line < LANES; line++) {
      if (line >> step & 1)
        continue;
      const real above = square[line], below = square[line + (1 << step)];
      square[line] = shuffled(above, below, upper);
      square[line + (1 << step)] = shuffled(above, below, lower);
    }
  }
}

// Packs one vector of units, LANES of its depth at a time: in the matrix either
// the depth or the units lie side by side.
static void pack_vector(const layout *of, const scalar *from, long units,
                        scalar *packed) {
  for (long k = 0; k < of->depth; k += LANES) {
    const long left = of->depth - k < LANES ? of->depth - k : LANES;
    real square[LANES];
    if (of->depth_apart == 1) {
      for (long unit = 0; unit < LANES; unit++)
        square[unit] =
            load(from + unit * of->unit_apart + k, unit < units ? left : 0);
      turn(square);
    } else
      for (long depth = 0; depth < left; depth++)
        square[depth] = load(from + (k + depth) * of->depth_apart, units);
    for (long depth = 0; depth < left; depth++)
      store(packed + (k + depth) * VECTORS * LANES, square[depth], LANES);
  }
}

static void pack(const layout *of, long n, scalar *packed) {
  const long blocks = VECTORS / of->parts;
  for (long group = 0; group < groups_of(of); group++)
    for (long vector = 0; vector < VECTORS; vector++) {
      const long block = vector / of->parts, part = vector % of->parts;
      const long unit = (group * blocks + block) * LANES;
      const long left = block < blocks ? of->units - unit : 0;
      const scalar *from = of->matrix + n * of->apart + unit * of->unit_apart +
                           part * of->part_apart;
      pack_vector(of, from, left > 0 ? left : 0,
                  packed + (group * of->depth * VECTORS + vector) * LANES);
    }
}

// Σ_k input[row][k] weights[group][k] of each row and group, all in registers.
static inline __attribute__((always_inline)) void
multiply(const int rows, const int groups, const scalar *const *input,
         long depth, const scalar *weights, real (*sums)[VECTORS]) {
  const real *from = (const real *)weights;
  real each[TILE][VECTORS] = {{{0}}};
  for (long k = 0; k < depth; k++, from += VECTORS) {
#pragma GCC unroll 16
    for (int row = 0; row < rows; row++) {
      const real value = input[row][k] - (real){0};
#pragma GCC unroll 16
      for (int group = 0; group < groups; group++)
#pragma GCC unroll 16
        for (int vector = 0; vector < VECTORS; vector++)
          each[row * groups + group][vector] +=
              value * from[group * depth * VECTORS + vector];
    }
  }
#pragma GCC unroll 16
  for (int line = 0; line < rows * groups; line++)
#pragma GCC unroll 16
    for (int vector = 0; vector < VECTORS; vector++)
      sums[line][vector] = each[line][vector];
}

// What is done with a row's sums, once they are there.
typedef void use(void *context, long row, long group, const real *sums);

// The product of so many rows of `input`, which lie `apart` from each other, at
// the places `at`; they are used by the numbers in `live`. As many rows at once
// as registers hold, all tiles of about the same number; of a single row two
// groups, whose sums do not wait for each other. Every other step takes the
// groups from the last to the first, `backwards`: what the step before read
// last is in the nearest cache still.
static inline __attribute__((always_inline)) void
product(const layout *of, const scalar *packed, const scalar *input, long apart,
        const long *at, const long *live, long count, int backwards, use *with,
        void *context) {
  const long depth = of->depth, groups = groups_of(of);
  const long tiles = divided_up(count, ROWS);
  packed += of->to;
  for (long first = 0, width, group; first < groups; first += width) {
    width = count == 1 && first + 1 < groups ? 2 : 1;
    group = backwards ? groups - first - width : first;
    const scalar *weights = packed + group * depth * VECTORS * LANES;
    for (long tile = 0, done = 0, rows; tile < tiles; tile++, done += rows) {
      real sums[TILE][VECTORS];
      const scalar *from[ROWS];
      rows = divided_up(count - done, tiles - tile);
      for (long row = 0; row < rows; row++)
        from[row] = input + at[done + row] * apart;
      switch (width == 2 ? 0 : rows) {
#define OF_ROWS(number)                                                        \
  case number:                                                                 \
    if (number <= ROWS)                                                        \
      multiply(number <= ROWS ? number : 1, 1, from, depth, weights, sums);    \
    break;
        OF_ROWS(1)
        OF_ROWS(2)
        OF_ROWS(3)
        OF_ROWS(4)
        OF_ROWS(5)
        OF_ROWS(6)
        OF_ROWS(7)
        OF_ROWS(8)
      default:
        multiply(1, 2, from, depth, weights, sums);
      }
      for (long line = 0; line < rows * width; line++)
        with(context, live[done + line / width], group + line % width,
             sums[line]);
    }
  }
}

// The same as a function of its own, for what is not in every step's way.
static __attribute__((noinline)) void
product_apart(const layout *of, const scalar *packed, const scalar *input,
              long apart, const long *at, const long *live, long count,
              int backwards, use *with, void *context) {
  product(of, packed, input, apart, at, live, count, backwards, with, context);
}

// One thread's shares: every one of `threads` from `number` on.
typedef struct {
  const arguments *of;
  const scalar *packed; // of every recurrence
  long size;            // of one
  int (*run)(const share *);
  long number;
  int failed;
} worker;

static void work(void *workers, long which) {
  worker *self = (worker *)workers + which;
  const arguments *a = self->of;
  for (long k = self->number; k < a->across * a->tiles; k += a->threads) {
    const long n = k / a->tiles, first = k % a->tiles;
    const share mine = {a,        self->packed + n * self->size,
                        n,        first,
                        a->tiles, divided_up(a->batch - first, a->tiles)};
    self->failed |= self->run(&mine);
  }
}

// How the weights of some gates lie, or of no gates the projection's.
typedef layout a_layout(const arguments *a, int gates);

// The layouts of all products, one packed after the other; returns the size of
// all.
static long lay_out(const arguments *a, a_layout *of_gates, layout *products) {
  const long matrix = a->units * a->width;
  long size = 0;
  for (int k = 0; k < PRODUCTS; k++) {
    const int by_gate = a->masks > 1;
    products[k] = (layout){.parts = 1};
    if (k < (by_gate ? GATES : STAGES)) {
      products[k] = of_gates(a, by_gate ? 1 : gates_of(k));
      products[k].matrix = a->w_hh + (by_gate ? k : FIRST[k]) * matrix;
      products[k].apart = GATES * matrix;
    } else if (k == PROJECTION && a->w_hr) {
      products[k] = of_gates(a, 0);
      products[k].matrix = a->w_hr;
      products[k].apart = matrix;
    } else if (k == INPUT && a->x && !a->d_gates)
      products[k] = (layout){.units = a->units,
                             .parts = GATES,
                             .depth = a->features,
                             .unit_apart = a->features,
                             .part_apart = a->units * a->features,
                             .depth_apart = 1,
                             .matrix = a->w_ih,
                             .apart = GATES * a->units * a->features};
    products[k].to = size;
    size += packed_size(&products[k]);
  }
  return size;
}

// Pieces of work that threads take one by one, however many come.
typedef struct {
  void (*run)(void *context, long number);
  void *context;
  long next, count;
} pieces;

typedef void start_team(void (*run)(void *), void *, unsigned threads,
                        unsigned flags); // GOMP_parallel

static void take_pieces(void *given) {
  pieces *all = given;
  for (;;) {
    const long k = __atomic_fetch_add(&all->next, 1, __ATOMIC_RELAXED);
    if (k >= all->count)
      return;
    all->run(all->context, k);
  }
}

static void *take_pieces_too(void *given) {
  take_pieces(given);
  return 0;
}

// So many threads, this one among them, or those that can be started.
static void in_threads(const arguments *a, long threads, pieces all) {
  threads = threads < all.count ? threads : all.count;
  if (a->team && threads > 1) {
    ((start_team *)a->team)(take_pieces, &all, threads, 0);
    return;
  }
  pthread_t *others = calloc(threads, sizeof(pthread_t));
  long count = 0;
  while (others && count < threads - 1 &&
         !pthread_create(&others[count], 0, take_pieces_too, &all))
    count++;
  take_pieces(&all);
  for (long k = 0; k < count; k++)
    pthread_join(others[k], 0);
  free(others);
}

// All shares of a call. Returns 1 where memory is short.
static int run_shares(const arguments *a, a_layout *of_gates,
                      int (*run)(const share *)) {
  layout products[PRODUCTS];
  const long size = lay_out(a, of_gates, products);
  scalar *packed = take(OF_WEIGHTS, size * a->across);
  worker *workers = calloc(a->threads, sizeof(worker));
  int failed = !packed || !workers;
  if (!failed) {
    for (long n = 0; n < a->across; n++)
      for (int k = 0; k < PRODUCTS; k++)
        pack(&products[k], n, packed + n * size + products[k].to);
    for (long k = 0; k < a->threads; k++)
      workers[k] = (worker){a, packed, size, run, k, 0};
    in_threads(a, a->threads, (pieces){work, workers, 0, a->threads});
    for (long k = 0; k < a->threads; k++)
      failed |= workers[k].failed;
  }
  free(workers);
  give(OF_WEIGHTS, packed);
  return failed;
}
