// SPDX-License-Identifier: Apache-2.0
// Scalar functions for generated code: what CUDA's own set lacks, or defines
// otherwise than torch. Generated steps call them and CUDA's math functions;
// NVRTC has those built in, a host compiler finds them in <cmath>.
#pragma once

#ifndef __CUDACC_RTC__
#include <cmath>
#endif
#ifndef INFINITY
#define INFINITY __int_as_float(0x7f800000)
#endif
#ifndef NAN
#define NAN __int_as_float(0x7fffffff)
#endif

// APPROXIMATE: for products of 16 bits and tf32, which lose far more. The value
// is then off by at most 2.7e-7: e^-x by 2^-23 |x| (log2 e and the product with
// it are rounded) and 2^-22 of it, the sum by 2^-24, the reciprocal by 2^-23. A
// division is a call in a branch of its own, once for each gate of a unit.
__device__ __forceinline__ float sigmoidf(float x) {
#if APPROXIMATE
  return reciprocal_approximate(1.0f + exp2_approximate(x * -1.44269504f));
#else
  return 1.0f / (1.0f + expf(-x));
#endif
}

// 0 for NaN too, as torch.sign.
__device__ __forceinline__ float signf(float x) {
  return x > 0.0f ? 1.0f : x < 0.0f ? -1.0f : 0.0f;
}

// CUDA's fminf and fmaxf drop a NaN; torch's minimum, maximum and clamp pass it
// on.
__device__ __forceinline__ float minimumf(float a, float b) {
  return a < b || a != a ? a : b;
}

__device__ __forceinline__ float maximumf(float a, float b) {
  return a > b || a != a ? a : b;
}

__device__ __forceinline__ float clampf(float x, float low, float high) {
  return minimumf(maximumf(x, low), high);
}
