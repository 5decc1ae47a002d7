// SPDX-License-Identifier: Apache-2.0
// How a group's words travel. Publications are numbered from 0; every thread
// publishes number s + 1 only after its warps have collected number s.
//
// Through L2 with the data as the flag (the default). Slots are empty (all bits
// set, which no written word is) until their word is there, and a reader loads
// a word again until it is not empty. One word, one store, one load: nothing
// has to be ordered between words. Slots are used again, which rests on this:
// (a) Once a block has collected number s from all members, every member has
//     published s, hence collected s - 1 whole: its publishing warps met in
//     `join` (or collect everything themselves), and store a word of s only
//     behind the loop that waited for the words of s - 1. So after publishing
//     e, which follows collecting e - 1, the words up to e - 2 will not be read
//     again.
// (b) Every PERIOD publications, after publishing e, the owner of a word
//     empties it in the slots of e - 1 - PERIOD to e - 2, then runs a fence.
//     The slots come round after RING = 3 PERIOD + 1 numbers. A word has one
//     writer, and one reader in each block, always the same threads. Before
//     the reader looks for number r + RING, where r <= e - 2 was emptied at e,
//     it ran its own fence after publishing e + PERIOD or e + 2 PERIOD, and it
//     had collected e + 1 or later by then, stored by the writer after its
//     fence. A store before one fence is seen after the other: the reader
//     finds the slot empty or with the new word, never with the old one.
//     Where tiles take turns the reader looks for n = r + RING one step early,
//     while it collects n - 1, so it ran the fence after e + PERIOD at the
//     start of that step at the latest; it had collected e + 1 by then if
//     PERIOD > 1.
// Both fences stand where the thread would only wait for the others' words.
//
// COUNTER: words are plain; a block's barrier and one release a tile count its
// publication, and one lane of a reading warp polls with acquire. Two slots are
// enough by (a).
//
// A group of one keeps two slots in shared memory, with one barrier a tile.
#pragma once
#include "group_watch.cuh"

constexpr unsigned long long EMPTY_SUMS = ~0ULL;
constexpr Word CALM = EMPTY >> 1; // the same NaNs to a reader, and not empty
static_assert(!AHEAD || PERIOD > 1, "else a look ahead may find an old word");
constexpr int RING = MEMBERS == 1 || COUNTER ? 2 : 3 * PERIOD + 1;

struct Exchange {
  Word *slots;
  unsigned *counters;
  Watch watch;

  DEVICE Exchange(Word *p_words, unsigned *p_left, unsigned *p_counters,
                  unsigned long long *p_error, unsigned long long limit,
                  int launch) {
    const int group = block_index() / MEMBERS;
    slots = p_words + static_cast<long long>(group) * RING * WHOLE_SLOT;
    if constexpr (MEMBERS == 1)
      slots =
          reinterpret_cast<Word *>(shared_memory() + WEIGHT_BYTES + SUM_BYTES);
    counters = p_counters + 1 + group * TILES;
    watch = {p_left, p_counters, p_error, limit, 0, launch, group, 0, true};
  }

  DEVICE Word *slot(int number) const {
    if constexpr (MEMBERS == 1 && NORM) // its words and sums have one slot each
      return slots;
    return slots + static_cast<unsigned>(number) % RING *
                       static_cast<long long>(WHOLE_SLOT);
  }

  // (DEPTH, MOST, ROWS) pairs of numbers, of which EMPTY_SUMS is none.
  DEVICE unsigned long long *sums(int number) const {
    return reinterpret_cast<unsigned long long *>(slot(number) + SLOT);
  }

  // Of the spot's block of units and its row, from one of eight lanes: of each
  // of a stage's gates.
  template <int N>
  DEVICE void publish_sums(const Seat &seat, const Spot &spot, int number,
                           const float (&first)[N], const float (&second)[N]) {
    if (seat.i)
      return;
    unsigned long long *to = sums(number) + spot.block * MOST * ROWS + spot.row;
#pragma unroll
    for (int gate = 0; gate < N; gate++) {
      const unsigned long long pair =
          __float_as_uint(first[gate]) |
          static_cast<unsigned long long>(__float_as_uint(second[gate])) << 32;
      if constexpr (MEMBERS == 1 || COUNTER)
        to[gate * ROWS] = pair;
      else
        store_relaxed<SEND_SUMS>(to + gate * ROWS,
                                 pair == EMPTY_SUMS ? EMPTY_SUMS >> 1 : pair);
    }
  }

  // N / EACH gates' of every eighth block of the depth, from this lane's on.
  template <int EACH, int N>
  DEVICE void collect_sums(unsigned long long (&pairs)[N],
                           const unsigned long long *from, const Seat &seat,
                           int number) {
    watch.start();
#pragma unroll
    for (int w = 0; w < N; w++)
      pairs[w] = look_for_sums<EACH>(from, seat, w);
    if constexpr (MEMBERS == 1 || COUNTER)
      return;
    while (any_empty(pairs) && watch.alive) {
      watch.poll(number);
#pragma unroll
      for (int w = 0; w < N; w++)
        if (pairs[w] == EMPTY_SUMS)
          pairs[w] = look_for_sums<EACH>(from, seat, w);
    }
  }

