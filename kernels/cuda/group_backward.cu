// SPDX-License-Identifier: Apache-2.0
// The backward time loop beside group_forward.cu; sizes and grid as there. The
// weights stand transposed: a unit's d_h takes the d_gates of all units, which
// are what the members exchange. A step's gradients are computed, published and
// only then multiplied, so that one exchange a step is enough. The gradients of
// weights, biases and input are products over all steps, made elsewhere.
#include "group_tiles.cuh"

struct Backward : Common {
  // What a thread keeps of its pair of units for all rows.
  struct Pair {
    float params[ANY_PARAMS][2], d_params[ANY_PARAMS][2];
  };
  const Scalar *p_gates;     // (T, B, N, G, H) pre-activations
  const Scalar *p_recurrent; // (T, B, N, R, H)
  const float *p_inner;      // (S - 1, T, B, N, H)
  const Scalar *p_y;         // (T, B, N, H)
  const Scalar *p_initial;   // (S, B, N, H)
  const Scalar *p_d_y;       // (T, B, N, H)
  Scalar *p_d_gates;         // (T, B, N, G, H) out
  const float *p_d_inner;    // (S - 1, T, B, N, H), with INNER
  Scalar *p_d_recurrent;     // (T, B, N, R, H) out
  float *p_d_values;         // (S, 1 or T, B, N, H) sums, with VALUES
  float *p_d_params;         // (shares, N, P, H) sums
  long long shares, d_y_stride_t, d_y_stride_b, d_y_stride_n;
};
typedef Backward::Pair Pair;

// One step of one pair: what was saved, then the gradients.
struct Step {
  // As loaded: the states before the step as h, as the others in fp32, and as
  // the initial ones, of which `unpack` picks.
  RawPair raw_a[GATES], raw_r[ANY_SPLITS], raw_d_y, raw_h, raw_initial[STATES];
  float inner[STATES][2];
  float a[GATES][2], r[ANY_SPLITS][2], before[STATES][2], d_y[2];
  float d_a[GATES][2], d_r[ANY_SPLITS][2], d_inner[STATES][2];
  long long time;
  int flags;
  unsigned zone;
};

// The states that the step before left, or the initial ones.
DEVICE void load_before(Step &step, const Backward &b, const Seat &seat,
                        const Spot &spot, const Row &row, int t) {
  const long long size = b.B * b.N * b.H;
  const long long unit = (row.batch * b.N + seat.n) * b.H + spot.unit;
  const long long place =
      t ? time_of(t - 1, row.length, b.reversed) * size + unit : unit;
  load_raw(step.raw_h, (t ? b.p_y : b.p_initial) + place, row.count);
#pragma unroll
  for (int s = 1; s < STATES; s++) {
    load_pair_f32(step.inner[s], b.p_inner + (s - 1) * b.T * size + place,
                  t ? row.count : 0);
    load_raw(step.raw_initial[s], b.p_initial + s * size + unit,
             t ? 0 : row.count);
  }
}

// What `prefetch` brought, as numbers.
DEVICE void unpack(Step &step, int t) {
#pragma unroll
  for (int gate = 0; gate < GATES; gate++)
    unpack(step.a[gate], step.raw_a[gate]);
#pragma unroll
  for (int k = 0; k < SPLITS; k++)
    unpack(step.r[k], step.raw_r[k]);
  unpack(step.d_y, step.raw_d_y);
  unpack(step.before[0], step.raw_h);
#pragma unroll
  for (int s = 1; s < STATES; s++) {
    unpack(step.before[s], step.raw_initial[s]);
#pragma unroll
    for (int unit = 0; unit < 2; unit++)
      step.before[s][unit] = t ? step.inner[s][unit] : step.before[s][unit];
  }
}

