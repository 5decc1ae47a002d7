// SPDX-License-Identifier: Apache-2.0
// The functions that generated C calls, of LANES values at once, in GCC's and
// Clang's vector extensions: no intrinsics, no library but libm's erf, sin and
// cos. Build with -O3 -fno-math-errno -fno-trapping-math, never -ffast-math.
//
// SCALAR is float or double, LANES a power of two. Every function is within 2
// units in the last place, denormal numbers, infinities and NaN included.
// Generated code calls those whose names end with an underscore.
// The polynomials are printed by tools/fit_native.py.
#include <math.h>
#include <stdint.h>

#ifndef SCALAR
#define SCALAR float
#endif
#ifndef LANES
#define LANES 8
#endif

typedef SCALAR scalar;
#define IS_DOUBLE (sizeof(scalar) == 8)
// One lane of `truth` is all ones or all zeros; one of `real` has as many bits.
#define BITS                                                                   \
  __typeof__(__builtin_choose_expr(IS_DOUBLE, (int64_t)0, (int32_t)0))
typedef BITS bits;
typedef scalar real __attribute__((vector_size(LANES * sizeof(scalar))));
typedef bits truth __attribute__((vector_size(LANES * sizeof(scalar))));

// A constant in all lanes; less 0, for -0.0 + 0.0 is 0.0.
#define K(value) ((scalar)(value) - (real){0})
#define OF_TYPE(of_float, of_double) (IS_DOUBLE ? (of_double) : (of_float))
#define MANTISSA OF_TYPE(23, 52)
#define BIAS OF_TYPE(127, 1023)
#define SIGN ((truth)(-(real){0}))

static inline real where_(truth c, real a, real b) {
  return (real)((c & (truth)a) | (~c & (truth)b));
}

static inline real abs_(real x) { return (real)((truth)x & ~SIGN); }

static inline real with_sign_of(real x, real magnitude) {
  return (real)(((truth)x & SIGN) | (truth)magnitude);
}

static inline real sign_(real x) {
  return where_(x > K(0), K(1), where_(x < K(0), K(-1), K(0)));
}

static inline real relu_(real x) { return where_(x < K(0), K(0), x); }

// A NaN passes, as in torch.
static inline real minimum_(real a, real b) {
  return where_((a < b) | (a != a), a, b);
}

static inline real maximum_(real a, real b) {
  return where_((a > b) | (a != a), a, b);
}

static inline real clamp_(real x, real low, real high) {
  return minimum_(maximum_(x, low), high);
}

// Lane by lane, which compilers make one instruction of where there is one.
#define LANEWISE(name, of_float, of_double)                                    \
  static inline real name(real x) {                                            \
    for (int lane = 0; lane < LANES; lane++)                                   \
      x[lane] = OF_TYPE(of_float(x[lane]), of_double(x[lane]));                \
    return x;                                                                  \
  }
LANEWISE(sqrt_, sqrtf, sqrt)
LANEWISE(floor_, floorf, floor)
LANEWISE(erf_, erff, erf)
LANEWISE(sin_, sinf, sin)
LANEWISE(cos_, cosf, cos)

// 2^n for whole n in the range of normal numbers.
static inline real power_of_two(truth n) {
  return (real)((n + BIAS) << MANTISSA);
}

static inline real between(real low, real x, real high) {
  return where_(x > high, high, where_(x < low, low, x));
}

// e^x as 2^n (1 + p) with |p| < 0.42, |x| < 2000.
typedef struct {
  truth n;
  real p;
} power;

static inline power power_of_e(real x) {
  const real shift = K(OF_TYPE(0x1.8p23, 0x1.8p52)); // ends in the unit's place
  const real shifted = x * K(1.4426950408889634) + shift;
  const real whole = shifted - shift;
  const real near = x - whole * K(OF_TYPE(0x1.62e4p-1, 0x1.62e42feep-1));
  const real r =
      near - whole * K(OF_TYPE(1.4286068203094173e-06, 1.9082149292705877e-10));
  real q;
  if (IS_DOUBLE) {
    q = K(2.0915442297780116e-09) * r + K(2.5106274733573296e-08);
    q = q * r + K(2.75572718102198e-07);
    q = q * r + K(2.7557252833516911e-06);
    q = q * r + K(2.4801587327007187e-05);
    q = q * r + K(0.00019841269876864356);
    q = q * r + K(0.0013888888888883327);
    q = q * r + K(0.0083333333333255443);
    q = q * r + K(0.041666666666666671);
    q = q * r + K(0.16666666666666671);
  } else {
    q = K(0.000198919813) * r + K(0.00139345419);
    q = q * r + K(0.00833331002);
    q = q * r + K(0.0416664568);
    q = q * r + K(0.166666667);
  }
  return (power){(truth)shifted - (truth)shift, r * r * (q * r + K(0.5)) + r};
}

