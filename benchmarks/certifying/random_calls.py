# SPDX-License-Identifier: Apache-2.0
"""Calls of `functional.rnn` with any options: their tensors drawn at random, the call, and the gradients.

The tests compare such calls with `options_by_hand`, the soak of `benchmarks/soak.py` with the float64 reference.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.certifying.given import Given
from gpu_rnn import functional
from gpu_rnn.recurrence import Recurrence

OPTIONS = (
    "mask",
    "lengths",
    "resets",
    "reset_state",
    "reset_state_per_step",
    "recurrent_dropout",
    "recurrent_dropout_per_gate",
    "zoneout",
    "layer_norm",
    "rms_norm",
    "all_states",
    "bidirectional",
    "num_layers",
    "proj_size",
    "no_bias",
    "batch_first",
    "clip",
    "heads",
    "save_states",
)
HEADS = 2
CLIP = 0.3  # about half of what enters the activations is cut


def of_the_cell(options: Collection[str]) -> dict[str, Any]:
    """The arguments of a cell of the library."""
    return {"clip": CLIP} if "clip" in options else {}


def flags(options: Collection[str]) -> dict[str, Any]:
    """What is no tensor of a call."""
    return {
        "directions": 1 + ("bidirectional" in options),
        "clip": CLIP if "clip" in options else math.inf,
        "rms": "rms_norm" in options,
        "heads": HEADS if "heads" in options else 1,
    }


class Sizes(NamedTuple):
    T: int
    B: int
    I: int  # noqa: E741
    H: int


def fitting(sizes: Sizes, options: Collection[str]) -> Sizes:
    """The sizes, large enough for these options: a projection is smaller than the layer, and heads are equal."""
    least = 1 + ("proj_size" in options)
    heads = HEADS if "heads" in options else 1
    return sizes._replace(H=max(-(-sizes.H // heads), least) * heads)


def sensible(chosen: Collection[str]) -> frozenset[str]:
    """Without what excludes another option, and with what one needs."""
    found = set(chosen)
    if "reset_state_per_step" in found:
        found -= {"reset_state"}
    if found & {"reset_state", "reset_state_per_step"}:
        found |= {"resets"}
    if "rms_norm" in found:
        found -= {"layer_norm"}
    if "recurrent_dropout_per_gate" in found:
        found -= {"recurrent_dropout"}
    return frozenset(found)


def tensors(
    name: str,
    recurrence: Recurrence,
    sizes: Sizes,
    options: Collection[str],
    seed: int,
    weight_scale: float = 0.7,
) -> Given:
    """A call's tensors, float64, differentiable ones as leaves."""
    options = frozenset(options)
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 0.7) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()

    def weight(*shape: int) -> Tensor:
        return normal(*shape, scale=weight_scale)

    def chance(*shape: int, p: float = 0.4) -> Tensor:
        return torch.rand(shape, generator=generator) < p

    def states(*shape: int) -> list[Tensor]:
        return [
            _positive(normal(*shape, width)) if state == "n" else normal(*shape, width)
            for state, width in zip(recurrence.states, [P, *[H] * len(recurrence.states)], strict=False)
        ]

    T, B, I, H = sizes  # noqa: E741
    gates = len(recurrence.gates)
    steering, layers = flags(options), 1 + ("num_layers" in options)
    directions, heads = steering["directions"], steering["heads"]
    P = H - heads if "proj_size" in options else H
    front = (heads,) * (heads > 1)
    weights = []
    for index in range(layers * directions):
        features = directions * P if index >= directions else I
        shapes = _shapes(recurrence, features, H // heads, P // heads, options)
        own = {name: weight(*front, *shape) for name, shape in shapes.items()}
        scales = ("norm_ih", "norm_hh") if options & {"layer_norm", "rms_norm"} else ()
        weights.append(own | {name: normal(*front, gates * H // heads) for name in scales})
    rows = layers * directions
    steps = (T,) if "reset_state_per_step" in options else ()
    resetting = options & {"reset_state", "reset_state_per_step"}
    masks = gates if "recurrent_dropout_per_gate" in options else 1
    dropping = options & {"recurrent_dropout", "recurrent_dropout_per_gate"}
    return Given(
        name,
        normal(T, B, I),
        weights,
        states(rows, B),
        **steering,
        mask=~chance(T, B) if "mask" in options else None,
        lengths=torch.randint(0, T + 1, (B,), generator=generator) if "lengths" in options else None,
        resets=chance(T, B) if "resets" in options else None,
        reset_state=states(*steps, rows, B) if resetting else None,
        recurrent_mask=chance(rows, B, masks, P, p=0.6).double() / 0.6 if dropping else None,
        zone=_zone(chance(len(recurrence.states), T, rows, B, H), options) if "zoneout" in options else None,
    )


def _shapes(
    recurrence: Recurrence, features: int, H: int, P: int, options: frozenset[str]
) -> dict[str, tuple[int, ...]]:
    """Of the weights of one layer and direction, in the order in which they are drawn."""
    gates = len(recurrence.gates)
    found: dict[str, tuple[int, ...]] = {"weight_ih": (gates * H, features), "weight_hh": (gates * H, P)}
    if "no_bias" not in options:
        found |= {"bias_ih": (gates * H,), "bias_hh": (gates * H,)}
    if "proj_size" in options:
        found["weight_hr"] = (P, H)
    if recurrence.params:
        found["weight_peephole"] = (len(recurrence.params), H)
    return found


def _zone(kept: Tensor, options: Collection[str]) -> Tensor:
    """Units that keep their states; none of a projected h, which is no unit's."""
    if "proj_size" in options:
        kept[0] = False
    return kept


def _positive(value: Tensor) -> Tensor:
    """A normaliser is a sum of positive terms."""
    return (value.detach().abs() + 0.5).requires_grad_()


def leaves(made: Given) -> dict[str, Tensor]:
    """What has a gradient, by name."""
    weights = {f"{name} {k}": w for k, own in enumerate(made.weights) for name, w in own.items()}
    states = {f"state {k}": s for k, s in enumerate(made.states)}
    resets = {f"reset state {k}": s for k, s in enumerate(made.reset_state or [])}
    return {"x": made.x, **weights, **states, **resets}


def with_leaves(made: Given, values: Sequence[Tensor]) -> Given:
    """The same call with other tensors in the place of its `leaves`, in their order."""
    rest = iter(values)
    return replace(
        made,
        x=next(rest),
        weights=[{name: next(rest) for name in own} for own in made.weights],
        states=[next(rest) for _ in made.states],
        reset_state=made.reset_state and [next(rest) for _ in made.reset_state],
    )


def on(made: Given, device: torch.device) -> Given:
    """The same call with new leaves on a device."""

    def moved(value: Any) -> Any:
        return value.to(device) if isinstance(value, Tensor) else value

    placed = replace(made, **{field.name: moved(getattr(made, field.name)) for field in fields(made)})
    own = [leaf.detach().to(device).requires_grad_() for leaf in leaves(made).values()]
    return with_leaves(placed, own)


def call(made: Given, recurrence: Recurrence, options: Collection[str], backend: str) -> list[Tensor]:
    """The library's results: y, the final states and, if wanted, all states."""
    first = "batch_first" in options

    def laid(tensor: Tensor | None) -> Tensor | None:
        return tensor.transpose(0, 1) if first and tensor is not None else tensor

    y, *states = functional.rnn(
        laid(made.x),  # type: ignore[arg-type]
        tuple(made.states),
        [w for own in made.weights for w in own.values()],
        recurrence,
        bias="no_bias" not in options,
        num_layers=len(made.weights) // made.directions,
        bidirectional=made.directions == 2,
        batch_first=first,
        proj_size=made.states[0].shape[-1] if "proj_size" in options else 0,
        backend=backend,
        mask=laid(made.mask),
        lengths=made.lengths,
        resets=laid(made.resets),
        reset_state=made.reset_state and tuple(made.reset_state),
        recurrent_mask=made.recurrent_mask,
        zone=made.zone,
        norm="layer_norm" in options or made.rms,
        rms=made.rms,
        all_states="all_states" in options,
        heads=made.heads,
        save="states" if "save_states" in options else "gates",
    )
    return [laid(y), *(state for parts in states for state in parts)]  # type: ignore[list-item]


def gradients(outputs: Sequence[Tensor], wanted: Sequence[Tensor], create_graph: bool = False) -> list[Tensor]:
    """Of a fixed sum of the outputs with weights of its own for every element."""
    total = sum(
        (out.double() * torch.arange(1.0, out.numel() + 1, device=out.device).view(out.shape).sin()).sum()
        for out in outputs
    )
    total = total + 0 * wanted[0].sum()  # where all steps are masked and reset, nothing else wants a gradient
    given = {"allow_unused": True, "materialize_grads": True, "create_graph": create_graph}
    return list(torch.autograd.grad(total, list(wanted), **given))


def values_and_gradients(outputs: Sequence[Tensor], wanted: Sequence[Tensor]) -> list[Tensor]:
    """Outputs, and their `gradients`."""
    return [value.detach().double() for value in (*outputs, *gradients(outputs, wanted))]
