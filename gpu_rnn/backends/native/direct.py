# SPDX-License-Identifier: Apache-2.0
"""The forward time loop in C of a layer as its weights come. What a call needs besides its tensors is found once, in a
`LayerPlan`: of a short call that is most."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_rnn.backends import linear
from gpu_rnn.backends.native import arguments, building, launch, text
from gpu_rnn.backends.normalisation import Normaliser, room_for
from gpu_rnn.backends.tensors import PLAIN, LayerControls, Result, Weights
from gpu_rnn.compiler.program import Program
from gpu_rnn.memo import memoize

# Multiplications of the input products of all steps, below which they are the loop's own even if it has fewer threads
# than torch.
ALONE = 1 << 22


class LayerPlan(NamedTuple):
    """What every call of a kind of layer in one dtype needs."""

    program: Program
    dtype: torch.dtype  # of all that it computes with
    run: launch.LoopInC
    back: launch.LoopInC | None  # where there are derivatives
    packing: arguments.Packing
    names: tuple[str, ...]  # of the weights, as in `Weights`
    reverse: str
    rms: bool  # products are normalised by their root mean square
    takes_inputs: bool  # whether the loop can take the input products itself
    of_one: bool  # whether the gradients of the weights are a few matrices' (`linear.of_one`)

    def weights(self, each: Sequence[Tensor]) -> Weights:
        """In canonical layout; `each` is as `Stack.of_layer` has them."""
        n, gates = len(self.reverse), len(self.program.gates)
        return Weights(**{name: _view(name, weight, n, gates) for name, weight in zip(self.names, each, strict=True)})


def _view(name: str, weight: Tensor, n: int, gates: int) -> Tensor:
    if name in ("w_ih", "w_hh"):
        return weight.view(n, gates, -1, weight.shape[-1])
    return weight.view(n, -1, weight.shape[-1]) if name in ("w_hr", "params") else weight.view(n, gates, -1)


@memoize(256)
def plan(
    program: str, dtype: torch.dtype, derivative: bool, names: tuple[str, ...], reverse: str, rms: bool
) -> LayerPlan:
    """Built or found; the backward loop too, where there are derivatives.

    Raises:
        CompilerError: it cannot be built here.
    """
    parsed = Program.parse(program)
    run, back = launch.library(program, dtype, False).run, None
    if derivative:
        back = launch.library(program, dtype, True).run
    side_by_side = text.vectors(parsed, False, building.instruction_sets()[0])
    return LayerPlan(
        parsed,
        dtype,
        run,
        back,
        arguments.of_a_loop(len(parsed.states)),
        names,
        reverse,
        rms,
        "norm" not in names and len(parsed.gates) <= side_by_side,
        "norm" not in names and len(parsed.stages) == 1 == len(reverse) and "w_hr" not in names,
    )


def forward(
    plan: LayerPlan,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    resets: Sequence[Tensor] = (),
    controls: LayerControls = PLAIN,
    save: bool = False,
    all_states: bool = False,
) -> Result:
    """Of x (T, B, I), states (B, N, ·) or of one direction (1, B, ·), and weights as `Stack.of_layer` has them, all
    without gaps and of the plan's dtype; y is (T, B, N·P), 0 at masked steps where nothing else is wanted."""
    program, n = plan.program, len(plan.reverse)
    steps, batch, features = x.shape
    of_gates, width = weights[1].shape[-2:]
    shape = steps, batch, n, len(program.gates), of_gates // len(program.gates)
    numbers = launch.sizes(shape, width) | launch.of_controls(controls, resets)
    silent = controls.flags is not None and not (save or all_states)
    numbers |= {
        "save": int(save),
        "silent": int(silent),
        "rms": int(plan.rms),
        "features": features,
        "reverse": ctypes.addressof(launch.directions(plan.reverse)),
    }
    alone = numbers["threads"] == torch.get_num_threads() or x.numel() * of_gates * n <= ALONE
    normal = room_for(x, shape[2:]) if save and "norm" in plan.names else None
    # Steps that are not computed leave what is saved of them as it is; a second product's values are made of it.
    made = x.new_zeros if len(program.stages) > 1 and controls is not PLAIN else x.new_empty
    tensors: dict[str, Tensor | None] = dict(zip(plan.names, weights, strict=True))
    tensors.pop("norm_ih", None)
    if plan.takes_inputs and alone:
        gates = made(*shape[:-1], shape[-1] * save)
        tensors["x"] = x
    else:
        gates = linear.project(x, plan.weights(weights), program, normal, normaliser=Normaliser.of(plan.rms))
        del tensors["w_ih"]
    y, final = x.new_empty(steps, batch, n * width), [torch.empty_like(state) for state in states]
    recurrent = made(steps, batch, n, len(program.split) * save, shape[-1])
    inner = x.new_empty((len(states) - 1) * (save or all_states), steps, batch, n, shape[-1])
    tensors |= {"gates": gates, "recurrent": recurrent, "inner": inner, "y": y}
    if controls is not PLAIN:
        tensors |= launch.steering(controls)
    if normal is not None:
        tensors |= {"normal": normal.values[1], "rstd": normal.rstd[1]}
    lists = {"initial": states, "final": final, "resets": resets}
    if plan.run(plan.packing.filled(numbers, tensors, lists)):
        raise MemoryError(launch.NO_MEMORY)
    return Result(y, final, gates, recurrent, inner, normal)
