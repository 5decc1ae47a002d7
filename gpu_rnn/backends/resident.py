# SPDX-License-Identifier: Apache-2.0
"""W_hh stays on chip for the whole sequence (`kernels/triton/resident.py`): its limits, its cost, its tiles, its
launch.

Any recurrence with one product a step, or two. Programs never wait for each other, so any grid is right on any device.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from gpu_rnn import environment
from gpu_rnn.backends import building, chains, persistent, rates, triton_interpreter
from gpu_rnn.backends.building import TritonLaunch
from gpu_rnn.backends.linear import of_projection
from gpu_rnn.backends.persistent import bits, even_rows, rows, whole
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.resident_tiles import Tile, available, matrices, padded, shared_memory, tile, widths
from gpu_rnn.backends.tensors import PLAIN, Call, LoopGradients, Result, Weights
from gpu_rnn.backends.throughput import (
    FP32_PER_CYCLE,
    SHARED_BYTES_PER_CYCLE,
    SPECIAL_PER_CYCLE,
    multiplications,
    projection,
    special,
)
from gpu_rnn.compiler.codegen import EXACT_FUNCTIONS
from gpu_rnn.compiler.program import Program
from gpu_rnn.compiler.triton_module import triton_module
from gpu_rnn.devices import is_described
from gpu_rnn.memo import memoize

MOST_ACROSS = 65535  # blocks in the second dimension of a CUDA grid, which is N
LONGEST_PATTERN = 62  # bits of a signed 64-bit argument that can be shifted and tested
VECTOR = 16  # elements that may be loaded at once, and more than enough
BIASED_BYTES = 256  # of a row of h: with more, biases in registers made a GRU's step 20 % longer (simulated)
WIDEST_PROJECTED = 128  # units with a projection of h: more spill (test_resident_builds.py)
WIDEST_FULL = 64  # units in full fp32: without tensor cores a wider product spills registers (test_resident_builds.py)

FAST_FUNCTIONS = "gpu_rnn.kernels.triton.fast_math"
# Operations of which a small error of an argument makes a small one of the result, however small that is itself.
STEADY = {"add", "sub", "mul", "neg", "tanh", "sigmoid", "relu", "clamp", "minimum", "maximum"}

INTERPRETED = 5e-3  # seconds for a tile's step in Triton's interpreter; predicted


def unsupported(problem: Problem) -> list[str]:
    """Why this kernel cannot run a problem."""
    program, device, reasons = problem.program, problem.device, []
    if find_spec("triton") is None and not is_described(device):
        reasons.append(triton_interpreter.NOT_INSTALLED)
    runs_here = device.is_gpu or (triton_interpreter.INTERPRETING and problem.device_type == "cpu")
    if not runs_here:
        reasons.append(f"needs an NVIDIA GPU, not {problem.device_type} (or TRITON_INTERPRET=1, for tests)")
    if len(program.stages) > 2:
        reasons.append(f"takes two products a step at most, {program.name} has {len(program.stages)}")
    reasons += persistent.unsupported(problem)
    if problem.N > MOST_ACROSS or bits(problem.reverse)[1] > LONGEST_PATTERN:
        reasons.append(f"takes {MOST_ACROSS} recurrences side by side, directions repeating within {LONGEST_PATTERN}")
    return reasons + (_too_wide(problem) if runs_here else []) or _builds.reasons(problem)


def _too_wide(problem: Problem) -> list[str]:
    """What the device's memories have against a problem."""
    program, reasons = problem.program, []
    if problem.dtype == torch.float32 and problem.precision == "ieee" and problem.H > WIDEST_FULL:
        reasons.append(f"takes {WIDEST_FULL} units at most in full float32, not {problem.H} (tf32 takes more)")
    if problem.proj_size and problem.H > WIDEST_PROJECTED:
        reasons.append(f"takes {WIDEST_PROJECTED} units at most with a projection of h (proj_size), not {problem.H}")
    needed, there = shared_memory(problem, 1), available(problem)
    if needed > there:
        reasons.append(
            f"keeps W_hh on chip: with {problem.H} units of {program.name} a block needs {needed >> 10} KiB of shared "
            f"memory and has {there >> 10}"
        )
    return reasons