// Scaled in two steps: 2^n itself may be no normal number.
static inline real exp_(real x) {
  const power e =
      power_of_e(between(K(OF_TYPE(-104, -746)), x, K(OF_TYPE(89, 710))));
  const truth half = e.n >> 1;
  return (K(1) + e.p) * power_of_two(half) * power_of_two(e.n - half);
}

// 2^n - 1 + 2^n p, halved: 2^n may overflow where e^x does not.
static inline real expm1_(real x) {
  const power e =
      power_of_e(between(K(OF_TYPE(-20, -40)), x, K(OF_TYPE(89, 710))));
  const real half = power_of_two(e.n - 1);
  return where_(abs_(x) < K(OF_TYPE(1e-8, 1e-17)), x,
                K(2) * (half * e.p + (half - K(0.5))));
}

// 1 / (1 + 2^n (1 + p)), of e^-x. Over and under the line 2^(-n / 2) is taken
// out: what is left are normal numbers.
static inline real sigmoid_(real x) {
  const power e =
      power_of_e(between(K(OF_TYPE(-90, -720)), -x, K(OF_TYPE(105, 747))));
  const truth half = e.n >> 1;
  const real over = power_of_two(-half), under = power_of_two(e.n - half);
  return over / (under * e.p + over + under);
}

// With t = e^2|x| - 1: t / (t + 2), which near 0 is less exact than a
// polynomial.
static inline real tanh_(real x) {
  const real z = x * x, a = abs_(x), largest = K(OF_TYPE(10, 20));
  real q;
  if (IS_DOUBLE) {
    q = K(0.00051019992152539844) * z + K(-0.0014443765687810444);
    q = q * z + K(0.0035912589556821679);
    q = q * z + K(-0.0088631987904742391);
    q = q * z + K(0.02186948769012043);
    q = q * z + K(-0.05396825395866825);
    q = q * z + K(0.13333333333329189);
    q = q * z + K(-0.33333333333333331);
  } else {
    q = K(0.0203363594) * z + K(-0.0538824996);
    q = q * z + K(0.133331784);
    q = q * z + K(-0.333333329);
  }
  const power e = power_of_e(K(2) * where_(a > largest, largest, a));
  const real scale = power_of_two(e.n);
  const real t = scale * e.p + (scale - K(1));
  return with_sign_of(x, where_(a < K(0.3), a * z * q + a, t / (t + K(2))));
}

// x as 2^e (1 + f) with 1 + f from sqrt(1/2) to sqrt(2). With s = f / (2 + f),
// log(1 + f) is f - s (f - R), R = s² (log((1 + s) / (1 - s)) - 2 s) / s³.
static inline real log_(real x) {
  const real positive = where_(x > K(0), x, K(1)); // others are answered below
  const truth small = positive < K(OF_TYPE(0x1p-126, 0x1p-1022));
  const real scaled =
      where_(small, positive * K(OF_TYPE(0x1p23, 0x1p52)), positive);
  const truth offset = (truth)K(0.70710678118654752);
  const truth above = (truth)scaled - offset;
  truth exponent = above >> MANTISSA;
  const real f = (real)(((truth)scaled) - (exponent << MANTISSA)) - K(1);
  exponent -= small & MANTISSA;
  const real e = __builtin_convertvector(exponent, real);
  const real s = f / (K(2) + f), z = s * s, half = K(0.5) * f * f;
  real g;
  if (IS_DOUBLE) {
    g = K(0.13100721383503491) * z + K(0.13267418596474884);
    g = g * z + K(0.15386290534658992);
    g = g * z + K(0.18181794700897799);
    g = g * z + K(0.22222222400547759);
    g = g * z + K(0.28571428570764451);
    g = g * z + K(0.4000000000000094);
    g = g * z + K(0.66666666666666663);
  } else {
    g = K(0.233419434) * z + K(0.28550397);
    g = g * z + K(0.400001256);
    g = g * z + K(0.666666665);
  }
  const real low = s * (half + z * g) + e * K(OF_TYPE(1.4286068203094173e-06,
                                                      1.9082149292705877e-10));
  const real y =
      e * K(OF_TYPE(0x1.62e4p-1, 0x1.62e42feep-1)) + (f - (half - low));
  const real of_zero = where_(x == K(0), K(-INFINITY), K(NAN));
  return where_(x > K(0), where_(x == K(INFINITY), x, y),
                where_(x != x, x, of_zero));
}

// log(u) + (x - (u - 1)) / u with u = 1 + x as rounded (Kahan).
static inline real log1p_(real x) {
  const real u = K(1) + x;
  const truth plain = (u == K(0)) | (u == K(INFINITY));
  const real lost = where_(plain, K(0), (x - (u - K(1))) / u);
  return where_(x == K(0), x, log_(u) + lost);
}
