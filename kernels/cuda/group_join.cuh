// SPDX-License-Identifier: Apache-2.0
// How the warps along the depth join their shares of a product's sums, so that
// each thread has the whole ones of the units that it owns.
#pragma once
#include "group_product.cuh"

template <class S> using Results = float[S::RESULTS][OWN_BLOCKS][COLUMNS][4];
typedef float Totals[OWNED][RESULTS][2];

template <class S>
DEVICE void join_own(Totals &totals, const Results<S> &results) {
#pragma unroll
  for (int item = 0; item < OWNED * S::RESULTS; item++) {
    const int spot = item / S::RESULTS, result = item % S::RESULTS;
    const int own = spot / PAIRS, pair = spot % PAIRS;
#pragma unroll
    for (int unit = 0; unit < 2; unit++)
      totals[spot][result][unit] =
          results[result][own][pair / 2][pair % 2 + 2 * unit];
  }
}

// A lane's sums of one spot lie together, so that they travel as vectors.
template <class S> struct Vector {
  static constexpr int OF_A_SPOT = 2 * S::RESULTS; // floats
  static constexpr int WIDE = OF_A_SPOT % 4 ? 2 : 4;
  alignas(4 * WIDE) float x[WIDE];
};

constexpr int PASS_SPOTS = SPOTS / JOINS;

// Puts this warp's sums for the spots of a pass where their owners will look.
template <class S>
DEVICE void share_sums(Vector<S> *to, const Results<S> &results, int pass) {
  constexpr int WIDE = Vector<S>::WIDE, VECTORS = Vector<S>::OF_A_SPOT / WIDE;
#pragma unroll
  for (int v = 0; v < PASS_SPOTS * VECTORS; v++) {
    Vector<S> vector;
#pragma unroll
    for (int e = 0; e < WIDE; e++) {
      const int spot = pass * PASS_SPOTS + v / VECTORS;
      const int item = v % VECTORS * WIDE + e;
      const int own = spot / PAIRS, pair = spot % PAIRS;
      vector.x[e] = results[item / 2][own][pair / 2][pair % 2 + 2 * (item % 2)];
    }
    to[v * 32] = vector;
  }
}

// Adds the shares of all warps for one spot. Even and odd ones are added apart:
// the chain of additions is half as long.
template <class S>
DEVICE void add_shares(float (&total)[RESULTS][2], const Vector<S> *from) {
  constexpr int WIDE = Vector<S>::WIDE, OF_A_SPOT = Vector<S>::OF_A_SPOT;
  float sums[2][OF_A_SPOT] = {};
#pragma unroll
  for (int along = 0; along < ALONG; along++)
#pragma unroll
    for (int v = 0; v < OF_A_SPOT / WIDE; v++) {
      const Vector<S> share =
          from[(along * (SUM_FLOATS / JOINS / WIDE) + v) * 32];
#pragma unroll
      for (int e = 0; e < WIDE; e++) {
        float &sum = sums[along % 2][v * WIDE + e];
        sum = along < 2 ? share.x[e] : sum + share.x[e];
      }
    }
#pragma unroll
  for (int item = 0; item < OF_A_SPOT; item++)
    total[item / 2][item % 2] = sums[0][item] + sums[1][item];
}

// Through shared memory, in JOINS passes over the spots: the more, the smaller
// are the buffers. Two take turns, so one barrier a pass is enough: who writes
// a buffer again has met everyone who read it at the barrier between. Whether a
// spot is taken is asked once, for all lanes of a warp agree; the totals of one
// that is not stay as they are.
template <class S>
DEVICE void join_warps(Totals &totals, const Results<S> &results,
                       const Seat &seat, const Spot (&spots)[OWNED],
                       int number) {
  constexpr int WIDE = Vector<S>::WIDE, VECTORS = Vector<S>::OF_A_SPOT / WIDE;
  constexpr int OF_A_WARP = SUM_FLOATS / JOINS / WIDE * 32; // of any stage's
  static_assert(JOINS == 1 || JOINS % 2 == 0, "else a buffer comes twice");
  Vector<S> *buffers =
      reinterpret_cast<Vector<S> *>(shared_memory() + WEIGHT_BYTES) + lane();
#pragma unroll
  for (int pass = 0; pass < JOINS; pass++) {
    const int parity = (JOINS > 1 ? pass : number) & 1;
    Vector<S> *buffer =
        buffers + (parity * ACROSS + seat.across) * ALONG * OF_A_WARP;
    share_sums<S>(buffer + seat.along * OF_A_WARP, results, pass);
    named_sync<JOIN>(1 + seat.across, 32 * ALONG);
#pragma unroll
    for (int k = 0; k < OWNED; k++) {
      const int spot = seat.along * OWNED + k - pass * PASS_SPOTS;
      const bool in_pass = JOINS == 1 || (spot >= 0 && spot < PASS_SPOTS);
      if (spots[k].taken && in_pass)
        add_shares<S>(totals[k], buffer + spot * VECTORS * 32);
    }
  }
}

// The shares of all warps along the depth, for this thread's spots. In the
// backward direction the products of all gates enter one sum, unless each has
// factors of its own.
template <class S>
DEVICE void join(Totals &totals, Accumulators<S> &sums, const Seat &seat,
                 const Spot (&spots)[OWNED], int number) {
  Results<S> results;
#pragma unroll
  for (int tile = 0; tile < OWN_BLOCKS * COLUMNS; tile++) {
    const int own = tile / COLUMNS, c = tile % COLUMNS;
#pragma unroll
    for (int gate = S::RESULTS; gate < S::COUNT; gate++)
#pragma unroll
      for (int k = 0; k < SUMS; k++)
        sums[0][own][c][k] += sums[gate][own][c][k];
#pragma unroll
    for (int result = 0; result < S::RESULTS; result++)
      fold(results[result][own][c], sums[result][own][c], seat.j);
  }
  if constexpr (ALONG == 1)
    join_own<S>(totals, results);
  else
    join_warps<S>(totals, results, seat, spots, number);
}
