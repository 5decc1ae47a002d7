# SPDX-License-Identifier: Apache-2.0
"""The time loop in C (`kernels/native`): its limits, its builds, its launch. One library for each program, dtype and
direction; options are asked of it while it runs, as each is a branch beside a product."""

from __future__ import annotations

import ctypes
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gpu_rnn import memo
from gpu_rnn.backends import cpu_cost, linear, rates
from gpu_rnn.backends.native import arguments, building, limits, one_step, team, text
from gpu_rnn.backends.native.building import CompilerError
from gpu_rnn.backends.problem import OF_ALL_LOOPS, Problem
from gpu_rnn.backends.step.product import normalised_products
from gpu_rnn.backends.tensors import PLAIN, Call, LayerControls, LoopGradients, Result, Weights, dense, state_dtype
from gpu_rnn.compiler.program import Program
from gpu_rnn.memo import memoize

log = logging.getLogger("gpu_rnn")
LoopInC = Callable[[bytes], int]  # a loop in C, of its arguments; 1 where memory is short
OF_A_CONVERSION = 1.5e-9  # seconds of a weight in 16 bits, once a call: 0.5 to 3.3 ns of 7 million on an EPYC
OF_A_THREAD = 5e6  # floating-point operations that are worth starting a thread for: some 0.1 ms; predicted

_stays = "`unsupported` is asked after `prepare`, in whatever thread"
_failures: dict[tuple[str, torch.dtype, bool], str] = memo.hold(f"{__name__}: failures", {}, None, stays=_stays)


def unsupported(problem: Problem) -> list[str]:
    """Why the loop in C cannot run a problem."""
    reasons, device = [], problem.device
    if problem.device_type != "cpu" or device.is_gpu:
        reasons.append(f"runs on a CPU, not on {device.name if device.is_gpu else problem.device_type}")
    if state_dtype(problem.dtype) not in text.C_TYPES:
        reasons.append(f"takes real floating-point numbers, not {str(problem.dtype).removeprefix('torch.')}")
    return reasons + problem.without(*OF_ALL_LOOPS, "norm", "rms") or _against_building(problem)


def _against_building(problem: Problem) -> list[str]:
    try:
        building.compiler()
    except CompilerError as error:
        _say_once(str(error))
        return [str(error)]
    failure = _failures.get(_key(problem))
    return [] if failure is None else [failure]


@memoize(16, stays="what was said once is not said again")
def _say_once(reason: str) -> None:
    """That a layer on a CPU runs otherwise, and slower perhaps, for want of a compiler."""
    log.info("native: not used: %s", reason)


def _key(problem: Problem) -> tuple[str, torch.dtype, bool]:
    return problem.program.text, state_dtype(problem.dtype), problem.direction == "backward"


def cost(problem: Problem, constants: rates.Rates | None = None) -> float:
    """Seconds by the cost model."""
    every = constants or rates.of(problem.device)
    rows, width = problem.B * problem.N, problem.proj_size or problem.H
    most = worth(multiplications((problem.T, rows, problem.G, problem.H), width), rows)
    known = getattr(every, cpu_model(problem))
    if state_dtype(problem.dtype) != problem.dtype:
        known = replace(known, pack=known.pack + OF_A_CONVERSION, back_pack=known.back_pack + OF_A_CONVERSION)
    return cpu_cost.seconds(problem, known, most=most)


def cpu_model(problem: Problem) -> str:
    """The constants of its model: the short ways have their own where nothing steers them."""
    if limits.single_step(problem):
        return "cpu_one"
    plain = limits.plain_layer(problem) and problem.N == 1 and not problem.options
    return "cpu_plain" if plain else "cpu_native"


def prepare(problem: Problem) -> None:
    """Builds and loads the library of a supported problem."""
    try:
        if limits.single_step(problem):
            one_step.plan(problem.program.text, problem.dtype)
        else:
            library(*_key(problem))
    except CompilerError as error:
        _failures[_key(problem)] = str(error)


def library(program: str, dtype: torch.dtype, backward: bool) -> ctypes.CDLL:
    """Built or found.

    Raises:
        CompilerError: it cannot be built here.
    """
    best = building.instruction_sets()[0]
    return building.library(text.of(program, dtype, backward, best), best.flags)