// What the step needs, on its way before the wait for the others' words.
DEVICE void prefetch(Step &step, const Backward &b, const Seat &seat,
                     const Spot &spot, const Row &row, int t) {
  step.time = time_of(t, row.length, b.reversed);
  const Scalar *p = b.p_gates + step.time * b.stride_t +
                    row.batch * b.stride_b + seat.n * b.stride_n + spot.unit;
#pragma unroll
  for (int gate = 0; gate < GATES; gate++)
    load_raw(step.raw_a[gate], p + gate * b.stride_g, row.count);
  const long long place = (step.time * b.B + row.batch) * b.N + seat.n;
  const Scalar *p_recurrent = b.p_recurrent + place * SPLITS * b.H + spot.unit;
#pragma unroll
  for (int k = 0; k < SPLITS; k++)
    load_raw(step.raw_r[k], p_recurrent + k * b.H, row.count);
  load_raw(step.raw_d_y,
           b.p_d_y + step.time * b.d_y_stride_t + row.batch * b.d_y_stride_b +
               seat.n * b.d_y_stride_n + spot.unit,
           row.count);
  if constexpr (INNER) {
    const long long size = b.B * b.N * b.H;
#pragma unroll
    for (int s = 1; s < STATES; s++)
      load_pair_f32(step.d_inner[s],
                    b.p_d_inner + ((s - 1) * b.T * b.B * b.N + place) * b.H +
                        spot.unit,
                    row.count);
  }
  step.zone = zone_of(b, seat, spot, row, step.time);
  step.flags = flags_of(b, seat, row, t);
  load_before(step, b, seat, spot, row, t);
}

DEVICE void differentiate(Step &step, Pair &pair, Row &row, int unit,
                          bool active) {
  float a[GATES], r[ANY_SPLITS], s[STATES], p[ANY_PARAMS], none[1], d[STATES];
  float whole[STATES]; // gradients after the step
  float d_a[GATES], d_r[ANY_SPLITS], d_s[STATES], d_p[ANY_PARAMS], d_none[1];
#pragma unroll
  for (int gate = 0; gate < GATES; gate++)
    a[gate] = step.a[gate][unit];
#pragma unroll
  for (int k = 0; k < SPLITS; k++)
    r[k] = step.r[k][unit];
#pragma unroll
  for (int k = 0; k < PARAMS; k++)
    p[k] = pair.params[k][unit];
#pragma unroll
  for (int k = 0; k < STATES; k++) {
    s[k] = step.before[k][unit];
    whole[k] = row.state[k][unit];
    if (k == 0)
      whole[k] += step.d_y[unit];
    if (INNER && k > 0)
      whole[k] += step.d_inner[k][unit];
    d[k] = step.zone >> (2 * k + unit) & 1 ? 0.0f : whole[k];
  }
  step_0_backward(a, r, s, p, none, d, d_a, d_r, d_s, d_p, d_none);
  // Steps that a row has not may give anything: it is selected away.
  active = active && !(step.flags & SKIP);
#pragma unroll
  for (int gate = 0; gate < GATES; gate++)
    step.d_a[gate][unit] = active ? d_a[gate] : 0.0f;
#pragma unroll
  for (int k = 0; k < SPLITS; k++)
    step.d_r[k][unit] = active ? d_r[k] : 0.0f;
#pragma unroll
  for (int k = 0; k < PARAMS; k++)
    pair.d_params[k][unit] += active ? d_p[k] : 0.0f;
#pragma unroll
  for (int k = 0; k < STATES; k++) {
    float d_before = d_s[k];
    if (step.zone >> (2 * k + unit) & 1)
      d_before += whole[k];
    if (k > 0 || FLAGS) // else y is 0 beyond a row's length, whatever h is
      row.state[k][unit] = whole[k];
    row.state[k][unit] = active ? d_before : row.state[k][unit];
  }
}

DEVICE void store(const Step &step, const Backward &b, const Seat &seat,
                  const Spot &spot, const Row &row) {
  Scalar *p = b.p_d_gates + step.time * b.stride_t + row.batch * b.stride_b +
              seat.n * b.stride_n + spot.unit;
#pragma unroll
  for (int gate = 0; gate < GATES; gate++)
    store_pair(p + gate * b.stride_g, step.d_a[gate], row.count);
  const long long place = (step.time * b.B + row.batch) * b.N + seat.n;
  Scalar *p_recurrent = b.p_d_recurrent + place * SPLITS * b.H + spot.unit;
#pragma unroll
  for (int k = 0; k < SPLITS; k++)
    store_pair(p_recurrent + k * b.H, step.d_r[k], row.count);
}

DEVICE void prepare(Pair &, const Backward &, const Seat &, const Spot &) {}

