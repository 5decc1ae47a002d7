// SPDX-License-Identifier: Apache-2.0
// The backward time loop, from the last step to the first: the gradients of the
// gates and of the states before each step. Those of weights are products over
// all steps, taken afterwards (gradients.h) or outside.

typedef struct {
  const share *mine;
  long padded, t;
  int stage, gate;
  layout weights[PRODUCTS];
  scalar *d_states[STATES]; // (rows, padded)
  scalar *d_products;       // (rows, GATES * units), of the recurrent products
  long width;               // of a row of these
  scalar *d_projected;      // (rows, padded), of a projected h
  // Of what a stage makes for the next one; of the last one's h, if projected.
  scalar *d_between, *d_carried[CARRIED + 1];
} backward_loop;

// Where state k of a row lies as its step at a time found it; null where it was
// reset to the recurrence's own values.
static const scalar *state_before(const backward_loop *loop, int k, long row,
                                  long time) {
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  const long width = width_of(a, k);
  if (flags_of(mine, row, time) & RESET)
    return reset_value(mine, k, row, time);
  if (loop->t == 0)
    return a->initial[k] + place_of_row(mine, row) * width;
  const long before = place_of(mine, row, time_of(mine, row, loop->t - 1));
  const long all = a->steps * a->batch * a->across;
  return (k ? a->inner + (k - 1) * all * width : a->y) + before * width;
}

// Of a vector of units. No step takes a projected h unit by unit.
static real entered(const backward_loop *loop, int k, long row, long time,
                    long unit, long left) {
  if (!k && loop->mine->of->w_hr)
    return K(0);
  const scalar *value = state_before(loop, k, row, time);
  return value ? load(value + unit, left) : K(INITIAL[k]);
}

// What comes in for state k after a step: returns what goes through the step,
// and leaves what units that kept their state hand on.
static inline real incoming(const backward_loop *loop, int k, long row,
                            long place, long unit, real *stays) {
  const arguments *a = loop->mine->of;
  const long all = a->steps * a->batch * a->across;
  const long width = width_of(a, k), left = width - unit;
  const scalar *outer = k ? a->d_inner : a->d_y;
  real d = load(loop->d_states[k] + row * loop->padded + unit, LANES);
  if (outer)
    d += load(outer + ((k ? k - 1 : 0) * all + place) * width + unit, left);
  *stays = K(0);
  if (!a->zone)
    return d;
  const uint8_t *zone = a->zone + (k * all + place) * a->units + unit;
  const truth keeps = set_lanes(zone, left);
  *stays = where_(keeps, d, K(0));
  return where_(keeps, K(0), d);
}

