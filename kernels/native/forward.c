// SPDX-License-Identifier: Apache-2.0
// The forward time loop; see gpu_rnn/backends/reference.py for what it means.

// The states of a share's rows, (rows, padded) each. h of the next step has a
// place of its own, as a step's product reads all of the last one.
typedef struct {
  const share *mine;
  long padded, t;
  int stage;
  layout weights[STAGES];
  scalar *states[STATES], *next, *entering;
  scalar *between, *carried[CARRIED + 1]; // what a stage makes for the next one
} forward_loop;

// From the sums of one row and group of units the new states of these units.
static void advance(void *context, long row, long group, const real *sums) {
  forward_loop *loop = context;
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  const long time = time_of(mine, row, loop->t);
  const long place = place_of(mine, row, time);
  const long all = a->steps * a->batch * a->across;
  const int stage = stage_of(loop->stage), of_stage = gates_of(stage);
  scalar *gates = a->gates + place * GATES * a->units;
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
    for (int k = 0; k < CARRIED * stage; k++)
      v[k] = load(loop->carried[k] + at, LANES);
    step(stage, x + FIRST[stage], r + FIRST_SPLIT[stage], s, p, v, out);
    if (stage < STAGES - 1) {
      if (a->drop)
        out[0] *=
            load(a->drop + place_of_row(mine, row) * a->units + unit, left);
      store(loop->between + at, out[0], LANES);
      for (int k = 0; k < CARRIED; k++)
        store(loop->carried[k] + at, out[k + 1], LANES);
      continue;
    }
    for (int k = 0; k < STATES; k++) {
      const long of_state = (k * all + place) * a->units + unit;
      if (a->zone)
        for (int lane = 0; lane < LANES && lane < left; lane++)
          if (a->zone[of_state + lane])
            out[k][lane] = s[k][lane];
      store((k ? loop->states[k] : loop->next) + at, out[k], LANES);
      if (k && a->inner)
        store(a->inner + of_state - all * a->units, out[k], left);
    }
    store(a->y + place * a->units + unit, out[0], left);
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
        for (long unit = 0; unit < a->units; unit++)
          loop->states[k][at + unit] = value ? value[unit] : INITIAL[k];
      }
    if (!a->drop)
      continue;
    const scalar *drop = a->drop + place_of_row(mine, row) * a->units;
    for (long unit = 0; unit < a->units; unit++)
      loop->entering[at + unit] = loop->states[0][at + unit] * drop[unit];
  }
}

// The rows that a step does not compute keep their states; beyond a row's
// length y is 0.
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
    memcpy(loop->next + at, loop->states[0] + at, bytes);
    if (beyond)
      memset(a->y + place * a->units, 0, bytes);
    else
      memcpy(a->y + place * a->units, loop->states[0] + at, bytes);
    for (int k = 1; k < STATES && a->inner; k++)
      memcpy(a->inner + ((k - 1) * all + place) * a->units,
             loop->states[k] + at, bytes);
  }
}

static void all_steps(forward_loop *loop, long *live) {
  const share *mine = loop->mine;
  const arguments *a = mine->of;
  for (loop->t = 0; loop->t < a->steps; loop->t++) {
    if (a->flags || a->drop)
      enter(loop);
    const long count = live_rows(mine, loop->t, live);
    if (count < mine->rows)
      keep(loop);
    const scalar *input = a->drop ? loop->entering : loop->states[0];
    for (loop->stage = 0; loop->stage < STAGES; loop->stage++)
      product(&loop->weights[stage_of(loop->stage)], mine->packed,
              loop->stage ? loop->between : input, loop->padded, live, count,
              advance, loop);
    scalar *last = loop->states[0];
    loop->states[0] = loop->next;
    loop->next = last;
  }
}

static layout forward_layout(long units, int stage) {
  return (layout){units, gates_of(stage), units, units, units * units, 1, 0, 0};
}

static int forward_share(const share *mine) {
  const arguments *a = mine->of;
  enum { BUFFERS = STATES + 3 + CARRIED };
  const long padded = whole(a->units), each = mine->rows * padded;
  scalar *room = allocate(BUFFERS * each);
  long *live = malloc((mine->rows + 1) * sizeof(long));
  const int failed = !room || !live;
  if (!failed) {
    memset(room, 0, BUFFERS * each * sizeof(scalar));
    forward_loop loop = {.mine = mine, .padded = padded};
    lay_out(a, forward_layout, loop.weights);
    for (int k = 0; k < STATES; k++)
      loop.states[k] = room + k * each;
    loop.next = room + STATES * each;
    loop.entering = loop.next + each;
    loop.between = loop.entering + each;
    for (int k = 0; k < CARRIED; k++)
      loop.carried[k] = loop.between + (k + 1) * each;
    const size_t bytes = a->units * sizeof(scalar);
    for (int k = 0; k < STATES; k++)
      for (long row = 0; row < mine->rows; row++)
        memcpy(loop.states[k] + row * padded,
               a->initial[k] + place_of_row(mine, row) * a->units, bytes);
    all_steps(&loop, live);
    for (int k = 0; k < STATES; k++)
      for (long row = 0; row < mine->rows; row++)
        memcpy(a->final[k] + place_of_row(mine, row) * a->units,
               loop.states[k] + row * padded, bytes);
  }
  free(live);
  free(room);
  return failed;
}

// Returns 1 where memory is short.
int run(const arguments *a) {
  return run_shares(a, forward_layout, forward_share);
}
