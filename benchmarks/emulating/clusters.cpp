// SPDX-License-Identifier: Apache-2.0
// What blocks of a cluster send into each other's shared memory, and the places
// where its arrival is counted.
#include "internal.h"

#include <queue>
#include <unordered_map>
#include <unordered_set>

namespace cpu {

namespace {

struct Counted {
  int block; // in whose shared memory
  int count; // arrivals of a phase
  int pending;
  long long bytes; // announced and not there; below 0: there first
  int ended;       // phases
  int token;       // the order that whoever arrives hands to whoever waits
};

struct Sent {
  uint64_t when, bits;
  size_t bytes;
  void *to, *arrivals;
  bool whole;
  bool operator>(const Sent &other) const { return when > other.when; }
};

std::unordered_map<const void *, Counted> counted;
std::priority_queue<Sent, std::vector<Sent>, std::greater<Sent>> under_way;
std::unordered_map<const void *, std::vector<Sent>> hoarded; // by `arrivals`
std::unordered_set<const void *> wanted; // waited for since nobody could go on
uint64_t latest, now;
std::minstd_rand random_bits;
constexpr long long MOST_BYTES = (1 << 20) - 1; // PTX ISA, tx-count of mbarrier

Counted &counted_at(const void *arrivals) {
  auto found = counted.find(arrivals);
  require(found != counted.end(), "arrivals are counted before their start");
  return found->second;
}

void add(Counted &at, int arrivals, long long bytes) {
  at.pending -= arrivals;
  at.bytes += bytes;
  require(at.pending >= 0, "more threads arrive than a phase counts");
  require(at.bytes <= MOST_BYTES && at.bytes >= -MOST_BYTES,
          "no more bytes are under way than can be counted");
  if (at.pending > 0 || at.bytes != 0)
    return;
  ++at.ended;
  at.pending = at.count;
}

void deliver(const Sent &sent) {
  Counted &at = counted.at(sent.arrivals);
  if (has_left(at.block))
    fail("a word comes to block %d, which has left", at.block);
  write_word(sent.to, sent.bits, sent.bytes);
  if (sent.whole)
    add(at, 0, -static_cast<long long>(sent.bytes));
}

} // namespace

void start_sends(uint64_t latest_, uint64_t seed) {
  latest = latest_;
  random_bits.seed(seed + 2);
}

void start_arrivals(void *arrivals, int count) {
  Outside outside;
  counted[arrivals] = {here->block, count, count, 0, 0, 0};
}

void arrive(void *arrivals, long long bytes) {
  give_order(counted_at(arrivals).token);
  Outside outside;
  add(counted_at(arrivals), 1, bytes);
}

bool has_ended(void *arrivals, int parity) {
  Counted &at = counted_at(arrivals);
  if (at.ended % 2 != parity) {
    take_order(at.token);
    return true;
  }
  Outside outside;
  wanted.insert(arrivals);
  return false;
}

void send(void *to, uint64_t bits, size_t bytes, void *arrivals, bool whole) {
  Counted &at = counted_at(arrivals);
  if (whole)
    give_order(at.token);
  Outside outside;
  if (!whole)
    add(at, 0, -static_cast<long long>(bytes));
  Sent sent = {now, bits, bytes, to, arrivals, whole};
  if (latest == 0)
    return deliver(sent);
  if (latest == NEVER)
    return hoarded[arrivals].push_back(sent);
  sent.when += random_bits() % latest;
  under_way.push(sent);
}

void age_sends(uint64_t switches) {
  now = switches;
  for (; !under_way.empty() && under_way.top().when <= now; under_way.pop())
    deliver(under_way.top());
}

bool deliver_wanted() {
  bool some = false;
  for (const void *arrivals : wanted) {
    for (const Sent &sent : hoarded[arrivals]) {
      deliver(sent);
      some = true;
    }
    hoarded[arrivals].clear();
  }
  wanted.clear();
  return some;
}

void deliver_all() {
  for (; !under_way.empty(); under_way.pop())
    deliver(under_way.top());
  for (auto &[arrivals, all] : hoarded)
    for (const Sent &sent : all)
      deliver(sent);
}

} // namespace cpu
