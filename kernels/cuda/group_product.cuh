// SPDX-License-Identifier: Apache-2.0
// The product of the weights that a block keeps with the words that it
// collects.
//
// fp16, bf16 and tf32 take the tensor cores. In full fp32 a lane holds the same
// weights as for tf32 and multiplies them with the columns of all lanes, which
// a shuffle brings; four lanes then share a row's sums (`fold`).
#pragma once
#include "group_watch.cuh"
#if CLUSTER
#include "group_cluster.cuh"
#else
#include "group_exchange.cuh"
#endif

constexpr int CHUNK_WORDS = 32; // 32-bit registers of words under way at once
constexpr bool FMA = !HALF && PRECISION == IEEE;
constexpr int SUMS = FMA ? 16 : 4; // of a lane, for a 16 x 8 product

// Blocks of the depth whose words are under way together: a divisor of SHARE,
// so that loops have no rest; one where the last warp's share is smaller.
DEVICE constexpr int chunk() {
  constexpr int words =
      PARTS * 2 * COLUMNS * static_cast<int>(sizeof(Word)) / 4;
  // Backward in 16 bits no sums are kept: all are looked for at once, if there
  // are registers for them beside the weights.
  constexpr int all = SHARE * words;
  constexpr bool fits =
      all <= 64 && all + HELD * GATES * OWN_BLOCKS * FRAGMENT <= 128;
  constexpr int most = BACKWARD && HALF && fits ? 64 : CHUNK_WORDS;
  int blocks = SHARE * ALONG == DEPTH ? most / words : 1;
  blocks = blocks < 1 ? 1 : blocks > SHARE ? SHARE : blocks;
  while (SHARE % blocks)
    blocks--;
  return blocks;
}
constexpr int CHUNK = chunk();

// W[gate][unit][k] in the forward direction; in the backward one, where d_gates
// of all units enter a unit's d_h, the transposed.
DEVICE float weight(const Scalar *p_w, int gate, int unit, int k, int H) {
  if (unit >= H || k >= H)
    return 0.0f;
  const long long row = BACKWARD ? k : unit, column = BACKWARD ? unit : k;
  return to_float(p_w[(static_cast<long long>(gate) * H + row) * H + column]);
}

// Register `f` of the A operand for unit block `own` and block `depth` of the
// depth. In fp32 it serves two instructions, and the order within 8 of the
// depth is that of the words: a lane's word holds its two operands.
DEVICE unsigned fragment(const Scalar *p_w, const Seat &seat, int gate, int own,
                         int depth, int f, int H) {
  const int block = seat.member * BLOCKS + seat.across * OWN_BLOCKS + own;
  const int unit = 16 * block + 2 * seat.i + f % 2;
  if constexpr (HALF) {
    const int k = 16 * depth + 2 * seat.j + 8 * (f / 2);
    return static_cast<unsigned>(pack_pair<Scalar>(
        weight(p_w, gate, unit, k, H), weight(p_w, gate, unit, k + 1, H)));
  } else {
    const int k = 16 * depth + 8 * (f / 4) + 2 * seat.j + f / 2 % 2;
    return static_cast<unsigned>(
        pack_pair<Scalar>(weight(p_w, gate, unit, k, H), 0.0f));
  }
}

DEVICE void mma_half(f16, float (&d)[4], const unsigned (&a)[4],
                     const unsigned (&b)[2]) {
  mma_f16(d, a, b);
}
DEVICE void mma_half(bf16, float (&d)[4], const unsigned (&a)[4],
                     const unsigned (&b)[2]) {
  mma_bf16(d, a, b);
}

// Fragments a[first] to a[first + 3] times the two values of a word.
DEVICE void mma_word(float (&d)[4], const unsigned (&a)[8], int first,
                     Word word, int) {
  const unsigned part[4] = {a[first], a[first + 1], a[first + 2], a[first + 3]};
  const unsigned b[2] = {low_part(word), high_part(word)};
  mma_tf32(d, part, b);
}

DEVICE void mma_word(float (&d)[16], const unsigned (&a)[8], int first,
                     Word word, int j) {
  const float pair[2] = {__uint_as_float(low_part(word)),
                         __uint_as_float(high_part(word))};
#pragma unroll
  for (int column = 0; column < 8; column++) {
    const float x = shuffle(pair[0], 4 * column + j);
    const float y = shuffle(pair[1], 4 * column + j);
#pragma unroll
    for (int row = 0; row < 2; row++) {
      float &sum = d[8 * row + column];
      sum = fmaf(__uint_as_float(a[first + row]), x, sum);
      sum = fmaf(__uint_as_float(a[first + 2 + row]), y, sum);
    }
  }
}