def cost(problem: Problem, constants: rates.Rates | None = None) -> float:
    """Seconds by the cost model, with the device's own constants or those given."""
    device, chosen = problem.device, tile(problem)
    known = (constants or rates.of(device)).resident
    tiles = -(-problem.B // chosen.rows) * problem.N
    steps = problem.T * problem.layers
    if not device.is_gpu:
        return steps * tiles * INTERPRETED
    together = device.sms * max(1, available(problem) // shared_memory(problem, chosen.stages, chosen.held))
    one = chains.step(_one_tile(problem), "resident", modelled)
    step = known.step * max(min(one, _busy(problem)) * -(-tiles // device.sms), one * -(-tiles // together))
    return known.start + steps * step + known.projection * projection(problem)


def source(problem: Problem) -> str:
    """Where its time a step comes from: see `gpu_rnn.backends.Entry`."""
    alone = -(-problem.B // tile(problem).rows) * problem.N <= problem.device.sms
    return "simulated" if alone and chains.simulated(_one_tile(problem), "resident") else "modelled"


def _one_tile(problem: Problem) -> Problem:
    """What a block does of a problem."""
    width, entering = widths(problem)
    return problem.but(B=tile(problem).rows, N=1, H=width, proj_size=entering if problem.proj_size else 0)


def modelled(problem: Problem) -> float:
    """Seconds of a step of one tile by what its units have to do and what nothing hides."""
    products = len(problem.program.stages) + rates.RESIDENT.projected * bool(problem.proj_size)
    return _busy(problem) + rates.RESIDENT.latency * products / (problem.device.clock * 1e9)


def _busy(problem: Problem) -> float:
    """Seconds of the busiest unit of a multiprocessor, for a step of one tile."""
    program, chosen, known = problem.program, tile(problem), rates.RESIDENT
    units, weights = chosen.rows * chosen.width, matrices(problem) * math.prod(widths(problem))
    operations = [op for stage in program.stages for op in stage.ops]
    instructions = known.instructions * len(operations) * (known.backward if problem.direction == "backward" else 1.0)
    cycles = max(
        chosen.rows * weights / multiplications(problem, known.tensor_share),
        weights * problem.dtype.itemsize / SHARED_BYTES_PER_CYCLE,
        units * special(operations) / SPECIAL_PER_CYCLE / (2 if functions(problem) == FAST_FUNCTIONS else 1),
        units * instructions / FP32_PER_CYCLE,
    )
    return cycles / (problem.device.clock * 1e9)


def functions(problem: Problem) -> str:
    """The module of scalar functions that a problem's kernel calls. The hardware's tanh is for cells in which its error
    stays as small as it is: of a logarithm, a quotient or a comparison it could be any."""
    if problem.dtype.itemsize > 2:
        return EXACT_FUNCTIONS
    if triton_interpreter.INTERPRETING or str(problem.dtype).removeprefix("torch.") not in environment.approximated():
        return EXACT_FUNCTIONS
    operations = {op.name for stage in problem.program.stages for op in stage.ops}
    return FAST_FUNCTIONS if operations <= STEADY else EXACT_FUNCTIONS


def _constants(call: Call, *, backward: bool) -> dict[str, Any]:
    """What a kernel is compiled for, of a program."""
    return _constants_of(call.program.text, functions(call.problem), backward)


@memoize(256)
def _constants_of(text: str, functions: str, backward: bool) -> dict[str, Any]:
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


def _strides(tensor: Tensor) -> dict[str, int]:
    """Of T, B, N, and G where there are gates, as the kernels name them."""
    return dict(zip(("stride_t", "stride_b", "stride_n", "stride_g"), tensor.stride()[:-1], strict=False))


def _whole(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else whole(tensor)


def _bytes(tensor: Tensor | None) -> Tensor | None:
    """Truth values as the kernels read them."""
    return tensor.view(torch.uint8) if tensor is not None and tensor.dtype == torch.bool else tensor


def _each_whole(tensors: Iterable[Tensor]) -> tuple[Tensor, ...]:
    return tuple(map(whole, tensors))


def _launch(
    kernel: Any,
    call: Call,
    *,
    p_gates: Tensor,
    strides: dict[str, int],
    chosen: Tile,
    **arguments: Any,
) -> TritonLaunch:
    """A launch with what both directions take alike."""
    steps, batch, n, _, hidden = p_gates.shape
    pattern, period = bits(call.reverse)
    width = call.weights.w_hh.shape[-1]
    align = math.gcd(VECTOR, hidden, width, *strides.values())
    both = {
        "p_gates": p_gates,
        "p_initial": _each_whole(call.states),
        "p_w": whole(call.weights.w_hh),
        "p_w_hr": _whole(call.weights.w_hr),
        "p_params": _whole(call.weights.params),
        **{name: stride // align for name, stride in strides.items()},
        "T": steps,
        "B": batch,
        "H": hidden // align,
        "width": None if call.weights.w_hr is None else width // align,
        "reverse": pattern,
        "period": period,
        "PRECISION": call.problem.precision,
        "ALIGN": align,
        "BLOCK_B": chosen.rows,
        "BLOCK_H": chosen.width,
        "BLOCK_W": widths(call.problem)[1],
        "STAGES": chosen.stages,
        "HELD": chosen.held,
        "num_warps": chosen.warps,
        "maxnreg": chosen.registers or None,
        "enable_fp_fusion": True,  # Triton is about to change its default, and 3.9 warns of it
    }
    return TritonLaunch(kernel, (-(-batch // chosen.rows), n), both | _controls(call) | arguments)


NO_CONTROLS = {**dict.fromkeys(f"p_{name}" for name in (*PLAIN.of_loops, "resets")), "PER_STEP": False, "DROP": 0}


def _controls(call: Call) -> dict[str, Any]:
    """What steers the steps."""
    controls, values = call.controls, call.reset_values
    if not values and not [value for value in controls if value is not None]:
        return NO_CONTROLS | {"INITIAL": call.program.initial}
    return {
        **{f"p_{name}": _bytes(_whole(value)) for name, value in controls.of_loops.items()},
        "p_resets": _each_whole(values) if values else None,
        "INITIAL": call.program.initial,
        "PER_STEP": bool(values) and len(values[0]) > 1,
        "DROP": 0 if controls.drop is None else controls.drop.shape[2],
    }


def prepare_forward(
    call: Call,
    gates: Tensor,  # (T, B, N, G, H), the input projection; overwritten when `save`
    save: bool,
    all_states: bool = False,
) -> tuple[TritonLaunch, Result]:
    """The launch and the result that it fills."""
    from gpu_rnn.kernels.triton.resident import resident_forward

    program, states = call.program, call.states
    steps, batch, n, _, hidden = gates.shape
    gates = rows(gates)
    y = gates.new_empty(steps, *states[0].shape)
    final = [gates.new_empty(state.shape) for state in states]
    saved_products, saved_states = len(program.split) * save, (len(states) - 1) * (save or all_states)
    recurrent = gates.new_empty(steps, batch, n, saved_products, hidden)
    inner = gates.new_empty(saved_states, steps, batch, n, hidden, dtype=torch.float32)
    launch = _launch(
        resident_forward,
        call,
        p_gates=gates,
        p_recurrent=recurrent,
        p_inner=inner,
        p_y=y,
        p_final=tuple(final),
        p_b_hh=_whole(call.weights.b_hh) if program.split or not call.joined else None,
        strides=_strides(gates),
        chosen=tile(call.problem),
        SUMMED=not call.joined,
        SAVE=save,
        JOINED=_joined(call.problem),
        INNER=save or all_states,
        **_constants(call, backward=False),
    )
    return launch, Result(y, final, gates if save else gates.new_empty(0), recurrent, inner)


def prepare_backward(
    call: Call,
    saved: Result,
    d_y: Tensor,  # (T, B, N, H)
    d_final: list[Tensor],  # each (B, N, H)
    d_inner: Tensor | None = None,  # (S - 1, T, B, N, H)
) -> tuple[TritonLaunch, LoopGradients]:
    """The launch and the gradients that it fills; those of the parameters (tiles, N, P, H), a share from each tile."""
    from gpu_rnn.kernels.triton.resident import resident_backward

    program, projects = call.program, call.weights.w_hr is not None
    (gates, d_gates), d_y = persistent.beside(call, saved.gates), even_rows(d_y)
    batch, n, _, hidden = gates.shape[1:]
    d_recurrent = gates.new_empty(saved.recurrent.shape)
    d_states, d_resets = [
        [each.new_empty(each.shape) for each in tensors] for tensors in (call.states, call.reset_values)
    ]
    chosen = tile(call.problem)
    tiles, params = -(-batch // chosen.rows), len(program.params)
    d_params = gates.new_empty(tiles, n, params, hidden, dtype=torch.float32)
    launch = _launch(
        resident_backward,
        call,
        p_gates=gates,
        p_recurrent=whole(saved.recurrent),
        p_inner=whole(saved.inner),
        p_y=None if projects else whole(saved.y),
        p_d_y=d_y,
        p_d_inner=None if d_inner is None or not len(d_inner) else whole(d_inner),
        p_d_final=_each_whole(d_final),
        p_d_gates=d_gates,
        p_d_recurrent=d_recurrent,
        p_d_initial=tuple(d_states),
        p_d_params=d_params,
        p_d_resets=tuple(d_resets) or None,
        p_d_h=d_y.new_empty(d_y.shape) if projects else None,
        p_made=gates.new_empty(*gates.shape[:3], hidden) if projects else None,
        strides=_strides(gates) | {f"d_y_{name}": stride for name, stride in _strides(d_y).items()},
        chosen=chosen,
        **_constants(call, backward=True),
    )
    return launch, LoopGradients(d_gates, d_recurrent, d_states, d_params, d_resets=d_resets)


def _of_projection(launch: TritonLaunch) -> Tensor | None:
    """(N, P, H): the gradient of W_hr, once a backward launch has run."""
    d_h, made = launch.arguments["p_d_h"], launch.arguments["p_made"]
    return None if d_h is None else of_projection(d_h, made)


def _launches(problem: Problem) -> list[TritonLaunch]:
    """The launch that a problem takes."""
    call, gates, saved = building.example(problem)
    if problem.direction == "backward":
        inner = saved.inner if problem.all_states else None
        return [prepare_backward(call, saved, saved.y, saved.final, inner)[0]]
    call = replace(call, joined=not adds_b_hh(problem))
    return [prepare_forward(call, gates, problem.direction == "training", problem.all_states)[0]]


_builds = building.Builds(_launches)
prepare = _builds.prepare


def forward(call: Call, gates: Tensor, save: bool, all_states: bool) -> Result:
    """The forward loop in one launch; see `reference.forward`, whose results it gives. Shapes: `prepare_forward`."""
    launch, result = prepare_forward(call, gates, save, all_states)
    launch(gates)
    return result


class Again:
    """A forward pass in inference once more, of other gates, states and weights."""

    by_address = True

    def __init__(self, call: Call, gates: Tensor) -> None:
        launch, result = prepare_forward(call, gates, save=False)
        self.launch, self.y, self.final = building.Relaunch(launch), result.y.shape, [s.shape for s in result.final]
        self.adds = bool(call.program.split) or not call.joined

    def __call__(self, gates: Tensor, states: Iterable[Tensor], weights: Weights) -> tuple[Tensor, list[Tensor]]:
        y, final = gates.new_empty(self.y), [gates.new_empty(shape) for shape in self.final]
        of_call = {"p_gates": gates, "p_initial": tuple(states), "p_y": y, "p_final": tuple(final)}
        b_hh = weights.b_hh if self.adds else None
        own = {"p_w": weights.w_hh, "p_b_hh": b_hh, "p_params": weights.params, "p_w_hr": weights.w_hr}
        self.launch(gates, **of_call, **own)
        return y, final


def backward(call: Call, saved: Result, d_y: Tensor, d_final: list[Tensor], d_inner: Tensor | None) -> LoopGradients:
    """The backward loop in one launch. Shapes: `prepare_backward`."""
    launch, grads = prepare_backward(call, saved, d_y, d_final, d_inner)
    launch(d_y)
    return persistent.summed(call, grads._replace(d_w_hr=_of_projection(launch)))
