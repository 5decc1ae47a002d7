# SPDX-License-Identifier: Apache-2.0
"""The pointwise part of one stage of one step, between two products; every unit of every sample by itself.

Sizes and names as in resident.py. Buffers of products have N first, (N, B, ·), as the batched product takes them; all
are contiguous. `STEP` is generated from the recurrence.
"""

from typing import Any, NamedTuple

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


class Place(NamedTuple):
    """Where each element of a program stands, (BLOCK,) each, and where its tensors have it."""

    o: Any  # in (B, N, H)
    row: Any  # b·N + n
    i_n: Any
    i_b: Any
    unit: Any
    m: Any
    size: Any  # of (B, N, H)
    o_gate: Any  # of the stage's first gate in (B, N, G, H)
    o_entering: Any  # in (N, B, H)
    product_row: Any  # of the stage's first gate
    rows_apart: Any  # from gate to gate


@triton.jit
def place(
    B, N, H, FIRST: tl.constexpr, G: tl.constexpr, count: tl.constexpr, BY_GATE: tl.constexpr, BLOCK: tl.constexpr
):
    """A product is (N, B, count, H), or BY_GATE (N, count, B, H)."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = o // H
    i_n, i_b, unit = row % N, row // N, o % H
    size = B.to(tl.int64) * N * H
    m = o < size
    o_gate = (row * G + FIRST) * H + unit
    if BY_GATE:
        product_row, rows_apart = i_n * count * B + i_b, B.to(tl.int64)
    else:
        product_row, rows_apart = (i_n * B + i_b) * count, tl.full((), 1, tl.int64)
    o_entering = (i_n * B + i_b) * H + unit
    return Place(o, row, i_n, i_b, unit, m, size, o_gate, o_entering, product_row, rows_apart)


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
    at = place(B, N, H, FIRST, G, count, BY_GATE, BLOCK)
    state_stride, reset_stride = elements(state_stride), elements(reset_stride)
    # All loads before anything is done with one: each would wait for memory by itself.
    inputs = load_blocks(p_gates + at.o_gate, H, at.m, count)
    products = load_blocks(p_product + at.product_row * H + at.unit, at.rows_apart * H, at.m, count)
    states = load_blocks(p_states + at.o, at.size, at.m, S)
    params = load_blocks(p_params + at.i_n * P * H + at.unit, H, at.m, P) if P else ()
    values = load_blocks(p_values + at.o, at.size, at.m, V_IN)
    biases = load_blocks(p_b_hh + (at.i_n * G + FIRST) * H + at.unit, H, at.m, count) if p_b_hh is not None else ()
    a, r, saved = (), (), ()
    for g in tl.static_range(count):
        x, product = inputs[g].to(tl.float32), products[g].to(tl.float32)
        if KEPT[g] < 0:
            a = a + (x + product,)
            saved = saved + (x + product,)
        else:
            if p_b_hh is not None:
                product += biases[g].to(tl.float32)
            a = a + (x,)
            r = r + (product,)
            saved = saved + (product,)
    params = as_float(params)
    new = STEP(a, r, states, params, values)
    if SAVE:  # a load behind a store, which may be of the same address, waits for memory by itself
        for g in tl.static_range(count):
            if KEPT[g] < 0:
                tl.store(p_gates + at.o_gate + g * H, saved[g], mask=at.m)
            else:
                tl.store(p_recurrent + (at.row * R + KEPT[g]) * H + at.unit, saved[g], mask=at.m)
    if V_OUT >= 0:  # not the last stage
        tl.store(p_entering + at.o_entering, new[0], mask=at.m)
        store_blocks(p_values + at.o, at.size, new[1:], at.m)
    else:
        if p_zone is not None:
            new = select_each(load_blocks(p_zone + at.o, state_stride, at.m, S), states, new)
        if p_flags is not None:
            flags = tl.load(p_flags + at.row, mask=at.m, other=0)
            new = select((flags & SKIP_BIT) != 0, states, new)
        tl.store(p_y + at.o, new[0], mask=at.m)
        if p_inner is not None:
            store_blocks(p_inner + at.o, state_stride, new[1:], at.m)
        if p_flags is not None:
            new = select((flags & RESET_BIT) != 0, load_blocks(p_reset + at.o, reset_stride, at.m, S), new)
        tl.store(p_entering + at.o_entering, new[0], mask=at.m)
        store_blocks(p_states + at.o, at.size, new, at.m)


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
    at = place(B, N, H, FIRST, G, count, BY_GATE, BLOCK)
    state_stride = elements(state_stride)
    a, r = (), ()
    for g in tl.static_range(count):
        a = a + (tl.load(p_gates + at.o_gate + g * H, mask=at.m, other=0.0).to(tl.float32),)
        if KEPT[g] >= 0:
            r = r + (tl.load(p_recurrent + (at.row * R + KEPT[g]) * H + at.unit, mask=at.m, other=0.0).to(tl.float32),)
    before = load_blocks(p_before + at.o, state_stride, at.m, S)
    params = as_float(load_blocks(p_params + at.i_n * P * H + at.unit, H, at.m, P)) if P else ()
    values = load_blocks(p_values + at.o, state_stride, at.m, V_IN)
    d_states = load_blocks(p_d_states + at.o, at.size, at.m, S)
    seed = tl.load(p_d_seed + at.o_entering, mask=at.m, other=0.0).to(tl.float32)
    active = at.m
    if p_flags is not None:
        flags = tl.load(p_flags + at.row, mask=at.m, other=0)
        active = at.m & ((flags & SKIP_BIT) == 0)
    if V_OUT >= 0:  # an earlier stage: the later one left gradients of its product and of what it read
        d = (seed,) + load_blocks(p_d_values + at.o, at.size, at.m, V_OUT)
    else:
        d_states = (d_states[0] + seed,) + d_states[1:]
        if p_d_entered is not None:
            store_blocks(p_d_entered + at.o, state_stride, d_states, at.m)
        if p_flags is not None:
            d_states = select((flags & RESET_BIT) != 0, zeros_like_each(d_states), d_states)
        d_y = tl.load(p_d_y + at.o, mask=at.m, other=0.0).to(tl.float32)
        d_states = (d_states[0] + d_y,) + d_states[1:]
        if p_d_inner is not None:
            d_inner = load_blocks(p_d_inner + at.o, state_stride, at.m, S - 1)
            d_states = (d_states[0],) + add_each(d_states[1:], d_inner)
        d = d_states
        if p_zone is not None:
            zone = load_blocks(p_zone + at.o, state_stride, at.m, S)
            d = select_each(zone, zeros_like_each(d_states), d_states)
    d_a, d_r, d_s, d_p, d_v = STEP(a, r, before, params, values, d)
    for g in tl.static_range(count):
        d_gate = tl.where(active, d_a[g], 0.0)
        tl.store(p_d_gates + at.o_gate + g * H, d_gate, mask=at.m)
        if KEPT[g] >= 0:
            d_gate = tl.where(active, d_r[KEPT[g] - KEPT_FIRST], 0.0)
            tl.store(p_d_recurrent + (at.row * R + KEPT[g]) * H + at.unit, d_gate, mask=at.m)
        tl.store(p_d_product + (at.product_row + g * at.rows_apart) * H + at.unit, d_gate, mask=at.m)
    for k in tl.static_range(S):
        d_before = d_s[k]
        if V_OUT >= 0:
            d_before += d_states[k]
        elif p_zone is not None:
            d_before += tl.where(zone[k] != 0, d_states[k], 0.0)
        tl.store(p_d_states + k * at.size + at.o, tl.where(active, d_before, d_states[k]), mask=at.m)
    store_blocks(p_d_values + at.o, at.size, d_v, at.m)
    for k in tl.static_range(P):
        p_sum = p_d_params + (at.row * P + k) * H + at.unit
        tl.store(p_sum, tl.load(p_sum, mask=at.m, other=0.0) + tl.where(active, d_p[k], 0.0), mask=at.m)
