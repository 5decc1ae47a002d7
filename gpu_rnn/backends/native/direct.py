# SPDX-License-Identifier: Apache-2.0
"""The time loop in C of a plain layer: one direction, one product a step, no option. Its tensors are read as they come,
and what a call needs besides them is found once, in a `LayerPlan`: of a short call that is most."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_rnn.backends import linear, onednn
from gpu_rnn.backends.native import arguments, launch, team
from gpu_rnn.compiler.program import Program
from gpu_rnn.memo import memoize

# Multiplications of the input products of all steps, below which they are the loop's own even if it has fewer threads
# than torch.
ALONE = 1 << 22
_FORWARD_IN_TIME = ctypes.create_string_buffer(1)  # arguments.reverse of one recurrence


class LayerPlan(NamedTuple):
    """What every call of a cell in one dtype needs."""

    program: Program
    forward: Callable[[bytes], int]
    backward: Callable[[bytes], int] | None  # where there are derivatives
    packing: arguments.Packing
    summed: int  # gates before the first split one


class Saved(NamedTuple):
    """What the backward loop takes besides what came in: (T, B, H), (T, B, G·H), (T, B, K, H) and (S - 1, T, B, H)."""

    y: Tensor
    gates: Tensor
    recurrent: Tensor
    inner: Tensor


class Gradients(NamedTuple):
    """Of the gates (T, B, G·H), of the products of split gates (T, B, K·H), of the states (1, B, H) and of params (U,
    H)."""

    gates: Tensor
    recurrent: Tensor
    states: list[Tensor]
    params: Tensor | None


@memoize(256)
def plan(program: str, dtype: torch.dtype, derivative: bool) -> LayerPlan:
    """Built or found.

    Raises:
        CompilerError: it cannot be built here.
    """
    parsed = Program.parse(program)
    backward = launch.library(program, dtype, True).run if derivative else None
    return LayerPlan(
        parsed,
        launch.library(program, dtype, False).run,
        backward,
        arguments.of_a_loop(len(parsed.states)),
        len(parsed.summed),
    )


def forward(
    plan: LayerPlan,
    x: Tensor,
    states: Sequence[Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    params: Tensor | None,
    save: bool,
) -> tuple[list[Tensor], Saved]:
    """The final states and what is saved, of x (T, B, I), states (1, B, H), w_ih (G·H, I), w_hh (G·H, H), biases (G·H)
    and params (U, H), all without gaps."""
    steps, batch, features = x.shape
    of_gates, hidden = w_hh.shape
    fields, places = _fields(plan, x, w_hh, params)
    if fields[places["threads"]] == torch.get_num_threads() or x.numel() * of_gates <= ALONE:
        gates = x.new_empty(steps, batch, of_gates * save)
        for name, tensor in (("x", x), ("w_ih", w_ih), ("b_ih", b_ih)):
            fields[places[name]] = 0 if tensor is None else tensor.data_ptr()
    else:
        gates = onednn.linear(x, w_ih, linear.joined_bias(b_ih, b_hh, plan.program))
    y = x.new_empty(steps, batch, hidden)
    final = [torch.empty_like(state) for state in states]
    recurrent = x.new_empty(steps, batch, len(plan.program.split) * save, hidden)
    inner = x.new_empty((len(states) - 1) * save, steps, batch, hidden)
    fields[places["features"]], fields[places["save"]] = features, int(save)
    fields[places["b_hh"]] = 0 if b_hh is None else b_hh.data_ptr()
    for name, tensor in (("gates", gates), ("recurrent", recurrent), ("inner", inner), ("y", y)):
        fields[places[name]] = tensor.data_ptr() if tensor.numel() else 0
    for name, tensors in (("initial", states), ("final", final)):
        fields[places[name] : places[name] + len(states)] = [tensor.data_ptr() for tensor in tensors]
    _run(plan.forward, plan.packing.packed(*fields))
    return final, Saved(y, gates, recurrent, inner)


def backward(
    plan: LayerPlan,
    saved: Saved,
    states: Sequence[Tensor],
    w_hh: Tensor,
    params: Tensor | None,
    d_y: Tensor | None,
    d_final: Sequence[Tensor],
) -> Gradients:
    """From the gradients of y and the final states, all without gaps."""
    assert plan.backward is not None
    gates = saved.gates
    steps, batch, _ = gates.shape
    hidden, names = w_hh.shape[1], plan.program.params
    d_gates, d_recurrent = torch.empty_like(gates), gates.new_empty(steps, batch, len(plan.program.split) * hidden)
    d_states = [torch.empty_like(state) for state in states]
    d_params = gates.new_zeros(batch, len(names), hidden) if names else None  # a share of each row
    fields, places = _fields(plan, gates, w_hh, params)
    given = {**saved._asdict(), "d_y": d_y, "d_gates": d_gates, "d_recurrent": d_recurrent, "d_params": d_params}
    for name, tensor in given.items():
        fields[places[name]] = 0 if tensor is None or not tensor.numel() else tensor.data_ptr()
    for name, tensors in (("initial", states), ("d_final", d_final), ("d_initial", d_states)):
        fields[places[name] : places[name] + len(states)] = [tensor.data_ptr() for tensor in tensors]
    _run(plan.backward, plan.packing.packed(*fields))
    return Gradients(d_gates, d_recurrent, d_states, None if d_params is None else d_params.sum(0))


def _fields(
    plan: LayerPlan, over_time: Tensor, w_hh: Tensor, params: Tensor | None
) -> tuple[list[int], dict[str, int]]:
    """What both directions are given alike, at its places."""
    places, fields = plan.packing.places, [0] * plan.packing.fields
    steps, batch, _ = over_time.shape
    hidden, threads = w_hh.shape[1], launch.threads(steps * batch * w_hh.numel(), batch)
    numbers = {"steps": steps, "batch": batch, "across": 1, "units": hidden, "width": hidden, "threads": threads}
    for name, value in numbers.items():
        fields[places[name]] = value
    fields[places["tiles"]], fields[places["team"]] = threads, team.address()
    fields[places["reset_steps"]] = 1
    fields[places["flags_across"]] = 1
    fields[places["reverse"]] = ctypes.addressof(_FORWARD_IN_TIME)
    fields[places["w_hh"]] = w_hh.data_ptr()
    if params is not None:
        fields[places["params"]] = params.data_ptr()
    return fields, places


def _run(run: Callable[[bytes], int], given: bytes) -> None:
    if run(given):
        raise MemoryError(launch.NO_MEMORY)
