# SPDX-License-Identifier: Apache-2.0
"""One product and one pointwise pass a step: every recurrence, every option, every size, any device.

On a GPU the pointwise pass is one generated Triton kernel and chunks of steps are replayed as a CUDA graph
(`backends/step/gpu.py`); the rest runs in torch (`backends/step/torch_forward.py`, `backends/step/torch_backward.py`).
"""

from __future__ import annotations

from torch import Tensor

from gpu_rnn.backends import building, chains, cpu_cost, rates
from gpu_rnn.backends.problem import OF_ALL_LOOPS, Problem
from gpu_rnn.backends.step import gpu, torch_backward, torch_forward
from gpu_rnn.backends.tensors import Call, LoopGradients, Result
from gpu_rnn.backends.throughput import products

LOADED = 6e-7  # seconds until two loads in a row are there: the latency of an H100's memory

_builds = building.Builds(gpu.launches)
prepare = _builds.prepare


def unsupported(problem: Problem) -> list[str]:
    """Why the step loop cannot run a problem."""
    reasons = ["complex numbers run on the reference only"] * problem.dtype.is_complex
    return reasons + problem.without(*OF_ALL_LOOPS, "norm", "rms") or _builds.reasons(problem)


def cost(problem: Problem, constants: rates.Rates | None = None) -> float:
    """Seconds by the cost model: the products, and two launches a stage with what the pointwise kernel takes, or on a
    CPU a torch operation for each of the program's.

    On a GPU a projection of h takes two launches more.
    """
    stages, every = problem.program.stages, constants or rates.of(problem.device)
    if not problem.device.is_gpu:
        return cpu_cost.seconds(problem, every.cpu_step, sum(len(stage.ops) + len(stage.gates) for stage in stages))
    steps = (2.0 if problem.direction == "backward" else 1.0) * problem.T * problem.layers
    pairs = len(stages) + bool(problem.proj_size)
    pointwise = len(stages) * chains.step(problem, "step", pointwise_pass)
    return steps * (pairs * every.step.step + pointwise) + every.step.products * products(problem)


def pointwise_pass(problem: Problem) -> float:
    """Seconds of the pointwise kernel by what it reads and writes: pre-activations, products and states."""
    units = problem.B * problem.N * problem.H
    moved = 2 * problem.G * problem.dtype.itemsize + 8 * len(problem.program.states)
    return LOADED + units * moved / (problem.device.memory_rate * 1e9)


def forward(
    call: Call,
    gates: Tensor,  # (T, B, N, G, H), the input projection; overwritten
    save: bool,
    all_states: bool,
) -> Result:
    """The forward loop; see `reference.forward`, whose results it gives."""
    if gpu.takes(gates, call):
        return gpu.forward(call, gates, save, all_states)
    return torch_forward.forward(call, gates, save, all_states)


def backward(call: Call, saved: Result, d_y: Tensor, d_final: list[Tensor], d_inner: Tensor | None) -> LoopGradients:
    """The backward loop; `d_inner` (S - 1, T, B, N, H) where all states are wanted."""
    if gpu.takes(saved.gates, call):
        return gpu.backward(call, saved, d_y, d_final, d_inner)
    return torch_backward.backward(call, saved, d_y, d_final, d_inner)
