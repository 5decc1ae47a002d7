# SPDX-License-Identifier: Apache-2.0
"""The time loop in C (`kernels/native`): its limits, its builds, its launch. One library for each program, dtype and
direction; options are asked of it while it runs, as each is a branch beside a product."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpu_rnn import memo
from gpu_rnn.backends import cpu_cost, linear, rates
from gpu_rnn.backends.native import arguments, building, limits, one_step, team, text
from gpu_rnn.backends.native.building import CompilerError
from gpu_rnn.backends.problem import CONTROL_FIELDS, Problem
from gpu_rnn.backends.step.product import normalised_products
from gpu_rnn.backends.tensors import Call, LoopGradients, Result, dense, state_dtype

OF_A_THREAD = 5e6  # floating-point operations that are worth starting a thread for: some 0.1 ms; predicted
NO_MEMORY = "the time loop in C has no memory for its weights and states"

_stays = "`unsupported` is asked after `prepare`, in whatever thread"
_failures: dict[tuple[str, torch.dtype, bool], str] = memo.hold(f"{__name__}: failures", {}, None, stays=_stays)


def unsupported(problem: Problem) -> list[str]:
    """Why the loop in C cannot run a problem."""
    reasons, device = [], problem.device
    if problem.device_type != "cpu" or device.is_gpu:
        reasons.append(f"runs on a CPU, not on {device.name if device.is_gpu else problem.device_type}")
    if state_dtype(problem.dtype) not in text.C_TYPES:
        reasons.append(f"takes real floating-point numbers, not {str(problem.dtype).removeprefix('torch.')}")
    return reasons + problem.without(*CONTROL_FIELDS, "all_states", "norm", "rms") or _against_building(problem)


def _against_building(problem: Problem) -> list[str]:
    try:
        building.compiler()
    except CompilerError as error:
        return [str(error)]
    failure = _failures.get(_key(problem))
    return [] if failure is None else [failure]


def _key(problem: Problem) -> tuple[str, torch.dtype, bool]:
    return problem.program.text, state_dtype(problem.dtype), problem.direction == "backward"


def cost(problem: Problem, constants: rates.Rates | None = None) -> float:
    """Seconds by the cost model."""
    every = constants or rates.of(problem.device)
    return cpu_cost.seconds(problem, getattr(every, cpu_model(problem)))


def cpu_model(problem: Problem) -> str:
    """The constants of its model: the short ways have their own."""
    if limits.single_step(problem):
        return "cpu_one"
    return "cpu_plain" if limits.plain_layer(problem) else "cpu_native"


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
    gates = _whole(gates, state_dtype(dtype))
    steps, batch, n, _, hidden = gates.shape
    y = gates.new_empty(steps, batch, n, _width(call))
    final = [gates.new_empty(state.shape) for state in call.states]
    inner = gates.new_empty((len(final) - 1) * (save or all_states), steps, batch, n, hidden)
    # Masked steps write no products.
    recurrent = gates.new_zeros(steps, batch, n, len(call.program.split) * save, hidden)
    kept = call.kept if save else None
    given = {"gates": gates, "recurrent": recurrent, "inner": inner, "y": y, "final": final, "save": int(save)}
    if kept is not None:
        given |= {"normal": kept.values[1], "rstd": kept.rstd[1]}
    _run(call, gates, False, given)
    saved = gates.to(dtype) if save else gates.new_empty(0, dtype=dtype)
    return Result(y.to(dtype), [state.to(dtype) for state in final], saved, recurrent.to(dtype), inner, kept)


def backward(call: Call, saved: Result, d_y: Tensor, d_final: list[Tensor], d_inner: Tensor | None) -> LoopGradients:
    """From the gradients of all outputs those of the gates, the states before the first step and the parameters."""
    dtype, program = saved.gates.dtype, call.program
    wide = state_dtype(dtype)
    gates = _whole(saved.gates, wide)
    steps, batch, n, _, hidden = gates.shape
    d_gates, d_recurrent = torch.empty_like(gates), gates.new_empty(saved.recurrent.shape)
    d_states = [gates.new_empty(state.shape) for state in call.states]
    d_resets = [gates.new_zeros(value.shape) for value in call.reset_values]
    d_params = gates.new_zeros(batch, n, len(program.params), hidden)  # a share of each row: the same for all threads
    d_norm = d_normed = made = d_made = None
    given = {
        "gates": gates,
        "recurrent": _whole(saved.recurrent, wide),
        "inner": _whole(saved.inner, wide),
        "y": _whole(saved.y, wide),
        "d_y": _whole(d_y, wide),
        "d_inner": None if d_inner is None else _whole(d_inner, wide),
        "d_final": [_whole(d, wide) for d in d_final],
        "d_gates": d_gates,
        "d_recurrent": d_recurrent,
        "d_initial": d_states,
        "d_resets": d_resets,
        "d_params": d_params,
    }
    if call.weights.norm is not None:
        normal = normalised_products(call, saved)
        d_norm, d_normed = torch.zeros_like(gates[0]), torch.empty_like(gates)
        given |= {"normal": normal.values, "rstd": normal.rstd, "d_norm": d_norm, "d_normed": d_normed}
    if call.weights.w_hr is not None:
        made, d_made = gates.new_empty(steps, batch, n, hidden), gates.new_empty(steps, batch, n, _width(call))
        given |= {"made": made, "d_made": d_made}
    _run(call, gates, True, given)
    return LoopGradients(
        d_gates.to(dtype),
        d_recurrent.to(dtype),
        d_states,
        d_params.sum(0) if program.params else None,
        None if made is None or d_made is None else linear.over_steps(d_made.unsqueeze(3), made).squeeze(1),
        None if d_norm is None else d_norm.sum(0),
        None if d_normed is None else d_normed.to(dtype),
        d_resets,
    )


def _run(call: Call, gates: Tensor, backward: bool, given: dict[str, Any]) -> None:
    """Runs one direction. Raises MemoryError where the loop's own memory is not to be had."""
    both = _shape(call, gates) | _tensors(call, gates.dtype) | given
    loop = library(call.program.text, gates.dtype, backward)
    if loop.run(arguments.filled(len(call.states), both)):
        raise MemoryError(NO_MEMORY)


