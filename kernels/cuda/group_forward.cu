// SPDX-License-Identifier: Apache-2.0
// The forward time loop of any recurrence with one product a step, or two, by
// groups of blocks. Sizes: T time, B batch, N independent recurrences, G gates,
// R split gates, S states, P per-unit parameters, H hidden units. STEP, what
// follows the last product, and `step_0`, what follows the first of two, are
// generated from the recurrence, so nothing in here knows any cell. The grid is
// (N of this launch) x (groups of each) x MEMBERS blocks, all of which are
// resident.
#include "group_tiles.cuh"

struct Forward : Common {
  // What a thread keeps of its pair of units for all rows.
  struct Pair {
    float bias[ANY_SPLITS][2], params[ANY_PARAMS][2], scale[ANY_NORM][2];
  };
  Scalar *p_gates;      // (T, B, N, G, H) in: projection; out: pre-activations
  Scalar *p_recurrent;  // (T, B, N, R, H) out, with SAVE
  float *p_inner;       // (S - 1, T, B, N, H) out, with INNER
  Scalar *p_y;          // (T, B, N, H) out
  const Scalar *p_b_hh; // (N, G, H), of which split gates' are read, or null
};
typedef Forward::Pair Pair;

// One step of one pair: the projection, then what comes of it.
struct Step {
  RawPair projected[GATES];
  float a[GATES][2], r[ANY_SPLITS][2], y[2], fresh[2];
  float entering[2]; // the second product
  long long time;
  int flags, next; // of this step and of the one after
  unsigned keeps;  // bits: units that keep a state
};

// What is under way for the tile that comes next.
struct Next {
  Words<First> words;
  Step steps[OWNED];
};

// The stage's projection, on its way before the wait for the others' words.
template <class S>
DEVICE void prefetch(Step &step, const Forward &f, const Seat &seat,
                     const Spot &spot, const Row &row, int t) {
  step.time = time_of(t, row.length, f.reversed);
  const Scalar *p = f.p_gates + gates_of(f, seat, spot, row, step.time);
#pragma unroll
  for (int gate = S::START; gate < S::STOP; gate++)
    load_raw(step.projected[gate], p + gate * f.stride_g, row.count);
  if constexpr (!S::LAST)
    return;
  step.keeps = keeps_of(f, seat, spot, row, step.time);
  step.flags = flags_of(f, seat, row, t);
  step.next = flags_of(f, seat, row, t + 1);
  if constexpr (FLAGS)
    load_value(step.fresh, f, seat, spot, row, t + 1 < f.T ? t + 1 : t, 0);
}

// What the generated step takes of one unit.
struct Unit {
  float a[GATES], r[ANY_SPLITS], s[STATES], p[ANY_PARAMS], v[ANY_HANDED];
};

template <class S>
DEVICE void gather(Unit &at, const Step &step, const Pair &pair, const Row &row,
                   const float (&products)[RESULTS][2], int unit) {
#pragma unroll
  for (int gate = S::START; gate < S::STOP; gate++) {
    const int kept = KEPT_OF[gate], own = gate - S::START;
    at.a[own] = step.a[gate][unit];
    if (kept < 0)
      at.a[own] += products[own][unit];
    else
      at.r[kept - S::BEFORE] = products[own][unit] + pair.bias[kept][unit];
  }
#pragma unroll
  for (int k = 0; k < STATES; k++)
    at.s[k] = row.state[k][unit];
#pragma unroll
  for (int k = 0; k < PARAMS; k++)
    at.p[k] = pair.params[k][unit];
#pragma unroll
  for (int k = 0; S::START > 0 && k < HANDED; k++)
    at.v[k] = row.handed[k][unit];
}

// What the stage's gates were, to be saved.
template <class S> DEVICE void keep(Step &step, const Unit &at, int unit) {
#pragma unroll
  for (int gate = S::START; gate < S::STOP; gate++) {
    const int kept = KEPT_OF[gate];
    step.a[gate][unit] = at.a[gate - S::START];
    if (kept >= 0)
      step.r[kept][unit] = at.r[kept - S::BEFORE];
  }
}

