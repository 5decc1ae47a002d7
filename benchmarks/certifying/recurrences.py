# SPDX-License-Identifier: Apache-2.0
"""Every recurrence that calls are drawn of: the library's, one that is a user's own, and those with any activations."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature

import torch

from gpu_rnn import cells
from gpu_rnn.recurrence import Recurrence


def minimal_gated_unit(slope: float = 1.0) -> Recurrence:
    """A cell that is none of the library's: a closure over a number, with a parameter per unit."""

    def step(x, r, s, p):  # type: ignore[no-untyped-def]
        f = torch.sigmoid(slope * (x.f + r.f + p.peep * s.h))
        return (1 - f) * s.h + f * torch.tanh(x.n + f * r.n)

    return Recurrence(step, gates=("f", "n"), states=("h",), params=("peep",), name="minimal")


RECURRENCES: dict[str, Recurrence] = {
    **{name: make() for name, make in cells.CELLS.items()},
    "minimal": minimal_gated_unit(),
}


def _activations(make: Callable[..., Recurrence]) -> list[str]:
    return [name for name in ("activation", "recurrent_activation") if name in signature(make).parameters]


def _of_activations(make: Callable[..., Recurrence]) -> Callable[..., Recurrence]:
    """The cell as a function of φ and σ, of which Elman's takes one."""
    return lambda phi, sigma, **further: make(**dict(zip(_activations(make), (phi, sigma), strict=False)), **further)


WITH_ACTIVATIONS: dict[str, Callable[..., Recurrence]] = {
    name: _of_activations(make) for name, make in cells.CELLS.items() if _activations(make)
}
