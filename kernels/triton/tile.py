# SPDX-License-Identifier: Apache-2.0
"""What one program of the resident kernels owns: a tile of the batch of one recurrence.

Where it lies, what it loads, and its products. Sizes and names as in resident.py.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from gpu_rnn.kernels.triton.blocks import (
    RESET_BIT,
    add_each,
    load_blocks,
    load_each,
    part,
    select,
    select_each,
    store_each,
    store_joined,
    to_each,
    zeros_like_each,
)


class Tile(NamedTuple):
    """Where a program stands. Offsets of rows are in (B, N), those of units in (B, N, H).

    A projected h has fewer units than the rest: `of_h` is then the same rows with its units, else the tile itself.
    """

    N: Any
    H: Any
    i_n: Any
    o_b: Any  # (BLOCK_B,)
    o_h: Any  # (1, BLOCK_H)
    m_b: Any  # (BLOCK_B, 1)
    m_h: Any  # (1, BLOCK_H)
    m: Any  # (BLOCK_B, BLOCK_H)
    o_row: Any  # (BLOCK_B, 1)
    o_unit: Any  # (BLOCK_B, BLOCK_H)
    b_length: Any  # (BLOCK_B,) steps of each row
    reversed: Any  # not 0 where this recurrence runs backwards in time


@triton.jit
def place(p_lengths, T, B, H, reverse, period, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr):
    N = tl.num_programs(1).to(tl.int64)
    i_n = tl.program_id(1).to(tl.int64)
    o_b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    o_h = tl.arange(0, BLOCK_H)[None, :]
    m_b, m_h = o_b < B, o_h < H
    o_row = (o_b * N + i_n)[:, None]
    b_length = tl.load(p_lengths + o_b, mask=m_b, other=0) if p_lengths is not None else tl.zeros_like(o_b) + T
    reversed_ = (reverse >> (i_n % period)) & 1
    m_b = m_b[:, None]
    return Tile(N, H, i_n, o_b, o_h, m_b, m_h, m_b & m_h, o_row, o_row * H + o_h, b_length, reversed_)


@triton.jit
def with_units(at, H, BLOCK_H: tl.constexpr):
    """The same rows with other units."""
    o_h = tl.arange(0, BLOCK_H)[None, :]
    m_h = o_h < H
    o_unit = at.o_row * H + o_h
    return Tile(at.N, H, at.i_n, at.o_b, o_h, at.m_b, m_h, at.m_b & m_h, at.o_row, o_unit, at.b_length, at.reversed)


@triton.jit
def time_of(step, at):
    """(BLOCK_B, 1): the time at which each row's step lies. A reversed row starts at its own last step."""
    turned = (at.reversed != 0) & (step < at.b_length)
    return tl.where(turned, at.b_length - 1 - step, step).to(tl.int64)[:, None]


@triton.jit
def rows_at(o_t, at, B):
    """(BLOCK_B, 1): where the rows of a step lie in (T, B, N)."""
    return o_t * B * at.N + at.o_row


@triton.jit
def units_at(o_t, at, B):
    """(BLOCK_B, BLOCK_H): where the units of a step lie in (T, B, N, H)."""
    return rows_at(o_t, at, B) * at.H + at.o_h


@triton.jit
def load_states(pointers, o_row, at, of_h):
    """These rows of a tensor for each state, as fp32."""
    h = load_each(pointers[:1], o_row * of_h.H + of_h.o_h, of_h.m)
    return h + load_each(pointers[1:], o_row * at.H + at.o_h, at.m)


@triton.jit
def store_states(pointers, o_row, states, at, of_h):
    store_each(pointers[:1], o_row * of_h.H + of_h.o_h, states[:1], of_h.m)
    store_each(pointers[1:], o_row * at.H + at.o_h, states[1:], at.m)


@triton.jit
def load_reset_values(p_values, o_row, at, of_h, INITIAL: tl.constexpr):
    """What a reset sets each state to, as fp32: given values, or the recurrence's initial ones."""
    if p_values is not None:
        values = load_states(p_values, o_row, at, of_h)
    else:
        values = (tl.full(of_h.m.shape, INITIAL[0], tl.float32),)
        for k in tl.static_range(1, len(INITIAL)):
            values = values + (tl.full(at.m.shape, INITIAL[k], tl.float32),)
    return values


@triton.jit
def load_kept(p_keep, o_t, at, of_h, T, B, S: tl.constexpr):
    """Not 0 where a unit keeps its state, of each state; a projected h has the first of as many as the others."""
    p_keep += rows_at(o_t, at, B) * at.H
    stride = at.N * T * B * at.H
    h = load_blocks(p_keep + of_h.o_h, stride, of_h.m, 1)
    return h + load_blocks(p_keep + stride + at.o_h, stride, at.m, S - 1)