def _width(call: Call) -> int:
    """Of h, which may be projected."""
    return call.weights.w_hh.shape[3]


def _whole(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As the loop reads it: numbers in its dtype, flags and lengths in their own."""
    return dense(tensor, dtype if tensor.is_floating_point() else tensor.dtype)


def threads(multiplications: int, rows: int) -> int:
    """How many threads a call is worth: no more than torch was told."""
    return min(torch.get_num_threads(), max(1, int(2.0 * multiplications / OF_A_THREAD)), max(1, rows))


def _shape(call: Call, gates: Tensor) -> dict[str, Any]:
    steps, batch, n, _, hidden = gates.shape
    count = threads(gates.numel() * hidden, batch * n)
    flags, drop, values = call.controls.flags, call.controls.drop, call.reset_values
    return {
        "steps": steps,
        "batch": batch,
        "across": n,
        "units": hidden,
        "width": _width(call),
        "threads": count,
        "team": team.address(),
        "tiles": max(1, min(batch, -(-count // max(1, n)))),
        "masks": 0 if drop is None else drop.shape[2],
        "flags_across": 1 if flags is None else flags.shape[2],
        "reset_steps": len(values[0]) if values else 1,
        "rms": int(call.rms),
    }


def _tensors(call: Call, dtype: torch.dtype) -> dict[str, Tensor | Sequence[Tensor] | None]:
    """What both directions read."""
    weights = call.weights
    also = {"params": weights.params, "w_hr": weights.w_hr, "norm": weights.norm, **call.controls.of_loops}
    return {
        "reverse": torch.tensor([flag == "1" for flag in call.reverse], dtype=torch.uint8),
        "w_hh": _whole(weights.w_hh, dtype),
        "b_hh": None if weights.b_hh is None or not call.program.split else _whole(weights.b_hh, dtype),
        **{name: None if value is None else _whole(value, dtype) for name, value in also.items()},
        "initial": [_whole(state, dtype) for state in call.states],
        "resets": [_whole(value, dtype) for value in call.reset_values],
    }
