# SPDX-License-Identifier: Apache-2.0
"""W_hh stays on chip for the whole sequence (`kernels/triton/resident.py`): its limits, its tiles, its cost, its launch.

Any recurrence with one product a step. Programs never wait for each other, so any grid is right on any device.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gpu_rnn.launch import interpreter
from gpu_rnn.problem import Problem
from gpu_rnn.program import Program
from gpu_rnn.reference import Result, Weights

LONGEST_PATTERN = 62  # bits of a signed 64-bit argument that are safe to shift
MOST_IN_GRID_Y = 65535  # CUDA's limit


@dataclass(frozen=True)
class Tile:
    """Rows of the batch that one program owns, its warps, and the steps whose loads are under way together."""

    rows: int
    warps: int
    stages: int


def padded(hidden: int) -> int:
    """The width of a kernel's blocks: a power of two, and at least the 16 that tensor cores multiply at once."""
    return max(16, 1 << (hidden - 1).bit_length())


def tile(kind: str, direction: str, width: int) -> Tile:
    return Tile(16, 8 if width >= 128 else 4, 2)


@dataclass(frozen=True)
class Launch:
    """A kernel with everything but a device: what the compile tests build and what runs is the same."""

    kernel: Any
    grid: tuple[int, int]
    arguments: dict[str, Any]

    def __call__(self, like: Tensor) -> None:
        if 0 in self.grid:
            return
        with torch.cuda.device_of(like), interpreter.arithmetic():
            self.kernel[self.grid](**self.arguments)


