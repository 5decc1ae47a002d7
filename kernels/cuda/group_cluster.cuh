// SPDX-License-Identifier: Apache-2.0
// How the words of a group travel that is one cluster of blocks (sm_90 and
// later). Publications are numbered from 0; every thread publishes number s + 1
// only after its warps have collected number s.
//
// Who owns a word sends it into the shared memory of every member, where it is
// counted. A member has two slots for each tile, and `Arrivals` for each slot:
// a phase ends when all words of a publication are there. Whoever waits for
// number s waits for the end of phase s / 2 of slot s % 2. This rests on:
// (a) Once a block has collected number s from all members, every warp of every
//     member has collected s - 1: who publishes s met them in `join` behind
//     that, or collects everything itself. So when s + 1 is sent, after s was
//     collected, nobody reads s - 1 any more, whose slot it takes; and nobody
//     still waits for the phase of s - 1, so parity tells two phases apart.
// (b) One thread announces the bytes of s + 2 once it has seen phase s end.
//     That is one arrival a phase, without which no phase ends; words of s + 2
//     may be there before it.
// (c) All members have started, and their `Arrivals` too, before anything is
//     sent; and none leaves before all are done. What was sent is there by
//     then: who publishes a number waits for it too, until it is there or,
//     after a failure, for at least POLLS looks, while no more is sent.
//
// A word that never comes ends as in every exchange: whoever gives up sends no
// more, so others give up as well.
#pragma once
#include "group_watch.cuh"

static_assert(!NORM, "a cluster has one hop a product");

struct Exchange {
  Word *slots;        // (2, SLOT)
  Arrivals *arrivals; // (2, TILES)
  Watch watch;

  DEVICE Exchange(Word *, unsigned *p_left, unsigned *p_counters,
                  unsigned long long *p_error, unsigned long long limit,
                  int launch) {
    slots =
        reinterpret_cast<Word *>(shared_memory() + WEIGHT_BYTES + SUM_BYTES);
    arrivals = reinterpret_cast<Arrivals *>(slots + 2 * SLOT);
    watch = {
        p_left, p_counters, p_error, limit, 0, launch, block_index() / MEMBERS,
        0,      true};
    for (int k = 0; k < 2 * TILES && thread_index() == 0; k++) {
      arrivals_start(arrivals + k, 1);
      arrive_expecting<EXPECT>(arrivals + k, tile_bytes(k / TILES));
    }
    cluster_sync<BEGIN>();
  }

  DEVICE Word *slot(int number) const { return slots + (number & 1) * SLOT; }

  DEVICE Arrivals *phase(int number, int tile) const {
    return arrivals + (number & 1) * TILES + tile;
  }

  // To all members, beginning with the next: no two send to one at a time.
  DEVICE void publish(const Seat &seat, const Spot &spot, int number, int tile,
                      int part, const float (&pair)[2]) {
    if (!spot.taken || !watch.alive)
      return;
    // Units that do not exist may have become anything: a NaN would spread.
    const Word word = pack_pair<Scalar>(spot.count > 0 ? pair[0] : 0.0f,
                                        spot.count > 1 ? pair[1] : 0.0f);
    Word *to = slot(number) + spot.word(seat, tile, part);
#pragma unroll
    for (int k = 1; k <= MEMBERS; k++)
      store_async<SEND>(to, word, phase(number, tile),
                        (seat.member + k) % MEMBERS);
  }

  DEVICE void published(int) {}

  DEVICE void retire(const Seat &, const Spot (&)[OWNED], int) {}

  // Before `begin`: the wait for a tile's words.
  DEVICE void await(int number, int tile) {
    watch.start();
    while (watch.alive &&
           !arrived<ARRIVED>(phase(number, tile), number >> 1 & 1))
      watch.poll(number);
    if (thread_index() == THREADS - 1 && watch.alive)
      arrive_expecting<EXPECT_AGAIN>(phase(number, tile), tile_bytes(number));
  }

  // N words of this lane, `stride` apart: its column of the B operand.
  template <class S, int N>
  DEVICE void begin(Word (&words)[N], const Word *from, int stride) {
#pragma unroll
    for (int w = 0; w < N; w++)
      words[w] = watch.alive ? from[word_offset<S>(w) * stride] : EMPTY;
  }

  template <class S, int N>
  DEVICE void collect(Word (&)[N], const Word *, int, int) {}

  // Sums of layer normalisation go through L2: no cluster is built with them.
  DEVICE unsigned long long *sums(int) const { return nullptr; }
  template <int N>
  DEVICE void publish_sums(const Seat &, const Spot &, int, const float (&)[N],
                           const float (&)[N]) {}
  template <int EACH, int N>
  DEVICE void collect_sums(unsigned long long (&)[N],
                           const unsigned long long *, const Seat &, int) {}

  // After this thread's last store: do these threads spoil the outputs?
  DEVICE bool spoils() const {
    cluster_sync<END>();
    return watch.spoils();
  }
};
