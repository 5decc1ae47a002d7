// SPDX-License-Identifier: Apache-2.0
// What a block of either kernel does from its start to its end. A `Pass` is
// Forward or Backward; for it there are `prepare` of what a thread keeps of a
// pair of units, `run` of TILES tiles, `store_pairs` and `spoil_outputs`.
#pragma once
#include "group_join.cuh"
#include "group_norm.cuh"

template <class Pass>
DEVICE void run_tiles(const Pass &pass, const Seat &seat, Exchange &exchange,
                      int groups) {
  const int H = static_cast<int>(pass.H);
  Weights weights;
  weights.load(pass.p_w + static_cast<long long>(seat.n) * GATES * H * H, seat,
               H);
  Spot spots[OWNED];
  typename Pass::Pair pairs[OWNED] = {};
#pragma unroll
  for (int k = 0; k < OWNED; k++) {
    spots[k] = Spot(seat, k, H);
    prepare(pairs[k], pass, seat, spots[k]);
    load_params(pairs[k].params, pass, seat, spots[k]);
  }
  constexpr long long TOGETHER = TILES * ROWS;
  int number = 0; // of the first publication
  for (long long first = seat.group * TOGETHER; first < pass.B;
       first += groups * TOGETHER) {
    run(pass, seat, spots, pairs, weights, exchange, first, number);
    number += HOPS * static_cast<int>(pass.T);
  }
  store_pairs(pass, seat, spots, pairs);
  if (exchange.spoils())
    spoil_outputs(pass);
}
