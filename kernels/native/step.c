// SPDX-License-Identifier: Apache-2.0
// One step of one layer with both products in it, and its gradients: of a few
// rows, where to pack the weights would take longer than to use them once.
//
// Weights are read as torch has them, (GATES * units, width): a sum runs along
// a row of them, those of LANES neighbouring units side by side. What comes
// before this file is as in loop.h, but for `one_step`, which text.py prints.

// sums[lane] += what each lane adds to its sum: a row of weights times v.
static inline void accumulate(const scalar *weights, long width,
                              const scalar *v, long lanes, real *sums) {
  const scalar *row[LANES];
  for (int lane = 0; lane < LANES; lane++) // a row twice rather than a tail
    row[lane] = weights + (lane < lanes ? lane : lanes - 1) * width;
  long k = 0;
  for (; k + LANES <= width; k += LANES) {
    const real value = load(v + k, LANES);
#pragma GCC unroll 16
    for (int lane = 0; lane < LANES; lane++)
      sums[lane] += load(row[lane] + k, LANES) * value;
  }
  if (k < width) {
    const real value = load(v + k, width - k);
    for (int lane = 0; lane < LANES; lane++)
      sums[lane] += load(row[lane] + k, width - k) * value;
  }
}

// Of each lane's vector the sum of its elements.
static inline real totals(const real *sums) {
  real found;
#pragma GCC unroll 16
  for (int lane = 0; lane < LANES; lane++)
    found[lane] = total_of(sums[lane]);
  return found;
}

// What the first of two stages makes: what enters the second's product, and
// what it hands on besides, (rows, padded) each.
typedef struct {
  long padded;
  scalar *between, *carried[CARRIED + 1];
} made;

static inline made lay_out_made(const one_step *a, scalar *room) {
  made m = {whole(a->units), room, {0}};
  for (int k = 0; k < CARRIED; k++)
    m.carried[k] = room + (k + 1) * a->rows * m.padded;
  return m;
}

// The pre-activations of one gate of a row and vector of units.
static inline void meet(const one_step *a, const scalar *entering, long row,
                        int gate, long unit, long left, real *x, real *r) {
  const long of = gate * a->units + unit;
  const int split = PLACES[gate];
  real sums[LANES] = {{0}};
  accumulate(a->w_ih + of * a->features, a->features, a->x + row * a->features,
             left, sums);
  if (split >= 0) {
    x[gate] = totals(sums);
    memset(sums, 0, sizeof sums);
  }
  accumulate(a->w_hh + of * a->units, a->units, entering, left, sums);
  real *last = split < 0 ? &x[gate] : &r[split];
  *last = totals(sums);
  if (a->b_ih) {
    x[gate] += load(a->b_ih + of, left);
    *last += load(a->b_hh + of, left);
  }
  if (!a->save)
    return;
  store(a->gates + (row * GATES + gate) * a->units + unit, x[gate], left);
  if (split >= 0)
    store(a->recurrent + (row * RECURRENT + split) * a->units + unit, r[split],
          left);
}

static inline void read_states(const one_step *a, long row, long unit,
                               long left, real *s, real *p) {
  for (int k = 0; k < STATES; k++)
    s[k] = load(a->states[k] + row * a->units + unit, left);
  for (int k = 0; k < PARAMS; k++)
    p[k] = load(a->params + k * a->units + unit, left);
}

static inline void forward_stage(const one_step *a, int stage, const made *m) {
  for (long unit = 0; unit < a->units; unit += LANES)
    for (long row = 0; row < a->rows; row++) {
      const long left = a->units - unit, at = row * m->padded + unit;
      real x[GATES], r[RECURRENT + 1], s[STATES], p[PARAMS + 1];
      real v[CARRIED + 1], out[STATES + CARRIED + 1];
      const scalar *entering =
          stage ? m->between + row * m->padded : a->states[0] + row * a->units;
      for (int gate = FIRST[stage]; gate < FIRST[stage + 1]; gate++)
        meet(a, entering, row, gate, unit, left, x, r);
      read_states(a, row, unit, left, s, p);
      for (int k = 0; k < CARRIED * stage; k++)
        v[k] = load(m->carried[k] + at, LANES);
      step(stage, x + FIRST[stage], r + FIRST_SPLIT[stage], s, p, v, out);
      if (stage == STAGES - 1) {
        for (int k = 0; k < STATES; k++)
          store(a->final[k] + row * a->units + unit, out[k], left);
        continue;
      }
      store(m->between + at, out[0], LANES);
      for (int k = 0; k < CARRIED; k++)
        store(m->carried[k] + at, out[k + 1], LANES);
    }
}

