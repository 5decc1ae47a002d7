// SPDX-License-Identifier: Apache-2.0
// Normalisation of the products over all units of a row, gate by gate: a second
// hop of each product. With RMS nothing has a mean: it is 0 in both directions.
//
// The eight lanes that own a block of 16 units sum over it and publish two
// numbers for each row and gate; who owns units of a row collects those of all
// blocks. Such a publication is numbered like the words', behind them in the
// forward direction and before them in the backward one, and has a part of its
// own in a slot. Its readers are those who publish the words that follow:
// whoever has these from all members knows that the sums were read.
//   forward   a block's mean, and the squares about it: nothing cancels where
//             blocks are joined (Chan, Golub and LeVeque, 1979)
//   backward  sums of the gradients, and of these times the normalised values
#pragma once
#include "group_options.cuh"

static_assert(!NORM || (TILES == 1 && !CLUSTER), "the launcher's layout");
constexpr float EPSILON = 1e-5f;        // as torch.nn.LayerNorm's
constexpr int A_LANE = (DEPTH + 7) / 8; // blocks that a lane collects
constexpr int SUM_WORDS = 32;           // 32-bit registers of them under way
// Of a stage's gates those whose sums are under way together. In full fp32
// there are no registers left for more than one.
template <class S>
constexpr int TOGETHER =
    !FMA && S::COUNT * A_LANE * 2 <= SUM_WORDS ? S::COUNT : 1;

constexpr bool RMS = NORM == 2;

// Exact ones are calls in branches of their own, gate after gate.
DEVICE float divide(float x, float by) {
  return APPROXIMATE ? x * reciprocal_approximate(by) : x / by;
}
DEVICE float inverse_root(float x) {
  return APPROXIMATE ? inverse_root_approximate(x) : 1.0f / sqrtf(x);
}

// Over the lanes that hold a block's units of one row.
DEVICE float over_block(float x) {
  x += shuffle_xor(x, 4);
  x += shuffle_xor(x, 8);
  return x + shuffle_xor(x, 16);
}

// Of a block of units those that exist.
DEVICE int units_of(int block, int H) {
  const int units = H - 16 * block;
  return units < 0 ? 0 : units > 16 ? 16 : units;
}

// A gate's, of every eighth block from this lane's on, for the spot's row.
struct Collected {
  float first[A_LANE], second[A_LANE];
  int units[A_LANE];
};

// Those of the stage's gates from `gate` on.
template <class S>
DEVICE void collect_sums(Collected (&sums)[TOGETHER<S>], const Seat &seat,
                         const Spot &spot, Exchange &exchange, int number,
                         int gate, int H) {
  unsigned long long words[TOGETHER<S> * A_LANE];
  const unsigned long long *from =
      exchange.sums(number) + (seat.i * MOST + gate) * ROWS + spot.row;
  exchange.collect_sums<A_LANE>(words, from, seat, number);
#pragma unroll
  for (int w = 0; w < TOGETHER<S> * A_LANE; w++) {
    Collected &of_gate = sums[w / A_LANE];
    const int k = w % A_LANE, units = units_of(seat.i + 8 * k, H);
    of_gate.units[k] = units;
    of_gate.first[k] = units ? __uint_as_float(low_part(words[w])) : 0.0f;
    of_gate.second[k] = units ? __uint_as_float(high_part(words[w])) : 0.0f;
  }
}

// ---- Forward ----------------------------------------------------------------

// The mean of a block's products, and the squares about it.
template <class S>
DEVICE void publish_moments(const float (&products)[RESULTS][2],
                            const Seat &seat, const Spot &spot,
                            Exchange &exchange, int number, int H) {
  const int units = units_of(spot.block, H);
  float means[S::COUNT], squares[S::COUNT];
#pragma unroll
  for (int gate = 0; gate < S::COUNT; gate++) {
    const float x = spot.count > 0 ? products[gate][0] : 0.0f;
    const float y = spot.count > 1 ? products[gate][1] : 0.0f;
    means[gate] = RMS ? 0.0f : divide(over_block(x + y), units ? units : 1);
    const float dx = spot.count > 0 ? x - means[gate] : 0.0f;
    const float dy = spot.count > 1 ? y - means[gate] : 0.0f;
    squares[gate] = over_block(dx * dx + dy * dy);
  }
  exchange.publish_sums<S::COUNT>(seat, spot, number, means, squares);
}