template <class T, int N>
DEVICE void multiply(float (&sums)[N], const unsigned (&a)[FRAGMENT], Word low,
                     Word high, int j) {
  if constexpr (sizeof(T) == 2) {
    const unsigned b[2] = {static_cast<unsigned>(low),
                           static_cast<unsigned>(high)};
    mma_half(T(), sums, a, b);
  } else {
    mma_word(sums, a, 0, low, j);
    mma_word(sums, a, 4, high, j);
  }
}

// The sums as the tensor cores leave them: rows i and i + 8, each in columns 2
// j and 2 j + 1.
DEVICE void fold(float (&out)[4], const float (&sums)[4], int) {
#pragma unroll
  for (int k = 0; k < 4; k++)
    out[k] = sums[k];
}

// Four lanes hold shares of 8 columns; each is left with the whole of two.
DEVICE void fold(float (&out)[4], const float (&sums)[16], int j) {
#pragma unroll
  for (int row = 0; row < 2; row++) {
    float four[4];
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const float low = sums[8 * row + k], high = sums[8 * row + k + 4];
      four[k] = (j & 2 ? high : low) + shuffle_xor(j & 2 ? low : high, 2);
    }
#pragma unroll
    for (int k = 0; k < 2; k++)
      out[2 * row + k] = (j & 1 ? four[k + 2] : four[k]) +
                         shuffle_xor(j & 1 ? four[k] : four[k + 2], 1);
  }
}

// The weights of a warp: of the first HELD blocks of its depth in registers, of
// the others in shared memory, where each lane reads what it wrote itself.
struct Weights {
  unsigned held[HELD ? HELD : 1][GATES][OWN_BLOCKS][FRAGMENT];
  Quad *spilled;

  DEVICE Quad *at(int k, int gate, int own) const {
    const int number = ((k - HELD) * GATES + gate) * OWN_BLOCKS + own;
    return spilled + number * (FRAGMENT / 4) * 32;
  }

  DEVICE void load(const Scalar *p_w, const Seat &seat, int H) {
    spilled = reinterpret_cast<Quad *>(shared_memory()) +
              warp() * SPILLED * (FRAGMENT / 4) * 32 + lane();
#pragma unroll
    for (int k = 0; k < HELD; k++)
#pragma unroll
      for (int tile = 0; tile < GATES * OWN_BLOCKS; tile++)
#pragma unroll
        for (int f = 0; f < FRAGMENT; f++)
          held[k][tile / OWN_BLOCKS][tile % OWN_BLOCKS][f] =
              fragment(p_w, seat, tile / OWN_BLOCKS, tile % OWN_BLOCKS,
                       seat.along * SHARE + k, f, H);
#pragma unroll 1
    for (int k = HELD; k < SHARE; k++)
#pragma unroll
      for (int gate = 0; gate < GATES; gate++)
#pragma unroll
        for (int own = 0; own < OWN_BLOCKS; own++)
          spill(p_w, seat, k, gate, own, H);
  }

  DEVICE void spill(const Scalar *p_w, const Seat &seat, int k, int gate,
                    int own, int H) {
    unsigned a[FRAGMENT];
#pragma unroll
    for (int f = 0; f < FRAGMENT; f++)
      a[f] = fragment(p_w, seat, gate, own, seat.along * SHARE + k, f, H);
#pragma unroll
    for (int f = 0; f < FRAGMENT; f += 4)
      at(k, gate, own)[f / 4 * 32] = {a[f], a[f + 1], a[f + 2], a[f + 3]};
  }

  // Registers have no index: `spilled_only` says where k is no constant.
  DEVICE void get(int k, int gate, int own, unsigned (&a)[FRAGMENT],
                  bool spilled_only) const {
    if (!spilled_only && k < HELD) {
#pragma unroll
      for (int f = 0; f < FRAGMENT; f++)
        a[f] = held[k][gate][own][f];
    } else {
      const Quad *from = at(k, gate, own);
#pragma unroll
      for (int f = 0; f < FRAGMENT; f += 4) {
        const Quad quad = from[f / 4 * 32];
        a[f] = quad.x, a[f + 1] = quad.y, a[f + 2] = quad.z, a[f + 3] = quad.w;
      }
    }
  }
};

// Of a stage's gates.
template <class S>
using Accumulators = float[S::COUNT][OWN_BLOCKS][COLUMNS][SUMS];