// Returns 1 where memory is short.
int forward(const one_step *a) {
  const long each = a->rows * whole(a->units);
  scalar *room = STAGES > 1 ? allocate((1 + CARRIED) * each) : 0;
  if (STAGES > 1 && !room)
    return 1;
  const made m = lay_out_made(a, room);
  for (int stage = 0; stage < STAGES; stage++)
    forward_stage(a, stage_of(stage), &m);
  free(room);
  return 0;
}

// out (rows, width) += d (rows, count) times weights (count, width).
static void send_back(const scalar *d, long d_apart, long count,
                      const scalar *weights, long width, scalar *out,
                      long out_apart, long rows) {
  enum { BLOCK = 4 };
  for (long k = 0; k < width; k += BLOCK * LANES)
    for (long row = 0; row < rows; row++) {
      real sums[BLOCK] = {{0}};
      const long left = width - k;
      for (long from = 0; from < count; from++) {
        const real value = d[row * d_apart + from] - (real){0};
        const scalar *of = weights + from * width + k;
        if (left >= BLOCK * LANES)
#pragma GCC unroll 4
          for (int block = 0; block < BLOCK; block++)
            sums[block] += value * load(of + block * LANES, LANES);
        else
          for (int block = 0; block * LANES < left; block++)
            sums[block] +=
                value * load(of + block * LANES, left - block * LANES);
      }
      for (int block = 0; block < BLOCK && block * LANES < left; block++)
        add_to(out + row * out_apart + k + block * LANES, sums[block],
               left - block * LANES);
    }
}

// out (count, width) = the sum over rows of d (rows, count) times v (rows,
// width).
static void sum_outer(const scalar *d, long d_apart, long count,
                      const scalar *v, long v_apart, long width, long rows,
                      scalar *out) {
  for (long of = 0; of < count; of++)
    for (long k = 0; k < width; k += LANES) {
      real sum = {0};
      for (long row = 0; row < rows; row++)
        sum += d[row * d_apart + of] * load(v + row * v_apart + k, width - k);
      store(out + of * width + k, sum, width - k);
    }
}

static void sum_rows(const scalar *d, long count, long rows, scalar *out) {
  for (long k = 0; k < count; k += LANES) {
    real sum = {0};
    for (long row = 0; row < rows; row++)
      sum += load(d + row * count + k, count - k);
    store(out + k, sum, count - k);
  }
}

// Gradients on their way: of the gates and of the recurrent products, (rows,
// GATES * units) each, and of what the first of two stages makes.
typedef struct {
  scalar *d_gates, *d_products;
  made values, gradients;
} on_the_way;