DEVICE void moments(float &mean, float &rstd, const Collected &sums, int H) {
  float total = 0.0f, squares = 0.0f;
#pragma unroll
  for (int k = 0; k < A_LANE; k++)
    total += sums.units[k] * sums.first[k];
  mean = RMS ? 0.0f : divide(over_block(total), H);
#pragma unroll
  for (int k = 0; k < A_LANE; k++) {
    const float apart = sums.first[k] - mean;
    squares += sums.second[k] + sums.units[k] * apart * apart;
  }
  rstd = inverse_root(divide(over_block(squares), H) + EPSILON);
}

// The products as they enter the step: normalised and scaled.
template <class S>
DEVICE void normalise(float (&products)[RESULTS][2],
                      const float (&scale)[GATES][2], const Seat &seat,
                      const Spot &spot, Exchange &exchange, int number, int H) {
#pragma unroll
  for (int first = 0; first < S::COUNT; first += TOGETHER<S>) {
    Collected sums[TOGETHER<S>];
    collect_sums<S>(sums, seat, spot, exchange, number, first, H);
#pragma unroll
    for (int gate = first; gate < first + TOGETHER<S> && gate < S::COUNT;
         gate++) {
      float mean, rstd;
      moments(mean, rstd, sums[gate - first], H);
#pragma unroll
      for (int unit = 0; unit < 2; unit++)
        products[gate][unit] =
            (products[gate][unit] - mean) * rstd * scale[S::START + gate][unit];
    }
  }
}

// ---- Backward ---------------------------------------------------------------

// What a step's normalisation was, of one pair of units, and what comes back.
struct Normal {
  RawPair raw[GATES];
  float values[GATES][2], rstd[GATES];
  float d[GATES][2]; // of the normalised values, then of the products
};

template <class S>
DEVICE void publish_gradient_sums(Normal &normal, const Seat &seat,
                                  const Spot &spot, Exchange &exchange,
                                  int number) {
  float both[S::COUNT], with_values[S::COUNT];
#pragma unroll
  for (int k = 0; k < S::COUNT; k++) {
    const int gate = S::START + k;
    const float x = spot.count > 0 ? normal.d[gate][0] : 0.0f;
    const float y = spot.count > 1 ? normal.d[gate][1] : 0.0f;
    const float (&values)[2] = normal.values[gate];
    both[k] = RMS ? 0.0f : over_block(x + y);
    with_values[k] = over_block(x * values[0] + y * values[1]);
  }
  exchange.publish_sums<S::COUNT>(seat, spot, number, both, with_values);
}

// From the gradients of the normalised values those of the products.
template <class S>
DEVICE void through_norm(Normal &normal, const Seat &seat, const Spot &spot,
                         Exchange &exchange, int number, int H, bool active) {
#pragma unroll
  for (int first = 0; first < S::COUNT; first += TOGETHER<S>) {
    Collected sums[TOGETHER<S>];
    collect_sums<S>(sums, seat, spot, exchange, number, first, H);
#pragma unroll
    for (int k = 0; k < TOGETHER<S> && first + k < S::COUNT; k++) {
      const int gate = S::START + first + k;
      float both = 0.0f, with_values = 0.0f;
#pragma unroll
      for (int block = 0; block < A_LANE; block++) {
        both += sums[k].first[block];
        with_values += sums[k].second[block];
      }
      both = RMS ? 0.0f : divide(over_block(both), H);
      with_values = divide(over_block(with_values), H);
#pragma unroll
      for (int unit = 0; unit < 2; unit++) {
        const float d = normal.d[gate][unit] - both -
                        normal.values[gate][unit] * with_values;
        normal.d[gate][unit] = active ? d * normal.rstd[gate] : 0.0f;
      }
    }
  }
}
