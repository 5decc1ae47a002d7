// SPDX-License-Identifier: Apache-2.0
// The forward time loop; see gpu_rnn/backends/reference.py for what it means.

// The states of a share's rows, (rows, padded) each. h of the next step has a
// place of its own, as a step's product reads all of the last one.
typedef struct {
  const share *mine;
  long padded, t;
  int stage;
  layout weights[PRODUCTS];
  scalar *states[STATES], *next, *entering;
  scalar *between, *carried[CARRIED + 1]; // what a stage makes for the next one
  scalar *made;                           // h before its projection
  scalar *sums; // (rows, GATES, padded), of gates that stand apart
  int number;   // of the product whose sums go there
  input_products inputs;
} forward_loop;

// Whether the sums of a unit's gates do not stay in registers from the product
// to the step: all units of a gate are normalised together, and gates with
// masks of their own have products of their own.
static inline int gates_stand_apart(const arguments *a) {
  return a->norm || a->masks > 1;
}

// A row's input products, and then pre-activations, (GATES, units).
static inline scalar *gates_of_row(const forward_loop *loop, long row,
                                   long place) {
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  if (!a->x || a->save)
    return a->gates + place * GATES * a->units;
  const input_products *in = &loop->inputs;
  const long at = (loop->t - in->first_step) * mine->rows + row;
  return in->values + at * GATES * a->units;
}

// State k of a row after the last stage of a step.
static inline void put_state(forward_loop *loop, int k, long row, long place,
                             long unit, real value) {
  const arguments *a = loop->mine->of;
  const long all = a->steps * a->batch * a->across;
  const long at = row * loop->padded + unit, left = width_of(a, k) - unit;
  const long of_unit = (k * all + place) * a->units + unit;
  if (a->zone)
    value = where_(set_lanes(a->zone + of_unit, left),
                   load(loop->states[k] + at, LANES), value);
  store((k ? loop->states[k] : loop->next) + at, value, LANES);
  if (!k)
    store(a->y + place * a->width + unit, value, left);
  if (!k && a->h)
    store(a->h + place * a->width + unit, value, left);
  if (k && a->inner)
    store(a->inner + of_unit - all * a->units, value, left);
}

// From the sums of one row and group of units the new states of these units.
static void advance(void *context, long row, long group, const real *sums) {
  forward_loop *loop = context;
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  const long place = place_of(mine, row, time_of(mine, row, loop->t));
  const int stage = stage_of(loop->stage), of_stage = gates_of(stage);
  scalar *gates = gates_of_row(loop, row, place);
  for (long block = 0; block < VECTORS / of_stage; block++, sums += of_stage) {
    const long unit = (group * (VECTORS / of_stage) + block) * LANES;
    const long left = a->units - unit, at = row * loop->padded + unit;
    if (left <= 0)
      return;
    real x[GATES], r[RECURRENT + 1], s[STATES], p[PARAMS + 1];
    real v[CARRIED + 1], out[STATES + CARRIED + 1];
    for (int gate = FIRST[stage]; gate < FIRST[stage + 1]; gate++) {
      const real sum = sums[gate - FIRST[stage]];
      const int split = PLACES[gate];
      scalar *here = gates + gate * a->units + unit;
      x[gate] = load(here, left);
      if (split < 0) {
        x[gate] += sum;
        if (a->save)
          store(here, x[gate], left);
        continue;
      }
      const long bias = (mine->n * GATES + gate) * a->units + unit;
      r[split] = sum;
      if (a->b_hh)
        r[split] += load(a->b_hh + bias, left);
      if (a->save)
        store(a->recurrent + (place * RECURRENT + split) * a->units + unit,
              r[split], left);
    }
    for (int k = 0; k < STATES; k++)
      s[k] = load(loop->states[k] + at, LANES);
    for (int k = 0; k < PARAMS; k++)
      p[k] = load(a->params + (mine->n * PARAMS + k) * a->units + unit, left);
    for (int k = 0; k < CARRIED_OF[stage]; k++)
      v[k] = load(loop->carried[k] + at, LANES);
    step(stage, x + FIRST[stage], r + FIRST_SPLIT[stage], s, p, v, out);
    if (stage < STAGES - 1) {
      if (a->masks == 1)
        out[0] *= load(drop_of(mine, row, 0) + unit, left);
      store(loop->between + at, out[0], LANES);
      for (int k = 0; k < CARRIED_OF[stage + 1]; k++)
        store(loop->carried[k] + at, out[k + 1], LANES);
      continue;
    }
    for (int k = 0; k < STATES; k++)
      if (!k && a->w_hr)
        store(loop->made + at, out[0], LANES);
      else
        put_state(loop, k, row, place, unit, out[k]);
  }
}