// Adds one chunk of the depth; `words` as `Spot::word` orders them.
template <class S>
DEVICE void multiply_chunk(Accumulators<S> &sums, const Weights &weights,
                           int first,
                           const Word (&words)[CHUNK * S::PARTS * 2 * COLUMNS],
                           int j, bool spilled_only) {
#pragma unroll
  for (int k = 0; k < CHUNK; k++)
#pragma unroll
    for (int tile = 0; tile < S::COUNT * OWN_BLOCKS; tile++) {
      const int gate = tile / OWN_BLOCKS, own = tile % OWN_BLOCKS;
      const int w = 2 * COLUMNS * (k * S::PARTS + (S::PARTS > 1 ? gate : 0));
      unsigned a[FRAGMENT];
      weights.get(first + k, S::START + gate, own, a, spilled_only);
#pragma unroll
      for (int c = 0; c < COLUMNS; c++)
        multiply<Scalar>(sums[gate][own][c], a, words[w + c],
                         words[w + COLUMNS + c], j);
    }
}

// Blocks `first` to `first` + CHUNK - 1 of this warp's part of the depth.
template <class S>
DEVICE void collect_and_multiply(Accumulators<S> &sums, const Weights &weights,
                                 Exchange &exchange, const Seat &seat,
                                 int number, int tile, int first,
                                 bool spilled_only) {
  const int depth = seat.along * SHARE + first;
  if (SHARE * ALONG != DEPTH && depth >= DEPTH)
    return;
  Word words[CHUNK * S::PARTS * 2 * COLUMNS];
  const Word *from = exchange.slot(number) + read_by_lane() +
                     (tile * DEPTH + depth) * PARTS * 2 * COLUMNS * 32;
  exchange.collect<S>(words, from, 32, number);
  multiply_chunk<S>(sums, weights, first, words, seat.j, spilled_only);
}

// A tile's product with publication `number`: the share of it that lies in this
// warp's part of the depth.
template <class S>
DEVICE void product(Accumulators<S> &sums, const Weights &weights,
                    Exchange &exchange, const Seat &seat, int number,
                    int tile) {
#pragma unroll
  for (int k = 0; k < S::COUNT * OWN_BLOCKS * COLUMNS * SUMS; k++)
    (&sums[0][0][0][0])[k] = 0.0f;
  exchange.await(number, tile);
  constexpr int UNROLLED = (HELD + CHUNK - 1) / CHUNK * CHUNK;
#pragma unroll
  for (int k = 0; k < UNROLLED; k += CHUNK)
    collect_and_multiply<S>(sums, weights, exchange, seat, number, tile, k,
                            false);
#pragma unroll 1
  for (int k = UNROLLED; k < SHARE; k += CHUNK)
    collect_and_multiply<S>(sums, weights, exchange, seat, number, tile, k,
                            true);
}

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

// Puts this warp's sums where the owners of its spots will look for them.
template <class S>
DEVICE void share_sums(Vector<S> *to, const Results<S> &results) {
  constexpr int WIDE = Vector<S>::WIDE, OF_A_SPOT = Vector<S>::OF_A_SPOT;
#pragma unroll
  for (int v = 0; v < OWN_BLOCKS * PAIRS * OF_A_SPOT / WIDE; v++) {
    Vector<S> vector;
#pragma unroll
    for (int e = 0; e < WIDE; e++) {
      const int spot = (v * WIDE + e) / OF_A_SPOT;
      const int item = (v * WIDE + e) % OF_A_SPOT;
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
      const Vector<S> share = from[(along * (SUM_FLOATS / WIDE) + v) * 32];
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

// Through shared memory. Two buffers take turns, so one barrier is enough: who
// writes a buffer again has met everyone who read it at the barrier between.
// Whether a spot is taken is asked once, for all lanes of a warp agree; the
// totals of one that is not stay as they are.
template <class S>
DEVICE void join_warps(Totals &totals, const Results<S> &results,
                       const Seat &seat, const Spot (&spots)[OWNED], int pass) {
  constexpr int WIDE = Vector<S>::WIDE;
  constexpr int OF_A_WARP = SUM_FLOATS / WIDE * 32; // of any stage's
  Vector<S> *buffer =
      reinterpret_cast<Vector<S> *>(shared_memory() + WEIGHT_BYTES) + lane() +
      ((pass & 1) * ACROSS + seat.across) * ALONG * OF_A_WARP;
  share_sums<S>(buffer + seat.along * OF_A_WARP, results);
  named_sync<JOIN>(1 + seat.across, 32 * ALONG);
#pragma unroll
  for (int k = 0; k < OWNED; k++) {
    const int spot = seat.along * OWNED + k;
    if (spots[k].taken)
      add_shares<S>(totals[k],
                    buffer + spot * (Vector<S>::OF_A_SPOT / WIDE) * 32);
  }
}

// The shares of all warps along the depth, for this thread's spots. In the
// backward direction the products of all gates enter one sum, unless each has
// factors of its own.
template <class S>
DEVICE void join(Totals &totals, Accumulators<S> &sums, const Seat &seat,
                 const Spot (&spots)[OWNED], int pass) {
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
    join_warps<S>(totals, results, seat, spots, pass);
}
