// SPDX-License-Identifier: Apache-2.0
// What group_forward.cu and group_backward.cu share. MEMBERS blocks of threads,
// a group, run a tile of the batch together: each owns BLOCKS blocks of 16
// units, keeps their rows of the weights on chip and, step after step, sends
// what it computed for its units to all members (group_exchange.cuh).
//
// A block's warps stand ACROSS its unit blocks and ALONG the depth of the
// product. Weights are the A operand of the matrix instructions: row i of a
// 16-row fragment is unit 2 i, row i + 8 unit 2 i + 1, so that a thread holds
// two neighbouring units, with all their gates, for each of its batch rows.
// The batch is the B operand, COLUMNS columns of 8 rows a tile; TILES tiles
// take turns within a step, so that one computes while another's words travel.
//
// Given by the launcher: Scalar as SCALAR, PRECISION (of fp32: IEEE or TF32),
// GATES, SPLITS (gates whose product is kept apart), KEPT (per gate: its number
// among those, or -1), STAGES and what they share (`Stage`), STATES, PARAMS,
// MEMBERS, BLOCKS, ACROSS, ALONG, COLUMNS, TILES, HELD (of each warp's blocks
// of the depth: weights in registers, those beyond in shared memory), BACKWARD,
// SAVE (forward: keep what the backward direction needs), INNER (states other
// than h of all steps: forward, keep them; backward, they have gradients),
// PAIRED (units lie in aligned pairs), COUNTER, PERIOD, CLUSTER (a group is one
// cluster of blocks), JOINS (passes in which partial sums are joined), SHARED,
// and the options of group_options.cuh.
#pragma once
#include "device.cuh"

#define IEEE 0
#define TF32 1

typedef SCALAR Scalar;
constexpr bool HALF = sizeof(Scalar) == 2;

// Two neighbouring units of one batch row.
template <int BYTES> struct WordOf {
  typedef unsigned type;
};
template <> struct WordOf<4> {
  typedef unsigned long long type;
};
typedef WordOf<sizeof(Scalar)>::type Word;

constexpr int DEPTH =
    MEMBERS * BLOCKS; // blocks of 16 units that enter a product
constexpr int SHARE = (DEPTH + ALONG - 1) / ALONG; // of them, for a warp
constexpr int OWN_BLOCKS = BLOCKS / ACROSS;        // unit blocks of a warp
constexpr int ROWS = 8 * COLUMNS;                  // of the batch in a tile
// Warps that own no unit skip the forward pass's pointwise work. In full fp32
// the largest builds have no register left for the branch.
constexpr bool OWNERS_ONLY = APPROXIMATE;
constexpr int PAIRS = 2 * COLUMNS; // pairs of units of a thread in a unit block
constexpr int SPOTS = OWN_BLOCKS * PAIRS;
constexpr int OWNED = (SPOTS + ALONG - 1) / ALONG; // after ALONG
constexpr int THREADS = 32 * ACROSS * ALONG;
constexpr int FRAGMENT = HALF ? 4 : 8; // registers of 16 x 16 weights
static_assert(BLOCKS % ACROSS == 0 && HELD <= SHARE && SPOTS % JOINS == 0,
              "the launcher's layout");

// At least one, so that arrays of them exist.
constexpr int ANY_SPLITS = SPLITS ? SPLITS : 1;
constexpr int ANY_PARAMS = PARAMS ? PARAMS : 1;
constexpr int DROPS = DROP == 2 ? GATES : DROP;
constexpr int ANY_DROPS = DROPS ? DROPS : 1;
constexpr int ANY_HANDED = HANDED ? HANDED : 1;

// A step takes one product or, with STAGES = 2, two: of the first EARLY gates,
// then, with what the first part of the step hands on, of the others. Each has
// a publication of its own; numbers count on through both.
template <int NUMBER> struct Stage {
  static constexpr bool LAST = NUMBER == STAGES - 1;
  static constexpr int START = NUMBER ? EARLY : 0; // its gates
  static constexpr int STOP = NUMBER ? GATES : EARLY;
  static constexpr int COUNT = STOP - START;
  static constexpr int BEFORE = NUMBER ? EARLY_SPLITS : 0; // split gates
  static constexpr int PARTS = BACKWARD || DROP == 2 ? COUNT : 1;
  static constexpr int RESULTS = BACKWARD && DROP < 2 ? 1 : COUNT;
};
typedef Stage<0> First;
typedef Stage<STAGES - 1> Last;
constexpr int MOST = First::COUNT > Last::COUNT ? First::COUNT : Last::COUNT;