// Adds to a tile's d_h what its d_gates of publication `number` give.
DEVICE void add_product(Row (&rows)[OWNED], const Seat &seat,
                        const Spot (&spots)[OWNED], const Weights &weights,
                        Exchange &exchange, int number, int tile) {
  Accumulators sums;
  Totals totals = {};
  product(sums, weights, exchange, seat, number, tile);
  join(totals, sums, seat, spots, number * TILES + tile);
#pragma unroll
  for (int k = 0; k < OWNED; k++)
#pragma unroll
    for (int unit = 0; unit < 2; unit++)
#pragma unroll
      for (int r = 0; r < RESULTS; r++)
        rows[k].state[0][unit] +=
            DROPS ? totals[k][r][unit] * rows[k].drop[r][unit]
                  : totals[k][r][unit];
}

// Before step t the states were set anew: their gradients go to what they were
// set to.
DEVICE void cut(Row &row, int flags, const Backward &b, const Seat &seat,
                const Spot &spot, int t) {
  if constexpr (FLAGS) {
    if (!(flags & RESET))
      return;
#pragma unroll
    for (int k = 0; k < STATES; k++)
#pragma unroll
      for (int unit = 0; unit < 2; unit++) {
        if (VALUES && unit < row.count)
          b.p_d_values[value_at(b, seat, spot, row, t, k) + unit] +=
              row.state[k][unit];
        row.state[k][unit] = 0.0f;
      }
  }
}

// One tile's step: multiplies the publication before `number`, unless it is the
// first, and publishes `number`, unless all steps are done (t < 0).
DEVICE void advance(const Backward &b, const Seat &seat,
                    const Spot (&spots)[OWNED], Pair (&pairs)[OWNED],
                    Row (&rows)[OWNED], const Weights &weights,
                    Exchange &exchange, int t, int number, int tile) {
  Step steps[OWNED];
  int later[OWNED];
#pragma unroll
  for (int k = 0; k < OWNED; k++)
    later[k] = flags_of(b, seat, rows[k], t + 1);
#pragma unroll
  for (int k = 0; k < OWNED && t >= 0; k++)
    prefetch(steps[k], b, seat, spots[k], rows[k], t);
  if (t + 1 < b.T)
    add_product(rows, seat, spots, weights, exchange, number - 1, tile);
#pragma unroll
  for (int k = 0; k < OWNED; k++)
    cut(rows[k], later[k], b, seat, spots[k], t + 1);
  if (t < 0)
    return;
#pragma unroll
  for (int k = 0; k < OWNED; k++) {
    if (!spots[k].taken)
      continue;
    unpack(steps[k], t);
    reset(steps[k].before, steps[k].flags, b, seat, spots[k], rows[k], t);
#pragma unroll
    for (int unit = 0; unit < 2; unit++)
      differentiate(steps[k], pairs[k], rows[k], unit, t < rows[k].length);
#pragma unroll
    for (int gate = 0; gate < GATES; gate++) {
      const int kept = KEPT_OF[gate];
      exchange.publish(seat, spots[k], number, tile, gate,
                       kept < 0 ? steps[k].d_a[gate]
                                : steps[k].d_r[kept < 0 ? 0 : kept]);
    }
  }
  exchange.published(tile);
#pragma unroll
  for (int k = 0; k < OWNED; k++)
    if (spots[k].taken)
      store(steps[k], b, seat, spots[k], rows[k]);
}

// The steps of TILES tiles that start at row `first`; their publications are
// numbered from `number`.
DEVICE void run(const Backward &b, const Seat &seat, const Spot (&spots)[OWNED],
                Pair (&pairs)[OWNED], const Weights &weights,
                Exchange &exchange, long long first, int number) {
  Row rows[TILES][OWNED];
#pragma unroll
  for (int tile = 0; tile < TILES; tile++) {
    begin(rows[tile], b, seat, spots, first + tile * ROWS);
#pragma unroll
    for (int k = 0; k < OWNED; k++)
      load_drop(rows[tile][k], b, seat, spots[k]);
  }
  for (int i = 0; i <= b.T; i++) {
    if (i > 0)
      exchange.retire(seat, spots, number + i - 1);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
      advance(b, seat, spots, pairs, rows[tile], weights, exchange,
              static_cast<int>(b.T) - 1 - i, number + i, tile);
  }
#pragma unroll
  for (int tile = 0; tile < TILES; tile++)
    finish(rows[tile], b, seat, spots);
}

