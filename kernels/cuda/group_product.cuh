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

// 32-bit registers of words under way at once. Backward there are G times as
// many words and no sums to keep; what is looked for later costs a look of its
// own. Beside weights full fp32 leaves no room for that.
constexpr bool FMA = !HALF && PRECISION == IEEE;
constexpr int CHUNK_WORDS = BACKWARD && !(FMA && HELD) ? 64 : 32;
constexpr int SUMS = FMA ? 16 : 4; // of a lane, for a 16 x 8 product

// Blocks of the depth whose words are under way together: a divisor of SHARE,
// so that loops have no rest; one where the last warp's share is smaller.
DEVICE constexpr int chunk() {
  constexpr int words =
      PARTS * 2 * COLUMNS * static_cast<int>(sizeof(Word)) / 4;
  int blocks = SHARE * ALONG == DEPTH ? CHUNK_WORDS / words : 1;
  blocks = blocks < 1 ? 1 : blocks > SHARE ? SHARE : blocks;
  while (SHARE % blocks)
    blocks--;
  return blocks;
}
constexpr int CHUNK = chunk();
template <class S> using Words = Word[CHUNK * S::PARTS * 2 * COLUMNS];

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
                           int first, const Words<S> &words, int j,
                           bool spilled_only) {
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

// Whether block `first` of this warp's part of the depth exists.
DEVICE bool in_depth(const Seat &seat, int first) {
  return SHARE * ALONG == DEPTH || seat.along * SHARE + first < DEPTH;
}

// Where its words of a tile's publication lie.
DEVICE const Word *words_of(const Exchange &exchange, const Seat &seat,
                            int number, int tile, int first) {
  const int depth = tile * DEPTH + seat.along * SHARE + first;
  return exchange.slot(number) + read_by_lane() +
         depth * PARTS * 2 * COLUMNS * 32;
}

// Blocks `first` to `first` + CHUNK - 1 of this warp's part of the depth;
// `begun`: their words are on their way.
template <class S>
DEVICE void collect_and_multiply(Accumulators<S> &sums, const Weights &weights,
                                 Exchange &exchange, const Seat &seat,
                                 Words<S> &words, bool begun, int number,
                                 int tile, int first, bool spilled_only) {
  if (!in_depth(seat, first))
    return;
  const Word *from = words_of(exchange, seat, number, tile, first);
  if (!begun)
    exchange.begin<S>(words, from, 32);
  exchange.collect<S>(words, from, 32, number);
  multiply_chunk<S>(sums, weights, first, words, seat.j, spilled_only);
}

// A first look at the words of the tile that follows `tile` of a publication,
// long before they are needed.
DEVICE void look_ahead(Words<First> &words, Exchange &exchange,
                       const Seat &seat, int number, int tile) {
  const bool last = tile + 1 == TILES;
  if (in_depth(seat, 0))
    exchange.begin<First>(
        words, words_of(exchange, seat, number + last, last ? 0 : tile + 1, 0),
        32);
}

// A tile's product with publication `number`: the share of it that lies in this
// warp's part of the depth. `words` are those that `look_ahead` sent for.
template <class S>
DEVICE void product(Accumulators<S> &sums, Words<S> &words,
                    const Weights &weights, Exchange &exchange,
                    const Seat &seat, int number, int tile) {
#pragma unroll
  for (int k = 0; k < S::COUNT * OWN_BLOCKS * COLUMNS * SUMS; k++)
    (&sums[0][0][0][0])[k] = 0.0f;
  exchange.await(number, tile);
  constexpr int FIRST = HELD < AHEAD ? AHEAD : HELD;
  constexpr int UNROLLED = (FIRST + CHUNK - 1) / CHUNK * CHUNK;
#pragma unroll
  for (int k = 0; k < UNROLLED; k += CHUNK)
    collect_and_multiply<S>(sums, weights, exchange, seat, words,
                            AHEAD && k == 0, number, tile, k, false);
#pragma unroll 1
  for (int k = UNROLLED; k < SHARE; k += CHUNK)
    collect_and_multiply<S>(sums, weights, exchange, seat, words, false, number,
                            tile, k, true);
}
