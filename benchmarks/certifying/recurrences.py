# SPDX-License-Identifier: Apache-2.0
"""Every recurrence that calls are drawn of: the library's, one that is a user's own, and those with any activations."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

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


WITH_ACTIVATIONS: dict[str, Callable[..., Recurrence]] = {
    "rnn": lambda a, b, **further: cells.rnn(a, **further),
    "lstm": cells.lstm,
    "gru": cells.gru,
    "gru_reset_before": partial(cells.gru, reset_after=False),
    "peephole_lstm": partial(cells.lstm, peephole=True),
    "coupled_lstm": cells.coupled_lstm,
}
