# SPDX-License-Identifier: Apache-2.0
"""A kernel that does nothing but call a generated step: one point each, in and out as rows of SIZE."""

import triton
import triton.language as tl
from gpu_rnn.kernels.triton.resident import load_blocks


@triton.jit
def apply(
    p_in,  # (A + R + S + P + V + D, SIZE)
    p_out,  # (results, SIZE)
    STEP: tl.constexpr,
    A: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    V: tl.constexpr,
    D: tl.constexpr,  # incoming gradients, 0 forward
    SIZE: tl.constexpr,
):
    o = tl.arange(0, SIZE)
    m = o < SIZE
    a = load_blocks(p_in + o, SIZE, m, A)
    r = load_blocks(p_in + A * SIZE + o, SIZE, m, R)
    s = load_blocks(p_in + (A + R) * SIZE + o, SIZE, m, S)
    p = load_blocks(p_in + (A + R + S) * SIZE + o, SIZE, m, P)
    v = load_blocks(p_in + (A + R + S + P) * SIZE + o, SIZE, m, V)
    if D:
        d = load_blocks(p_in + (A + R + S + P + V) * SIZE + o, SIZE, m, D)
        d_a, d_r, d_s, d_p, d_v = STEP(a, r, s, p, v, d)
        results = d_a + d_r + d_s + d_p + d_v
    else:
        results = STEP(a, r, s, p, v)
    for k in tl.static_range(len(results)):
        tl.store(p_out + k * SIZE + o, results[k])