def _bits(reverse: str) -> tuple[int, int]:
    """`reverse` as a bit mask over its shortest period, and that period."""
    period = next(p for p in range(1, len(reverse) + 1) if reverse[:p] * (len(reverse) // p) == reverse)
    return int(reverse[:period][::-1], 2), period


@lru_cache(maxsize=256)
def _constants(text: str, step: str) -> dict[str, Any]:
    """What a kernel is compiled for, of a program."""
    from gpu_rnn.launch import generated

    program = Program.parse(text)
    kept = tuple(program.split.index(gate) if gate in program.split else -1 for gate in program.gates)
    return {
        "STEP": getattr(generated.triton_module(program), step),
        "KEPT": kept,
        "R": len(program.split),
        "P": len(program.params),
    }


def _rows(tensor: Tensor) -> Tensor:
    """The tensor with its last dimension contiguous, which is all that kernels ask of it."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def prepare_forward(
    program: Program,
    gates: Tensor,  # (T, B, N, G, H), the input projection; overwritten when `save`
    weights: Weights,
    states: list[Tensor],  # each (B, N, H)
    lengths: Tensor | None,  # (B,)
    reverse: str,
    save: bool,
    problem: Problem,
) -> tuple[Launch, Result]:
    """The launch and the result that it fills."""
    from gpu_rnn.kernels.triton.resident import resident_forward

    steps, batch, n, _, hidden = gates.shape
    gates = _rows(gates)
    constants = _constants(program.text, "step_0")
    y = gates.new_empty(steps, batch, n, hidden)
    final = [gates.new_empty(batch, n, hidden) for _ in states]
    recurrent = gates.new_empty(steps, batch, n, constants["R"], hidden) if save else gates.new_empty(0)
    kept_states = len(states) - 1 if save else 0
    inner = gates.new_empty(kept_states, steps, batch, n, hidden, dtype=torch.float32)
    launch = _launch(
        resident_forward,
        problem,
        constants,
        p_gates=gates,
        p_recurrent=recurrent,
        p_inner=inner,
        p_y=y,
        p_initial=tuple(state.contiguous() for state in states),
        p_final=tuple(final),
        p_w=weights.w_hh.contiguous(),
        p_b_hh=weights.b_hh.contiguous() if weights.b_hh is not None and program.split else None,
        p_params=weights.params.contiguous() if weights.params is not None else None,
        p_lengths=lengths,
        gates_strides=gates.stride()[:4],
        reverse=reverse,
        SAVE=save,
    )
    return launch, Result(y, final, gates if save else gates.new_empty(0), recurrent, inner)


def prepare_backward(
    program: Program,
    saved: Result,
    weights: Weights,
    states: list[Tensor],  # each (B, N, H)
    lengths: Tensor | None,  # (B,)
    reverse: str,
    d_y: Tensor,  # (T, B, N, H)
    d_final: list[Tensor],  # each (B, N, H)
    problem: Problem,
) -> tuple[Launch, tuple[Tensor, Tensor, list[Tensor], Tensor | None]]:
    """The launch and the gradients that it fills; those of the parameters are still one for each tile of the batch."""
    from gpu_rnn.kernels.triton.resident import resident_backward

    _, batch, n, _, hidden = saved.gates.shape
    gates, d_y = _rows(saved.gates), _rows(d_y)
    constants = _constants(program.text, "step_0_backward")
    d_gates = torch.empty_like(gates)
    d_recurrent = torch.empty_like(saved.recurrent)
    d_states = [torch.empty_like(state, memory_format=torch.contiguous_format) for state in states]
    d_params = None
    if program.params:
        tiles = -(-batch // _tile(problem).rows)
        d_params = gates.new_empty(tiles, n, len(program.params), hidden, dtype=torch.float32)
    launch = _launch(
        resident_backward,
        problem,
        constants,
        p_gates=gates,
        p_recurrent=saved.recurrent.contiguous(),
        p_inner=saved.inner.contiguous(),
        p_y=saved.y.contiguous(),
        p_initial=tuple(state.contiguous() for state in states),
        p_w=weights.w_hh.contiguous(),
        p_params=weights.params.contiguous() if weights.params is not None else None,
        p_lengths=lengths,
        p_d_y=d_y,
        p_d_final=tuple(d.contiguous() for d in d_final),
        p_d_gates=d_gates,
        p_d_recurrent=d_recurrent,
        p_d_initial=tuple(d_states),
        p_d_params=d_params,
        gates_strides=gates.stride()[:4],
        d_y_strides=d_y.stride()[:3],
        reverse=reverse,
    )
    return launch, (d_gates, d_recurrent, d_states, d_params)


def _launch(
    kernel: Any, problem: Problem, constants: dict[str, Any], *, p_gates: Tensor, reverse: str, **arguments: Any
) -> Launch:
    """A launch with what both directions take alike."""
    steps, batch, n, _, hidden = p_gates.shape
    chosen = _tile(problem)
    bits, period = _bits(reverse)
    return Launch(
        kernel,
        (-(-batch // chosen.rows), n),
        {
            "p_gates": p_gates,
            **arguments,
            **constants,
            "T": steps,
            "B": batch,
            "H": hidden,
            "reverse": bits,
            "period": period,
            "PRECISION": problem.precision,
            "BLOCK_B": chosen.rows,
            "BLOCK_H": padded(hidden),
            "STAGES": chosen.stages,
            "num_warps": chosen.warps,
        },
    )


def _tile(problem: Problem) -> Tile:
    return tile("", problem.direction, padded(problem.H))


def forward(
    program: Program,
    gates: Tensor,
    weights: Weights,
    states: list[Tensor],
    lengths: Tensor | None,
    reverse: str,
    save: bool,
    problem: Problem,
) -> Result:
    """The forward loop in one launch; see `reference.forward`, whose results it gives. `gates` is overwritten."""
    launch, result = prepare_forward(program, gates, weights, states, lengths, reverse, save, problem)
    launch(gates)
    return result


def backward(
    program: Program,
    saved: Result,
    weights: Weights,
    states: list[Tensor],
    lengths: Tensor | None,
    reverse: str,
    d_y: Tensor,
    d_final: list[Tensor],
    problem: Problem,
) -> tuple[Tensor, Tensor, list[Tensor], Tensor | None, None]:
    """The backward loop in one launch: d_gates, d_recurrent, d_states (before the first step), d_params, d_w_hr."""
    launch, found = prepare_backward(
        program, saved, weights, states, lengths, reverse, d_y, d_final, problem
    )
    launch(d_y)
    d_gates, d_recurrent, d_states, d_params = found
    return d_gates, d_recurrent, d_states, d_params.sum(0) if d_params is not None else None, None


def unsupported(problem: Problem) -> list[str]:
    return []


def cost(problem: Problem) -> float:
    return 1.0