def forward(call: Call, gates: Tensor, save: bool, all_states: bool) -> Result:
    """From the input products (T, B, N, G, H), which become the saved ones; see `reference.forward`.

    What comes in and goes out may have 16 bits; the loop computes in float32 then.
    """
    dtype = gates.dtype
    gates, call = dense(gates, state_dtype(dtype)), _dense_call(call, state_dtype(dtype))
    steps, batch, n, _, hidden = gates.shape
    y = gates.new_empty(steps, batch, n, call.weights.w_hh.shape[3])
    final = [gates.new_empty(state.shape) for state in call.states]
    inner = gates.new_empty((len(final) - 1) * (save or all_states), steps, batch, n, hidden)
    # Masked steps write no products.
    recurrent = gates.new_zeros(steps, batch, n, len(call.program.split) * save, hidden)
    kept = call.kept if save else None
    given = {"gates": gates, "recurrent": recurrent, "inner": inner, "y": y}
    if kept is not None:
        given |= {"normal": kept.values[1], "rstd": kept.rstd[1]}
    _run(library(call.program.text, gates.dtype, False).run, call, gates, given, {"final": final}, save)
    saved = gates.to(dtype) if save else gates.new_empty(0, dtype=dtype)
    return Result(y.to(dtype), [state.to(dtype) for state in final], saved, recurrent.to(dtype), inner, kept)


def backward(call: Call, saved: Result, d_y: Tensor, d_final: list[Tensor], d_inner: Tensor | None) -> LoopGradients:
    """From the gradients of all outputs those of the gates, the states before the first step and the parameters."""
    dtype = saved.gates.dtype
    wide = state_dtype(dtype)
    values = (saved.y, saved.gates, saved.recurrent, saved.inner)
    y, gates, recurrent, inner = (dense(value, wide) for value in values)
    saved = saved._replace(y=y, gates=gates, recurrent=recurrent, inner=inner)
    outer = None if d_inner is None else dense(d_inner, wide)
    call, after = _dense_call(call, wide), [dense(d, wide) for d in d_final]
    run = library(call.program.text, wide, True).run
    loop = backward_of_dense(run, call, saved, dense(d_y, wide), after, outer)
    if dtype == wide:
        return loop
    d_products = None if loop.d_products is None else loop.d_products.to(dtype)
    return loop._replace(d_gates=loop.d_gates.to(dtype), d_recurrent=loop.d_recurrent.to(dtype), d_products=d_products)


def backward_of_dense(
    run: LoopInC, call: Call, saved: Result, d_y: Tensor | None, d_final: Sequence[Tensor], d_inner: Tensor | None
) -> LoopGradients:
    """`backward` by a library's loop, of tensors without gaps in the dtype that it computes in; no gradient of y is one
    of 0."""
    program, gates = call.program, saved.gates
    steps, batch, n, _, hidden = gates.shape
    d_gates, d_recurrent = torch.empty_like(gates), torch.empty_like(saved.recurrent)
    d_states = [torch.empty_like(state) for state in call.states]
    d_resets = [torch.zeros_like(value) for value in call.reset_values]
    # A share of each row: the same for all threads.
    d_params = gates.new_zeros(batch, n, len(program.params), hidden) if program.params else None
    d_norm = d_normed = made = d_made = None
    given = {"gates": gates, "recurrent": saved.recurrent, "inner": saved.inner, "y": saved.y, "d_y": d_y}
    given |= {"d_inner": d_inner, "d_gates": d_gates, "d_recurrent": d_recurrent, "d_params": d_params}
    if call.weights.norm is not None:
        normal = normalised_products(call, saved)
        d_norm, d_normed = torch.zeros_like(gates[0]), torch.empty_like(gates)
        given |= {"normal": normal.values, "rstd": normal.rstd, "d_norm": d_norm, "d_normed": d_normed}
    if call.weights.w_hr is not None:
        made, d_made = gates.new_empty(steps, batch, n, hidden), torch.empty_like(saved.y)
        given |= {"made": made, "d_made": d_made}
    _run(run, call, gates, given, {"d_final": d_final, "d_initial": d_states, "d_resets": d_resets})
    return LoopGradients(
        d_gates,
        d_recurrent,
        d_states,
        None if d_params is None else d_params.sum(0),
        None if made is None or d_made is None else linear.of_projection(d_made, made),
        None if d_norm is None else d_norm.sum(0),
        d_normed,
        d_resets,
    )