// The gradients through a step's pointwise part, of one row and vector of
// units.
static void differentiate(backward_loop *loop, long row, long unit) {
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  const long time = time_of(mine, row, loop->t);
  const long place = place_of(mine, row, time), left = a->units - unit;
  const long at = row * loop->padded + unit;
  const int stage = stage_of(loop->stage), last = stage == STAGES - 1;
  real x[GATES], r[RECURRENT + 1], s[STATES], p[PARAMS + 1], v[CARRIED + 1];
  real d[STATES + CARRIED + 1], stays[STATES];
  real d_x[GATES], d_r[RECURRENT + 1], d_s[STATES], d_p[PARAMS + 1];
  real d_v[CARRIED + 1];
  for (int gate = 0; gate < GATES; gate++)
    x[gate] = load(a->gates + (place * GATES + gate) * a->units + unit, left);
  for (int k = 0; k < RECURRENT; k++)
    r[k] = load(a->recurrent + (place * RECURRENT + k) * a->units + unit, left);
  for (int k = 0; k < PARAMS; k++)
    p[k] = load(a->params + (mine->n * PARAMS + k) * a->units + unit, left);
  for (int k = 0; k < STATES; k++) {
    s[k] = entered(loop, k, row, time, unit, left);
    if (last && (k || !a->w_hr))
      d[k] = incoming(loop, k, row, place, unit, &stays[k]);
    else
      stays[k] = load(loop->d_states[k] + at, LANES);
  }
  if (!last || a->w_hr)
    d[0] = load(loop->d_between + at, LANES);
  for (int k = 0; k < CARRIED_OF[stage + 1]; k++)
    d[k + 1] = load(loop->d_carried[k] + at, LANES);
  for (int k = 0; k < stage; k++) {
    real made[STATES + CARRIED + 1];
    step(k, x + FIRST[k], r + FIRST_SPLIT[k], s, p, v, made);
    for (int j = 0; j < CARRIED_OF[k + 1]; j++)
      v[j] = made[j + 1];
  }
  if (last && a->w_hr) {
    real made[STATES];
    step(stage, x + FIRST[stage], r + FIRST_SPLIT[stage], s, p, v, made);
    store(a->made + place * a->units + unit, made[0], left);
  }
  step_backward(stage, x + FIRST[stage], r + FIRST_SPLIT[stage], s, p, v, d,
                d_x + FIRST[stage], d_r + FIRST_SPLIT[stage], d_s, d_p, d_v);
  for (int k = 0; k < CARRIED_OF[stage]; k++)
    store(loop->d_carried[k] + at, d_v[k], LANES);
  for (int gate = FIRST[stage]; gate < FIRST[stage + 1]; gate++) {
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
    store(loop->d_states[k] + at, d_s[k] + stays[k], LANES);
  const long of_row = place_of_row(mine, row) * PARAMS;
  for (int k = 0; k < PARAMS; k++)
    add_to(a->d_params + (of_row + k) * a->units + unit, d_p[k], left);
}

// A row's products before their normalisation.
static void differentiate_norm(backward_loop *loop, long row) {
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  const long place = place_of(mine, row, time_of(mine, row, loop->t));
  for (int gate = FIRST[loop->stage]; gate < FIRST[loop->stage + 1]; gate++) {
    const long of = place * GATES + gate;
    const long of_row = place_of_row(mine, row) * GATES + gate;
    scalar *d = loop->d_products + row * loop->width + gate * a->units;
    normalise_back(d, a->normal + of * a->units, a->rstd[of],
                   a->norm + (mine->n * GATES + gate) * a->units,
                   a->d_norm + of_row * a->units, a->units, a->rms);
    memcpy(a->d_normed + of * a->units, d, a->units * sizeof(scalar));
  }
}

// A row that the step did not compute: what comes in goes to the states before
// it. A y that is 0 takes nothing.
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
  if (a->norm)
    memset(a->d_normed + place * GATES * a->units, 0, GATES * bytes);
  if (a->w_hr) {
    memset(a->made + place * a->units, 0, bytes);
    memset(a->d_made + place * a->width, 0, a->width * sizeof(scalar));
  }
  for (int k = 0; k < STATES; k++) {
    const scalar *outer = k ? a->d_inner : a->d_y;
    if (!outer || (!k && (a->silent || loop->t >= length_of(mine, row))))
      continue;
    outer += ((k ? k - 1 : 0) * all + place) * width_of(a, k);
    for (long unit = 0; unit < width_of(a, k); unit++)
      loop->d_states[k][at + unit] += outer[unit];
  }
}

// What comes back through a product goes to what entered it: h before the step,
// or what the stage before made.
static void add_product(void *context, long row, long group, const real *sums) {
  backward_loop *loop = context;
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  for (long vector = 0; vector < VECTORS; vector++) {
    const long unit = (group * VECTORS + vector) * LANES;
    const long left = a->width - unit;
    if (left <= 0)
      return;
    real value = sums[vector];
    if (a->drop)
      value *= load(drop_of(mine, row, loop->gate) + unit, left);
    const long at = row * loop->padded + unit;
    const int first = a->masks < 2 || loop->gate == FIRST[loop->stage];
    if (stage_of(loop->stage) && first)
      store(loop->d_between + at, value, LANES);
    else
      add_to((stage_of(loop->stage) ? loop->d_between : loop->d_states[0]) + at,
             value, LANES);
  }
}

// The products of a stage, back.
static void multiply_back(backward_loop *loop, const long *live, long count) {
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  const int stage = stage_of(loop->stage);
  if (a->masks < 2) {
    product(&loop->weights[stage], mine->packed,
            loop->d_products + FIRST[stage] * a->units, loop->width, live, live,
            count, loop->t & 1, add_product, loop);
    return;
  }
  for (int gate = FIRST[stage]; gate < FIRST[stage + 1]; gate++) {
    loop->gate = gate;
    product_apart(&loop->weights[gate], mine->packed,
                  loop->d_products + gate * a->units, loop->width, live, live,
                  count, loop->t & 1, add_product, loop);
  }
}

