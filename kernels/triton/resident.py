# SPDX-License-Identifier: Apache-2.0
"""One program runs a whole sequence: it owns a tile of the batch and keeps W_hh on chip over all time steps.

Sizes: T time, B batch, N independent recurrences, G gates, R split gates (those whose recurrent product is kept beside
the input part), S states, P per-unit parameters, H hidden units, W units of h: H, or fewer with a projection, which is
a second product at the end of a step. Names: p_ pointers, b_ blocks, i_ ids, o_ offsets, m_ masks; gates, states and
parameters are tuples of blocks. `STEP` is generated from the recurrence, so nothing in here knows any cell. A
recurrence of two products a step has `FIRST` between them, which takes the first `EARLY` gates.
gpu_rnn/backends/resident_launch.py launches with the grid (tiles of the batch, N).
"""

import triton
import triton.language as tl
from gpu_rnn.kernels.triton.blocks import (
    RESET_BIT,
    SKIP_BIT,
    add_each,
    add_where,
    as_float,
    load_blocks,
    load_each,
    select,
    select_each,
    store_sums,
    zero_blocks,
    zeros_like_each,
)
from gpu_rnn.kernels.triton.tile import (
    cut,
    hold,
    load_before,
    load_flags,
    load_kept,
    load_reset_values,
    load_states,
    load_weights,
    multiply,
    of_new_states,
    place,
    project,
    pull_back,
    rows_at,
    store_states,
    store_summed,
    through_step,
    time_of,
    units_at,
    unproject,
    with_units,
)

# One build serves all of these; `ALIGN` says what the compiler needs to know of them.
STRIDES = ("stride_t", "stride_b", "stride_n", "stride_g", "d_y_stride_t", "d_y_stride_b", "d_y_stride_n")
GENERAL = ("T", "B", "H", "width", "reverse", "period", *STRIDES)


