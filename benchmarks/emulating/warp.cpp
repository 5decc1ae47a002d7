// SPDX-License-Identifier: Apache-2.0
// What the 32 lanes of a warp do together, and the numbers that they do it
// with. Element positions are those of the PTX ISA's "Matrix Fragments for
// mma".
#include "internal.h"

#include <cfloat>
#include <cmath>
#include <cstring>

namespace cpu {

namespace {

// The lane that comes last does the work of all; the others sleep until then.
template <class Operands>
void together(Kind kind, Operands &mine, void (*work)(Operands *(&)[32])) {
  Outside outside;
  Fiber *self = running();
  Warp &warp = *self->warp;
  require(warp.arrived == 0 || warp.kind == kind,
          "the lanes of this warp are at different operations");
  warp.kind = kind;
  warp.operands[self->thread % 32] = &mine;
  if (++warp.arrived < 32) {
    self->waits_for = kind;
    self->waits_at = self->thread % 32;
    return sleep_until_ready();
  }
  warp.arrived = 0;
  Operands *operands[32];
  for (int i = 0; i < 32; ++i)
    operands[i] = static_cast<Operands *>(warp.operands[i]);
  work(operands);
  for (Fiber *lane : warp.lanes)
    if (lane != self)
      make_ready(lane);
}

uint16_t half(unsigned word, int index) {
  return static_cast<uint16_t>(word >> 16 * index);
}

} // namespace

// ---- mma ----

namespace {

struct Product {
  float *d;
  const unsigned *a, *b;
};

float tf32(unsigned bits) {
  return bit_cast<float>(bits & ~0x1fffu);
} // the rest is not read
float bf16(uint16_t bits) {
  return bit_cast<float>(static_cast<unsigned>(bits) << 16);
}

// d (16 x 8) += a (16 x K) b (K x 8), in double: a GPU adds in another order.
template <int K>
void multiply(Product *(&lanes)[32], const float (&a)[16][K],
              const float (&b)[K][8]) {
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) {
      int row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
      double sum = lanes[l]->d[i];
      for (int k = 0; k < K; ++k)
        sum += static_cast<double>(a[row][k]) * b[k][column];
      lanes[l]->d[i] = static_cast<float>(sum);
    }
}

template <float (*VALUE)(uint16_t)>
void multiply_halves(Product *(&lanes)[32]) {
  float a[16][16], b[16][8];
  for (int l = 0; l < 32; ++l) {
    int group = l / 4, pair = 2 * (l % 4);
    for (int i = 0; i < 8; ++i)
      a[group + 8 * (i / 2 % 2)][pair + i % 2 + 8 * (i / 4)] =
          VALUE(half(lanes[l]->a[i / 2], i % 2));
    for (int i = 0; i < 4; ++i)
      b[pair + i % 2 + 8 * (i / 2)][group] =
          VALUE(half(lanes[l]->b[i / 2], i % 2));
  }
  multiply(lanes, a, b);
}

void multiply_tf32(Product *(&lanes)[32]) {
  float a[16][8], b[8][8];
  for (int l = 0; l < 32; ++l) {
    for (int i = 0; i < 4; ++i)
      a[l / 4 + 8 * (i % 2)][l % 4 + 4 * (i / 2)] = tf32(lanes[l]->a[i]);
    for (int i = 0; i < 2; ++i)
      b[l % 4 + 4 * i][l / 4] = tf32(lanes[l]->b[i]);
  }
  multiply(lanes, a, b);
}

} // namespace

void mma(Kind kind, float (&d)[4], const unsigned (&a)[4],
         const unsigned (&b)[2]) {
  Product mine = {d, a, b};
  auto work = kind == Kind::mma_f16    ? multiply_halves<float_from_f16>
              : kind == Kind::mma_bf16 ? multiply_halves<bf16>
                                       : multiply_tf32;
  together(kind, mine, work);
}

// ---- Shuffles ----

namespace {

struct Shuffle {
  unsigned value, result;
  int source;
};

void exchange(Shuffle *(&lanes)[32]) {
  for (Shuffle *lane : lanes)
    lane->result = lanes[lane->source]->value;
}

} // namespace

unsigned shuffle(unsigned value, int source) {
  Shuffle mine = {value, 0, source};
  together(Kind::shuffle, mine, exchange);
  return mine.result;
}

// ---- 16-bit numbers: to the nearest, ties to even ----

float float_from_f16(uint16_t bits) {
  unsigned sign = (bits & 0x8000u) << 16, exponent = bits >> 10 & 31,
           fraction = bits & 0x3ff;
  if (exponent == 31) // infinity and NaN
    return bit_cast<float>(sign | 0x7f800000u | fraction << 13);
  float magnitude = exponent ? std::ldexp(1024.0f + fraction, exponent - 25)
                             : std::ldexp(1.0f * fraction, -24);
  return sign ? -magnitude : magnitude;
}

uint16_t f16_from_float(float x) {
  uint16_t sign = bit_cast<unsigned>(x) >> 16 & 0x8000;
  float magnitude = std::fabs(x);
  if (std::isnan(x))
    return 0x7fff;           // the GPU's NaN
  if (magnitude >= 65520.0f) // half a step above the largest, 65504
    return sign | 0x7c00;
  // In steps of the result's last place, rounded by nearbyint; a carry into the
  // exponent is right as it is.
  int exponent = magnitude < 0x1p-14f ? -14 : std::ilogb(magnitude);
  unsigned steps = static_cast<unsigned>(
      std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return static_cast<uint16_t>(sign | (((exponent + 14) << 10) + steps));
}

uint16_t bf16_from_float(float x) {
  if (std::isnan(x))
    return 0x7fff; // the GPU's NaN
  unsigned bits = bit_cast<unsigned>(x);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float off_by(double exact, float x, double bound) {
  const bool up = bit_cast<uint32_t>(x) & 1;
  const float result =
      static_cast<float>(exact * (1.0 + (up ? bound : -bound)));
  return std::fabs(result) < FLT_MIN ? 0.0f * result : result;
}

} // namespace cpu
