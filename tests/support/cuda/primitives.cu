// SPDX-License-Identifier: Apache-2.0
// Each function of kernels/cuda/device.cuh by itself, its operands and results
// in global memory, so that a test knows what every thread gave and got. One
// block; the matrix kernels one warp.
#include "device.cuh"

enum Site {
  COPY,
  COPIED,
  ALL,
  HALF,
  LANES,
  SEND,
  SEND_WIDE,
  SEE,
  SEE_WIDE,
  SEND_AGAIN,
  SEND_WIDE_AGAIN,
  COUNT
};

extern "C" __global__ void indices(int *out) { // (threads, 6)
  int *mine = out + 6 * (block_index() * block_threads() + thread_index());
  int values[6] = {thread_index(), block_index(), block_threads(),
                   grid_blocks(),  lane(),        warp()};
  for (int i = 0; i < 6; ++i)
    mine[i] = values[i];
}

template <class F>
DEVICE void multiply(F mma, const unsigned *a, const unsigned *b, float *d) {
  unsigned r_a[4], r_b[2];
  float r_d[4];
  for (int i = 0; i < 4; ++i) {
    r_a[i] = a[4 * lane() + i];
    r_d[i] = d[4 * lane() + i];
  }
  for (int i = 0; i < 2; ++i)
    r_b[i] = b[2 * lane() + i];
  mma(r_d, r_a, r_b);
  for (int i = 0; i < 4; ++i)
    d[4 * lane() + i] = r_d[i];
}

using Accumulator = float (&)[4];
using FragmentA = const unsigned (&)[4];
using FragmentB = const unsigned (&)[2];

// Registers of the lanes: a (32, 4), b (32, 2), d (32, 4) in and out.
extern "C" __global__ void multiply_f16(const unsigned *a, const unsigned *b,
                                        float *d) {
  multiply([](Accumulator d, FragmentA a, FragmentB b) { mma_f16(d, a, b); }, a,
           b, d);
}

extern "C" __global__ void multiply_bf16(const unsigned *a, const unsigned *b,
                                         float *d) {
  multiply([](Accumulator d, FragmentA a, FragmentB b) { mma_bf16(d, a, b); },
           a, b, d);
}

extern "C" __global__ void multiply_tf32(const unsigned *a, const unsigned *b,
                                         float *d) {
  multiply([](Accumulator d, FragmentA a, FragmentB b) { mma_tf32(d, a, b); },
           a, b, d);
}

// Every thread copies 16 bytes, or zeros, and reads what its neighbour copied.
extern "C" __global__ void copy(const float *in, const int *valid, float *out) {
  float *slots = reinterpret_cast<float *>(shared_memory());
  int i = thread_index(), next = (i + 1) % block_threads();
  copy_async_16<COPY>(slots + 4 * i, in + 4 * i, valid[i] != 0);
  copy_async_commit();
  copy_async_wait<0, COPIED>();
  named_sync<HALF>(3, block_threads());
  for (int k = 0; k < 4; ++k)
    out[4 * i + k] = slots[4 * next + k];
}

// (32, 4): xor and by index, of words and of floats.
extern "C" __global__ void shuffles(const unsigned *in, int mask,
                                    const int *from, unsigned *out) {
  unsigned mine = in[lane()];
  int source = from[lane()];
  warp_sync<LANES>(0xffffffff);
  out[4 * lane()] = shuffle_xor(mine, mask);
  out[4 * lane() + 1] = shuffle(mine, source);
  out[4 * lane() + 2] =
      __float_as_uint(shuffle_xor(__uint_as_float(mine), mask));
  out[4 * lane() + 3] = __float_as_uint(shuffle(__uint_as_float(mine), source));
}

extern "C" __global__ void round_floats(const float *in, int count,
                                        unsigned *half, unsigned *brain,
                                        float *tf32) {
  for (int i = thread_index(); i < count; i += block_threads()) {
    half[i] = pack<f16>(in[i], -in[i]);
    brain[i] = pack<bf16>(in[i], -in[i]);
    tf32[i] = to_tf32(in[i]);
  }
}

extern "C" __global__ void approximate(const float *in, int count, float *exp2,
                                       float *reciprocal, float *root) {
  for (int i = thread_index(); i < count; i += block_threads()) {
    exp2[i] = exp2_approximate(in[i]);
    reciprocal[i] = reciprocal_approximate(in[i]);
    root[i] = inverse_root_approximate(in[i]);
  }
}

// Of all 65536 words.
extern "C" __global__ void widen(float *half, float *brain) {
  for (int i = thread_index(); i < 65536; i += block_threads()) {
    half[i] = to_float(f16{static_cast<unsigned short>(i)});
    brain[i] = to_float(bf16{static_cast<unsigned short>(i)});
  }
}

// Each thread sends words of 32 and 64 bits to itself.
extern "C" __global__ void words(const float *in, float *out,
                                 const unsigned long long *in_wide,
                                 unsigned long long *out_wide) {
  int i = thread_index();
  store_relaxed<SEND>(out + i, in[i]);
  store_relaxed<SEND_WIDE>(out_wide + i, in_wide[i]);
  float back = load_relaxed<SEE>(out + i);
  unsigned long long wide_back = load_relaxed<SEE_WIDE>(out_wide + i);
  store_relaxed<SEND_AGAIN>(out + i, back + 1.0f);
  store_relaxed<SEND_WIDE_AGAIN>(out_wide + i, wide_back + 1);
}

// Each thread counts itself and notes how many did before.
extern "C" __global__ void count(unsigned *counter, unsigned *before) {
  before[thread_index()] = add_acquire_release<COUNT>(counter, 1u);
}
