// SPDX-License-Identifier: Apache-2.0
// The backward time loop beside group_forward.cu; sizes and grid as there. The
// weights stand transposed: a unit's d_h takes the d_gates of all units, which
// are what the members exchange. A step's gradients are computed, published and
// only then multiplied, so that one exchange a product is enough. Of two
// products the last comes first. The gradients of weights, biases and input are
// products over all steps, made elsewhere.
#include "group_derivative.cuh"

DEVICE void prepare(Pair &pair, const Backward &b, const Seat &seat,
                    const Spot &spot) {
  if constexpr (!FMA)
    load_scale(pair.scale, b, seat, spot);
}

// What the stage's d_gates of publication `number` give in a tile.
template <class S>
DEVICE void take_product(Totals &totals, Words<S> &words, const Seat &seat,
                         const Spot (&spots)[OWNED], const Weights &weights,
                         Exchange &exchange, int number, int tile) {
  Accumulators<S> sums;
  product<S>(sums, words, weights, exchange, seat, number, tile);
  if constexpr (AHEAD)
    look_ahead(words, exchange, seat, number, tile);
  join<S>(totals, sums, seat, spots, number / OF_A_PRODUCT * TILES + tile);
}

// Adds it to the gradient of what entered the product.
template <class S>
DEVICE void add_total(float (&d)[2], const float (&total)[RESULTS][2],
                      const Row &row) {
#pragma unroll
  for (int unit = 0; unit < 2; unit++)
#pragma unroll
    for (int r = 0; r < S::RESULTS; r++)
      d[unit] +=
          DROPS ? total[r][unit] * row.drop[DROP == 2 ? S::START + r : 0][unit]
                : total[r][unit];
}

// Sends the gradients of the stage's products to all members.
template <class S>
DEVICE void publish_gradients(Exchange &exchange, const Seat &seat,
                              const Spot &spot, const Step &step, int number,
                              int tile) {
#pragma unroll
  for (int gate = S::START; gate < S::STOP; gate++) {
    const int kept = KEPT_OF[gate];
    exchange.publish(seat, spot, number, tile, gate - S::START,
                     NORM       ? step.normal.d[gate]
                     : kept < 0 ? step.d_a[gate]
                                : step.d_r[kept < 0 ? 0 : kept]);
  }
}

// The gradients of the stage's normalised products become those of the products
// themselves; `number` is the publication of their sums.
template <class S>
DEVICE void through_sums(Step (&steps)[OWNED], const Backward &b,
                         const Seat &seat, const Spot (&spots)[OWNED],
                         const Pair (&pairs)[OWNED], const Row (&rows)[OWNED],
                         Exchange &exchange, int t, int number, int tile) {
#pragma unroll
  for (int k = 0; k < OWNED; k++) {
    if (!spots[k].taken)
      continue;
    if constexpr (FMA) {
      load_normal<S::START, S::STOP>(steps[k], b, seat, spots[k], rows[k]);
      float scale[ANY_NORM][2];
      load_scale(scale, b, seat, spots[k]);
      scale_gradients<S>(steps[k], scale);
    } else {
      scale_gradients<S>(steps[k], pairs[k].scale);
    }
    publish_gradient_sums<S>(steps[k].normal, seat, spots[k], exchange, number);
  }
  exchange.published(tile);
  exchange.retire(seat, spots, number);
  exchange.await(number, tile);
#pragma unroll
  for (int k = 0; k < OWNED; k++) {
    if (!spots[k].taken)
      continue;
    through_norm<S>(steps[k].normal, seat, spots[k], exchange, number,
                    static_cast<int>(b.H),
                    t < rows[k].length && !(steps[k].flags & SKIP));
    publish_gradients<S>(exchange, seat, spots[k], steps[k], number + 1, tile);
  }
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
// first, and publishes `number`, unless all steps are done (t < 0). Of two
// products this is the last's part.
DEVICE void advance(Step (&steps)[OWNED], const Backward &b, const Seat &seat,
                    const Spot (&spots)[OWNED], Pair (&pairs)[OWNED],
                    Row (&rows)[OWNED], Words<First> &words,
                    const Weights &weights, Exchange &exchange, int t,
                    int number, int tile) {
  int later[OWNED];
#pragma unroll
  for (int k = 0; k < OWNED; k++)
    later[k] = flags_of(b, seat, rows[k], t + 1);
#pragma unroll
  for (int k = 0; k < OWNED && t >= 0; k++)
    prefetch(steps[k], b, seat, spots[k], rows[k], t);
  if (t + 1 < b.T) {
    Totals totals = {};
    take_product<First>(totals, words, seat, spots, weights, exchange,
                        number - 1, tile);
#pragma unroll
    for (int k = 0; k < OWNED; k++)
      add_total<First>(rows[k].state[0], totals[k], rows[k]);
  }
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
    differentiate<Last>(steps[k], pairs[k], rows[k], t < rows[k].length);
    if (!NORM)
      publish_gradients<Last>(exchange, seat, spots[k], steps[k], number, tile);
  }
  if constexpr (NORM)
    through_sums<Last>(steps, b, seat, spots, pairs, rows, exchange, t, number,
                       tile);
  exchange.published(tile);
#pragma unroll
  for (int k = 0; k < OWNED; k++)
    if (spots[k].taken)
      store<Last>(steps[k], b, seat, spots[k], rows[k]);
}

