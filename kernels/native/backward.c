// SPDX-License-Identifier: Apache-2.0
// The backward time loop, from the last step to the first: the gradients of the
// gates and of the states before each step. Those of weights are products over
// all steps, outside.

typedef struct {
  const share *mine;
  long padded, t;
  layout weights;
  scalar *d_states[STATES]; // (rows, padded)
  scalar *d_products;       // (rows, GATES * units), of the recurrent products
  long width;               // of a row of these
} backward_loop;

// State k of a row as its step at a time found it.
static real entered(const backward_loop *loop, int k, long row, long time,
                    long unit, long left) {
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  if (flags_of(mine, row, time) & RESET) {
    const scalar *value = reset_value(mine, k, row, time);
    return value ? load(value + unit, left) : K(INITIAL[k]);
  }
  if (loop->t == 0)
    return load(a->initial[k] + place_of_row(mine, row) * a->units + unit,
                left);
  const long before = place_of(mine, row, time_of(mine, row, loop->t - 1));
  const long all = a->steps * a->batch * a->across;
  const scalar *of = k ? a->inner + (k - 1) * all * a->units : a->y;
  return load(of + before * a->units + unit, left);
}

// The gradients through a step's pointwise part, of one row and vector of
// units.
static void differentiate(backward_loop *loop, long row, long unit) {
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  const long time = time_of(mine, row, loop->t);
  const long place = place_of(mine, row, time), left = a->units - unit;
  const long all = a->steps * a->batch * a->across;
  const long at = row * loop->padded + unit;
  real x[GATES], r[RECURRENT + 1], s[STATES], p[PARAMS + 1];
  real d[STATES], kept[STATES];
  real d_x[GATES], d_r[RECURRENT + 1], d_s[STATES], d_p[PARAMS + 1];
  for (int gate = 0; gate < GATES; gate++)
    x[gate] = load(a->gates + (place * GATES + gate) * a->units + unit, left);
  for (int k = 0; k < RECURRENT; k++)
    r[k] = load(a->recurrent + (place * RECURRENT + k) * a->units + unit, left);
  for (int k = 0; k < PARAMS; k++)
    p[k] = load(a->params + (mine->n * PARAMS + k) * a->units + unit, left);
  for (int k = 0; k < STATES; k++) {
    s[k] = entered(loop, k, row, time, unit, left);
    d[k] = load(loop->d_states[k] + at, LANES);
    kept[k] = K(0);
    const scalar *outer = k ? a->d_inner : a->d_y;
    if (outer)
      d[k] +=
          load(outer + ((k ? k - 1 : 0) * all + place) * a->units + unit, left);
    for (int lane = 0; a->zone && lane < LANES && lane < left; lane++)
      if (a->zone[(k * all + place) * a->units + unit + lane]) {
        kept[k][lane] = d[k][lane];
        d[k][lane] = 0;
      }
  }
  step_0_backward(x, r, s, p, 0, d, d_x, d_r, d_s, d_p, 0);
  for (int gate = 0; gate < GATES; gate++) {
    const int split = PLACES[gate];
    store(a->d_gates + (place * GATES + gate) * a->units + unit, d_x[gate],
          left);
    if (split >= 0)
      store(a->d_recurrent + (place * RECURRENT + split) * a->units + unit,
            d_r[split], left);
    store(loop->d_products + row * loop->width + gate * a->units + unit,
          split < 0 ? d_x[gate] : d_r[split], left);
  }
  for (int k = 0; k < STATES; k++)
    store(loop->d_states[k] + at, d_s[k] + kept[k], LANES);
  const long of_row = place_of_row(mine, row) * PARAMS;
  for (int k = 0; k < PARAMS; k++)
    add_to(a->d_params + (of_row + k) * a->units + unit, d_p[k], left);
}

