// SPDX-License-Identifier: Apache-2.0
// Memory operations that take effect later than they are written: relaxed
// stores on their way out of a block, and asynchronous copies.
#include "internal.h"

#include <queue>
#include <unordered_map>
#include <unordered_set>

namespace cpu {

namespace {

struct LateStore {
  uint64_t bits;
  size_t bytes;
};

struct Due {
  uint64_t when;
  int block;
  void *p;
  bool operator>(const Due &other) const { return when > other.when; }
};

std::vector<std::unordered_map<void *, LateStore>> late; // by block
std::priority_queue<Due, std::vector<Due>, std::greater<Due>> due;
std::unordered_set<const void *> wanted; // words read since nobody could go on
uint64_t latest, now;
std::minstd_rand random_bits;

void write(void *p, LateStore store) { write_word(p, store.bits, store.bytes); }

size_t late_stores() {
  size_t count = 0;
  for (auto &of_block : late)
    count += of_block.size();
  return count;
}

void finish_stores_of(int block) {
  for (auto &[p, store] : late[block])
    write(p, store);
  late[block].clear();
}

void finish(const Due &store) {
  auto found = late[store.block].find(store.p);
  if (found == late[store.block].end())
    return; // a release was faster
  write(found->first, found->second);
  late[store.block].erase(found);
}

} // namespace

void write_word(void *p, uint64_t bits, size_t bytes) {
  if (bytes == 4) // little-endian, as the GPU
    __atomic_store_n(static_cast<uint32_t *>(p), bits, __ATOMIC_RELAXED);
  else
    __atomic_store_n(static_cast<uint64_t *>(p), bits, __ATOMIC_RELAXED);
}

void start_stores(int blocks, uint64_t latest_, uint64_t seed) {
  late.resize(blocks);
  latest = latest_;
  random_bits.seed(seed + 1);
}

void queue_store(void *p, uint64_t bits, size_t bytes) {
  Outside outside;
  if (latest == 0)
    return write(p, {bits, bytes});
  // A second store to the same word takes the first one's place: it may.
  bool first =
      late[here->block].insert_or_assign(p, LateStore{bits, bytes}).second;
  if (first && latest != NEVER)
    due.push({now + random_bits() % latest, here->block, p});
}

uint64_t forward(const void *p, uint64_t in_memory) {
  if (latest == 0)
    return in_memory;
  Outside outside;
  if (latest == NEVER)
    wanted.insert(p);
  auto found = late[here->block].find(const_cast<void *>(p));
  return found == late[here->block].end() ? in_memory : found->second.bits;
}

void age_stores(uint64_t switches) {
  now = switches;
  for (; !due.empty() && due.top().when <= now; due.pop())
    finish(due.top());
}

// Only the words that somebody looked for: all others stay, and what they hold
// meanwhile is old.
bool release_wanted() {
  size_t before = late_stores();
  for (auto &of_block : late)
    for (auto store = of_block.begin(); store != of_block.end();)
      if (wanted.count(store->first)) {
        write(store->first, store->second);
        store = of_block.erase(store);
      } else
        ++store;
  wanted.clear();
  return late_stores() < before;
}

void finish_stores() {
  Outside outside;
  finish_stores_of(here->block);
}

void finish_all_stores() {
  for (size_t block = 0; block < late.size(); ++block)
    finish_stores_of(block);
}

void push_copy(Copy copy) {
  Outside outside;
  running()->copies.push_back({copy, running()->groups});
}

void commit_copies() { ++running()->groups; }

bool pop_copy(int pending, Copy &copy) {
  Outside outside;
  auto &copies = running()->copies;
  if (copies.empty() || copies.front().group >= running()->groups - pending)
    return false;
  copy = copies.front().copy;
  copies.pop_front();
  return true;
}

} // namespace cpu