static void put_unprojected(void *context, long row, long group,
                            const real *sums) {
  backward_loop *loop = context;
  for (long vector = 0; vector < VECTORS; vector++) {
    const long unit = (group * VECTORS + vector) * LANES;
    if (unit < loop->mine->of->units)
      store(loop->d_between + row * loop->padded + unit, sums[vector], LANES);
  }
}

// From the gradient of a projected h that of the h which the step made.
static void project_back(backward_loop *loop, const long *live, long count) {
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  for (long k = 0; k < count; k++)
    for (long unit = 0; unit < a->width; unit += LANES) {
      const long row = live[k], at = row * loop->padded + unit;
      const long place = place_of(mine, row, time_of(mine, row, loop->t));
      real stays;
      const real d = incoming(loop, 0, row, place, unit, &stays);
      store(loop->d_projected + at, d, LANES);
      store(a->d_made + place * a->width + unit, d, a->width - unit);
      store(loop->d_states[0] + at, stays, LANES);
    }
  product_apart(&loop->weights[PROJECTION], mine->packed, loop->d_projected,
                loop->padded, live, live, count, loop->t & 1, put_unprojected,
                loop);
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
      const long width = width_of(a, k);
      scalar *d = loop->d_states[k] + row * loop->padded;
      for (long unit = 0; a->d_resets[k] && unit < width; unit++)
        a->d_resets[k][of * width + unit] += d[unit];
      memset(d, 0, width * sizeof(scalar));
    }
  }
}

static void all_steps(backward_loop *loop, long *live) {
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  for (loop->t = a->steps - 1; loop->t >= 0; loop->t--) {
    const long count = live_rows(mine, loop->t, live);
    for (long row = 0, next = 0; row < mine->rows; row++)
      if (next < count && live[next] == row)
        next++;
      else
        pass_by(loop, row);
    if (a->w_hr)
      project_back(loop, live, count);
    for (loop->stage = STAGES - 1; loop->stage >= 0; loop->stage--) {
      for (long k = 0; k < count; k++)
        for (long unit = 0; unit < a->units; unit += LANES)
          differentiate(loop, live[k], unit);
      for (long k = 0; a->norm && k < count; k++)
        differentiate_norm(loop, live[k]);
      multiply_back(loop, live, count);
    }
    if (a->flags)
      leave(loop);
  }
}

static layout backward_layout(const arguments *a, int gates) {
  if (!gates)
    return (layout){.units = a->units,
                    .parts = 1,
                    .depth = a->width,
                    .unit_apart = 1,
                    .depth_apart = a->units};
  return (layout){.units = a->width,
                  .parts = 1,
                  .depth = gates * a->units,
                  .unit_apart = 1,
                  .depth_apart = a->width};
}

static int backward_share(const share *mine) {
  const arguments *a = mine->of;
  enum { BUFFERS = STATES + 2 + CARRIED };
  const long padded = whole(a->units), each = mine->rows * padded;
  const long width = whole(GATES * a->units);
  const long size = BUFFERS * each + mine->rows * width;
  scalar *room = take(OF_STATES, size);
  long *live = malloc((mine->rows + 1) * sizeof(long));
  const int failed = !room || !live;
  if (!failed) {
    memset(room, 0, size * sizeof(scalar));
    backward_loop loop = {.mine = mine, .padded = padded, .width = width};
    lay_out(a, backward_layout, loop.weights);
    loop.d_projected = room + STATES * each;
    loop.d_between = loop.d_projected + each;
    for (int k = 0; k < CARRIED; k++)
      loop.d_carried[k] = loop.d_between + (k + 1) * each;
    loop.d_products = room + BUFFERS * each;
    for (int k = 0; k < STATES; k++) {
      loop.d_states[k] = room + k * each;
      copy_in(mine, k, a->d_final, loop.d_states[k], padded);
    }
    all_steps(&loop, live);
    for (int k = 0; k < STATES; k++)
      copy_out(mine, k, loop.d_states[k], padded, a->d_initial);
  }
  free(live);
  give(OF_STATES, room);
  return failed;
}
