// SPDX-License-Identifier: Apache-2.0
// The gradients of weights and of x, once the loop has those of the gates:
// products over all steps, of some places (a row at a time) at once, so that
// what is multiplied stays in the nearer caches, and of those alone that the
// loop computed. Of calls that are too short to be a library's. Each thread
// takes all places, of lines of its own, so that no sum depends on how many
// there are.

enum { AT_ONCE = 64 }; // places

// A part of some lines, or columns: from the first one on, before the last.
typedef struct {
  long first, last;
} part;

typedef struct {
  const arguments *of;
  part gates, features, projected; // this thread's
  const share *all;                // rows of recurrence n
  long t, row;                     // where the next places begin
  long places[AT_ONCE], count;
  int adds;       // whether there were others before
  scalar *panel;  // what is multiplied with `turned`, as a product takes it
  scalar *w_ih;   // likewise, of its features, with the gradients of gates
  scalar *turned; // (GATES * units, AT_ONCE), of gates or their products
  scalar *beside; // (AT_ONCE, ·), what is to be packed
  long *lines;    // 0, 1, ... of all lines of `turned`
} gradients;

// Values of all places, from the first one on, which lie `apart`.
typedef struct {
  const scalar *from;
  long apart;
} values;

// The next places that were computed.
static void advance_places(gradients *self) {
  const share *all = self->all;
  const arguments *a = all->of;
  for (self->count = 0; self->t < a->steps; self->t++, self->row = 0)
    for (; self->row < a->batch; self->row++) {
      if (self->count == AT_ONCE)
        return;
      if (is_live(all, self->row, self->t))
        self->places[self->count++] =
            time_of(all, self->row, self->t) * a->batch + self->row;
    }
}

// Vector after vector shared out among so many threads.
static part part_of(long count, long number, long threads) {
  const long vectors = divided_up(count, LANES);
  const long first = vectors * number / threads * LANES;
  const long last = vectors * (number + 1) / threads * LANES;
  return (part){first, last < count ? last : count};
}

static part common(part of, long first, long count) {
  const long last = first + count;
  return (part){of.first > first ? of.first : first,
                of.last < last ? of.last : last};
}

// Where sums go: lines of so many columns, which lie `apart`.
typedef struct {
  scalar *to;
  long columns, apart;
  int adds;
} sums_of_lines;

static void put_lines(void *context, long line, long group, const real *sums) {
  const sums_of_lines *into = context;
  for (long vector = 0; vector < VECTORS; vector++) {
    const long column = (group * VECTORS + vector) * LANES;
    const long left = into->columns - column;
    scalar *here = into->to + line * into->apart + column;
    if (left <= 0)
      return;
    store(here, into->adds ? load(here, left) + sums[vector] : sums[vector],
          left);
  }
}

// Of a tensor (T, B, N, lines, columns) one line.
static values line_of(const gradients *self, const scalar *tensor, long lines,
                      long line, long columns) {
  const long at = (self->all->n * lines + line) * columns;
  return (values){tensor + at, self->of->across * lines * columns};
}

// The gradient of what enters a gate from the input or, where that is another
// one, from the product.
static values of_gate(const gradients *self, int gate, int of_product) {
  const arguments *a = self->of;
  if (of_product && PLACES[gate] >= 0)
    return line_of(self, a->d_recurrent, RECURRENT, PLACES[gate], a->units);
  return line_of(self, a->d_gates, GATES, gate, a->units);
}

// Lines of `turned`, from `line` on, of so many columns; those of `wanted`.
static void turn_lines(const gradients *self, values of, long line,
                       long columns, part wanted) {
  wanted = common(wanted, line, columns);
  of.from += wanted.first - line;
  columns = wanted.last - wanted.first;
  scalar *to = self->turned + wanted.first * AT_ONCE;
  for (long column = 0; column < columns; column += LANES)
    for (long place = 0; place < self->count; place += LANES) {
      real square[LANES];
      for (long k = 0; k < LANES; k++)
        square[k] =
            place + k < self->count
                ? load(of.from + self->places[place + k] * of.apart + column,
                       columns - column)
                : K(0);
      turn(square);
      for (long k = 0; k < LANES && column + k < columns; k++)
        store(to + (column + k) * AT_ONCE + place, square[k], LANES);
    }
}

// The sums over the places.
static void add_up(const gradients *self, values of, long columns, scalar *to) {
  for (long column = 0; column < columns; column += LANES) {
    const long left = columns - column;
    real sum = {0};
    for (long place = 0; place < self->count; place++)
      sum += load(of.from + self->places[place] * of.apart + column, left);
    add_to(to + column, sum, left);
  }
}

