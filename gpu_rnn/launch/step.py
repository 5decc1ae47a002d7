# SPDX-License-Identifier: Apache-2.0
"""One product and one pointwise pass a step: every recurrence, every option, every size, any device.

On a GPU the pointwise pass is one generated Triton kernel and chunks of steps are replayed as a CUDA graph
(`launch/pointwise.py`); the rest runs in torch (`launch/loop_forward.py`, `launch/loop_backward.py`).
"""

from __future__ import annotations

from torch import Tensor

from gpu_rnn.launch import building, loop_backward, loop_forward, pointwise, rates
from gpu_rnn.launch.common import products
from gpu_rnn.layout import Call, LoopGradients, Result
from gpu_rnn.problem import Problem

CPU_OPERATION = 3e-6  # seconds, predicted

_builds = building.Builds(pointwise.kernels)
prepare = _builds.prepare


def unsupported(problem: Problem) -> list[str]:
    """Why the step loop cannot run a problem."""
    return ["complex numbers run on the reference only"] * problem.dtype.is_complex or _builds.reasons(problem)


def cost(problem: Problem, given: rates.Rates | None = None) -> float:
    """Seconds by the cost model (see `resident.cost`): the products, and a torch operation for each of the program's,
    or two launches a stage.

    On a GPU a projection of h takes two launches more.
    """
    stages, passes = problem.program.stages, 2.0 if problem.direction == "backward" else 1.0
    steps = passes * problem.T * problem.layers
    if problem.device.is_gpu:
        pairs = len(stages) + bool(problem.proj_size)
        known = (given or rates.of(problem.device)).step
        return steps * pairs * known.step + known.products * products(problem)
    return steps * sum(len(stage.ops) + len(stage.gates) for stage in stages) * CPU_OPERATION + products(problem)


def forward(
    call: Call,
    gates: Tensor,  # (T, B, N, G, H), the input projection; overwritten
    save: bool,
    all_states: bool,
) -> Result:
    """The forward loop; see `reference.forward`, whose results it gives."""
    if pointwise.takes(gates, call):
        return pointwise.forward(call, gates, save, all_states)
    return loop_forward.forward(call, gates, save, all_states)


def backward(call: Call, saved: Result, d_y: Tensor, d_final: list[Tensor], d_inner: Tensor | None) -> LoopGradients:
    """The backward loop; `d_inner` (S - 1, T, B, N, H) where all states are wanted."""
    if pointwise.takes(saved.gates, call):
        return pointwise.backward(call, saved, d_y, d_final, d_inner)
    return loop_backward.backward(call, saved, d_y, d_final, d_inner)