def _run(
    run: LoopInC,
    call: Call,
    gates: Tensor,
    given: Mapping[str, Tensor | None],
    of_each_state: Mapping[str, Sequence[Tensor]],
    save: bool = False,
) -> None:
    """`start` of a call."""
    weights = call.weights
    lists: dict[str, Sequence[Tensor]] = {"initial": call.states, "resets": call.reset_values, **of_each_state}
    read = {"w_hh": weights.w_hh, "b_hh": weights.b_hh, "params": weights.params, "w_hr": weights.w_hr}
    tensors = read | {"norm": weights.norm, **steering(call.controls), **given}
    width, batch, n = weights.w_hh.shape[-1], *gates.shape[1:3]
    threads = min(torch.get_num_threads(), worth(multiplications(gates.shape, width), batch * n))
    packing = arguments.of_a_loop(len(call.states))
    numbers = of_a_call(gates.shape, width, of_controls(call.controls, call.reset_values), save, call.rms, call.reverse)
    start(run, packing, packing.numbered(numbers), threads, gates.shape, tensors, lists)


def start(
    run: LoopInC,
    packing: arguments.Packing,
    fields: list[int],
    threads: int,
    gates: Sequence[int],
    tensors: Mapping[str, Tensor | None],
    lists: Mapping[str, Sequence[Tensor | None]],
    gradient_threads: int = 1,
) -> None:
    """Runs one direction, of gates (T, B, N, G, H), with `fields` as all its arguments but for threads and addresses.

    Raises:
        MemoryError: the loop's own memory is not to be had.
    """
    if max(threads, gradient_threads) > 1:
        for name, number in of_threads(threads, gradient_threads, *gates[1:3]).items():
            fields[packing.places[name]] = number
    packing.put(fields, tensors, lists)
    if run(packing.packed(*fields)):
        raise MemoryError("the time loop in C has no memory for its weights and states")


def _dense_call(call: Call, dtype: torch.dtype) -> Call:
    """All that both directions read as the loop reads it."""
    weights = Weights(*(None if value is None else dense(value, dtype) for value in call.weights))  # type: ignore[arg-type]
    states, values = ([dense(value, dtype) for value in each] for each in (call.states, call.reset_values))
    return replace(call, weights=weights, controls=call.controls.dense(dtype), states=states, reset_values=values)


@memoize(64)
def directions(reverse: str) -> ctypes.Array[ctypes.c_char]:
    """A byte for each recurrence, 1 where time runs backwards."""
    return ctypes.create_string_buffer(bytes(map(int, reverse)), len(reverse))


def multiplications(gates: Sequence[int], width: int) -> int:
    """Of a loop with gates (T, B, N, G, H) and products of that width."""
    return math.prod(gates) * width


def worth(multiplications: int, rows: int) -> int:
    """How many threads a call is worth."""
    return min(max(1, int(2.0 * multiplications / OF_A_THREAD)), max(1, rows))


def side_by_side(program: Program) -> int:
    """How many gates of a unit the forward loop multiplies at once."""
    return text.vectors(program, False, building.instruction_sets()[0])


def of_a_call(
    gates: Sequence[int], width: int, steering: Mapping[str, int], save: bool, rms: bool, reverse: str
) -> dict[str, int]:
    """The numbers among the arguments, of gates (T, B, N, G, H); for one thread."""
    steps, batch, n, _, hidden = gates
    numbers = {"steps": steps, "batch": batch, "across": n, "units": hidden, "width": width, "threads": 1, "tiles": 1}
    of_all = {
        "gradient_threads": 1,
        "save": int(save),
        "rms": int(rms),
        "reverse": ctypes.addressof(directions(reverse)),
    }
    return numbers | dict(steering) | of_all


def of_threads(threads: int, gradient_threads: int, batch: int, n: int) -> dict[str, int]:
    """What more than one needs."""
    tiles = max(1, min(batch, -(-threads // max(1, n))))
    return {"threads": threads, "gradient_threads": gradient_threads, "team": team.address(), "tiles": tiles}


def steering(controls: LayerControls) -> dict[str, Tensor | None]:
    """The controls that a loop takes, by name."""
    return {} if controls is PLAIN else controls.of_loops


def of_controls(controls: LayerControls, reset_values: Sequence[Tensor]) -> dict[str, int]:
    """Their sizes."""
    if controls is PLAIN:
        return {}
    flags, drop = controls.flags, controls.drop
    return {
        "masks": 0 if drop is None else drop.shape[2],
        "flags_across": 0 if flags is None else flags.shape[2],
        "reset_steps": len(reset_values[0]) if reset_values else 1,
    }
