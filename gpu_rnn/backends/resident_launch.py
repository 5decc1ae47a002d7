# SPDX-License-Identifier: Apache-2.0
"""The launches of `kernels/triton/resident.py`. What a kernel is compiled for, and all of its arguments that are no
tensors, are found once for launches that are alike: of a short call they are most."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gpu_rnn import environment
from gpu_rnn.backends import building, persistent, triton_interpreter
from gpu_rnn.backends.building import Relaunch, TritonLaunch
from gpu_rnn.backends.linear import of_projection
from gpu_rnn.backends.persistent import ALIGNMENT, all_whole, bits, even_rows, rows
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.resident_tiles import padded, tile, widths
from gpu_rnn.backends.tensors import PLAIN, Call, LoopGradients, Result, Weights
from gpu_rnn.compiler.codegen import EXACT_FUNCTIONS
from gpu_rnn.compiler.program import Program
from gpu_rnn.compiler.triton_module import triton_module
from gpu_rnn.memo import memoize

VECTOR = 16  # elements that may be loaded at once, and more than enough
BIASED_BYTES = 256  # of a row of h: with more, biases in registers made a GRU's step 20 % longer (simulated)
FAST_FUNCTIONS = "gpu_rnn.kernels.triton.fast_math"
# Operations of which a small error of an argument makes a small one of the result, however small that is itself.
STEADY = {"add", "sub", "mul", "neg", "tanh", "sigmoid", "relu", "clamp", "minimum", "maximum"}
MOST_KINDS = 512  # of launches, of which all but the tensors is kept


def functions(problem: Problem) -> str:
    """The module of scalar functions that a problem's kernel calls. The hardware's tanh is for cells in which its error
    stays as small as it is: of a logarithm, a quotient or a comparison it could be any."""
    if problem.dtype.itemsize > 2:
        return EXACT_FUNCTIONS
    if triton_interpreter.INTERPRETING or str(problem.dtype).removeprefix("torch.") not in environment.approximated():
        return EXACT_FUNCTIONS
    operations = {op.name for stage in problem.program.stages for op in stage.ops}
    return FAST_FUNCTIONS if operations <= STEADY else EXACT_FUNCTIONS


@memoize(256)
def _constants(text: str, functions: str, backward: bool) -> dict[str, Any]:
    """What a kernel is compiled for, of a program."""
    program = Program.parse(text)
    steps, two = triton_module(program, functions), len(program.stages) == 2
    first, last, split = program.stages[0], len(program.stages) - 1, program.split
    constants = {
        "STEP": getattr(steps, f"step_{last}_backward" if backward else f"step_{last}"),
        "FIRST": steps.step_0 if two else None,
        "EARLY": len(first.gates),
        "KEPT": tuple(split.index(gate) if gate in split else -1 for gate in program.gates),
        "R": len(split),
        "P": len(program.params),
    }
    if backward:
        constants["MAKE"] = getattr(steps, f"step_{last}")
        constants["FIRST_BACKWARD"] = steps.step_0_backward if two else None
        constants["SPLIT"] = len(set(first.gates) - program.summed)
    return constants


def adds_b_hh(problem: Problem) -> bool:
    """See `gpu_rnn.backends.Entry`. The sum before the loop is a launch of torch's: much of a call of one step, little
    of a long one. With it in the loop a step takes, simulated, as long where split gates have their b_hh added in any
    case and registers are left for more, and of an LSTM 5 % longer.
    """
    split, row = bool(problem.program.split), padded(problem.H) * problem.dtype.itemsize
    return problem.T == 1 or (split and row <= BIASED_BYTES and not problem.drop)


def _joined(problem: Problem) -> int:
    """How many gates are saved as one block: in 16 bits, for else the exchange takes more shared memory."""
    summed = [gate in problem.program.summed for gate in problem.program.gates]
    counts = [count for count in (4, 2) if len(summed) >= count and all(summed[:count])]
    return counts[0] if counts and problem.dtype.itemsize == 2 else 0


class _Kind(NamedTuple):
    """What tells launches of a problem from each other, besides the values of their tensors."""

    shape: torch.Size  # of the gates, (T, B, N, G, H)
    width: int  # of what enters the products
    strides: tuple[int, ...]  # of the gates
    of_d_y: tuple[int, ...] | None  # in the backward pass
    reverse: str
    functions: str
    save: bool
    inner: bool  # the states other than h are written; of the backward pass: have gradients
    joined: bool
    biased: bool  # there is a b_hh
    controls: tuple[bool, ...]  # which there are
    drop: int  # masks
    resets: int  # steps of the values to reset to; 0: there are none
    aligned: tuple[bool, ...]  # whether the gates, and their gradients, begin where an allocation does
    device: torch.device


class _Fixed(NamedTuple):
    """All of a launch but its tensors."""

    launch: TritonLaunch
    again: Relaunch

    def of(self, tensors: dict[str, Any]) -> TritonLaunch:
        """The whole launch."""
        return self.launch._replace(arguments=self.launch.arguments | tensors)


@memoize(MOST_KINDS)
def _fixed(problem: Problem, kind: _Kind) -> _Fixed:
    from gpu_rnn.kernels.triton.resident import resident_backward, resident_forward

    backward, chosen = kind.of_d_y is not None, tile(problem)
    steps, batch, n, _, hidden = kind.shape
    pattern, period = bits(kind.reverse)
    of_d_y = {f"d_y_{name}": stride for name, stride in _strides(kind.of_d_y or ()).items()}
    strides = _strides(kind.strides) | of_d_y
    align = math.gcd(VECTOR, hidden, kind.width, *strides.values())
    arguments = {
        **{name: stride // align for name, stride in strides.items()},
        "T": steps,
        "B": batch,
        "H": hidden // align,
        "width": kind.width // align if problem.proj_size else None,
        "reverse": pattern,
        "period": period,
        "PRECISION": problem.precision,
        "ALIGN": align,
        "BLOCK_B": chosen.rows,
        "BLOCK_H": chosen.width,
        "BLOCK_W": widths(problem)[1],
        "STAGES": chosen.stages,
        "HELD": chosen.held,
        "num_warps": chosen.warps,
        "maxnreg": chosen.registers or None,
        "enable_fp_fusion": True,  # Triton is about to change its default, and 3.9 warns of it
        "INITIAL": problem.program.initial,
        "PER_STEP": kind.resets > 1,
        "DROP": kind.drop,
        **_constants(problem.program.text, kind.functions, backward),
    }
    if not backward:
        of_sums = {"SUMMED": not kind.joined, "SAVE": kind.save, "JOINED": _joined(problem), "INNER": kind.inner}
        arguments |= of_sums
    kernel = resident_backward if backward else resident_forward
    launch = TritonLaunch(kernel, (-(-batch // chosen.rows), n), arguments)
    return _Fixed(launch, Relaunch(launch))


def _strides(strides: tuple[int, ...]) -> dict[str, int]:
    """Of T, B, N, and G where there are gates, as the kernels name them."""
    return dict(zip(("stride_t", "stride_b", "stride_n", "stride_g"), strides[:-1], strict=False))


def _kind(call: Call, gates: Tensor, d_gates: Tensor | None, d_y: Tensor | None, save: bool, inner: bool) -> _Kind:
    controls, values, placed = call.controls, call.reset_values, (gates,) if d_gates is None else (gates, d_gates)
    return _Kind(
        gates.shape,
        call.weights.w_hh.shape[-1],
        gates.stride(),
        None if d_y is None else d_y.stride(),
        call.reverse,
        functions(call.problem),
        save,
        inner,
        call.joined,
        call.weights.b_hh is not None,
        () if controls is PLAIN else tuple([value is not None for value in controls]),
        0 if controls.drop is None else controls.drop.shape[2],
        len(values[0]) if values else 0,
        tuple([each.data_ptr() % ALIGNMENT == 0 for each in placed]),
        gates.device,
    )


NO_CONTROLS = dict.fromkeys(f"p_{name}" for name in (*PLAIN.of_loops, "resets"))


def _bytes(tensor: Tensor | None) -> Tensor | None:
    """Truth values as the kernels read them."""
    return tensor.view(torch.uint8) if tensor is not None and tensor.dtype == torch.bool else tensor


def _both(call: Call, gates: Tensor, b_hh: Tensor | None, *saved: Tensor | None) -> tuple[dict[str, Any], list[Any]]:
    """The tensors that both directions take alike, and those that were saved, or come in, as the kernels read them."""
    weights, count = call.weights, len(call.states)
    own = all_whole((weights.w_hh, weights.w_hr, weights.params, b_hh, *call.states, *saved))
    initial, others = tuple(own[4 : 4 + count]), list(own[4 + count :])
    tensors = {"p_gates": gates, "p_initial": initial, "p_w": own[0], "p_w_hr": own[1], "p_params": own[2]}
    tensors["p_b_hh"] = own[3]
    if call.controls is PLAIN and not call.reset_values:
        return tensors | NO_CONTROLS, others
    steering, values = call.controls.of_loops, call.reset_values
    named = zip(steering, all_whole(tuple(steering.values())), strict=True)
    tensors |= {f"p_{name}": _bytes(value) for name, value in named}
    return tensors | {"p_resets": tuple(all_whole(values)) if values else None}, others


def _of_forward(call: Call, gates: Tensor, save: bool, all_states: bool) -> tuple[_Fixed, dict[str, Any], Result]:
    """The launch, its tensors and the result that it fills."""
    program, states, gates, inner = call.program, call.states, rows(gates), save or all_states
    steps, batch, n, _, hidden = gates.shape
    y = gates.new_empty(steps, *states[0].shape)
    final = [gates.new_empty(state.shape) for state in states]
    recurrent = gates.new_empty(steps, batch, n, len(program.split) * save, hidden)
    others = gates.new_empty((len(states) - 1) * inner, steps, batch, n, hidden, dtype=torch.float32)
    tensors, _ = _both(call, gates, call.weights.b_hh if program.split or not call.joined else None)
    tensors |= {"p_recurrent": recurrent, "p_inner": others, "p_y": y, "p_final": tuple(final)}
    fixed = _fixed(call.problem, _kind(call, gates, None, None, save, inner))
    return fixed, tensors, Result(y, final, gates if save else gates.new_empty(0), recurrent, others)


def prepare_forward(
    call: Call,
    gates: Tensor,  # (T, B, N, G, H), the input projection; overwritten when `save`
    save: bool,
    all_states: bool = False,
) -> tuple[TritonLaunch, Result]:
    """The launch and the result that it fills."""
    fixed, tensors, result = _of_forward(call, gates, save, all_states)
    return fixed.of(tensors), result


def _of_backward(
    call: Call, saved: Result, d_y: Tensor, d_final: Sequence[Tensor], d_inner: Tensor | None
) -> tuple[_Fixed, dict[str, Any], LoopGradients]:
    """The launch, its tensors and the gradients that it fills."""
    program, projects = call.program, call.weights.w_hr is not None
    (gates, d_gates), d_y = persistent.beside(call, saved.gates), even_rows(d_y)
    n, _, hidden = gates.shape[2:]
    d_recurrent = gates.new_empty(saved.recurrent.shape)
    d_states = [state.new_empty(state.shape) for state in call.states]
    d_resets = [value.new_empty(value.shape) for value in call.reset_values]
    d_inner = None if d_inner is None or not len(d_inner) else d_inner
    fixed = _fixed(call.problem, _kind(call, gates, d_gates, d_y, True, d_inner is not None))
    d_params = gates.new_empty(fixed.launch.grid[0], n, len(program.params), hidden, dtype=torch.float32)
    others = saved.recurrent, saved.inner, None if projects else saved.y, d_inner, *d_final
    tensors, read = _both(call, gates, None, *others)
    del tensors["p_b_hh"]
    tensors |= {
        "p_recurrent": read[0],
        "p_inner": read[1],
        "p_y": read[2],
        "p_d_y": d_y,
        "p_d_inner": read[3],
        "p_d_final": tuple(read[4:]),
        "p_d_gates": d_gates,
        "p_d_recurrent": d_recurrent,
        "p_d_initial": tuple(d_states),
        "p_d_params": d_params,
        "p_d_resets": tuple(d_resets) or None,
        "p_d_h": d_y.new_empty(d_y.shape) if projects else None,
        "p_made": gates.new_empty(*gates.shape[:3], hidden) if projects else None,
    }
    return fixed, tensors, LoopGradients(d_gates, d_recurrent, d_states, d_params, d_resets=d_resets)


def prepare_backward(
    call: Call,
    saved: Result,
    d_y: Tensor,  # (T, B, N, H)
    d_final: list[Tensor],  # each (B, N, H)
    d_inner: Tensor | None = None,  # (S - 1, T, B, N, H)
) -> tuple[TritonLaunch, LoopGradients]:
    """The launch and the gradients that it fills; those of the parameters (tiles, N, P, H), a share from each tile."""
    fixed, tensors, grads = _of_backward(call, saved, d_y, d_final, d_inner)
    return fixed.of(tensors), grads


def launches(problem: Problem) -> list[TritonLaunch]:
    """The launch that a problem takes."""
    call, gates, saved = building.example(problem)
    if problem.direction == "backward":
        inner = saved.inner if problem.all_states else None
        return [prepare_backward(call, saved, saved.y, saved.final, inner)[0]]
    call = replace(call, joined=not adds_b_hh(problem))
    return [prepare_forward(call, gates, problem.saves_gates, problem.all_states or problem.training)[0]]


def forward(call: Call, gates: Tensor, save: bool, all_states: bool) -> Result:
    """The forward loop in one launch; see `reference.forward`, whose results it gives. Shapes: `prepare_forward`."""
    fixed, tensors, result = _of_forward(call, gates, save, all_states)
    fixed.again(gates, tensors)
    return result


class Again:
    """A forward pass in inference once more, of other gates, states and weights."""

    by_address = True

    def __init__(self, call: Call, gates: Tensor) -> None:
        fixed, tensors, result = _of_forward(call, gates, False, False)
        self.again, self.y, self.final = fixed.again, result.y.shape, [state.shape for state in result.final]
        self.adds = bool(call.program.split) or not call.joined
        nothing = {name: value for name, value in tensors.items() if value is None}
        self.others = nothing | {"p_recurrent": result.recurrent, "p_inner": result.inner}  # which have no elements

    def __call__(self, gates: Tensor, states: Iterable[Tensor], weights: Weights) -> tuple[Tensor, list[Tensor]]:
        y, final = gates.new_empty(self.y), [gates.new_empty(shape) for shape in self.final]
        of_call = {"p_gates": gates, "p_initial": tuple(states), "p_y": y, "p_final": tuple(final)}
        b_hh = weights.b_hh if self.adds else None
        own = {"p_w": weights.w_hh, "p_b_hh": b_hh, "p_params": weights.params, "p_w_hr": weights.w_hr}
        self.again(gates, self.others | of_call | own)
        return y, final


def backward(call: Call, saved: Result, d_y: Tensor, d_final: list[Tensor], d_inner: Tensor | None) -> LoopGradients:
    """The backward loop in one launch. Shapes: `prepare_backward`."""
    fixed, tensors, grads = _of_backward(call, saved, d_y, d_final, d_inner)
    fixed.again(d_y, tensors)
    d_h, made = tensors["p_d_h"], tensors["p_made"]
    return persistent.summed(call, grads._replace(d_w_hr=None if d_h is None else of_projection(d_h, made)))