@triton.jit
def load_flags(p_flags, o_t, at, T, B):
    """(BLOCK_B, 1): the flags of one step, 0 where there is none. They are read a step ahead: what waits for a single
    byte would wait for it alone, as only loads of 4 bytes go through shared memory."""
    rows = B * at.N
    return tl.load(p_flags + o_t * rows + at.o_row, mask=at.m_b & (o_t >= 0) & (o_t < T), other=0)


@triton.jit
def load_weights(p_w, H, at, row_stride, column_stride, G: tl.constexpr, BLOCK_H: tl.constexpr):
    """`G` matrices of `H` rows and the tile's units, as they are or transposed, by the strides of rows and columns."""
    rows = tl.arange(0, BLOCK_H)[:, None]
    p_w += at.i_n * G * H * at.H + rows * row_stride + at.o_h * column_stride
    return load_blocks(p_w, H * at.H, at.m_h & (rows < H), G)


@triton.jit
def hold(b_w, HELD: tl.constexpr):
    """The first `HELD` blocks as operands that stay in registers. Triton otherwise moves an operand's way through
    shared memory into the loop, and reads it again each step; it does not look for one that was turned and turned
    back, for which there is no instruction."""
    held = ()
    for g in tl.static_range(len(b_w)):
        block = b_w[g]
        if g < HELD:
            block = tl.reshape(tl.reshape(block, (block.shape[0] * block.shape[1],))[None, :], block.shape)
        held = held + (block,)
    return held


@triton.jit
def load_before(p_y, p_inner, p_initial, t, o_t_before, at, of_h, T, B):
    """The states before step `t`: what the step before it left at `o_t_before`, or the initial ones. A projected h,
    which no step reads, comes as zeros."""
    S: tl.constexpr = len(p_initial)
    o_before = units_at(o_t_before, at, B)
    b_step = tl.zeros_like(at.b_length) + t
    later, first = at.m & (b_step > 0)[:, None], at.m & (b_step == 0)[:, None]
    h = (tl.zeros(of_h.m.shape, tl.float32),)
    if p_y is not None:
        h = (tl.load(p_y + o_before, mask=later, other=0.0).to(tl.float32),)
        h = select(later, h, load_each(p_initial[:1], at.o_unit, first))
    others = load_blocks(p_inner + o_before, at.N * T * B * at.H, later, S - 1)
    return h + select(later, others, load_each(p_initial[1:], at.o_unit, first))