static inline void differentiate(const one_step *a, int stage, long row,
                                 long unit, const on_the_way *w) {
  const long left = a->units - unit, of_row = row * a->units + unit;
  const long at = row * w->values.padded + unit;
  real x[GATES], r[RECURRENT + 1], s[STATES], p[PARAMS + 1], v[CARRIED + 1];
  real d[STATES + CARRIED + 1], d_x[GATES], d_r[RECURRENT + 1], d_s[STATES];
  real d_p[PARAMS + 1], d_v[CARRIED + 1];
  for (int gate = 0; gate < GATES; gate++)
    x[gate] = load(a->gates + (row * GATES + gate) * a->units + unit, left);
  for (int k = 0; k < RECURRENT; k++)
    r[k] = load(a->recurrent + (row * RECURRENT + k) * a->units + unit, left);
  read_states(a, row, unit, left, s, p);
  if (stage == STAGES - 1)
    for (int k = 0; k < STATES; k++)
      d[k] = a->d_final[k] ? load(a->d_final[k] + of_row, left) : K(0);
  else {
    d[0] = load(w->gradients.between + at, LANES);
    for (int k = 0; k < CARRIED; k++)
      d[k + 1] = load(w->gradients.carried[k] + at, LANES);
  }
  if (stage) {
    real out[CARRIED + 1];
    step(0, x, r, s, p, 0, out);
    store(w->values.between + at, out[0], LANES);
    for (int k = 0; k < CARRIED; k++)
      v[k] = out[k + 1];
  }
  step_backward(stage, x + FIRST[stage], r + FIRST_SPLIT[stage], s, p, v, d,
                d_x + FIRST[stage], d_r + FIRST_SPLIT[stage], d_s, d_p, d_v);
  for (int k = 0; k < CARRIED * stage; k++)
    store(w->gradients.carried[k] + at, d_v[k], LANES);
  for (int gate = FIRST[stage]; gate < FIRST[stage + 1]; gate++) {
    const long of = (row * GATES + gate) * a->units + unit;
    const int split = PLACES[gate];
    store(w->d_gates + of, d_x[gate], left);
    store(w->d_products + of, split < 0 ? d_x[gate] : d_r[split], left);
  }
  for (int k = 0; k < STATES; k++)
    add_to(a->d_states[k] + of_row, d_s[k], left);
  for (int k = 0; k < PARAMS; k++)
    add_to(a->d_params + k * a->units + unit, d_p[k], left);
}

static void backward_stage(const one_step *a, int stage, const on_the_way *w) {
  const long width = GATES * a->units, first = FIRST[stage] * a->units;
  const long count = gates_of(stage) * a->units;
  for (long unit = 0; unit < a->units; unit += LANES)
    for (long row = 0; row < a->rows; row++)
      differentiate(a, stage, row, unit, w);
  const scalar *entering = stage ? w->values.between : a->states[0];
  const long apart = stage ? w->values.padded : a->units;
  scalar *out = stage ? w->gradients.between : a->d_states[0];
  send_back(w->d_products + first, width, count, a->w_hh + first * a->units,
            a->units, out, apart, a->rows);
  if (a->d_w_hh)
    sum_outer(w->d_products + first, width, count, entering, apart, a->units,
              a->rows, a->d_w_hh + first * a->units);
}

static void clear(scalar *of, long count) {
  if (of)
    memset(of, 0, count * sizeof(scalar));
}

// Returns 1 where memory is short.
int backward(const one_step *a) {
  const long width = GATES * a->units, each = a->rows * whole(a->units);
  const long of_stages = STAGES > 1 ? 2 * (1 + CARRIED) * each : 0;
  scalar *room = allocate(2 * a->rows * width + of_stages);
  if (!room)
    return 1;
  scalar *rest = room + 2 * a->rows * width;
  clear(rest, of_stages);
  clear(a->d_x, a->rows * a->features);
  clear(a->d_params, PARAMS * a->units);
  for (int k = 0; k < STATES; k++)
    clear(a->d_states[k], a->rows * a->units);
  const on_the_way w = {room, room + a->rows * width, lay_out_made(a, rest),
                        lay_out_made(a, rest + (1 + CARRIED) * each)};
  for (int stage = STAGES - 1; stage >= 0; stage--)
    backward_stage(a, stage_of(stage), &w);
  if (a->d_x)
    send_back(w.d_gates, width, width, a->w_ih, a->features, a->d_x,
              a->features, a->rows);
  if (a->d_w_ih)
    sum_outer(w.d_gates, width, width, a->x, a->features, a->features, a->rows,
              a->d_w_ih);
  if (a->d_b_ih) {
    sum_rows(w.d_gates, width, a->rows, a->d_b_ih);
    sum_rows(w.d_products, width, a->rows, a->d_b_hh);
  }
  free(room);
  return 0;
}
