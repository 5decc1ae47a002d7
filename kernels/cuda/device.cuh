// SPDX-License-Identifier: Apache-2.0
// Everything a kernel asks of the machine beyond plain CUDA C++: indices,
// shared memory, barriers, communication between blocks, asynchronous copies,
// matrix products, shuffles and 16-bit numbers. Here each is inline PTX (sm_80
// and later). With GPU_RNN_CPU the same names come from benchmarks/emulating,
// so that a kernel's text runs under the sanitizers of a C++ compiler; no other
// file in this folder may know the difference, or use an instruction of this
// kind.
//
// SITE numbers the call site of a synchronisation: an enumerator of the
// kernel's `enum Site`, used once. It costs nothing here; on the CPU a site can
// be switched off to see that its loss is noticed.
//
// An asm that touches memory, or orders it, clobbers "memory": the compiler
// then keeps every plain access, a prefetch too, on the side of it on which it
// is written.
#pragma once

#define DEVICE __device__ __forceinline__

// Storage of 16-bit numbers; arithmetic is in float.
struct f16 {
  unsigned short bits;
};
struct bf16 {
  unsigned short bits;
};

#ifdef GPU_RNN_CPU
#include "device_cpu.h"
#else

// ---- Indices: grids and blocks have one dimension ----

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int block_threads() { return blockDim.x; }
DEVICE int grid_blocks() { return gridDim.x; }
DEVICE int lane() { return threadIdx.x % 32; }
DEVICE int warp() { return threadIdx.x / 32; }

// ---- Shared memory: the block's dynamic part, and no other ----

DEVICE char *shared_memory() {
  extern __shared__ __align__(128) char dynamic_shared[];
  return dynamic_shared;
}

DEVICE unsigned shared_address(const void *p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// ---- Barriers: order shared and global memory among those who meet ----

template <int SITE> DEVICE void block_sync() {
  asm volatile("bar.sync 0;" ::: "memory");
}

// For whole warps: `threads` is a multiple of 32, `id` is 1 to 15.
template <int SITE> DEVICE void named_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

template <int SITE> DEVICE void warp_sync(unsigned mask) {
  asm volatile("bar.warp.sync %0;" ::"r"(mask) : "memory");
}

// ---- Global memory seen by other blocks ----

// Naturally aligned words of 32 or 64 bits. Never const, __restrict__ or .nc
// data: the compiler would load it before the wait.

// A word as the integer that an instruction takes.
template <class T> union Bits {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "one word of 32 or 64 bits");
  T value;
  unsigned u32;
  unsigned long long u64;
};

template <int SITE, class T> DEVICE T load_relaxed(const T *p) {
  Bits<T> word;
  if constexpr (sizeof(T) == 4)
    asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];"
                 : "=r"(word.u32)
                 : "l"(__cvta_generic_to_global(p))
                 : "memory");
  else
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];"
                 : "=l"(word.u64)
                 : "l"(__cvta_generic_to_global(p))
                 : "memory");
  return word.value;
}

template <int SITE, class T> DEVICE void store_relaxed(T *p, T value) {
  const Bits<T> word = {value};
  if constexpr (sizeof(T) == 4)
    asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(
                     __cvta_generic_to_global(p)),
                 "r"(word.u32)
                 : "memory");
  else
    asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(
                     __cvta_generic_to_global(p)),
                 "l"(word.u64)
                 : "memory");
}

template <int SITE> DEVICE unsigned load_acquire(const unsigned *p) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
               : "=r"(value)
               : "l"(__cvta_generic_to_global(p))
               : "memory");
  return value;
}

template <int SITE> DEVICE void store_release(unsigned *p, unsigned value) {
  asm volatile(
      "st.release.gpu.global.u32 [%0], %1;" ::"l"(__cvta_generic_to_global(p)),
      "r"(value)
      : "memory");
}

template <int SITE> DEVICE void add_release(unsigned *p, unsigned value) {
  asm volatile("red.release.gpu.global.add.u32 [%0], %1;" ::"l"(
                   __cvta_generic_to_global(p)),
               "r"(value)
               : "memory");
}

// The value before. Orders as a release and an acquire: who counts last sees
// what all others did before they counted.
template <int SITE>
DEVICE unsigned add_acquire_release(unsigned *p, unsigned value) {
  unsigned before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(__cvta_generic_to_global(p)), "r"(value)
               : "memory");
  return before;
}

template <int SITE> DEVICE void fence() {
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

// ---- Clusters: blocks that run at the same time and write into each other's
// shared memory (sm_90 and later). A block's rank is block_index() modulo the
// size of the cluster, which the kernel's `__cluster_dims__` says ----

// For all threads of the cluster; what they did to shared memory before it is
// seen by all after it.
template <int SITE> DEVICE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n"
               "barrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

// In shared memory: a phase ends when all arrivals that it counts and all bytes
// that those announced are there, and the next begins. Bytes may come before
// they are announced.
struct alignas(8) Arrivals {
  unsigned long long state;
};

DEVICE void arrivals_start(Arrivals *arrivals, int count) {
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(arrivals)),
      "r"(count)
      : "memory");
}

// Arrives at this block's, and announces bytes.
template <int SITE>
DEVICE void arrive_expecting(Arrivals *arrivals, int bytes) {
  asm volatile(
      "{\n"
      ".reg .b64 state;\n"
      "mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 state, [%0], %1;\n"
      "}" ::"r"(shared_address(arrivals)),
      "r"(bytes)
      : "memory");
}