@triton.jit(do_not_specialize=GENERAL)
def resident_forward(
    p_gates,  # (T, B, N, G, H) in: input projection; out, with SAVE: pre-activations
    p_recurrent,  # (T, B, N, R, H) out, with SAVE: products of the split gates
    p_inner,  # (S - 1, T, B, N, H) fp32, out, with INNER: the states other than h
    p_y,  # (T, B, N, W) out
    p_initial,  # of h (B, N, W), of each other state (B, N, H)
    p_final,  # likewise, out
    p_w,  # (N, G, H, W)
    p_w_hr,  # (N, W, H) or None: h is not projected
    p_b_hh,  # (N, G, H) or None
    p_params,  # (N, P, H) or None
    p_lengths,  # (B,) or None
    p_flags,  # (T, B, N) or None: `SKIP` and `RESET` of gpu_rnn/backends/tensors.py
    p_resets,  # per state (T or 1, B, N, W or H), or None: a reset sets the states to INITIAL
    p_drop,  # (B, N, DROP, W) or None
    p_zone,  # (S, T, B, N, H) or None: not 0 where a unit keeps its state
    stride_t,  # of gates, over ALIGN
    stride_b,
    stride_n,
    stride_g,
    T,
    B,
    H,  # over ALIGN
    width,  # W over ALIGN, or None: H
    reverse,  # bit i % period is set where recurrence i runs backwards in time
    period,
    STEP: tl.constexpr,  # after the last product
    FIRST: tl.constexpr,  # before it, where there are two; else None
    EARLY: tl.constexpr,  # gates of the first product
    KEPT: tl.constexpr,  # per gate: its number among the split gates, or -1
    R: tl.constexpr,
    P: tl.constexpr,
    SUMMED: tl.constexpr,  # b_hh is added to the summed gates here, not to their input parts before
    INITIAL: tl.constexpr,  # of each state
    PER_STEP: tl.constexpr,  # reset values are given for each step
    DROP: tl.constexpr,  # masks of what enters the products: none, one, or one for each gate
    SAVE: tl.constexpr,
    JOINED: tl.constexpr,  # of the first gates, which are saved as one block; 0, 2 or 4
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,  # what divides every row's offset: how many elements are loaded at once
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr,  # steps whose loads are under way together
    HELD: tl.constexpr,  # gates whose weights stay in registers
):
    G: tl.constexpr = len(KEPT)
    H = H * ALIGN
    at = place(p_lengths, T, B, H, reverse, period, BLOCK_B, BLOCK_H)
    of_h = at if width is None else with_units(at, width * ALIGN, BLOCK_W)
    stride_t, stride_g = stride_t.to(tl.int64) * ALIGN, stride_g.to(tl.int64) * ALIGN
    p_gates += (at.i_n * stride_n + at.o_b * stride_b)[:, None] * ALIGN + at.o_h
    b_w = hold(load_weights(p_w, of_h.H, at, 1, of_h.H, G, BLOCK_W), HELD)  # (input, output): W_hh transposed
    b_w_hr = load_weights(p_w_hr, H, of_h, 1, H, 1, BLOCK_H)[0] if p_w_hr is not None else None
    b_params = as_float(load_blocks(p_params + at.i_n * P * H + at.o_h, H, at.m_h, P)) if P else ()
    b_bias = as_float(load_blocks(p_b_hh + at.i_n * G * H + at.o_h, H, at.m_h, G)) if p_b_hh is not None else ()
    # Without a projection in one go: else ptxas makes the step of an LSTM of 128 units 9 % longer (simulated).
    states = load_each(p_initial, at.o_unit, at.m) if width is None else load_states(p_initial, at.o_row, at, of_h)
    drop = load_blocks(p_drop + at.o_row * DROP * of_h.H + of_h.o_h, of_h.H, of_h.m, DROP) if DROP else ()
    if p_flags is not None:
        next_flags = load_flags(p_flags, time_of(0, at), at, T, B)

    for t in tl.range(0, T, num_stages=STAGES):
        o_t = time_of(t, at)
        x = load_blocks(p_gates + o_t * stride_t, stride_g, at.m, G)
        if p_flags is not None:
            flags = next_flags
            next_flags = load_flags(p_flags, time_of(t + 1, at), at, T, B)
            values = load_reset_values(p_resets, rows_at(o_t, at, B) if PER_STEP else at.o_row, at, of_h, INITIAL)
            states = select((flags & RESET_BIT) != 0, values, states)
        # A recurrence may make anything of the padded units, NaN too, which the product would spread.
        entering = tl.where(of_h.m_h, states[0], 0.0)
        a, r = multiply(entering, x, b_w, b_bias, drop, 0, EARLY, KEPT, SUMMED, DROP, PRECISION)
        if FIRST is None:
            new = STEP(a, r, states, b_params, ())
        else:
            handed = FIRST(a, r, states, b_params, ())
            entering = tl.where(at.m_h, handed[0], 0.0)
            late_a, late_r = multiply(entering, x, b_w, b_bias, drop, EARLY, G, KEPT, SUMMED, DROP, PRECISION)
            new = STEP(late_a, late_r, states, b_params, handed[1:])
            a, r = a + late_a, r + late_r
        if p_w_hr is not None:
            new = (project(new[0], b_w_hr, at.m_h, PRECISION),) + new[1:]
        if p_zone is not None:
            new = select_each(load_kept(p_zone, o_t, at, of_h, T, B, len(states)), states, new)
        if p_flags is not None:
            new = select((flags & SKIP_BIT) != 0, states, new)
        y = new[0]
        if p_lengths is not None:
            active = (t < at.b_length)[:, None]
            y = tl.where(active, y, 0.0)
            new = select(active, new, states)
        states = new
        tl.store(p_y + units_at(o_t, of_h, B), y, mask=of_h.m)
        if SAVE:
            store_summed(p_gates + o_t * stride_t, stride_g, a, b_w[0].dtype, at.m, KEPT, JOINED)
            p_r = p_recurrent + rows_at(o_t, at, B) * R * H + at.o_h
            for k in tl.static_range(R):
                tl.store(p_r + k * H, r[k], mask=at.m)
        if INNER:
            for k in tl.static_range(len(states) - 1):
                tl.store(p_inner + at.N * T * B * H * k + units_at(o_t, at, B), states[k + 1], mask=at.m)
    store_states(p_final, at.o_row, states, at, of_h)