// The first product's part of the same step: multiplies publication `number`,
// and publishes the next.
DEVICE void advance_first(Step (&steps)[OWNED], const Backward &b,
                          const Seat &seat, const Spot (&spots)[OWNED],
                          Pair (&pairs)[OWNED], Row (&rows)[OWNED],
                          const Weights &weights, Exchange &exchange, int t,
                          int number, int tile) {
  Totals totals = {};
  Words<Last> words;
  take_product<Last>(totals, words, seat, spots, weights, exchange, number,
                     tile);
#pragma unroll
  for (int k = 0; k < OWNED; k++) {
    if (!spots[k].taken)
      continue;
    float d_entering[2] = {};
    add_total<Last>(d_entering, totals[k], rows[k]);
    steps[k].d_handed[0][0] = d_entering[0];
    steps[k].d_handed[0][1] = d_entering[1];
    differentiate<First>(steps[k], pairs[k], rows[k], t < rows[k].length);
    if (!NORM)
      publish_gradients<First>(exchange, seat, spots[k], steps[k], number + 1,
                               tile);
  }
  if constexpr (NORM)
    through_sums<First>(steps, b, seat, spots, pairs, rows, exchange, t,
                        number + 1, tile);
  exchange.published(tile);
#pragma unroll
  for (int k = 0; k < OWNED; k++)
    if (spots[k].taken)
      store<First>(steps[k], b, seat, spots[k], rows[k]);
}

// One step of all tiles.
DEVICE void step_back(const Backward &b, const Seat &seat,
                      const Spot (&spots)[OWNED], Pair (&pairs)[OWNED],
                      Row (&rows)[TILES][OWNED], Words<First> &words,
                      const Weights &weights, Exchange &exchange, int t,
                      int number) {
  if constexpr (STAGES == 1) {
#pragma unroll
    for (int tile = 0; tile < TILES; tile++) {
      Step steps[OWNED];
      advance(steps, b, seat, spots, pairs, rows[tile], words, weights,
              exchange, t, number, tile);
    }
  } else {
    Step steps[TILES][OWNED];
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
      advance(steps[tile], b, seat, spots, pairs, rows[tile], words, weights,
              exchange, t, number, tile);
    if (t < 0)
      return;
    const int of_words = number + OF_A_PRODUCT - 1;
    exchange.retire(seat, spots, of_words);
#pragma unroll
    for (int tile = 0; tile < TILES; tile++)
      advance_first(steps[tile], b, seat, spots, pairs, rows[tile], weights,
                    exchange, t, of_words, tile);
  }
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
  Words<First> words;
  if constexpr (AHEAD)
    look_ahead(words, exchange, seat, number - 1, TILES - 1);
  for (int i = 0; i <= b.T; i++) {
    if (i > 0)
      exchange.retire(seat, spots, number + HOPS * i - 1);
    step_back(b, seat, spots, pairs, rows, words, weights, exchange,
              static_cast<int>(b.T) - 1 - i, number + HOPS * i);
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
  if constexpr (NORM)
    spoil(b.p_d_products, b.T * GATES * units);
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
    const Scalar *p_norm,         // (N, G, H), with NORM
    const Scalar *p_normal,       // (T, B, N, G, H), with NORM
    const float *p_rstd,          // (T, B, N, G), with NORM
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
    Scalar *p_d_products,         // (T, B, N, G, H) out, with NORM
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
                       stride_g, p_w, p_params, p_norm, p_lengths, p_flags,
                       p_values, p_drop, p_zone, p_d_final, p_d_initial},
                      p_gates,
                      p_recurrent,
                      p_inner,
                      p_y,
                      p_initial,
                      p_normal,
                      p_rstd,
                      p_d_y,
                      p_d_gates,
                      p_d_inner,
                      p_d_recurrent,
                      p_d_products,
                      p_d_values,
                      p_d_params,
                      static_cast<long long>(groups) * ALONG,
                      d_y_stride_t,
                      d_y_stride_b,
                      d_y_stride_n};
  Exchange exchange(p_words, p_left, p_counters, p_error, limit, launch);
  run_tiles(b, seat, exchange, groups);
}