@triton.jit
def multiply(
    entering,
    x,
    b_w,
    b_bias,
    drop,
    BEGIN: tl.constexpr,
    END: tl.constexpr,
    KEPT: tl.constexpr,
    SUMMED: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Of the gates `BEGIN` to `END`, with the products of what enters them: (sums, or input parts of split gates;
    products of the split gates)."""
    b_entering = entering.to(b_w[0].dtype)
    a, r = (), ()
    for g in tl.static_range(BEGIN, END):
        if DROP:
            b_entering = (entering * drop[g % DROP].to(tl.float32)).to(b_w[0].dtype)
        product = tl.dot(b_entering, b_w[g], input_precision=PRECISION)
        b_x = x[g].to(tl.float32)
        if KEPT[g] >= 0:
            a = a + (b_x,)
            r = r + (product + b_bias[g] if len(b_bias) > 0 else product,)
        elif SUMMED and len(b_bias) > 0:
            a = a + (b_x + b_bias[g] + product,)  # before the product is there
        else:
            a = a + (b_x + product,)
    return a, r


@triton.jit
def project(made, b_w_hr, m_h, PRECISION: tl.constexpr):
    """The projection of an h, whose padded units may hold anything."""
    return tl.dot(tl.where(m_h, made, 0.0).to(b_w_hr.dtype), b_w_hr, input_precision=PRECISION)


@triton.jit
def store_summed(p, stride, a, dtype: tl.constexpr, m, KEPT: tl.constexpr, JOINED: tl.constexpr):
    """Saves the sums of a step, the first `JOINED` of them as one block."""
    if JOINED:
        store_joined(p, stride, to_each(part(a, 0, JOINED), dtype), m)
    for g in tl.static_range(JOINED, len(KEPT)):
        if KEPT[g] < 0:
            tl.store(p + g * stride, a[g], mask=m)


@triton.jit
def pull_back(
    d_a,
    d_r,
    d_entering,
    active,
    m,
    p_d_gates,  # of this step
    p_d_recurrent,
    stride_g,
    H,
    b_w,
    drop,
    BEGIN: tl.constexpr,
    END: tl.constexpr,
    SPLIT: tl.constexpr,  # split gates before these
    KEPT: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Stores the gradients of the gates `BEGIN` to `END`; returns `d_entering` with what comes through their
    products."""
    dtype: tl.constexpr = b_w[0].dtype
    # Two sums, so that the tensor cores need not wait for each other's result.
    even, odd = tl.zeros_like(d_entering), d_entering
    if DROP == 1:
        odd = tl.zeros_like(even)
    for g in tl.static_range(BEGIN, END):
        # Padded units and rows, and steps that do not count, may hold anything: they are selected away.
        d_gate = tl.where(active, d_a[g - BEGIN], 0.0).to(dtype)
        tl.store(p_d_gates + g * stride_g, d_gate, mask=m)
        d_product = d_gate
        if KEPT[g] >= 0:
            d_product = tl.where(active, d_r[KEPT[g] - SPLIT], 0.0).to(dtype)
            tl.store(p_d_recurrent + KEPT[g] * H, d_product, mask=m)
        if DROP > 1:
            product = tl.dot(d_product, b_w[g], input_precision=PRECISION)
            odd += product * drop[g].to(tl.float32)
        elif g % 2:
            odd = tl.dot(d_product, b_w[g], acc=odd, input_precision=PRECISION)
        else:
            even = tl.dot(d_product, b_w[g], acc=even, input_precision=PRECISION)
    if DROP == 1:
        odd = d_entering + (even + odd) * drop[0].to(tl.float32)
    return odd if DROP else even + odd


@triton.jit
def of_new_states(p_d_inner, p_keep, o_t, d_states, d_y, at, of_h, T, B):
    """Gradients: what comes from later steps, with y's, and of what the step computes; and where units keep a state."""
    S: tl.constexpr = len(d_states)
    if p_d_inner is not None:
        d_inner = load_blocks(p_d_inner + units_at(o_t, at, B), at.N * T * B * at.H, at.m, S - 1)
        d_states = d_states[:1] + add_each(d_states[1:], d_inner)
    d = (d_states[0] + d_y,) + d_states[1:]
    keep, d_computed = (), d
    if p_keep is not None:
        keep = load_kept(p_keep, o_t, at, of_h, T, B, S)
        d_computed = select_each(keep, zeros_like_each(d), d)
    return d_states, d, d_computed, keep


@triton.jit
def unproject(d_computed, made, b_w_hr, runs, p_d_h, p_made, o_t, at, of_h, B, PRECISION: tl.constexpr):
    """Of what a step makes the gradients, of h from that of its projection; stores this and the `made` h, whose product
    over all steps is the gradient of the projection."""
    d_h = tl.where(of_h.m & runs, d_computed[0], 0.0).to(b_w_hr.dtype)
    tl.store(p_d_h + units_at(o_t, of_h, B), d_h, mask=of_h.m)
    d_made = tl.dot(d_h, b_w_hr, input_precision=PRECISION)
    # What did not run has a gradient of 0 here. A select from this product, unlike one from a constant, keeps Triton
    # from computing all activations once more in the order in which they are stored.
    tl.store(p_made + units_at(o_t, at, B), tl.where(at.m & runs, made, d_made), mask=at.m)
    return (d_made,) + d_computed[1:]


@triton.jit
def through_step(
    a,
    r,
    before,
    b_params,
    d_computed,
    active,
    m,
    p_d_gates,  # of this step
    p_d_recurrent,
    stride_g,
    H,
    b_w,
    drop,
    STEP: tl.constexpr,
    FIRST: tl.constexpr,
    FIRST_BACKWARD: tl.constexpr,
    EARLY: tl.constexpr,
    SPLIT: tl.constexpr,
    R: tl.constexpr,
    KEPT: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The derivative of a step: gradients of the first product's gates, of the states before and of the parameters. Of
    two products it stores the gradients of the second's gates."""
    if FIRST is None:
        d_a, d_r, d_new, d_p, _nothing = STEP(a, r, before, b_params, (), d_computed)
    else:
        early_a, early_r = part(a, 0, EARLY), part(r, 0, SPLIT)
        handed = FIRST(early_a, early_r, before, b_params, ())
        late_a, late_r = part(a, EARLY, len(KEPT)), part(r, SPLIT, R)
        d_a, d_r, d_new, d_p, d_handed = STEP(late_a, late_r, before, b_params, handed[1:], d_computed)
        d_entering = pull_back(
            d_a, d_r, tl.zeros_like(d_computed[0]), active, m, p_d_gates, p_d_recurrent, stride_g, H, b_w, drop,
            EARLY, len(KEPT), SPLIT, KEPT, DROP, PRECISION,
        )  # fmt: skip
        d_handed = (d_entering,) + d_handed
        d_a, d_r, d_early, d_p_early, _nothing = FIRST_BACKWARD(early_a, early_r, before, b_params, (), d_handed)
        d_new, d_p = add_each(d_new, d_early), add_each(d_p, d_p_early)
    return d_a, d_r, d_new, d_p


@triton.jit
def cut(d_states, d_values, flags, p_d_values, o_t, at, of_h, B, PER_STEP: tl.constexpr):
    """(gradients of the states, sums of those of reset values). Where a step began with a reset, the values that the
    states were set to take the states' gradients."""
    nothing, reset = zeros_like_each(d_states), (flags & RESET_BIT) != 0
    if p_d_values is not None:
        if PER_STEP:
            store_states(p_d_values, rows_at(o_t, at, B), select(reset, d_states, nothing), at, of_h)
        else:
            d_values = add_each(d_values, select(reset, d_states, nothing))
    return select(reset, nothing, d_states), d_values