// A thread's share of the parameters' gradients: four lanes hold other rows of
// the same units; spots and warps along the depth may too.
DEVICE void store_pairs(const Backward &b, const Seat &seat,
                        const Spot (&spots)[OWNED],
                        const Pair (&pairs)[OWNED]) {
  const long long share = seat.group * ALONG + seat.along;
#pragma unroll
  for (int item = 0; item < OWNED * PARAMS; item++) {
    const Spot &spot = spots[item / ANY_PARAMS];
    const int k = item % ANY_PARAMS;
    float *p =
        b.p_d_params + ((share * b.N + seat.n) * PARAMS + k) * b.H + spot.unit;
#pragma unroll
    for (int unit = 0; unit < 2; unit++) {
      float sum = pairs[item / ANY_PARAMS].d_params[k][unit];
      sum += shuffle_xor(sum, 1);
      sum += shuffle_xor(sum, 2);
      if (seat.j == 0 && unit < spot.count)
        p[unit] += sum;
    }
  }
}

DEVICE void spoil_outputs(const Backward &b) {
  const long long units = b.B * b.N * b.H;
  spoil_gates(b.p_d_gates, b);
  spoil(b.p_d_recurrent, b.T * SPLITS * units);
  spoil(b.p_end, STATES * units);
  spoil(b.p_d_params, b.shares * b.N * PARAMS * b.H);
  if constexpr (VALUES > 0)
    spoil(b.p_d_values, (VALUES == 2 ? b.T : 1) * STATES * units);
}

extern "C" __global__ void LAUNCH_BOUNDS group_backward(
    const Scalar *p_gates,        // (T, B, N, G, H) pre-activations
    const Scalar *p_recurrent,    // (T, B, N, R, H)
    const float *p_inner,         // (S - 1, T, B, N, H)
    const Scalar *p_y,            // (T, B, N, H)
    const Scalar *p_initial,      // (S, B, N, H)
    const Scalar *p_w,            // (N, G, H, H)
    const Scalar *p_params,       // (N, P, H) or null
    const long long *p_lengths,   // (B,) or null
    const unsigned char *p_flags, // (T, B, N), with FLAGS
    const Scalar *p_values,       // (S, 1 or T, B, N, H), with VALUES
    const Scalar *p_drop,         // (B, N, DROPS, H)
    const unsigned char *p_zone,  // (S, T, B, N, H), with ZONE
    const float *p_d_inner,       // (S - 1, T, B, N, H), with INNER
    const Scalar *p_d_y,          // (T, B, N, H)
    const Scalar *p_d_final,      // (S, B, N, H)
    Scalar *p_d_gates,            // (T, B, N, G, H) out
    Scalar *p_d_recurrent,        // (T, B, N, R, H) out
    Scalar *p_d_initial,          // (S, B, N, H) out
    float *p_d_params,            // (groups x ALONG, N, P, H) zeros, out
    float *p_d_values,           // (S, 1 or T, B, N, H) zeros, out, with VALUES
    Word *p_words,               // (groups, RING, SLOT), all bits set
    unsigned *p_left,            // (1,) zero, of all launches of a call
    unsigned *p_counters,        // (1 + groups x TILES,) zeros
    unsigned long long *p_error, // (1,) in the host's memory
    unsigned long long limit,    // nanoseconds that a wait may take
    unsigned long long reverse,  // bit n % period: n runs backwards in time
    long long stride_t, long long stride_b, long long stride_n,
    long long stride_g, // of gates and d_gates
    long long d_y_stride_t, long long d_y_stride_b, long long d_y_stride_n,
    int T, int B, int N, int H, int period, int first_n, int groups,
    int launch) {
  const Seat seat(first_n, groups);
  const bool reversed = reverse >> (seat.n % period) & 1;
  const Backward b = {{T, B, N, H, reversed, stride_t, stride_b, stride_n,
                       stride_g, p_w, p_params, p_lengths, p_flags, p_values,
                       p_drop, p_zone, p_d_final, p_d_initial},
                      p_gates,
                      p_recurrent,
                      p_inner,
                      p_y,
                      p_initial,
                      p_d_y,
                      p_d_gates,
                      p_d_inner,
                      p_d_recurrent,
                      p_d_values,
                      p_d_params,
                      static_cast<long long>(groups) * ALONG,
                      d_y_stride_t,
                      d_y_stride_b,
                      d_y_stride_n};
  Exchange exchange(p_words, p_left, p_counters, p_error, limit, launch);
  run_tiles(b, seat, exchange, groups);
}