@triton.jit(do_not_specialize=GENERAL)
def resident_backward(
    p_gates,  # (T, B, N, G, H) pre-activations
    p_recurrent,  # (T, B, N, R, H)
    p_inner,  # (S - 1, T, B, N, H) fp32
    p_y,  # (T, B, N, H), or None: of a projected h
    p_initial,  # of h (B, N, W), of each other state (B, N, H)
    p_w,  # (N, G, H, W)
    p_w_hr,  # (N, W, H) or None: h is not projected
    p_params,  # (N, P, H) or None
    p_lengths,  # (B,) or None
    p_flags,  # (T, B, N) or None: `SKIP` and `RESET` of gpu_rnn/backends/tensors.py
    p_resets,  # per state (T or 1, B, N, W or H), or None: a reset sets the states to INITIAL
    p_drop,  # (B, N, DROP, W) or None
    p_zone,  # (S, T, B, N, H) or None: not 0 where a unit keeps its state
    p_d_y,  # (T, B, N, W)
    p_d_inner,  # (S - 1, T, B, N, H) or None
    p_d_final,  # of h (B, N, W), of each other state (B, N, H)
    p_d_gates,  # (T, B, N, G, H) out
    p_d_recurrent,  # (T, B, N, R, H) out
    p_d_initial,  # likewise, out
    p_d_params,  # (tiles of the batch, N, P, H) fp32, out, or None
    p_d_resets,  # per state (T or 1, B, N, W or H), out, or None
    p_d_h,  # (T, B, N, W) out, or None: of the projected h that each step made
    p_made,  # (T, B, N, H) out, or None: the h of each step before its projection
    stride_t,  # of gates and d_gates, over ALIGN
    stride_b,
    stride_n,
    stride_g,
    d_y_stride_t,  # over ALIGN
    d_y_stride_b,
    d_y_stride_n,
    T,
    B,
    H,  # over ALIGN
    width,  # W over ALIGN, or None: H
    reverse,  # bit i % period is set where recurrence i runs backwards in time
    period,
    STEP: tl.constexpr,  # derivative of what comes after the last product
    MAKE: tl.constexpr,  # what it is the derivative of
    FIRST: tl.constexpr,  # what comes before it, where there are two; else None
    FIRST_BACKWARD: tl.constexpr,
    EARLY: tl.constexpr,  # gates of the first product
    SPLIT: tl.constexpr,  # split gates among them
    KEPT: tl.constexpr,  # per gate: its number among the split gates, or -1
    R: tl.constexpr,
    P: tl.constexpr,
    INITIAL: tl.constexpr,  # of each state
    PER_STEP: tl.constexpr,  # reset values are given for each step
    DROP: tl.constexpr,  # masks of what enters the products: none, one, or one for each gate
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,  # what divides every row's offset: how many elements are loaded at once
    BLOCK_B: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_W: tl.constexpr,
    STAGES: tl.constexpr,  # steps whose loads are under way together
    HELD: tl.constexpr,  # gates whose weights stay in registers
):
    G: tl.constexpr = len(KEPT)
    H = H * ALIGN
    at = place(p_lengths, T, B, H, reverse, period, BLOCK_B, BLOCK_H)
    of_h = at if width is None else with_units(at, width * ALIGN, BLOCK_W)
    stride_t, stride_g = stride_t.to(tl.int64) * ALIGN, stride_g.to(tl.int64) * ALIGN
    d_y_stride_t = d_y_stride_t.to(tl.int64) * ALIGN
    o_gates = (at.i_n * stride_n + at.o_b * stride_b)[:, None] * ALIGN + at.o_h
    p_d_y += (at.i_n * d_y_stride_n + at.o_b * d_y_stride_b)[:, None] * ALIGN + of_h.o_h
    b_w = hold(load_weights(p_w, H, of_h, of_h.H, 1, G, BLOCK_H), HELD)  # (output, input): W_hh as it is
    b_w_hr = load_weights(p_w_hr, of_h.H, at, H, 1, 1, BLOCK_W)[0] if p_w_hr is not None else None
    b_params = as_float(load_blocks(p_params + at.i_n * P * H + at.o_h, H, at.m_h, P)) if P else ()
    d_states = load_states(p_d_final, at.o_row, at, of_h)
    d_params = zero_blocks(P, BLOCK_B, BLOCK_H)
    drop = load_blocks(p_drop + at.o_row * DROP * of_h.H + of_h.o_h, of_h.H, of_h.m, DROP) if DROP else ()
    if p_flags is not None:
        next_flags = load_flags(p_flags, time_of(T - 1, at), at, T, B)
    d_values = zeros_like_each(d_states)  # of reset values that all steps share

    for i in tl.range(0, T, num_stages=STAGES):
        t = T - 1 - i
        o_t = time_of(t, at)
        o_r = rows_at(o_t, at, B) * R * H + at.o_h
        a = as_float(load_blocks(p_gates + o_gates + o_t * stride_t, stride_g, at.m, G))
        r = as_float(load_blocks(p_recurrent + o_r, H, at.m, R)) if R else ()
        d_y = tl.load(p_d_y + o_t * d_y_stride_t, mask=of_h.m, other=0.0).to(tl.float32)
        o_t_before = time_of(t - 1, at)
        before = load_before(p_y, p_inner, p_initial, t, o_t_before, at, of_h, T, B)
        if p_flags is not None:
            flags = next_flags
            next_flags = load_flags(p_flags, o_t_before, at, T, B)
            values = load_reset_values(p_resets, rows_at(o_t, at, B) if PER_STEP else at.o_row, at, of_h, INITIAL)
            before = select((flags & RESET_BIT) != 0, values, before)
        d_states, d, d_computed, zone = of_new_states(p_d_inner, p_zone, o_t, d_states, d_y, at, of_h, T, B)
        runs = (flags & SKIP_BIT) == 0 if p_flags is not None else (t < at.b_length)[:, None]
        p_d_step, p_d_r = p_d_gates + o_gates + o_t * stride_t, p_d_recurrent + o_r
        active = at.m & runs
        if p_w_hr is not None:
            made = MAKE(a, r, before, b_params, ())[0]
            d_computed = unproject(d_computed, made, b_w_hr, runs, p_d_h, p_made, o_t, at, of_h, B, PRECISION)
        d_a, d_r, d_new, d_p = through_step(
            a, r, before, b_params, d_computed, active, at.m, p_d_step, p_d_r, stride_g, H, b_w, drop,
            STEP, FIRST, FIRST_BACKWARD, EARLY, SPLIT, R, KEPT, DROP, PRECISION,
        )  # fmt: skip
        d_new = d_new if p_w_hr is None else (tl.zeros_like(d[0]),) + d_new[1:]
        if p_zone is not None:
            d_new = add_each(d_new, select_each(zone, d, zeros_like_each(d)))
        # Beyond a row's length y is 0 and has no gradient; what a flag skips hands on that of y.
        d_states = select(runs, d_new, d if p_flags is not None else d_states)
        d_states = (pull_back(
            d_a, d_r, d_states[0], active, at.m, p_d_step, p_d_r, stride_g, H, b_w, drop,
            0, EARLY, 0, KEPT, DROP, PRECISION,
        ),) + d_states[1:]  # fmt: skip
        if p_flags is not None:
            d_states, d_values = cut(d_states, d_values, flags, p_d_resets, o_t, at, of_h, B, PER_STEP)
        d_params = add_where(active, d_params, d_p)
    store_states(p_d_initial, at.o_row, d_states, at, of_h)
    if p_d_resets is not None and not PER_STEP:
        store_states(p_d_resets, at.o_row, d_values, at, of_h)
    if P:
        store_sums(p_d_params + (tl.program_id(0) * at.N + at.i_n) * P * H + at.o_h, H, d_params, at.m_h)