// A row that the step did not compute: what comes in goes to the states before
// it. y beyond a row's length is 0 and takes nothing.
static void pass_by(backward_loop *loop, long row) {
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  const long time = time_of(mine, row, loop->t);
  const long place = place_of(mine, row, time), at = row * loop->padded;
  const long all = a->steps * a->batch * a->across;
  const size_t bytes = a->units * sizeof(scalar);
  memset(a->d_gates + place * GATES * a->units, 0, GATES * bytes);
  if (RECURRENT)
    memset(a->d_recurrent + place * RECURRENT * a->units, 0, RECURRENT * bytes);
  for (int k = 0; k < STATES; k++) {
    const scalar *outer = k ? a->d_inner : a->d_y;
    if (!outer || (!k && loop->t >= length_of(mine, row)))
      continue;
    outer += ((k ? k - 1 : 0) * all + place) * a->units;
    for (long unit = 0; unit < a->units; unit++)
      loop->d_states[k][at + unit] += outer[unit];
  }
}

// What comes back through the product goes to h before the step.
static void add_product(void *context, long row, long group, const real *sums) {
  backward_loop *loop = context;
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  for (long vector = 0; vector < VECTORS; vector++) {
    const long unit = (group * VECTORS + vector) * LANES;
    const long left = a->units - unit;
    if (left <= 0)
      return;
    real value = sums[vector];
    if (a->drop)
      value *= load(a->drop + place_of_row(mine, row) * a->units + unit, left);
    add_to(loop->d_states[0] + row * loop->padded + unit, value, LANES);
  }
}

// Before the step: a row that was reset hands nothing on.
static void leave(backward_loop *loop) {
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  for (long row = 0; row < mine->rows; row++) {
    const long time = time_of(mine, row, loop->t);
    if (!(flags_of(mine, row, time) & RESET))
      continue;
    const long of = place_of(mine, row, a->reset_steps > 1 ? time : 0);
    for (int k = 0; k < STATES; k++) {
      scalar *d = loop->d_states[k] + row * loop->padded;
      for (long unit = 0; a->d_resets[k] && unit < a->units; unit++)
        a->d_resets[k][of * a->units + unit] += d[unit];
      memset(d, 0, a->units * sizeof(scalar));
    }
  }
}

static void all_steps(backward_loop *loop, long *live) {
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  for (loop->t = a->steps - 1; loop->t >= 0; loop->t--) {
    const long count = live_rows(mine, loop->t, live);
    for (long row = 0, next = 0; row < mine->rows; row++) {
      if (next == count || live[next] != row) {
        pass_by(loop, row);
        continue;
      }
      next++;
      for (long unit = 0; unit < a->units; unit += LANES)
        differentiate(loop, row, unit);
    }
    product(&loop->weights, mine->packed, loop->d_products, loop->width, live,
            count, add_product, loop);
    if (a->flags)
      leave(loop);
  }
}

static layout backward_layout(const arguments *a) {
  return (layout){a->units, 1, GATES * a->units, 1, 0, a->units};
}

static int backward_share(const share *mine) {
  const arguments *a = mine->of;
  const layout weights = backward_layout(a);
  const long padded = whole(a->units), each = mine->rows * padded;
  const long width = whole(GATES * a->units);
  scalar *room = allocate(STATES * each + mine->rows * width);
  long *live = malloc((mine->rows + 1) * sizeof(long));
  const int failed = !room || !live;
  if (!failed) {
    memset(room, 0, (STATES * each + mine->rows * width) * sizeof(scalar));
    backward_loop loop = {
        .mine = mine, .padded = padded, .weights = weights, .width = width};
    loop.d_products = room + STATES * each;
    const size_t bytes = a->units * sizeof(scalar);
    for (int k = 0; k < STATES; k++) {
      loop.d_states[k] = room + k * each;
      for (long row = 0; row < mine->rows; row++)
        memcpy(loop.d_states[k] + row * padded,
               a->d_final[k] + place_of_row(mine, row) * a->units, bytes);
    }
    all_steps(&loop, live);
    for (int k = 0; k < STATES; k++)
      for (long row = 0; row < mine->rows; row++)
        memcpy(a->d_initial[k] + place_of_row(mine, row) * a->units,
               loop.d_states[k] + row * padded, bytes);
  }
  free(live);
  free(room);
  return failed;
}

// Returns 1 where memory is short.
int run(const arguments *a) {
  const layout weights = backward_layout(a);
  return run_shares(a, &weights, backward_share);
}