  template <int EACH>
  DEVICE unsigned long long look_for_sums(const unsigned long long *from,
                                          const Seat &seat, int w) const {
    if (seat.i + w % EACH * 8 >= DEPTH)
      return 0;
    from += w % EACH * 8 * MOST * ROWS + w / EACH * ROWS;
    if constexpr (MEMBERS == 1 || COUNTER)
      return watch.alive ? *from : EMPTY_SUMS;
    else
      return load_relaxed<COLLECT_SUMS>(from);
  }

  DEVICE void publish(const Seat &seat, const Spot &spot, int number, int tile,
                      int part, const float (&pair)[2]) {
    if (!spot.taken)
      return;
    // Units that do not exist may have become anything: a NaN would spread.
    const Word word = pack_pair<Scalar>(spot.count > 0 ? pair[0] : 0.0f,
                                        spot.count > 1 ? pair[1] : 0.0f);
    Word *to = slot(number) + spot.word(seat, tile, part);
    if constexpr (MEMBERS == 1 || COUNTER)
      *to = word;
    else
      store_relaxed<PUBLISH>(to, word == EMPTY ? CALM : word);
  }

  // After a tile's last word.
  DEVICE void published(int tile) {
    if constexpr (MEMBERS == 1) {
      block_sync<WITHIN>();
    } else if constexpr (COUNTER) {
      block_sync<COUNT_BLOCK>();
      if (thread_index() == 0)
        add_release<COUNT_ADD>(counters + tile, 1u);
    }
  }

  // After the last tile's.
  DEVICE void retire(const Seat &seat, const Spot (&spots)[OWNED], int number) {
    if constexpr (MEMBERS == 1 || COUNTER)
      return;
    if (number <= PERIOD || (number - 1) % PERIOD)
      return;
    for (int old = number - 1 - PERIOD; old <= number - 2; old++)
      for (int spot = 0; spot < OWNED; spot++)
        of_sums(old) ? empty_sums(seat, spots[spot], sums(old))
                     : empty(seat, spots[spot], slot(old));
    fence<EMPTIED>();
  }

  DEVICE void empty(const Seat &seat, const Spot &spot, Word *from) {
    if (!spot.taken)
      return;
    for (int tile = 0; tile < TILES; tile++)
      for (int part = 0; part < PARTS; part++)
        store_relaxed<EMPTYING>(from + spot.word(seat, tile, part), EMPTY);
  }

  DEVICE void empty_sums(const Seat &seat, const Spot &spot,
                         unsigned long long *from) {
    for (int gate = 0; gate < MOST && spot.taken && seat.i == 0; gate++)
      store_relaxed<EMPTYING_SUMS>(
          from + (spot.block * MOST + gate) * ROWS + spot.row, EMPTY_SUMS);
  }

  // Before `collect`: with COUNTER the wait for a tile's words.
  DEVICE void await(int number, int tile) {
    watch.start();
    if constexpr (MEMBERS > 1 && COUNTER) {
      const unsigned wanted = MEMBERS * (number + 1u);
      // Counters wrap around: what counts is the difference.
      while (lane() == 0 && watch.alive &&
             static_cast<int>(load_acquire<COUNT_WAIT>(counters + tile) -
                              wanted) < 0)
        watch.poll(number);
      warp_sync<COUNT_WARP>(0xffffffffu);
    }
  }

  // A first look at N words of this lane: its column of the B operand. Of each
  // block of the depth those of the stage's parts, which are `stride` apart.
  // Nothing waits for them before `collect`.
  template <class S, int N>
  DEVICE void begin(Word (&words)[N], const Word *from, int stride) {
#pragma unroll
    for (int w = 0; w < N; w++)
      if constexpr (MEMBERS == 1 || COUNTER)
        words[w] = watch.alive ? from[word_offset<S>(w) * stride] : EMPTY;
      else
        words[w] = look(from + word_offset<S>(w) * stride);
  }

  // Looks again until all of them are there.
  template <class S, int N>
  DEVICE void collect(Word (&words)[N], const Word *from, int stride,
                      int number) {
    if constexpr (MEMBERS == 1 || COUNTER)
      return;
    while (any_empty(words) && watch.alive) {
      watch.poll(number);
#pragma unroll
      for (int w = 0; w < N; w++)
        if (words[w] == EMPTY)
          words[w] = look(from + word_offset<S>(w) * stride);
    }
  }

  DEVICE static Word look(const Word *from) {
    return load_relaxed<COLLECT>(from);
  }

  // As a tree of maxima, of which an empty word gives the largest: one
  // comparison for all, and a short chain.
  template <class T, int N> DEVICE static bool any_empty(const T (&words)[N]) {
    unsigned most[N];
#pragma unroll
    for (int w = 0; w < N; w++)
      most[w] = sizeof(T) == 4 ? low_part(words[w])
                               : low_part(words[w]) & high_part(words[w]);
#pragma unroll
    for (int step = 1; step < N; step *= 2)
#pragma unroll
      for (int w = 0; w + step < N; w += 2 * step)
        most[w] = max(most[w], most[w + step]);
    return most[0] == ~0u;
  }

  // After this thread's last store: do these threads spoil the outputs?
  DEVICE bool spoils() const { return watch.spoils(); }
};