// Of the projection: h.
static void project(void *context, long row, long group, const real *sums) {
  forward_loop *loop = context;
  const share *mine = loop->mine;
  const long place = place_of(mine, row, time_of(mine, row, loop->t));
  for (long vector = 0; vector < VECTORS; vector++) {
    const long unit = (group * VECTORS + vector) * LANES;
    if (unit < mine->of->width)
      put_state(loop, 0, row, place, unit, sums[vector]);
  }
}

static void put_sums(void *context, long row, long group, const real *sums) {
  forward_loop *loop = context;
  const layout *of = &loop->weights[loop->number];
  const int by_gate = loop->mine->of->masks > 1;
  const long first = by_gate ? loop->number : FIRST[loop->number];
  const long blocks = VECTORS / of->parts;
  for (long vector = 0; vector < blocks * of->parts; vector++) {
    const long gate = first + vector % of->parts;
    const long unit = (group * blocks + vector / of->parts) * LANES;
    if (unit < of->units)
      store(loop->sums + (row * GATES + gate) * loop->padded + unit,
            sums[vector], LANES);
  }
}

// Normalises and scales the products of a row's gate.
static void scale_sums(forward_loop *loop, long row, int gate) {
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  const long place = place_of(mine, row, time_of(mine, row, loop->t));
  const long of = place * GATES + gate;
  const scalar *scale = a->norm + (mine->n * GATES + gate) * a->units;
  scalar *sums = loop->sums + (row * GATES + gate) * loop->padded;
  const scalar rstd = normalise(sums, a->units, a->rms, scale,
                                a->normal ? a->normal + of * a->units : 0);
  if (a->normal)
    a->rstd[of] = rstd;
}

// A stage whose gates stand apart.
static void advance_apart(forward_loop *loop, const scalar *input,
                          const long *live, long count) {
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  const int stage = stage_of(loop->stage), by_gate = a->masks > 1;
  const int first = FIRST[stage], gates = gates_of(stage);
  for (int k = 0; k < (by_gate ? gates : 1); k++) {
    loop->number = by_gate ? first + k : stage;
    for (long next = 0; by_gate && next < count; next++) {
      const scalar *drop = drop_of(mine, live[next], first + k);
      const long at = live[next] * loop->padded;
      for (long unit = 0; unit < a->width; unit++)
        loop->entering[at + unit] = input[at + unit] * drop[unit];
    }
    product_apart(&loop->weights[loop->number], mine->packed,
                  by_gate ? loop->entering : input, loop->padded, live, live,
                  count, loop->t & 1, put_sums, loop);
  }
  const long blocks = VECTORS / gates;
  for (long next = 0; next < count; next++) {
    const long row = live[next];
    const scalar *sums = loop->sums + (row * GATES + first) * loop->padded;
    for (int k = 0; a->norm && k < gates; k++)
      scale_sums(loop, row, first + k);
    for (long group = 0; group * blocks * LANES < a->units; group++) {
      real together[VECTORS];
      for (long k = 0; k < blocks * gates; k++) {
        const long unit = (group * blocks + k / gates) * LANES;
        if (unit < a->units)
          together[k] = load(sums + k % gates * loop->padded + unit, LANES);
      }
      advance(loop, row, group, together);
    }
  }
}

// Before a step: rows that are reset, and what enters the product.
static void enter(forward_loop *loop) {
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  for (long row = 0; row < mine->rows; row++) {
    const long time = time_of(mine, row, loop->t), at = row * loop->padded;
    if (flags_of(mine, row, time) & RESET)
      for (int k = 0; k < STATES; k++) {
        const scalar *value = reset_value(mine, k, row, time);
        for (long unit = 0; unit < width_of(a, k); unit++)
          loop->states[k][at + unit] = value ? value[unit] : INITIAL[k];
      }
    if (a->masks != 1)
      continue;
    const scalar *drop = drop_of(mine, row, 0);
    for (long unit = 0; unit < a->width; unit++)
      loop->entering[at + unit] = loop->states[0][at + unit] * drop[unit];
  }
}

