# SPDX-License-Identifier: Apache-2.0
"""The pointwise part of one stage of one step, between two products; every unit of every sample by itself.

Sizes and names as in resident.py. Buffers of products have N first, (N, B, ·), as the batched product takes them; all
are contiguous. `STEP` is generated from the recurrence.
"""

import triton
import triton.language as tl
from gpu_rnn.kernels.triton.blocks import (
    RESET_BIT,
    SKIP_BIT,
    add_each,
    as_float,
    load_blocks,
    select,
    select_each,
    zeros_like_each,
)


@triton.jit
def offsets(B, N, H, BLOCK: tl.constexpr):
    """(offset in (B, N, H), its row b·N + n, n, b, unit, mask) of each element of this program."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = o // H
    return o, row, row % N, row // N, o % H, o < B.to(tl.int64) * N * H


# One build serves every batch and number of steps: each step of a buffer begins at a multiple of 16 elements, so that
# its pointers are always aligned, and strides come in `ALIGN` elements. A user's CUDA graph, which cannot load another
# build while it is captured, so finds the one that the call before it had.
ALIGN = tl.constexpr(16)
GENERAL = ("state_stride", "reset_stride", "B")


@triton.jit
def elements(stride):
    """A stride of `ALIGN` elements in elements, of which there may be more than 32 bits count."""
    return stride.to(tl.int64) * ALIGN


@triton.jit
def store_blocks(p, stride, blocks, mask):
    for i in tl.static_range(len(blocks)):
        tl.store(p, blocks[i], mask=mask)
        p += stride  # one at a time: a multiple of it may not fit 32 bits


@triton.jit
def product_rows(i_b, i_n, B, count: tl.constexpr, BY_GATE: tl.constexpr):
    """(row of the first gate, rows between gates) in a product: (N, B, gates, H), BY_GATE (N, gates, B, H)."""
    if BY_GATE:
        return i_n * count * B + i_b, B.to(tl.int64)
    else:
        return (i_n * B + i_b) * count, tl.full((), 1, tl.int64)


@triton.jit(do_not_specialize=GENERAL)
def step_forward(
    p_gates,  # (B, N, G, H) of this step; in: input projection, out: sums
    p_recurrent,  # (B, N, R, H) of this step, out, with SAVE
    p_inner,  # this step of (S - 1, T, B, N, H), out, or None
    p_y,  # (B, N, H) of this step, out
    p_states,  # (S, B, N, H) fp32, in and out
    p_values,  # (V, B, N, H) fp32: what stages hand on
    p_entering,  # (N, B, H) out: the next product's input
    p_product,  # (N, B, stage gates, H), BY_GATE (N, stage gates, B, H)
    p_b_hh,  # (N, G, H) or None
    p_params,  # (N, P, H) or None
    p_flags,  # (B, N) or None; SKIP: the step is masked, RESET: the states are set after it
    p_reset,  # (S, B, N, H) fp32: what they are set to
    p_zone,  # this step of (S, T, B, N, H) or None: units that keep their states
    state_stride,  # between states in inner and zone, in ALIGN elements
    reset_stride,  # between states in reset, likewise
    B,
    N,
    H,
    STEP: tl.constexpr,
    KEPT: tl.constexpr,  # per gate of the stage: its number among all split gates, or -1
    FIRST: tl.constexpr,  # the stage's first gate
    G: tl.constexpr,  # gates of all stages
    R: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    V_IN: tl.constexpr,  # values that the stage reads
    V_OUT: tl.constexpr,  # values that it hands on
    SAVE: tl.constexpr,
    BY_GATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    count: tl.constexpr = len(KEPT)
    o, row, i_n, i_b, unit, m = offsets(B, N, H, BLOCK)
    size = B.to(tl.int64) * N * H
    state_stride, reset_stride = elements(state_stride), elements(reset_stride)
    o_gate = (row * G + FIRST) * H + unit
    first, apart = product_rows(i_b, i_n, B, count, BY_GATE)
    o_entering = (i_n * B + i_b) * H + unit
    a, r = (), ()
    for g in tl.static_range(count):
        x = tl.load(p_gates + o_gate + g * H, mask=m, other=0.0).to(tl.float32)
        product = tl.load(p_product + (first + g * apart) * H + unit, mask=m, other=0.0).to(tl.float32)
        if KEPT[g] < 0:
            a = a + (x + product,)
            if SAVE:
                tl.store(p_gates + o_gate + g * H, x + product, mask=m)
        else:
            if p_b_hh is not None:
                product += tl.load(p_b_hh + (i_n * G + FIRST + g) * H + unit, mask=m, other=0.0).to(tl.float32)
            a = a + (x,)
            r = r + (product,)
            if SAVE:
                tl.store(p_recurrent + (row * R + KEPT[g]) * H + unit, product, mask=m)
    states = load_blocks(p_states + o, size, m, S)
    params = as_float(load_blocks(p_params + i_n * P * H + unit, H, m, P)) if P else ()
    values = load_blocks(p_values + o, size, m, V_IN)
    new = STEP(a, r, states, params, values)
    if V_OUT >= 0:  # not the last stage
        tl.store(p_entering + o_entering, new[0], mask=m)
        store_blocks(p_values + o, size, new[1:], m)
    else:
        if p_zone is not None:
            new = select_each(load_blocks(p_zone + o, state_stride, m, S), states, new)
        if p_flags is not None:
            flags = tl.load(p_flags + row, mask=m, other=0)
            new = select((flags & SKIP_BIT) != 0, states, new)
        tl.store(p_y + o, new[0], mask=m)
        if p_inner is not None:
            store_blocks(p_inner + o, state_stride, new[1:], m)
        if p_flags is not None:
            new = select((flags & RESET_BIT) != 0, load_blocks(p_reset + o, reset_stride, m, S), new)
        tl.store(p_entering + o_entering, new[0], mask=m)
        store_blocks(p_states + o, size, new, m)


@triton.jit(do_not_specialize=GENERAL)
def step_backward(
    p_gates,  # (B, N, G, H) of this step
    p_recurrent,  # (B, N, R, H) of this step
    p_before,  # this step of (S, T, B, N, H): the states before it
    p_values,  # this step of (V, T, B, N, H): what the stage reads of earlier ones
    p_d_y,  # (B, N, H) of this step
    p_d_inner,  # this step of (S - 1, T, B, N, H) or None
    p_d_states,  # (S, B, N, H) fp32, in and out, without the seed
    p_d_seed,  # (N, B, H) what came through the product taken just before: of h, or of this stage's own result
    p_d_values,  # (V, B, N, H) fp32, in: of what the stage hands on, out: of what it reads
    p_d_gates,  # (B, N, G, H) of this step, out
    p_d_recurrent,  # (B, N, R, H) of this step, out
    p_d_product,  # (N, B, stage gates, H), BY_GATE (N, stage gates, B, H), out
    p_d_params,  # (B, N, P, H) fp32, in and out
    p_params,  # (N, P, H)
    p_flags,  # (B, N) or None
    p_zone,  # this step of (S, T, B, N, H) or None
    # this step of (S, T, B, N, H), out, or None: of the states as the step after this one entered with them
    p_d_entered,
    state_stride,  # between states in before and all others like it, and between values in values, in ALIGN elements
    B,
    N,
    H,
    STEP: tl.constexpr,
    KEPT: tl.constexpr,
    KEPT_FIRST: tl.constexpr,  # number of the stage's first split gate
    FIRST: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    S: tl.constexpr,
    P: tl.constexpr,
    V_IN: tl.constexpr,
    V_OUT: tl.constexpr,
    BY_GATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    count: tl.constexpr = len(KEPT)
    o, row, i_n, i_b, unit, m = offsets(B, N, H, BLOCK)
    size, state_stride = B.to(tl.int64) * N * H, elements(state_stride)
    o_gate = (row * G + FIRST) * H + unit
    first, apart = product_rows(i_b, i_n, B, count, BY_GATE)
    a, r = (), ()
    for g in tl.static_range(count):
        a = a + (tl.load(p_gates + o_gate + g * H, mask=m, other=0.0).to(tl.float32),)
        if KEPT[g] >= 0:
            r = r + (tl.load(p_recurrent + (row * R + KEPT[g]) * H + unit, mask=m, other=0.0).to(tl.float32),)
    before = load_blocks(p_before + o, state_stride, m, S)
    params = as_float(load_blocks(p_params + i_n * P * H + unit, H, m, P)) if P else ()
    values = load_blocks(p_values + o, state_stride, m, V_IN)
    d_states = load_blocks(p_d_states + o, size, m, S)
    seed = tl.load(p_d_seed + (i_n * B + i_b) * H + unit, mask=m, other=0.0).to(tl.float32)
    active = m
    if p_flags is not None:
        flags = tl.load(p_flags + row, mask=m, other=0)
        active = m & ((flags & SKIP_BIT) == 0)
    if V_OUT >= 0:  # an earlier stage: the later one left gradients of its product and of what it read
        d = (seed,) + load_blocks(p_d_values + o, size, m, V_OUT)
    else:
        d_states = (d_states[0] + seed,) + d_states[1:]
        if p_d_entered is not None:
            store_blocks(p_d_entered + o, state_stride, d_states, m)
        if p_flags is not None:
            d_states = select((flags & RESET_BIT) != 0, zeros_like_each(d_states), d_states)
        d_y = tl.load(p_d_y + o, mask=m, other=0.0).to(tl.float32)
        d_states = (d_states[0] + d_y,) + d_states[1:]
        if p_d_inner is not None:
            d_inner = load_blocks(p_d_inner + o, state_stride, m, S - 1)
            d_states = (d_states[0],) + add_each(d_states[1:], d_inner)
        d = d_states
        if p_zone is not None:
            zone = load_blocks(p_zone + o, state_stride, m, S)
            d = select_each(zone, zeros_like_each(d_states), d_states)
    d_a, d_r, d_s, d_p, d_v = STEP(a, r, before, params, values, d)
    for g in tl.static_range(count):
        d_gate = tl.where(active, d_a[g], 0.0)
        tl.store(p_d_gates + o_gate + g * H, d_gate, mask=m)
        if KEPT[g] >= 0:
            d_gate = tl.where(active, d_r[KEPT[g] - KEPT_FIRST], 0.0)
            tl.store(p_d_recurrent + (row * R + KEPT[g]) * H + unit, d_gate, mask=m)
        tl.store(p_d_product + (first + g * apart) * H + unit, d_gate, mask=m)
    for k in tl.static_range(S):
        d_before = d_s[k]
        if V_OUT >= 0:
            d_before += d_states[k]
        elif p_zone is not None:
            d_before += tl.where(zone[k] != 0, d_states[k], 0.0)
        tl.store(p_d_states + k * size + o, tl.where(active, d_before, d_states[k]), mask=m)
    store_blocks(p_d_values + o, size, d_v, m)
    for k in tl.static_range(P):
        p_sum = p_d_params + (row * P + k) * H + unit
        tl.store(p_sum, tl.load(p_sum, mask=m, other=0.0) + tl.where(active, d_p[k], 0.0), mask=m)
