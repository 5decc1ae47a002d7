# SPDX-License-Identifier: Apache-2.0
"""What a call would raise, found without its values: `explain` says it instead of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gpu_rnn.backends.problem import Problem
from gpu_rnn.call.controls import StackControls

if TYPE_CHECKING:
    from gpu_rnn.layers.base import LayerBase

CONTROLS = ("mask", "lengths", "resets", "reset_state")
GIB = 2**30


def check(
    layer: LayerBase, x: Tensor, batch_sizes: Tensor | None, call: Mapping[str, Any], has_batch: bool = True
) -> None:
    """Raises what the layer does for such an input and what comes with it.

    Args:
        layer: any layer.
        x: its input, with a batch of one where it has none.
        batch_sizes: of a packed input.
        call: its other arguments; True stands for any value.
        has_batch: whether the user's input has one.
    """
    x, weights = x.to("meta"), layer._weights()
    if x.shape[-1] != layer.input_size or x.dtype != weights[0].dtype:
        layer.check_input(x, batch_sizes)
    if (hx := call.get("hx")) is not None and hx is not True:
        states = layer._as_tuple(hx)
        layer._check_rank(states, 3 if has_batch else 2, "batched" if has_batch else "unbatched")
        layer._check_states(x, states if has_batch else tuple(state.unsqueeze(1) for state in states), batch_sizes)
    controls = _controls(layer, x, call)
    if controls.given:
        controls.refuse_packed(batch_sizes)
        stack = layer._stack(batch_sizes is not None)
        steps, batch = stack.sizes(x, batch_sizes)
        if not has_batch:
            controls = controls.batched(steps)
        elif layer.batch_first:
            controls = controls.transposed()
        controls.checked(steps, stack.state_shapes(weights, batch), len(layer.recurrence.gates), x)


def _controls(layer: LayerBase, x: Tensor, call: Mapping[str, Any]) -> StackControls:
    """Those of which more is known than that they are there, without their values but for lengths."""
    known = {name: value for name in CONTROLS if (value := call.get(name)) is not None and value is not True}
    if getattr(known.get("lengths"), "is_meta", False) or call.get("resets") is True:
        known = {name: value for name, value in known.items() if name == "mask"}
    if "reset_state" in known:
        known["reset_state"] = layer._as_tuple(known["reset_state"], "reset_state")
    controls = StackControls.of(x, **known)
    return StackControls(*map(_without_values, controls))._replace(lengths=controls.lengths)


def _without_values(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(each.to("meta") for each in value)
    return value.to("meta") if isinstance(value, Tensor) else value


def check_memory(problem: Problem, memory: int) -> None:
    """Raises ValueError where a call's own tensors, without what is computed on the way, exceed so many bytes, a
    device's memory; 0 where that is not known."""
    width = problem.proj_size or problem.H
    weights = problem.N * problem.G * problem.H * (problem.I + problem.layers * width)
    sequences = problem.T * problem.B * (problem.I + problem.N * width)
    least = (weights + sequences) * problem.dtype.itemsize
    if memory and least > memory:
        raise ValueError(
            f"{problem.device.name} has {memory / GIB:,.0f} GiB of memory, and the weights, the input and the output "
            f"alone take {least / GIB:,.0f} GiB: "
            + ("W_hh grows with the square of the hidden units" if weights > sequences else "those grow with T and B")
        )