// The rows that a step does not compute keep their states; beyond a row's
// length y is 0 and, if it is to be silent, wherever a row is masked.
static void keep(forward_loop *loop) {
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  const long all = a->steps * a->batch * a->across;
  for (long row = 0; row < mine->rows; row++) {
    const long time = time_of(mine, row, loop->t);
    const int beyond = loop->t >= length_of(mine, row);
    if (!beyond && !(flags_of(mine, row, time) & SKIP))
      continue;
    const long at = row * loop->padded, place = place_of(mine, row, time);
    const size_t bytes = a->units * sizeof(scalar);
    const size_t of_h = a->width * sizeof(scalar);
    memcpy(loop->next + at, loop->states[0] + at, of_h);
    if (beyond || a->silent)
      memset(a->y + place * a->width, 0, of_h);
    else
      memcpy(a->y + place * a->width, loop->states[0] + at, of_h);
    if (a->h)
      memcpy(a->h + place * a->width, loop->states[0] + at, of_h);
    for (int k = 1; k < STATES && a->inner; k++)
      memcpy(a->inner + ((k - 1) * all + place) * a->units,
             loop->states[k] + at, bytes);
    scalar *const normal[] = {a->normal, a->normal_x};
    scalar *const rstd[] = {a->rstd, a->rstd_x};
    for (int k = 0; k < 2; k++)
      if (normal[k]) {
        memset(normal[k] + place * GATES * a->units, 0, GATES * bytes);
        memset(rstd[k] + place * GATES, 0, GATES * sizeof(scalar));
      }
  }
}

static void all_steps(forward_loop *loop, long *live) {
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  for (loop->t = 0; loop->t < a->steps; loop->t++) {
    if (a->x && loop->t % loop->inputs.chunk == 0)
      take_inputs(&loop->inputs, loop->t, live);
    if (a->flags || a->drop)
      enter(loop);
    const long count = live_rows(mine, loop->t, live);
    if (count < mine->rows)
      keep(loop);
    const scalar *first = a->masks == 1 ? loop->entering : loop->states[0];
    for (loop->stage = 0; loop->stage < STAGES; loop->stage++) {
      const scalar *input = loop->stage ? loop->between : first;
      if (gates_stand_apart(a))
        advance_apart(loop, input, live, count);
      else
        product(&loop->weights[stage_of(loop->stage)], mine->packed, input,
                loop->padded, live, live, count, loop->t & 1, advance, loop);
    }
    if (a->w_hr)
      product_apart(&loop->weights[PROJECTION], mine->packed, loop->made,
                    loop->padded, live, live, count, loop->t & 1, project,
                    loop);
    scalar *last = loop->states[0];
    loop->states[0] = loop->next;
    loop->next = last;
  }
}

static layout forward_layout(const arguments *a, int gates) {
  if (!gates)
    return (layout){.units = a->width,
                    .parts = 1,
                    .depth = a->units,
                    .unit_apart = a->units,
                    .depth_apart = 1};
  return (layout){.units = a->units,
                  .parts = gates,
                  .depth = a->width,
                  .unit_apart = a->width,
                  .part_apart = a->units * a->width,
                  .depth_apart = 1};
}

static int forward_share(const share *mine) {
  const arguments *a = mine->of;
  enum { BUFFERS = STATES + 4 + CARRIED };
  const long padded = whole(a->units), each = mine->rows * padded;
  const long buffers = BUFFERS + (gates_stand_apart(a) ? GATES : 0);
  const long chunk = a->x ? chunk_of(mine) : 1;
  const long inputs =
      a->x && !a->save ? chunk * mine->rows * GATES * a->units : 0;
  scalar *room = take(OF_STATES, buffers * each + inputs);
  long *live = malloc((2 * chunk * mine->rows + 1) * sizeof(long));
  const int failed = !room || !live;
  if (!failed) {
    memset(room, 0, buffers * each * sizeof(scalar));
    forward_loop loop = {.mine = mine, .padded = padded};
    lay_out(a, forward_layout, loop.weights);
    loop.inputs = (input_products){mine, loop.weights[INPUT], chunk, 0,
                                   a->save ? a->gates : room + buffers * each};
    for (int k = 0; k < STATES; k++) {
      loop.states[k] = room + k * each;
      copy_in(mine, k, a->initial, loop.states[k], padded);
    }
    loop.next = room + STATES * each;
    loop.entering = loop.next + each;
    loop.made = loop.entering + each;
    loop.between = loop.made + each;
    for (int k = 0; k < CARRIED; k++)
      loop.carried[k] = loop.between + (k + 1) * each;
    loop.sums = room + BUFFERS * each;
    all_steps(&loop, live);
    for (int k = 0; k < STATES; k++)
      copy_out(mine, k, loop.states[k], padded, a->final);
  }
  free(live);
  give(OF_STATES, room);
  return failed;
}

// Returns 1 where memory is short.
int run(const arguments *a) {
  return run_shares(a, forward_layout, forward_share);
}
