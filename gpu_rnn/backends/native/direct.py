# SPDX-License-Identifier: Apache-2.0
"""Both passes of a layer's time loop in C with its weights as they come. What a call needs besides its tensors is found
once, in a `LayerPlan` and its sizes: of a short call that is most, and each tensor that is made is a part of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_rnn import memo
from gpu_rnn.backends import linear
from gpu_rnn.backends.native import arguments, launch
from gpu_rnn.backends.native.sizes import Extent, LayerSizes, Room
from gpu_rnn.backends.native.sizes import of as sizes_of
from gpu_rnn.backends.normalisation import Normalised, Normaliser, room_for
from gpu_rnn.backends.tensors import PLAIN, Call, LayerControls, Result, Weights, counted
from gpu_rnn.compiler.program import Program
from gpu_rnn.memo import memoize

MOST_SIZES = 64  # of a plan, that are kept
# Of a weight that has one for each row in the loop.
ADDED_UP = {"params": "d_params_of_all", "norm": "d_norm_of_all"}


class Done(NamedTuple):
    """A forward pass. `saved` is the tensor of `LayerSizes.saved` and then what was made apart: gates, normal values
    and 1 over their deviations (2, ...) where the input products were a library's, the states other than h where all
    are wanted."""

    y: Tensor
    final: list[Tensor]
    inner: Tensor | None
    saved: list[Tensor]
    sizes: LayerSizes


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
    of_gradients: tuple[str, ...]  # in the arguments, of each weight
    sizes: dict[Extent, LayerSizes]

    def weights(self, each: Sequence[Tensor]) -> Weights:
        """In canonical layout; `each` is as `Stack.of_layer` has them."""
        n, gates = len(self.reverse), len(self.program.gates)
        return Weights(**{name: _view(name, weight, n, gates) for name, weight in zip(self.names, each, strict=True)})

    def rows_first(self, x: Tensor, states: Sequence[Tensor]) -> list[Tensor]:
        """The states, (B, N, ·)"""
        return [state.view(x.shape[1], len(self.reverse), -1) for state in states]


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
    packing = arguments.of_a_loop(len(parsed.states))
    of_gradients = tuple(ADDED_UP.get(name, f"d_{name}") for name in names)
    return LayerPlan(parsed, dtype, run, back, packing, names, reverse, rms, of_gradients, {})


def _sizes(plan: LayerPlan, kind: Extent) -> LayerSizes:
    found = plan.sizes.get(kind)
    if found is None:
        each = plan.program, plan.packing, plan.names, plan.reverse, plan.rms, torch.finfo(plan.dtype).bits
        found = memo.put(plan.sizes, kind, sizes_of(kind, *each), MOST_SIZES)
    return found


def forward(
    plan: LayerPlan,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    resets: Sequence[Tensor] = (),
    controls: LayerControls = PLAIN,
    save: bool = False,
    all_states: bool = False,
) -> Done:
    """Of x (T, B, I), states (B, N, ·) or of one direction (1, B, ·), and weights as `Stack.of_layer` has them, all
    without gaps and of the plan's dtype; y is (T, B, N·P), 0 at steps that do not count unless all states are wanted.
    What x holds there is not read."""
    steering = () if controls is PLAIN else tuple(launch.of_controls(controls, resets).items())
    kind = Extent(x.shape, weights[1].shape, steering, save, all_states, torch.get_num_threads())
    sizes = _sizes(plan, kind)
    # Steps that are not computed leave what is saved of them as it is; a second product's values are made of it.
    made = x.new_zeros if steering and len(plan.program.stages) > 1 else x.new_empty
    saved = [made(sizes.saved.size)] if save else []
    fields = sizes.fields.copy()
    if save:
        _place(fields, sizes.saved, saved[0])
    tensors: dict[str, Tensor | None] = dict(zip(plan.names, weights, strict=True))
    if sizes.takes_inputs:
        tensors["x"] = x
    else:
        saved += _project(plan, sizes, x, weights, tensors, save)
    inner = None
    if all_states:
        inner = tensors["inner"] = x.new_empty(sizes.inner)
        saved.append(inner)
    y, final = x.new_empty(sizes.y), [torch.empty_like(state) for state in states]
    tensors["y"] = y
    if controls is not PLAIN:
        tensors |= controls.of_loops
    lists = {"initial": states, "final": final, "resets": resets}
    launch.start(plan.run, plan.packing, fields, sizes.threads, sizes.gates, tensors, lists)
    return Done(y, final, inner, saved if save else [], sizes)


def _project(
    plan: LayerPlan,
    sizes: LayerSizes,
    x: Tensor,
    weights: Sequence[Tensor],
    tensors: dict[str, Tensor | None],
    save: bool,
) -> list[Tensor]:
    """A library's input products and, if they are normalised, their normal values; enters them."""
    normal = room_for(x, sizes.gates[2:]) if save and "norm" in plan.names else None
    gates = linear.project(x, plan.weights(weights), plan.program, normal, normaliser=Normaliser.of(plan.rms))
    tensors["gates"] = gates
    if normal is None:
        return [gates]
    tensors["normal"], tensors["rstd"] = normal.values[1], normal.rstd[1]
    return [gates, *normal]