// Adds up the products of some lines of `turned` with the values beside them.
static void multiply_turned(const gradients *self, part lines, long columns,
                            scalar *to) {
  const layout of = {.units = columns,
                     .parts = 1,
                     .depth = self->count,
                     .unit_apart = 1,
                     .depth_apart = columns,
                     .matrix = self->beside};
  sums_of_lines into = {to + lines.first * columns, columns, columns,
                        self->adds};
  if (lines.first >= lines.last)
    return;
  pack(&of, 0, self->panel);
  product_apart(&of, self->panel, self->turned + lines.first * AT_ONCE, AT_ONCE,
                self->lines, self->lines, lines.last - lines.first, 0,
                put_lines, &into);
}

static void put_beside(const gradients *self, values of, long columns) {
  for (long k = 0; k < self->count; k++)
    memcpy(self->beside + k * columns, of.from + self->places[k] * of.apart,
           columns * sizeof(scalar));
}

// What entered the product of a gate, or of all.
static void put_entered_beside(const gradients *self, int gate) {
  const share *all = self->all;
  const arguments *a = all->of;
  backward_loop loop = {.mine = all};
  for (long k = 0; k < self->count; k++) {
    const long row = self->places[k] % a->batch;
    const long time = self->places[k] / a->batch;
    scalar *to = self->beside + k * a->width;
    loop.t = time_of(all, row, time);
    const scalar *from = state_before(&loop, 0, row, time);
    const scalar *drop = a->drop ? drop_of(all, row, gate) : 0;
    for (long unit = 0; unit < a->width; unit++)
      to[unit] =
          (from ? from[unit] : INITIAL[0]) * (drop ? drop[unit] : (scalar)1);
  }
}

static void of_recurrent_weights(const gradients *self) {
  const arguments *a = self->of;
  const long n = self->all->n, units = a->units;
  scalar *to = a->d_w_hh + n * GATES * units * a->width;
  for (int gate = 0; gate < GATES; gate++)
    if (a->norm || PLACES[gate] >= 0)
      turn_lines(self,
                 a->norm ? line_of(self, a->d_normed, GATES, gate, units)
                         : of_gate(self, gate, 1),
                 gate * units, units, self->gates);
  const int by_gate = a->masks > 1;
  for (int gate = 0; gate < (by_gate ? GATES : 1); gate++) {
    put_entered_beside(self, gate);
    multiply_turned(
        self, by_gate ? common(self->gates, gate * units, units) : self->gates,
        a->width, to);
  }
  if (!a->d_w_hr)
    return;
  turn_lines(self, line_of(self, a->d_made, 1, 0, a->width), 0, a->width,
             self->projected);
  put_beside(self, line_of(self, a->made, 1, 0, units), units);
  multiply_turned(self, self->projected, units,
                  a->d_w_hr + n * a->width * units);
}

// The sums of some gates' gradients, of what enters them and of products.
static void of_biases(const gradients *self, part wanted) {
  const arguments *a = self->of;
  const long units = a->units, n = self->all->n * GATES * units;
  for (int gate = 0; a->d_b_ih && gate < GATES; gate++)
    for (int k = 0; k < 2; k++) {
      const part own = common(wanted, gate * units, units);
      values of = of_gate(self, gate, k);
      of.from += own.first - gate * units;
      add_up(self, of, own.last - own.first,
             (k ? a->d_b_hh : a->d_b_ih) + n + own.first);
    }
}

// The gradients of a gate's input products before their normalisation, in the
// place of those after it.
static void through_norm(const gradients *self, long gate) {
  const share *all = self->all;
  const arguments *a = all->of;
  const long at = (all->n * GATES + gate) * a->units;
  for (long k = 0; k < self->count; k++) {
    const long of = (self->places[k] * a->across + all->n) * GATES + gate;
    normalise_back(a->d_gates + of * a->units, a->normal_x + of * a->units,
                   a->rstd_x[of], a->norm_ih + at, a->d_norm_ih + at, a->units,
                   a->rms);
  }
}

static void of_places(const gradients *self) {
  const arguments *a = self->of;
  const long n = self->all->n, of_gates = GATES * a->units;
  if (!a->norm_ih)
    of_biases(self, self->gates);
  const values of_all = line_of(self, a->d_gates, 1, 0, of_gates);
  turn_lines(self, of_all, 0, of_gates, self->gates);
  put_beside(self, (values){a->x, a->features}, a->features);
  multiply_turned(self, self->gates, a->features,
                  a->d_w_ih + n * of_gates * a->features);
  const part columns = self->features;
  if (a->d_x && columns.first < columns.last) {
    const layout of = {
        .units = columns.last - columns.first, .parts = 1, .depth = of_gates};
    sums_of_lines into = {a->d_x + columns.first, of.units, a->features, n > 0};
    product_apart(&of, self->w_ih, of_all.from, of_all.apart, self->places,
                  self->places, self->count, 0, put_lines, &into);
  }
  of_recurrent_weights(self);
}

