// SPDX-License-Identifier: Apache-2.0
// What both directions take alike, and the rows of a tile: where their values
// lie, the states that they begin and end with, what their units share.
#pragma once
#include "group.cuh"

// The time at which a row's step lies: a reversed row starts at its last step.
DEVICE long long time_of(int step, long long length, bool reversed) {
  return reversed && step < length ? length - 1 - step : step;
}

// ---- Rows of the batch ------------------------------------------------------

constexpr int KEPT_OF[GATES] = KEPT;

// What both kernels take. The states of a row before its first step, and after
// its last; in the backward direction their gradients, from the end on.
struct Common {
  long long T, B, N, H;
  bool reversed; // this recurrence runs backwards in time
  long long stride_t, stride_b, stride_n, stride_g; // of gates and d_gates
  const Scalar *p_w;                                // (N, G, H, H)
  const Scalar *p_params;                           // (N, P, H) or null
  const Scalar *p_norm;                             // (N, G, H) with NORM
  const long long *p_lengths;                       // (B,) or null
  const unsigned char *p_flags;                     // (T, B, N) with FLAGS
  const Scalar *p_values;      // (S, 1 or T, B, N, H) with VALUES
  const Scalar *p_drop;        // (B, N, DROPS, H)
  const unsigned char *p_zone; // (S, T, B, N, H) with ZONE
  const Scalar *p_begin;       // (S, B, N, H)
  Scalar *p_end;               // (S, B, N, H) out
};

// One row of a thread's: the states, or in the backward direction their
// gradients. Beyond B nothing is loaded or stored, and no step is active.
struct Row {
  float state[STATES][2], drop[ANY_DROPS][2];
  float handed[ANY_HANDED][2]; // by the first part of a step to the second
  long long batch, length;
  int count;
};

// Of a row at a time its place among (T, B, N).
DEVICE long long place_of(const Common &common, const Seat &seat,
                          const Row &row, long long time) {
  return (time * common.B + row.batch) * common.N + seat.n;
}

// Of a pair of units at a time the first gate's place, as strides say.
DEVICE long long gates_of(const Common &common, const Seat &seat,
                          const Spot &spot, const Row &row, long long time) {
  return time * common.stride_t + row.batch * common.stride_b +
         seat.n * common.stride_n + spot.unit;
}

// Whether rows' lengths, none of which is more than T, are compared with it
// once they are loaded. A loop that takes them as they come waits in each step
// until they are there, and so for the step's own loads, which the compiler
// counts on the same scoreboard: 1,100 cycles, where these leave just before
// the first look for words. (Of other builds simulated steps get up to 9 %
// longer by it.)
constexpr bool LENGTH_FIRST = !BACKWARD && TILES == 1 && !CLUSTER;

// The rows of a tile that starts at row `first` of the batch.
DEVICE void begin(Row (&rows)[OWNED], const Common &common, const Seat &seat,
                  const Spot (&spots)[OWNED], long long first) {
#pragma unroll
  for (int k = 0; k < OWNED; k++) {
    const long long batch = first + spots[k].row;
    const bool inside = batch < common.B;
    rows[k].batch = inside ? batch : 0;
    rows[k].count = inside ? spots[k].count : 0;
    if (LENGTH_FIRST) { // compared before `inside`: after it one build spills
      const long long length =
          inside && common.p_lengths ? common.p_lengths[batch] : common.T;
      rows[k].length = !inside ? 0 : length > common.T ? common.T : length;
    } else {
      rows[k].length = !inside            ? 0
                       : common.p_lengths ? common.p_lengths[batch]
                                          : common.T;
    }
    const Scalar *p = common.p_begin +
                      place_of(common, seat, rows[k], 0) * common.H +
                      spots[k].unit;
#pragma unroll
    for (int s = 0; s < STATES; s++)
      load_pair(rows[k].state[s], p + s * common.B * common.N * common.H,
                rows[k].count);
  }
}

DEVICE void finish(const Row (&rows)[OWNED], const Common &common,
                   const Seat &seat, const Spot (&spots)[OWNED]) {
#pragma unroll
  for (int k = 0; k < OWNED; k++) {
    Scalar *p = common.p_end + place_of(common, seat, rows[k], 0) * common.H +
                spots[k].unit;
#pragma unroll
    for (int s = 0; s < STATES; s++)
      store_pair(p + s * common.B * common.N * common.H, rows[k].state[s],
                 rows[k].count);
  }
}

// Of each gate's normalised products; 0 beyond the last unit.
DEVICE void load_scale(float (&scale)[ANY_NORM][2], const Common &common,
                       const Seat &seat, const Spot &spot) {
#pragma unroll
  for (int gate = 0; NORM && gate < GATES; gate++)
    load_pair(scale[gate],
              common.p_norm +
                  (seat.n * static_cast<long long>(GATES) + gate) * common.H +
                  spot.unit,
              spot.count);
}

DEVICE void load_params(float (&params)[ANY_PARAMS][2], const Common &common,
                        const Seat &seat, const Spot &spot) {
#pragma unroll
  for (int k = 0; k < PARAMS; k++)
    load_pair(params[k],
              common.p_params +
                  (seat.n * static_cast<long long>(PARAMS) + k) * common.H +
                  spot.unit,
              spot.count);
}

// ---- After a failure: one warp makes outputs NaN ----------------------------

template <class T> DEVICE void spoil(T *p, long long count) {
  for (long long k = lane(); k < count; k += 32)
    p[k] = from_float<T>(NAN);
}

DEVICE void spoil_gates(Scalar *p, const Common &z) { // (T, B, N, G, H)
  for (long long row = 0; row < z.T * z.B * z.N * GATES; row++) {
    const long long n = row / GATES % z.N, b = row / GATES / z.N % z.B;
    const long long t = row / GATES / z.N / z.B;
    spoil(p + t * z.stride_t + b * z.stride_b + n * z.stride_n +
              row % GATES * z.stride_g,
          z.H);
  }
}