// The first of two parts of a step: what enters the second product.
DEVICE void hand_on(Step &step, const Pair &pair, Row &row,
                    const float (&products)[RESULTS][2], int unit) {
  Unit at;
  float out[1 + HANDED];
  gather<First>(at, step, pair, row, products, unit);
  step_0(at.a, at.r, at.s, at.p, at.v, out);
  keep<First>(step, at, unit);
  step.entering[unit] = out[0];
#pragma unroll
  for (int k = 0; k < HANDED; k++)
    row.handed[k][unit] = out[1 + k];
}

DEVICE void advance_unit(Step &step, const Pair &pair, Row &row,
                         const float (&products)[RESULTS][2], int unit,
                         bool active) {
  Unit at;
  float out[STATES];
  gather<Last>(at, step, pair, row, products, unit);
  STEP(at.a, at.r, at.s, at.p, at.v, out);
  keep<Last>(step, at, unit);
#pragma unroll
  for (int k = 0; k < STATES; k++) {
    const bool kept = step.flags & SKIP || step.keeps >> (2 * k + unit) & 1;
    row.state[k][unit] = active && !kept ? out[k] : at.s[k];
  }
  step.y[unit] = active ? row.state[0][unit] : 0.0f;
}

template <class S>
DEVICE void store(const Step &step, const Forward &f, const Seat &seat,
                  const Spot &spot, const Row &row) {
  const long long place = place_of(f, seat, row, step.time);
  if constexpr (S::LAST)
    store_pair(f.p_y + place * f.H + spot.unit, step.y, row.count);
  if constexpr (SAVE) {
    Scalar *p_gates = f.p_gates + gates_of(f, seat, spot, row, step.time);
#pragma unroll
    for (int gate = S::START; gate < S::STOP; gate++)
      if (KEPT_OF[gate] < 0)
        store_pair(p_gates + gate * f.stride_g, step.a[gate], row.count);
    Scalar *p_recurrent = f.p_recurrent + place * SPLITS * f.H + spot.unit;
#pragma unroll
    for (int gate = S::START; gate < S::STOP; gate++)
      if (KEPT_OF[gate] >= 0)
        store_pair(p_recurrent + KEPT_OF[gate] * f.H, step.r[KEPT_OF[gate]],
                   row.count);
  }
  if constexpr (INNER && S::LAST) {
    float *p_inner = f.p_inner + place * f.H + spot.unit;
#pragma unroll
    for (int k = 1; k < STATES; k++)
      store_pair_f32(p_inner + (k - 1) * f.T * f.B * f.N * f.H, row.state[k],
                     row.count);
  }
}

template <class S>
DEVICE void compute(Step &step, const Pair &pair, Row &row,
                    const float (&products)[RESULTS][2], bool active) {
#pragma unroll
  for (int unit = 0; unit < 2; unit++) {
    if constexpr (S::LAST)
      advance_unit(step, pair, row, products, unit, active);
    else
      hand_on(step, pair, row, products, unit);
  }
}

// h goes to all members as it enters the next step. (A choice between arrays
// would put both into memory.)
DEVICE void publish_next(Exchange &exchange, const Seat &seat, const Spot &spot,
                         const Step &step, const Row &row, int number,
                         int tile) {
  float h[2];
#pragma unroll
  for (int unit = 0; unit < 2; unit++)
    h[unit] =
        FLAGS && step.next & RESET ? step.fresh[unit] : row.state[0][unit];
  publish_entering<First>(exchange, seat, spot, row, number, tile, h);
}

template <class S>
DEVICE void prefetch(Step (&steps)[OWNED], const Forward &f, const Seat &seat,
                     const Spot (&spots)[OWNED], const Row (&rows)[OWNED],
                     int t) {
#pragma unroll
  for (int k = 0; k < OWNED; k++)
    prefetch<S>(steps[k], f, seat, spots[k], rows[k], t);
}

