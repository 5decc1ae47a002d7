// SPDX-License-Identifier: Apache-2.0
// A share of a call's work: its rows and steps, and where their values lie.
//
// Before it come functions.h, memory.h and what
// gpu_rnn/backends/native/text.py prints.

enum { SKIP = 1, RESET = 2 }; // bits of flags, as gpu_rnn/backends/tensors.py

// Part of a call: of recurrence `n` the rows `first`, `first + apart`, ...
typedef struct {
  const arguments *of;
  const scalar *packed;
  long n, first, apart, rows;
} share;

static inline long batch_row(const share *mine, long row) {
  return mine->first + row * mine->apart;
}

static inline long length_of(const share *mine, long row) {
  const arguments *a = mine->of;
  return a->lengths ? a->lengths[batch_row(mine, row)] : a->steps;
}

// The time at which a row's step number t lies: a reversed row starts at its
// own last step, and what is beyond it stays where it is.
static inline long time_of(const share *mine, long row, long t) {
  const long length = length_of(mine, row);
  return mine->of->reverse[mine->n] && t < length ? length - 1 - t : t;
}

// Of a row at a time its place among (T, B, N).
static inline long place_of(const share *mine, long row, long time) {
  const arguments *a = mine->of;
  return (time * a->batch + batch_row(mine, row)) * a->across + mine->n;
}

// Its place among (B, N).
static inline long place_of_row(const share *mine, long row) {
  return place_of(mine, row, 0);
}

static inline int flags_of(const share *mine, long row, long time) {
  const arguments *a = mine->of;
  if (!a->flags)
    return 0;
  const long of = time * a->batch + batch_row(mine, row);
  return a->flags[of * a->flags_across + (a->flags_across > 1) * mine->n];
}

// Whether step number t of a row is computed: it is within its length, and not
// masked.
static inline int is_live(const share *mine, long row, long t) {
  return t < length_of(mine, row) &&
         !(flags_of(mine, row, time_of(mine, row, t)) & SKIP);
}

static long live_rows(const share *mine, long t, long *live) {
  long count = 0;
  for (long row = 0; row < mine->rows; row++)
    if (is_live(mine, row, t))
      live[count++] = row;
  return count;
}

// The values of state k: a projected h is narrower than the units.
static inline long width_of(const arguments *a, int k) {
  return k ? a->units : a->width;
}

// State k of all rows, between a call's values (B, N, width), if there are any,
// and a share's (rows, padded).
static void copy_in(const share *mine, int k, const scalar *const *values,
                    scalar *state, long padded) {
  const long width = width_of(mine->of, k);
  for (long row = 0; values[k] && row < mine->rows; row++)
    memcpy(state + row * padded, values[k] + place_of_row(mine, row) * width,
           width * sizeof(scalar));
}

static void copy_out(const share *mine, int k, const scalar *state, long padded,
                     scalar *const *values) {
  const long width = width_of(mine->of, k);
  for (long row = 0; values[k] && row < mine->rows; row++)
    memcpy(values[k] + place_of_row(mine, row) * width, state + row * padded,
           width * sizeof(scalar));
}

// Where a row's masks of what enters a product lie, (B, N, masks, width).
static inline const scalar *drop_of(const share *mine, long row, int gate) {
  const arguments *a = mine->of;
  const long mask = place_of_row(mine, row) * a->masks;
  return a->drop + (mask + (a->masks > 1 ? gate : 0)) * a->width;
}

// What state k of a row is reset to: values (1 or T, B, N, width), or none.
static inline const scalar *reset_value(const share *mine, int k, long row,
                                        long time) {
  const arguments *a = mine->of;
  if (!a->resets[k])
    return 0;
  const long at = place_of(mine, row, a->reset_steps > 1 ? time : 0);
  return a->resets[k] + at * width_of(a, k);
}
