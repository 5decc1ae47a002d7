// SPDX-License-Identifier: Apache-2.0
// What a thread does in a backward step of a pair of units: what it loads, the
// derivative of the generated step, and what it stores.
#pragma once
#include "group_tiles.cuh"

struct Backward : Common {
  // What a thread keeps of its pair of units for all rows.
  struct Pair {
    float params[ANY_PARAMS][2], d_params[ANY_PARAMS][2], scale[ANY_NORM][2];
  };
  const Scalar *p_gates;     // (T, B, N, G, H) pre-activations
  const Scalar *p_recurrent; // (T, B, N, R, H)
  const float *p_inner;      // (S - 1, T, B, N, H)
  const Scalar *p_y;         // (T, B, N, H)
  const Scalar *p_initial;   // (S, B, N, H)
  const Scalar *p_normal;    // (T, B, N, G, H) normalised products, with NORM
  const float *p_rstd;       // (T, B, N, G) 1 over their deviations
  const Scalar *p_d_y;       // (T, B, N, H)
  Scalar *p_d_gates;         // (T, B, N, G, H) out
  const float *p_d_inner;    // (S - 1, T, B, N, H), with INNER
  Scalar *p_d_recurrent;     // (T, B, N, R, H) out
  Scalar *p_d_products;      // (T, B, N, G, H) out, with NORM
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
  // Of what the first of two parts hands on: what entered the second product,
  // then the others; and of the states before, as far as the second part goes.
  float d_handed[1 + HANDED][2], d_before[STATES][2];
  Normal normal; // with NORM
  long long time;
  int flags;
  unsigned keeps; // bits: units that keep a state
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

// The normalised products of some gates. In full fp32, which has no registers
// for them and their scales meanwhile, both are loaded when they are needed.
template <int FROM, int TO>
DEVICE void load_normal(Step &step, const Backward &b, const Seat &seat,
                        const Spot &spot, const Row &row) {
  const long long place = place_of(b, seat, row, step.time);
#pragma unroll
  for (int gate = FROM; gate < TO; gate++) {
    const long long at = place * GATES + gate;
    load_raw(step.normal.raw[gate], b.p_normal + at * b.H + spot.unit,
             row.count);
    step.normal.rstd[gate] = row.count > 0 ? b.p_rstd[at] : 0.0f;
  }
}

// What the step needs, on its way before the wait for the others' words.
DEVICE void prefetch(Step &step, const Backward &b, const Seat &seat,
                     const Spot &spot, const Row &row, int t) {
  step.time = time_of(t, row.length, b.reversed);
  const Scalar *p = b.p_gates + gates_of(b, seat, spot, row, step.time);
#pragma unroll
  for (int gate = 0; gate < GATES; gate++)
    load_raw(step.raw_a[gate], p + gate * b.stride_g, row.count);
  const long long place = place_of(b, seat, row, step.time);
  const Scalar *p_recurrent = b.p_recurrent + place * SPLITS * b.H + spot.unit;
#pragma unroll
  for (int k = 0; k < SPLITS; k++)
    load_raw(step.raw_r[k], p_recurrent + k * b.H, row.count);
  if constexpr (NORM && !FMA)
    load_normal<0, GATES>(step, b, seat, spot, row);
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
  step.keeps = keeps_of(b, seat, spot, row, step.time);
  step.flags = flags_of(b, seat, row, t);
  load_before(step, b, seat, spot, row, t);
}

// What the generated step takes of one unit, in either part, and its gradients.
struct Unit {
  float a[GATES], r[ANY_SPLITS], s[STATES], p[ANY_PARAMS], v[ANY_HANDED];
  float d_a[GATES], d_r[ANY_SPLITS], d_s[STATES], d_p[ANY_PARAMS];
  float d_v[ANY_HANDED];
};

template <class S>
DEVICE void gather(Unit &at, const Step &step, const Pair &pair, int unit) {
#pragma unroll
  for (int gate = S::START; gate < S::STOP; gate++)
    at.a[gate - S::START] = step.a[gate][unit];
#pragma unroll
  for (int gate = S::START; gate < S::STOP; gate++)
    if (KEPT_OF[gate] >= 0)
      at.r[KEPT_OF[gate] - S::BEFORE] = step.r[KEPT_OF[gate]][unit];
#pragma unroll
  for (int k = 0; k < PARAMS; k++)
    at.p[k] = pair.params[k][unit];
#pragma unroll
  for (int k = 0; k < STATES; k++)
    at.s[k] = step.before[k][unit];
}

// Steps that a row has not may give anything: it is selected away.
template <class S>
DEVICE void keep(Step &step, Pair &pair, const Unit &at, int unit,
                 bool active) {
#pragma unroll
  for (int gate = S::START; gate < S::STOP; gate++)
    step.d_a[gate][unit] = active ? at.d_a[gate - S::START] : 0.0f;
#pragma unroll
  for (int gate = S::START; gate < S::STOP; gate++)
    if (KEPT_OF[gate] >= 0)
      step.d_r[KEPT_OF[gate]][unit] =
          active ? at.d_r[KEPT_OF[gate] - S::BEFORE] : 0.0f;
#pragma unroll
  for (int k = 0; k < PARAMS; k++)
    pair.d_params[k][unit] += active ? at.d_p[k] : 0.0f;
}

// The gradient of state k after the step.
DEVICE float whole(const Step &step, const Row &row, int k, int unit) {
  float d = row.state[k][unit];
  if (k == 0)
    d += step.d_y[unit];
  if (INNER && k > 0)
    d += step.d_inner[k][unit];
  return d;
}

// From the gradients of the states after the step to those before.
DEVICE void leave(const Step &step, Row &row, const float (&d_s)[STATES],
                  const float (&d_after)[STATES], int unit, bool active) {
#pragma unroll
  for (int k = 0; k < STATES; k++) {
    float d_before = d_s[k];
    if (step.keeps >> (2 * k + unit) & 1)
      d_before += d_after[k];
    if (k > 0 || FLAGS) // else y is 0 beyond a row's length, whatever h is
      row.state[k][unit] = d_after[k];
    row.state[k][unit] = active ? d_before : row.state[k][unit];
  }
}

// What follows the last product.
DEVICE void differentiate_last(Step &step, Pair &pair, Row &row, int unit,
                               bool active) {
  Unit at;
  float d_after[STATES], d[STATES];
  if constexpr (STAGES == 2) {
    float out[1 + HANDED];
    gather<First>(at, step, pair, unit);
    step_0(at.a, at.r, at.s, at.p, at.v, out);
#pragma unroll
    for (int k = 0; k < HANDED; k++)
      at.v[k] = out[1 + k];
  }
  gather<Last>(at, step, pair, unit);
#pragma unroll
  for (int k = 0; k < STATES; k++) {
    d_after[k] = whole(step, row, k, unit);
    d[k] = step.keeps >> (2 * k + unit) & 1 ? 0.0f : d_after[k];
  }
  STEP_BACKWARD(at.a, at.r, at.s, at.p, at.v, d, at.d_a, at.d_r, at.d_s, at.d_p,
                at.d_v);
  active = active && !(step.flags & SKIP);
  keep<Last>(step, pair, at, unit, active);
  if constexpr (STAGES == 1)
    leave(step, row, at.d_s, d_after, unit, active);
#pragma unroll
  for (int k = 0; k < HANDED; k++)
    step.d_handed[1 + k][unit] = at.d_v[k];
#pragma unroll
  for (int k = 0; k < STATES; k++)
    step.d_before[k][unit] = at.d_s[k];
}

// What follows the first of two products.
DEVICE void differentiate_first(Step &step, Pair &pair, Row &row, int unit,
                                bool active) {
  Unit at;
  float d_after[STATES], d[1 + HANDED];
  gather<First>(at, step, pair, unit);
#pragma unroll
  for (int k = 0; k <= HANDED; k++)
    d[k] = step.d_handed[k][unit];
  step_0_backward(at.a, at.r, at.s, at.p, at.v, d, at.d_a, at.d_r, at.d_s,
                  at.d_p, at.d_v);
  active = active && !(step.flags & SKIP);
  keep<First>(step, pair, at, unit, active);
#pragma unroll
  for (int k = 0; k < STATES; k++) {
    d_after[k] = whole(step, row, k, unit);
    at.d_s[k] += step.d_before[k][unit];
  }
  leave(step, row, at.d_s, d_after, unit, active);
}

template <class S>
DEVICE void differentiate(Step &step, Pair &pair, Row &row, bool active) {
#pragma unroll
  for (int unit = 0; unit < 2; unit++) {
    if constexpr (S::LAST)
      differentiate_last(step, pair, row, unit, active);
    else
      differentiate_first(step, pair, row, unit, active);
  }
}

// From the gradients of the scaled products to those of the normalised ones.
template <class S>
DEVICE void scale_gradients(Step &step, const float (&scale)[ANY_NORM][2]) {
#pragma unroll
  for (int gate = S::START; gate < S::STOP; gate++) {
    const int kept = KEPT_OF[gate];
    unpack(step.normal.values[gate], step.normal.raw[gate]);
#pragma unroll
    for (int unit = 0; unit < 2; unit++)
      step.normal.d[gate][unit] =
          scale[NORM ? gate : 0][unit] *
          (kept < 0 ? step.d_a[gate] : step.d_r[kept < 0 ? 0 : kept])[unit];
  }
}

template <class S>
DEVICE void store(const Step &step, const Backward &b, const Seat &seat,
                  const Spot &spot, const Row &row) {
  Scalar *p = b.p_d_gates + gates_of(b, seat, spot, row, step.time);
#pragma unroll
  for (int gate = S::START; gate < S::STOP; gate++)
    store_pair(p + gate * b.stride_g, step.d_a[gate], row.count);
  const long long place = place_of(b, seat, row, step.time);
  Scalar *p_recurrent = b.p_d_recurrent + place * SPLITS * b.H + spot.unit;
#pragma unroll
  for (int gate = S::START; gate < S::STOP; gate++)
    if (KEPT_OF[gate] >= 0)
      store_pair(p_recurrent + KEPT_OF[gate] * b.H, step.d_r[KEPT_OF[gate]],
                 row.count);
  if constexpr (NORM) {
    Scalar *p_products = b.p_d_products + place * GATES * b.H + spot.unit;
#pragma unroll
    for (int gate = S::START; gate < S::STOP; gate++)
      store_pair(p_products + gate * b.H, step.normal.d[gate], row.count);
  }
}
