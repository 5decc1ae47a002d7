# SPDX-License-Identifier: Apache-2.0
"""Scalar functions for generated code, which calls them as ``m.<name>``: fp32 in, fp32 out, to a few units in the last
place.

Triton's own set has no tanh, expm1 or log1p that works both compiled and interpreted, and its exp is the hardware's
base-2 one: exact enough except where a difference with 1 cancels. There a polynomial takes over. The polynomials are
least-squares fits of ours at Chebyshev nodes, rounded to fp32.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def one_over(x):
    """1 / x for x ≥ 1, infinity too. A full-range division costs six instructions, this two."""
    root = tl.rsqrt(x)
    return root * root


@triton.jit
def tanh(x):
    """x + x³ P(x²) below 0.55 (relative error below 6.6e-8, in fp32 at 200,000 points), else 1 − 2 / (e^2|x| + 1) with
    the sign of x."""
    u = x * x
    p = -0.00661575 * u + 0.02131274
    p = p * u - 0.05391007
    p = p * u + 0.13333118
    p = p * u - 0.33333332
    far = 1.0 - 2.0 * one_over(tl.exp2(tl.abs(x) * (2.0 * LOG2_E)) + 1.0)
    return tl.where(tl.abs(x) < 0.55, x + x * u * p, tl.where(x < 0, -far, far))


@triton.jit
def sigmoid(x):
    return one_over(1.0 + tl.exp2(x * -LOG2_E))


@triton.jit
def expm1(x):
    """x + x² Q(x) below 0.5 (relative error below 8.2e-8, likewise), else e^x − 1."""
    q = 2.49397424e-05 * x + 1.99621861e-04
    q = q * x + 1.38886728e-03
    q = q * x + 8.33318204e-03
    q = q * x + 4.16666677e-02
    q = q * x + 1.66666671e-01
    q = q * x + 0.5
    return tl.where(tl.abs(x) < 0.5, x + x * x * q, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(u) x / (u − 1) with u = 1 + x as rounded: the rounding of u cancels (Kahan). x where u is 1, inf at inf."""
    u = 1.0 + x
    d = u - 1.0
    exact = (d == 0.0) | (u == float("inf"))
    return tl.where(exact, x, tl.log(u) * (x / tl.where(d == 0.0, 1.0, d)))


@triton.jit
def sign(x):
    """0 for NaN too, as torch.sign."""
    return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, 0.0))


@triton.jit
def minimum(x, y):
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def maximum(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def clamp(x, low, high):
    """NaN stays NaN, as in torch.clamp."""
    return minimum(maximum(x, low), high)