// Whether the phase of that parity, 0 for the first, has ended; waits a while
// for it. Then all its bytes are seen.
template <int SITE> DEVICE bool arrived(Arrivals *arrivals, int parity) {
  unsigned answer;
  asm volatile(
      "{\n"
      ".reg .pred ended;\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 ended, "
      "[%1], %2;\n"
      "selp.u32 %0, 1, 0, ended;\n"
      "}"
      : "=r"(answer)
      : "r"(shared_address(arrivals)), "r"(parity)
      : "memory");
  return answer;
}

// Stores a word of 32 or 64 bits where `to` lies in the block of that rank, and
// counts its bytes at that block's `arrivals`, some time later. What this
// thread did before is seen by whoever sees the phase end.
template <int SITE, class T>
DEVICE void store_async(T *to, T value, Arrivals *arrivals, int rank) {
  const Bits<T> word = {value};
  unsigned there, counted;
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(there)
      : "r"(shared_address(to)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(counted)
      : "r"(shared_address(arrivals)), "r"(rank));
  if constexpr (sizeof(T) == 4)
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 "
        "[%0], %1, [%2];" ::"r"(there),
        "r"(word.u32), "r"(counted)
        : "memory");
  else
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 "
        "[%0], %1, [%2];" ::"r"(there),
        "l"(word.u64), "r"(counted)
        : "memory");
}

// ---- Waiting ----

// In every polling loop. A pause would only lengthen the wait here.
DEVICE void poll_pause() {}

DEVICE unsigned long long clock_ns() {
  unsigned long long now;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(now)::"memory");
  return now;
}

// ---- Asynchronous copies to shared memory ----

// Written data is there for the copying thread after its wait, and for others
// after a barrier that follows.

// 16 aligned bytes; zeros, and `global` not read, unless `valid`.
template <int SITE>
DEVICE void copy_async_16(void *shared, const void *global, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(
                   shared_address(shared)),
               "l"(__cvta_generic_to_global(global)), "r"(valid ? 16 : 0)
               : "memory");
}

DEVICE void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Wait until at most the newest N committed groups are under way.
template <int N, int SITE> DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// ---- Matrix products: PTX ISA, "Matrix Fragments for mma" ----

// Whole warps only.

// d (16x8) += a (16x16, rows) b (16x8, columns).
DEVICE void mma_f16(float (&d)[4], const unsigned (&a)[4],
                    const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]),
                 "r"(b[1]));
}

DEVICE void mma_bf16(float (&d)[4], const unsigned (&a)[4],
                     const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]),
                 "r"(b[1]));
}

// d (16x8) += a (16x8) b (8x8), operands float bits whose low 13 are not read:
// pass them through to_tf32.
DEVICE void mma_tf32(float (&d)[4], const unsigned (&a)[4],
                     const unsigned (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
               "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]),
                 "r"(b[1]));
}

// ---- Shuffles: whole warps; they carry a value and order no memory ----

DEVICE unsigned shuffle_xor(unsigned value, int mask) {
  unsigned result;
  asm volatile("shfl.sync.bfly.b32 %0, %1, %2, 0x1f, 0xffffffff;"
               : "=r"(result)
               : "r"(value), "r"(mask));
  return result;
}

DEVICE unsigned shuffle(unsigned value, int source) {
  unsigned result;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x1f, 0xffffffff;"
               : "=r"(result)
               : "r"(value), "r"(source));
  return result;
}

// ---- Numbers: all round to the nearest, ties to even; to_tf32 ties away ----

DEVICE float to_float(f16 x) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x.bits));
  return result;
}

template <class T> DEVICE T from_float(float x);

template <> DEVICE f16 from_float<f16>(float x) {
  f16 result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}

template <> DEVICE bf16 from_float<bf16>(float x) {
  bf16 result;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"(x));
  return result;
}

DEVICE float to_tf32(float x) {
  unsigned result;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(result) : "f"(x));
  return __uint_as_float(result);
}

// ---- Special functions, one instruction each; subnormal numbers are 0 ----

// 2 to the power x, off by at most 2^-22 of it: PTX ISA, ex2.approx.
DEVICE float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / x, off by at most 2^-23 of it: PTX ISA, rcp.approx.
DEVICE float reciprocal_approximate(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// 1 / the root of x, off by at most 2^-22.9 of it: PTX ISA, rsqrt.approx.
DEVICE float inverse_root_approximate(float x) {
  float result;
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

#endif

// ---- What follows from the above ----

DEVICE float to_float(bf16 x) {
  return __uint_as_float(static_cast<unsigned>(x.bits) << 16);
}
DEVICE float to_float(float x) { return x; }
template <> DEVICE float from_float<float>(float x) { return x; }

DEVICE float shuffle_xor(float value, int mask) {
  return __uint_as_float(shuffle_xor(__float_as_uint(value), mask));
}

DEVICE float shuffle(float value, int source) {
  return __uint_as_float(shuffle(__float_as_uint(value), source));
}

// Two numbers as mma takes them: the one of lower index in the lower half.
template <class Half> DEVICE unsigned pack(float low, float high) {
  return from_float<Half>(low).bits |
         static_cast<unsigned>(from_float<Half>(high).bits) << 16;
}