// Publication `number` of sums, and what comes of it.
template <class S>
DEVICE void normalise_totals(Totals &totals, const Forward &f, const Seat &seat,
                             const Spot (&spots)[OWNED],
                             const Pair (&pairs)[OWNED], Exchange &exchange,
                             int number, int tile) {
  const int H = static_cast<int>(f.H);
#pragma unroll
  for (int k = 0; k < OWNED; k++)
    if (spots[k].taken)
      publish_moments<S>(totals[k], seat, spots[k], exchange, number, H);
  exchange.published(tile);
  exchange.retire(seat, spots, number);
  exchange.await(number, tile);
#pragma unroll
  for (int k = 0; k < OWNED; k++)
    if (spots[k].taken)
      normalise<S>(totals[k], pairs[k].scale, seat, spots[k], exchange, number,
                   H);
}

// One tile's stage of a step: collects publication `number`, and publishes the
// next.
template <class S>
DEVICE void advance(const Forward &f, const Seat &seat,
                    const Spot (&spots)[OWNED], const Pair (&pairs)[OWNED],
                    Row (&tiles)[TILES][OWNED], Next &next,
                    const Weights &weights, Exchange &exchange, int t,
                    int number, int tile) {
  Row(&rows)[OWNED] = tiles[tile];
  Step steps[OWNED];
  Accumulators<S> sums;
  Totals totals = {};
  if constexpr (AHEAD) {
#pragma unroll
    for (int k = 0; k < OWNED; k++)
      steps[k] = next.steps[k];
    product<S>(sums, next.words, weights, exchange, seat, number, tile);
    const bool last = tile + 1 == TILES;
    look_ahead(next.words, exchange, seat, number, tile);
    prefetch<S>(next.steps, f, seat, spots, tiles[last ? 0 : tile + 1],
                t + last < f.T ? t + last : t);
  } else {
    prefetch<S>(steps, f, seat, spots, rows, t);
    Words<S> words;
    product<S>(sums, words, weights, exchange, seat, number, tile);
  }
  join<S>(totals, sums, seat, spots, number / OF_A_PRODUCT * TILES + tile);
  if constexpr (NORM)
    normalise_totals<S>(totals, f, seat, spots, pairs, exchange, ++number,
                        tile);
#pragma unroll
  for (int k = 0; k < OWNED; k++) {
    if (OWNERS_ONLY && !spots[k].taken)
      continue;
#pragma unroll
    for (int gate = S::START; gate < S::STOP; gate++)
      unpack(steps[k].a[gate], steps[k].projected[gate]);
    compute<S>(steps[k], pairs[k], rows[k], totals[k], t < rows[k].length);
    if (!S::LAST)
      publish_entering<Last>(exchange, seat, spots[k], rows[k], number + 1,
                             tile, steps[k].entering);
    else if (t + 1 < f.T)
      publish_next(exchange, seat, spots[k], steps[k], rows[k], number + 1,
                   tile);
  }
  if (!S::LAST || t + 1 < f.T)
    exchange.published(tile);
#pragma unroll
  for (int k = 0; k < OWNED; k++) {
    if (OWNERS_ONLY && !spots[k].taken)
      continue;
    store<S>(steps[k], f, seat, spots[k], rows[k]);
    if constexpr (S::LAST)
      reset(rows[k].state, steps[k].next, f, seat, spots[k], rows[k], t + 1);
  }
}

template <class S>
DEVICE void
advance_tiles(const Forward &f, const Seat &seat, const Spot (&spots)[OWNED],
              const Pair (&pairs)[OWNED], Row (&rows)[TILES][OWNED], Next &next,
              const Weights &weights, Exchange &exchange, int t, int number) {
  exchange.retire(seat, spots, number);
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
    advance<S>(f, seat, spots, pairs, rows, next, weights, exchange, t, number,
               tile);
}

DEVICE void prepare(Pair &pair, const Forward &f, const Seat &seat,
                    const Spot &spot) {
#pragma unroll
  for (int gate = 0; gate < GATES; gate++)
    if (KEPT_OF[gate] >= 0)
      load_pair(pair.bias[KEPT_OF[gate]],
                f.p_b_hh +
                    (static_cast<long long>(seat.n) * GATES + gate) * f.H +
                    spot.unit,
                f.p_b_hh ? spot.count : 0);
  load_scale(pair.scale, f, seat, spot);
}

