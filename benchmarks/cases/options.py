# SPDX-License-Identifier: Apache-2.0
"""The options that torch.nn has not, as the benchmarks run ours with them: arguments of the layer and of its call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from gpu_rnn.layers import regularization
from gpu_rnn.recurrence import Recurrence

BOTH = ("forward", "training")
TRAINING = ("training",)
CELLS = ("LSTM", "GRU")

# A tensor argument of the call from the number of steps, the batch and the device.
Draw = Callable[[int, int, torch.device], Tensor]


@dataclass(frozen=True)
class Option:
    """What one option adds to a layer.

    Attributes:
        layer: keyword arguments of the layer.
        call: keyword arguments of its call: a tensor drawn anew, or a value.
        cells: the layers that have it.
        directions: those in which it does something.
        recurrence: a cell of a user's own that is run in the layer's place, of as many gates and states.
    """

    layer: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Draw | bool] = field(default_factory=dict)
    cells: tuple[str, ...] = CELLS
    directions: tuple[str, ...] = BOTH
    recurrence: Recurrence | None = None

    def on(self, cell: str) -> bool:
        return cell in self.cells

    def arguments(self, steps: int, batch: int, device: torch.device) -> dict[str, Any]:
        """Of the call."""
        return {n: v if isinstance(v, bool) else v(steps, batch, device) for n, v in self.call.items()}


def _mask(steps: int, batch: int, device: torch.device) -> Tensor:
    return torch.rand(steps, batch, device=device) < 0.9


def _lengths(steps: int, batch: int, device: torch.device) -> Tensor:
    return torch.randint(1, steps + 1, (batch,), device=device)


def _resets(steps: int, batch: int, device: torch.device) -> Tensor:
    """Episodes of 50 steps on average, or of as many as there are."""
    return torch.rand(steps, batch, device=device) < 1 / min(steps, 50)


def coupled_lstm(x: Any, r: Any, s: Any) -> Any:
    """A cell that no library has: i fills what f leaves of c."""
    f = torch.sigmoid(x.f + r.f)
    c = f * s.c + (1 - f) * torch.sigmoid(x.i + r.i) * torch.tanh(x.g + r.g)
    return torch.sigmoid(x.o + r.o) * torch.tanh(c), c


COUPLED = Recurrence(coupled_lstm, gates=("i", "f", "g", "o"), states=("h", "c"))

# Masks of probability 1/2: what is kept is then multiplied by 2, which every dtype holds exactly.
OPTIONS = {
    "activation": Option({"activation": "softsign"}),
    "recurrent_activation": Option({"recurrent_activation": "hard_sigmoid"}),
    "mask": Option(call={"mask": _mask}),
    "lengths": Option(call={"lengths": _lengths}),
    "resets": Option(call={"resets": _resets}),
    "recurrent_dropout": Option({"recurrent_dropout": 0.5}, directions=TRAINING),
    "recurrent_dropout_per_gate": Option(
        {"recurrent_dropout": 0.5, "recurrent_dropout_per_gate": True}, directions=TRAINING
    ),
    "zoneout": Option({"zoneout": 0.1}),
    "peephole": Option({"peephole": True}, cells=("LSTM",)),
    "layer_norm": Option({"layer_norm": True}),
    "all_states": Option(call={"return_all_states": True}),
    "own_cell": Option(cells=("LSTM",), recurrence=COUPLED),
    "reset_before": Option({"reset_after": False}, cells=("GRU",)),
}
NONE = Option()


@contextmanager
def same_masks(seed: int) -> Iterator[None]:
    """Inside, a layer's random masks are the same on every backend and in every dtype: drawn in fp32, from this
    seed."""
    draw = regularization.recurrent_mask

    def in_fp32(like: Tensor, probability: float, shape: tuple[int, ...]) -> Tensor:
        return draw(like.float(), probability, shape).to(like.dtype)

    regularization.recurrent_mask = in_fp32
    torch.manual_seed(seed)
    try:
        yield
    finally:
        regularization.recurrent_mask = draw