// What is done with some places of a recurrence, and with the next ones.
static void of_recurrence(gradients *self, const share *all,
                          void (*with)(const gradients *)) {
  self->all = all;
  self->t = self->row = self->adds = 0;
  do { // of no place the gradients are 0
    advance_places(self);
    with(self);
    self->adds = 1;
  } while (self->t < self->of->steps);
}

// What the threads have to do; `failed` where memory is short.
typedef struct {
  const arguments *of;
  int failed;
} all_gradients;

// Of one gate all that its normalisation needs, and the sums before it.
static void of_normed_gate(const gradients *self) {
  const arguments *a = self->of;
  const long gate = self->gates.first;
  of_biases(self, (part){gate * a->units, (gate + 1) * a->units});
  through_norm(self, gate);
}

static void normalise_part(void *given, long number) {
  const arguments *a = ((all_gradients *)given)->of;
  const share all = {a, 0, number / GATES, 0, 1, a->batch};
  gradients self = {a, .gates = {number % GATES}};
  of_recurrence(&self, &all, of_normed_gate);
}

static void take_part(void *given, long number) {
  all_gradients *every = given;
  const arguments *a = every->of;
  const long of_gates = GATES * a->units, threads = a->gradient_threads;
  const long widest = a->features > a->units ? a->features : a->units;
  const part columns = part_of(a->features, number, threads);
  const layout panel = {.units = widest, .parts = 1, .depth = AT_ONCE};
  const layout w_ih = {.units = columns.last - columns.first,
                       .parts = 1,
                       .depth = of_gates,
                       .unit_apart = 1,
                       .depth_apart = a->features,
                       .matrix = a->w_ih + columns.first,
                       .apart = of_gates * a->features};
  const int of_x = a->d_x && columns.first < columns.last;
  const long sizes[] = {packed_size(&panel), of_x ? packed_size(&w_ih) : 0,
                        of_gates * AT_ONCE, widest * AT_ONCE};
  scalar *room = take(OF_WEIGHTS, sizes[0] + sizes[1] + sizes[2] + sizes[3]);
  long *lines = malloc(of_gates * sizeof(long));
  if (!room || !lines)
    __atomic_store_n(&every->failed, 1, __ATOMIC_RELAXED);
  else {
    gradients self = {a,
                      .gates = part_of(of_gates, number, threads),
                      .features = columns,
                      .projected = part_of(a->width, number, threads),
                      .panel = room,
                      .lines = lines};
    self.w_ih = self.panel + sizes[0];
    self.turned = self.w_ih + sizes[1];
    self.beside = self.turned + sizes[2];
    for (long k = 0; k < of_gates; k++)
      lines[k] = k;
    for (long n = 0; n < a->across; n++) {
      const share all = {a, 0, n, 0, 1, a->batch};
      if (of_x)
        pack(&w_ih, n, self.w_ih);
      of_recurrence(&self, &all, of_places);
    }
  }
  free(lines);
  give(OF_WEIGHTS, room);
}

// Returns 1 where memory is short.
static int take_gradients(const arguments *a) {
  all_gradients every = {a, 0};
  if (a->norm_ih)
    in_threads(a, a->gradient_threads,
               (pieces){normalise_part, &every, 0, a->across * GATES});
  in_threads(a, a->gradient_threads,
             (pieces){take_part, &every, 0, a->gradient_threads});
  return every.failed;
}

static void clear(const arguments *a) {
  const size_t row = a->across * a->units * sizeof(scalar);
  scalar *const sums[] = {a->d_b_ih, a->d_b_hh, a->d_norm_ih};
  for (int k = 0; k < 3; k++)
    if (sums[k])
      memset(sums[k], 0, GATES * row);
  if (PARAMS)
    memset(a->d_params, 0, PARAMS * a->batch * row);
  if (a->norm)
    memset(a->d_norm, 0, GATES * a->batch * row);
  if (a->d_x && (a->flags || a->lengths)) // some places may not be computed
    memset(a->d_x, 0, a->steps * a->batch * a->features * sizeof(scalar));
}

// What a loop leaves for each row, added up.
static void add_rows(const arguments *a, const scalar *of_rows, long count,
                     scalar *to) {
  const long each = a->across * count * a->units;
  if (!to)
    return;
  memcpy(to, of_rows, each * sizeof(scalar));
  for (long row = 1; row < a->batch; row++)
    for (long k = 0; k < each; k += LANES)
      add_to(to + k, load(of_rows + row * each + k, each - k), each - k);
}

// The backward pass. Returns 1 where memory is short.
int run(const arguments *a) {
  const int apart = !a->d_w_hh; // the gradients of weights are
  if (!apart)
    clear(a);
  if (run_shares(a, backward_layout, backward_share))
    return 1;
  add_rows(a, a->d_params, PARAMS, a->d_params_of_all);
  add_rows(a, a->d_norm, GATES, a->d_norm_of_all);
  return !apart && take_gradients(a);
}
