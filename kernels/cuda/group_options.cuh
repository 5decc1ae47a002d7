// SPDX-License-Identifier: Apache-2.0
// What an option does to a step, in both directions; each is a switch of the
// launcher and costs nothing where it is off:
//   FLAGS   rows skip steps (SKIP), and states are set before a step (RESET)
//   VALUES  to what: 0 INITIAL, 1 given values, 2 given for every step
//   DROP    factors of what enters the products: 0 none, 1 one for all gates,
//           2 one for each
//   ZONE    units that keep the state with which they entered a step
// A member publishes what enters the next step, reset and dropped, so no
// product knows any option.
#pragma once
#include "group_product.cuh"
#include "group_rows.cuh"

constexpr int SKIP = 1, RESET = 2;

// The flags of a row's step; none beyond the first and the last.
DEVICE int flags_of(const Common &common, const Seat &seat, const Row &row,
                    int t) {
  if constexpr (!FLAGS)
    return 0;
  if (t < 0 || t >= common.T)
    return 0;
  const long long time = time_of(t, row.length, common.reversed);
  return common.p_flags[place_of(common, seat, row, time)];
}

// Where the values for a reset of state k before step t lie, of this pair.
DEVICE long long value_at(const Common &common, const Seat &seat,
                          const Spot &spot, const Row &row, int t, int k) {
  const long long first =
      VALUES == 2 ? k * common.T + time_of(t, row.length, common.reversed) : k;
  return place_of(common, seat, row, first) * common.H + spot.unit;
}

DEVICE void load_value(float (&pair)[2], const Common &common, const Seat &seat,
                       const Spot &spot, const Row &row, int t, int k) {
  if constexpr (VALUES == 0) {
    const float initial[STATES] = INITIAL; // no constexpr: infinities are calls
    pair[0] = pair[1] = initial[k];
  } else {
    load_pair(pair, common.p_values + value_at(common, seat, spot, row, t, k),
              row.count);
  }
}

// The states with which a row enters step t, if it is reset before.
DEVICE void reset(float (&states)[STATES][2], int flags, const Common &common,
                  const Seat &seat, const Spot &spot, const Row &row, int t) {
  if constexpr (FLAGS)
    if (flags & RESET)
#pragma unroll
      for (int k = 0; k < STATES; k++)
        load_value(states[k], common, seat, spot, row, t, k);
}

// Bit 2 k + unit: that unit keeps state k in the step at `time`.
DEVICE unsigned keeps_of(const Common &common, const Seat &seat,
                         const Spot &spot, const Row &row, long long time) {
  unsigned zone = 0;
  if constexpr (ZONE) {
#pragma unroll
    for (int k = 0; k < STATES; k++) {
      const unsigned char *p =
          common.p_zone +
          place_of(common, seat, row, k * common.T + time) * common.H +
          spot.unit;
      zone |= row.count > 0 && p[0] ? 1u << 2 * k : 0u;
      zone |= row.count > 1 && p[1] ? 2u << 2 * k : 0u;
    }
  }
  return zone;
}

// The factors of a row's pair; they are the same in every step.
DEVICE void load_drop(Row &row, const Common &common, const Seat &seat,
                      const Spot &spot) {
#pragma unroll
  for (int k = 0; k < DROPS; k++)
    load_pair(row.drop[k],
              common.p_drop +
                  ((row.batch * common.N + seat.n) * DROPS + k) * common.H +
                  spot.unit,
              row.count);
}

// What enters a stage's product, as h enters a step's first, goes to all
// members.
template <class S>
DEVICE void publish_entering(Exchange &exchange, const Seat &seat,
                             const Spot &spot, const Row &row, int number,
                             int tile, const float (&h)[2]) {
  if constexpr (DROPS == 0) {
    exchange.publish(seat, spot, number, tile, 0, h);
  } else {
#pragma unroll
    for (int k = 0; k < S::PARTS; k++) {
      const float (&drop)[2] = row.drop[DROP == 2 ? S::START + k : 0];
      const float dropped[2] = {h[0] * drop[0], h[1] * drop[1]};
      exchange.publish(seat, spot, number, tile, k, dropped);
    }
  }
}
