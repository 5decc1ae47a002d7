// SPDX-License-Identifier: Apache-2.0
// The input products of the forward loop, where it takes them itself: those of
// some steps at once.

typedef struct {
  const share *mine;
  layout weights;
  // The steps, the first of these, and where its first row's products lie.
  long chunk, first_step;
  scalar *values;
} input_products;

// Steps whose input products are taken at once: enough rows for a product, few
// enough values for the nearer caches.
static long chunk_of(const share *mine) {
  const arguments *a = mine->of;
  const long chunk = (1 << 16) / (mine->rows * GATES * a->units + 1);
  return chunk < 1 ? 1 : chunk < a->steps ? chunk : a->steps;
}

// Of a gate that is a sum, both biases.
static inline real bias_of_input(const arguments *a, int gate, long unit,
                                 long left) {
  const real bias = load(a->b_ih + unit, left);
  return PLACES[gate] < 0 ? bias + load(a->b_hh + unit, left) : bias;
}

// The input product of one row at one time, whose place among them is `at`.
static void put_input(void *context, long at, long group, const real *sums) {
  const input_products *of = context;
  const arguments *a = of->mine->of;
  const long blocks = VECTORS / GATES, first = of->mine->n * GATES * a->units;
  for (long k = 0; k < blocks * GATES; k++) {
    const long gate = k % GATES, unit = (group * blocks + k / GATES) * LANES;
    const long place = gate * a->units + unit, left = a->units - unit;
    if (left <= 0)
      return;
    real value = sums[k];
    if (a->b_ih && !a->norm_ih)
      value += bias_of_input(a, gate, first + place, left);
    store(of->values + at * GATES * a->units + place, value, left);
  }
}

// Normalises the input products of such a place, scales them, adds the biases.
static void scale_input(const input_products *of, long at) {
  const arguments *a = of->mine->of;
  for (int gate = 0; gate < GATES; gate++) {
    const long place = at * GATES + gate;
    const long first = (of->mine->n * GATES + gate) * a->units;
    scalar *values = of->values + place * a->units;
    const scalar rstd =
        normalise(values, a->units, a->rms, a->norm_ih + first,
                  a->normal_x ? a->normal_x + place * a->units : 0);
    if (a->normal_x)
      a->rstd_x[place] = rstd;
    for (long unit = 0; a->b_ih && unit < a->units; unit += LANES) {
      const long left = a->units - unit;
      add_to(values + unit, bias_of_input(a, gate, first + unit, left), left);
    }
  }
}

// Those of the steps from the `first` on, of rows that are computed: `live` has
// room for two numbers of each.
static void take_inputs(input_products *of, long first, long *live) {
  const share *mine = of->mine;
  const arguments *a = mine->of;
  const long left = a->steps - first;
  const long steps = left < of->chunk ? left : of->chunk;
  long *at = live + of->chunk * mine->rows, count = 0;
  of->first_step = first;
  for (long step = 0; step < steps; step++)
    for (long row = 0; row < mine->rows; row++) {
      const long t = first + step, time = time_of(mine, row, t);
      if (!is_live(mine, row, t))
        continue;
      at[count] = time * a->batch + batch_row(mine, row);
      live[count++] =
          a->save ? place_of(mine, row, time) : step * mine->rows + row;
    }
  product_apart(&of->weights, mine->packed, a->x, a->features, at, live, count,
                0, put_input, of);
  for (long k = 0; a->norm_ih && k < count; k++)
    scale_input(of, live[k]);
}