// Publications of a step. With NORM, layer normalisation (group_norm.cuh), each
// product has one of sums as well, before the words of the backward direction
// and behind those of the forward one: of two neighbours one is of sums.
constexpr int OF_A_PRODUCT = NORM ? 2 : 1;
constexpr int HOPS = STAGES * OF_A_PRODUCT;
DEVICE constexpr bool of_sums(int number) {
  return NORM && (number & 1) != BACKWARD;
}
constexpr int ANY_NORM = NORM ? GATES : 1;

// Shared memory: weights beyond the registers, two buffers of partial sums, and
// two slots of words, of a group of one or of a cluster, which counts them too.
constexpr int SPILLED = GATES * OWN_BLOCKS * (SHARE - HELD); // fragments a warp
constexpr int PARTS = BACKWARD || DROP == 2 ? MOST : 1;      // words of a unit
constexpr int RESULTS = BACKWARD && DROP < 2 ? 1 : MOST;     // sums of a unit
constexpr int SUM_FLOATS = ALONG > 1 ? OWN_BLOCKS * RESULTS * COLUMNS * 4 : 0;
constexpr int SLOT = TILES * PARTS * DEPTH * 2 * COLUMNS * 32; // words
constexpr int SLOT_SUMS =
    NORM ? TILES * DEPTH * MOST * ROWS : 0; // pairs of fp32
constexpr int WHOLE_SLOT =
    SLOT + SLOT_SUMS * 8 / static_cast<int>(sizeof(Word));

// Of a lane's words in a slot the w-th that the stage uses: of each block of
// the depth those of its parts.
template <class S> DEVICE constexpr int word_offset(int w) {
  constexpr int used = S::PARTS * 2 * COLUMNS, all = PARTS * 2 * COLUMNS;
  return w / used * all + w % used;
}

constexpr long long WEIGHT_BYTES = THREADS * 4LL * FRAGMENT * SPILLED;
constexpr long long SUM_BYTES = 2 * THREADS * 4LL * SUM_FLOATS / JOINS;
constexpr long long WORD_BYTES =
    MEMBERS == 1 || CLUSTER ? sizeof(Word) * (NORM ? WHOLE_SLOT : 2LL * SLOT)
                            : 0;

// Of a tile's words in a publication. Of two stages one has the even numbers.
DEVICE constexpr int tile_bytes(int number) {
  constexpr int part = SLOT / TILES / PARTS * static_cast<int>(sizeof(Word));
  const bool last = (number & 1) != BACKWARD;
  return part * (STAGES == 2 && last ? Last::PARTS : First::PARTS);
}

constexpr long long ARRIVAL_BYTES =
    CLUSTER ? 2LL * sizeof(Arrivals) * TILES : 0;
static_assert(WEIGHT_BYTES + SUM_BYTES + WORD_BYTES + ARRIVAL_BYTES == SHARED,
              "the launcher's count of shared memory");
// Tiles take turns: the next one's words are on their way while one is joined.
// Full fp32 has no register left for that, and two products wait for each
// other.
constexpr bool AHEAD = TILES > 1 && MEMBERS > 1 && HOPS == 1 && !COUNTER &&
                       !CLUSTER && (HALF || PRECISION == TF32);
static_assert(!CLUSTER || (MEMBERS > 1 && MEMBERS <= 16), "a cluster's blocks");

#if CLUSTER
#define LAUNCH_BOUNDS                                                          \
  __cluster_dims__(MEMBERS, 1, 1) __launch_bounds__(THREADS, 1)
#else
#define LAUNCH_BOUNDS __launch_bounds__(THREADS, 1)
#endif

struct alignas(16) Quad {
  unsigned x, y, z, w;
};

// ---- Words ------------------------------------------------------------------

DEVICE unsigned low_part(unsigned long long word) {
  return static_cast<unsigned>(word);
}
DEVICE unsigned high_part(unsigned long long word) {
  return static_cast<unsigned>(word >> 32);
}

template <class T> DEVICE Word pack_pair(float first, float second) {
  if constexpr (HALF) {
    return pack<T>(first, second);
  } else {
    if constexpr (PRECISION == TF32) {
      first = to_tf32(first);
      second = to_tf32(second);
    }
    return __float_as_uint(first) |
           static_cast<unsigned long long>(__float_as_uint(second)) << 32;
  }
}