// The steps of TILES tiles that start at row `first`; their publications are
// numbered from `number`.
DEVICE void run(const Forward &f, const Seat &seat, const Spot (&spots)[OWNED],
                const Pair (&pairs)[OWNED], const Weights &weights,
                Exchange &exchange, long long first, int number) {
  Row rows[TILES][OWNED];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    begin(rows[tile], f, seat, spots, first + tile * ROWS);
#pragma unroll
    for (int k = 0; k < OWNED; k++) {
      Row &row = rows[tile][k];
      load_drop(row, f, seat, spots[k]);
      reset(row.state, flags_of(f, seat, row, 0), f, seat, spots[k], row, 0);
      publish_entering<First>(exchange, seat, spots[k], row, number, tile,
                              row.state[0]);
    }
    exchange.published(tile);
  }
  Next next;
  if constexpr (AHEAD) {
    look_ahead(next.words, exchange, seat, number - 1, TILES - 1);
    prefetch<First>(next.steps, f, seat, spots, rows[0], 0);
  }
  for (int t = 0; t < f.T; t++) {
    advance_tiles<First>(f, seat, spots, pairs, rows, next, weights, exchange,
                         t, number + HOPS * t);
    if constexpr (STAGES == 2)
      advance_tiles<Last>(f, seat, spots, pairs, rows, next, weights, exchange,
                          t, number + HOPS * t + OF_A_PRODUCT);
  }
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
    finish(rows[tile], f, seat, spots);
}

DEVICE void store_pairs(const Forward &, const Seat &, const Spot (&)[OWNED],
                        const Pair (&)[OWNED]) {}

DEVICE void spoil_outputs(const Forward &f) {
  const long long units = f.B * f.N * f.H;
  spoil(f.p_y, f.T * units);
  spoil(f.p_end, STATES * units);
  if constexpr (SAVE) {
    spoil_gates(f.p_gates, f);
    spoil(f.p_recurrent, f.T * SPLITS * units);
  }
  if constexpr (INNER)
    spoil(f.p_inner, (STATES - 1) * f.T * units);
}

extern "C" __global__ void LAUNCH_BOUNDS group_forward(
    Scalar *p_gates,              // (T, B, N, G, H), overwritten with SAVE
    Scalar *p_recurrent,          // (T, B, N, R, H) out, with SAVE
    float *p_inner,               // (S - 1, T, B, N, H) out, with INNER
    Scalar *p_y,                  // (T, B, N, H) out
    const Scalar *p_initial,      // (S, B, N, H)
    Scalar *p_final,              // (S, B, N, H) out
    const Scalar *p_w,            // (N, G, H, H)
    const Scalar *p_b_hh,         // (N, G, H), of which split gates' are read
    const Scalar *p_params,       // (N, P, H) or null
    const Scalar *p_norm,         // (N, G, H), with NORM
    const long long *p_lengths,   // (B,) or null
    const unsigned char *p_flags, // (T, B, N), with FLAGS
    const Scalar *p_values,       // (S, 1 or T, B, N, H), with VALUES
    const Scalar *p_drop,         // (B, N, DROPS, H)
    const unsigned char *p_zone,  // (S, T, B, N, H), with ZONE
    Word *p_words,                // (groups, RING, SLOT), all bits set
    unsigned *p_left,             // (1,) zero, of all launches of a call
    unsigned *p_counters,         // (1 + groups x TILES,) zeros
    unsigned long long *p_error,  // (1,) in the host's memory
    unsigned long long limit,     // nanoseconds that a wait may take
    unsigned long long reverse,   // bit n % period: n runs backwards in time
    long long stride_t, long long stride_b, long long stride_n,
    long long stride_g, // of gates
    int T, int B, int N, int H, int period, int first_n, int groups,
    int launch) {
  const Seat seat(first_n, groups);
  const bool reversed = reverse >> (seat.n % period) & 1;
  const Forward f = {{T, B, N, H, reversed, stride_t, stride_b, stride_n,
                      stride_g, p_w, p_params, p_norm, p_lengths, p_flags,
                      p_values, p_drop, p_zone, p_initial, p_final},
                     p_gates,
                     p_recurrent,
                     p_inner,
                     p_y,
                     p_b_hh};
  Exchange exchange(p_words, p_left, p_counters, p_error, limit, launch);
  run_tiles(f, seat, exchange, groups);
}