def _place(fields: list[int], room: Room, whole: Tensor) -> None:
    """Enters the addresses of what lies in one tensor."""
    start = whole.data_ptr()
    for place, offset in room.places:
        fields[place] = start + offset


def backward(
    plan: LayerPlan,
    sizes: LayerSizes,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    resets: Sequence[Tensor],
    controls: LayerControls,
    y: Tensor,
    saved: Sequence[Tensor],
    d_y: Tensor | None,
    d_final: Sequence[Tensor | None],
    d_inner: Tensor | None,
    of_x: bool,
    of_states: bool,
) -> list[Tensor | None]:
    """The gradients of x, the states, the weights and the values of resets, of what `forward` was given and has
    `saved`; those of x and the states where they are wanted."""
    assert plan.back is not None
    if not sizes.own_gradients:
        if controls is not PLAIN:
            counts = controls.counts(len(x))
            x = counted(x, counts)
            d_y = counted(d_y, counts) if sizes.silenced and d_y is not None else d_y
        result = _result(plan, sizes, y, saved)
        return _by_a_library(plan, x, states, weights, resets, controls, result, d_y, d_final, d_inner, of_x)
    made = x.new_empty(sizes.made.size)
    fields = sizes.fields.copy()
    _place(fields, sizes.saved, saved[0])
    _place(fields, sizes.made, made)
    if sizes.silenced:  # what stands there is what states were
        fields[plan.packing.places["y"]] = fields[plan.packing.places["h"]]
    d_x = torch.empty_like(x) if of_x else None
    d_states = [torch.empty_like(state) if of_states else None for state in states]
    d_weights, d_resets = (
        [torch.empty_like(weight) for weight in weights],
        [torch.zeros_like(value) for value in resets],
    )
    tensors: dict[str, Tensor | None] = dict(zip(plan.names, weights, strict=True))
    tensors |= zip(plan.of_gradients, d_weights, strict=True)
    tensors |= {"x": x, "d_y": d_y, "d_x": d_x, "d_inner": d_inner} | _apart(plan, sizes, saved)
    tensors["y"] = None if sizes.silenced else y
    if controls is not PLAIN:
        tensors |= controls.of_loops
    lists = {"initial": states, "d_final": d_final, "d_initial": d_states, "resets": resets, "d_resets": d_resets}
    launch.start(plan.back, plan.packing, fields, sizes.threads, sizes.gates, tensors, lists, sizes.gradient_threads)
    return [d_x, *d_states, *d_weights, *d_resets]


def _apart(plan: LayerPlan, sizes: LayerSizes, saved: Sequence[Tensor]) -> dict[str, Tensor]:
    """Of what was saved the tensors that were made apart, by name."""
    rest, apart = list(saved[1:]), {}
    if "inner" not in sizes.saved.shapes:
        apart["inner"] = rest.pop()
    if rest:
        apart["gates"] = rest[0]
    if len(rest) > 1:
        (apart["normal_x"], apart["normal"]), (apart["rstd_x"], apart["rstd"]) = rest[1:]
    return apart


def _result(plan: LayerPlan, sizes: LayerSizes, y: Tensor, saved: Sequence[Tensor]) -> Result:
    """What was saved, in canonical layout."""
    steps, batch, n, *_ = sizes.gates
    room, whole, apart = sizes.saved, saved[0], _apart(plan, sizes, saved)
    gates, inner = (apart[name] if name in apart else room.view(name, whole) for name in ("gates", "inner"))
    normal = None
    if "gates" in apart and len(saved) > 3:
        normal = Normalised(*saved[2:4])
    elif "norm" in plan.names:
        normal = Normalised(room.views(("normal_x", "normal"), whole), room.views(("rstd_x", "rstd"), whole))
    h = room.view("h", whole) if sizes.silenced else y.view(steps, batch, n, -1)
    return Result(h, [], gates, room.view("recurrent", whole), inner, normal)


def _by_a_library(
    plan: LayerPlan,
    x: Tensor,
    states: Sequence[Tensor],
    weights: Sequence[Tensor],
    resets: Sequence[Tensor],
    controls: LayerControls,
    result: Result,
    d_y: Tensor | None,
    d_final: Sequence[Tensor | None],
    d_inner: Tensor | None,
    of_x: bool,
) -> list[Tensor | None]:
    """`backward` where the products over all steps are torch's."""
    before = plan.rows_first(x, states)
    call = Call(plan.program, plan.weights(weights), before, controls, [*resets], plan.reverse, rms=plan.rms)
    after = [torch.zeros_like(s) if d is None else d for d, s in zip(d_final, before, strict=True)]
    assert plan.back is not None
    loop = launch.backward_of_dense(plan.back, call, result, d_y, after, d_inner)
    d_x, d_weights = linear.gradients(call, x, result, loop, of_x)
    by_name = d_weights._asdict()
    d_tensors = [d_x, *loop.d_states, *(by_name[name] for name in plan.names), *loop.d_resets]
    given = [x, *states, *weights, *resets]
    return [d if d is None or d.shape == t.shape else d.view(t.shape) for d, t in zip(d_tensors, given, strict=True)]