template <class T> DEVICE void unpack_pair(float (&pair)[2], Word word) {
  if constexpr (HALF) {
    const T first = {static_cast<unsigned short>(word)};
    const T second = {static_cast<unsigned short>(word >> 16)};
    pair[0] = to_float(first);
    pair[1] = to_float(second);
  } else {
    pair[0] = __uint_as_float(low_part(word));
    pair[1] = __uint_as_float(high_part(word));
  }
}

// Two neighbouring units in memory, of which the first `count` exist, on their
// way: no instruction looks at them before `unpack`, so none waits for them.
struct RawPair {
  Word word;
  Scalar units[2]; // of which only these are used where pairs are not aligned
};

DEVICE void load_raw(RawPair &raw, const Scalar *p, int count) {
  if constexpr (PAIRED) {
    raw.word = 0;
    if (count > 0)
      raw.word = *reinterpret_cast<const Word *>(p);
  } else {
    raw.units[0] = raw.units[1] = from_float<Scalar>(0.0f);
    if (count > 0)
      raw.units[0] = p[0];
    if (count > 1)
      raw.units[1] = p[1];
  }
}

DEVICE void unpack(float (&pair)[2], const RawPair &raw) {
  if constexpr (PAIRED) {
    unpack_pair<Scalar>(pair, raw.word);
  } else {
    pair[0] = to_float(raw.units[0]);
    pair[1] = to_float(raw.units[1]);
  }
}

DEVICE void load_pair(float (&pair)[2], const Scalar *p, int count) {
  RawPair raw;
  load_raw(raw, p, count);
  unpack(pair, raw);
}

DEVICE void store_pair(Scalar *p, const float (&pair)[2], int count) {
  if constexpr (PAIRED && HALF) {
    if (count > 0)
      *reinterpret_cast<Word *>(p) = pack_pair<Scalar>(pair[0], pair[1]);
  } else {
    if (count > 0)
      p[0] = from_float<Scalar>(pair[0]);
    if (count > 1)
      p[1] = from_float<Scalar>(pair[1]);
  }
}

DEVICE void load_pair_f32(float (&pair)[2], const float *p, int count) {
  pair[0] = count > 0 ? p[0] : 0.0f;
  pair[1] = count > 1 ? p[1] : 0.0f;
}

DEVICE void store_pair_f32(float *p, const float (&pair)[2], int count) {
  if (count > 0)
    p[0] = pair[0];
  if (count > 1)
    p[1] = pair[1];
}

// ---- Who and where ----------------------------------------------------------

// A thread's place. Blocks are numbered (recurrence, group, member).
struct Seat {
  int n, group, member, across, along, i, j; // lane = 4 i + j
  int place;                                 // of the words that it reads

  DEVICE Seat(int first_n, int groups) {
    const int whole = block_index() / MEMBERS;
    n = first_n + whole / groups;
    group = whole % groups;
    member = block_index() % MEMBERS;
    across = warp() / ALONG;
    along = warp() % ALONG;
    i = lane() / 4;
    j = lane() % 4;
  }
};

// What a thread owns once the partial sums are joined: a pair of units of one
// batch row. Beyond the last one `count`, the units that exist, is 0.
struct Spot {
  bool taken;
  int own, pair, block, unit, row, count;

  DEVICE Spot() {}
  DEVICE Spot(const Seat &seat, int number, int H) {
    const int item = seat.along * OWNED + number;
    taken = item < SPOTS;
    own = item / PAIRS;
    pair = item % PAIRS;
    block = seat.member * BLOCKS + seat.across * OWN_BLOCKS + own;
    unit = 16 * block + 2 * seat.i;
    row = 8 * (pair / 2) + 2 * seat.j + pair % 2;
    count = !taken || unit >= H ? 0 : unit + 1 < H ? 2 : 1;
  }

  // Of its word, within a slot: 32 words of 8 rows are what a warp reads at
  // once. A cluster has them as rows of one warp, so that a store is 64 bytes
  // in a row.
  DEVICE int word(const Seat &seat, int tile, int part) const {
    const int half = 2 * ((tile * DEPTH + block) * PARTS + part) + seat.i / 4;
    const int first = (half * COLUMNS + pair / 2) * 32;
    if constexpr (CLUSTER)
      return first + 16 * (pair % 2) + 4 * seat.j + seat.i % 4;
    return first + 4 * (row % 8) + seat.i % 4;
  }
};

// Which of 32 words a lane reads: that of row `lane() / 4`.
DEVICE int read_by_lane() {
  if constexpr (CLUSTER)
    return (lane() & 4) << 2 | lane() >> 3 << 2 | (lane() & 3);
  return lane();
}
