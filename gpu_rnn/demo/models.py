# SPDX-License-Identifier: Apache-2.0
"""The layers that the demo compares: ours, torch.nn's, and the Python loop people write where torch.nn has no layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

__all__ = ["STANDARD", "WITH_OPTIONS", "Classifier", "PythonLoop", "Variant"]

HIDDEN = 100  # the size for which accuracies on JapaneseVowels are known


@dataclass(frozen=True)
class Variant:
    """A layer as the demo names it; the same description builds ours and, without options, torch.nn's."""

    label: str
    cell: str
    bidirectional: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def layer(self, library: ModuleType, channels: int) -> nn.Module:
        make = getattr(library, self.cell)
        return make(channels, HIDDEN, bidirectional=self.bidirectional, **self.options)


_OPTIONS = {"activation": "softsign", "recurrent_activation": "hard_sigmoid"}
STANDARD = (Variant("bidirectional LSTM", "LSTM", True), Variant("GRU", "GRU"))
WITH_OPTIONS = tuple(
    Variant(f"{v.label}, hard_sigmoid gates, softsign", v.cell, v.bidirectional, _OPTIONS) for v in STANDARD
)


class Classifier(nn.Module):
    """A recurrent layer, each unit's largest output over time, and a linear map to the classes.

    The largest output, not the last: through PLAID's thousand steps the last alone learns next to nothing.
    """

    def __init__(self, layer: nn.Module, classes: int) -> None:
        super().__init__()
        self.layer = layer
        self.classes = nn.Linear(HIDDEN * (2 if layer.bidirectional else 1), classes)

    def forward(self, packed: PackedSequence) -> Tensor:  # (B, classes)
        outputs, _ = pad_packed_sequence(self.layer(packed)[0], padding_value=-torch.inf)  # (T, B, D*H)
        return self.classes(outputs.amax(dim=0))


class PythonLoop(nn.Module):
    """The demo's option layers as one writes them without this library: a loop over time of torch operations.

    It shares the given layer's weights. The input product is done for all steps at once, and sorted packed data
    make finished recordings drop out of the batch, as a careful user would have it.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, packed: PackedSequence) -> tuple[PackedSequence, None]:
        sizes = packed.batch_sizes.tolist()
        suffixes = ["", "_reverse"] if self.layer.bidirectional else [""]
        outputs = [self._direction(packed.data, sizes, suffix) for suffix in suffixes]
        return packed._replace(data=torch.cat(outputs, dim=1)), None

    def _direction(self, data: Tensor, sizes: list[int], suffix: str) -> Tensor:
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        w_ih, w_hh, b_ih, b_hh = (getattr(self.layer, f"{name}_l0{suffix}") for name in names)
        inputs = F.linear(data, w_ih, b_ih).split(sizes)
        lstm = len(w_hh) == 4 * HIDDEN
        step = _lstm_step if lstm else _gru_step
        times = range(len(sizes))[::-1] if suffix else range(len(sizes))
        state = (data.new_zeros(sizes[times[0]], HIDDEN),) * (1 + lstm)
        outputs = list(inputs)
        for t in times:
            state = tuple(_resize(s, sizes[t]) for s in state)
            state = step(inputs[t], F.linear(state[0], w_hh, b_hh), *state)
            outputs[t] = state[0]
        return torch.cat(outputs)


def _resize(state: Tensor, rows: int) -> Tensor:
    """Drops the recordings that have ended or, backwards, adds those that begin, at zero."""
    return state[:rows] if rows <= len(state) else F.pad(state, (0, 0, 0, rows - len(state)))


def _lstm_step(x: Tensor, r: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    i, f, g, o = (x + r).chunk(4, dim=1)
    c = F.hardsigmoid(f) * c + F.hardsigmoid(i) * F.softsign(g)
    return F.hardsigmoid(o) * F.softsign(c), c


def _gru_step(x: Tensor, r: Tensor, h: Tensor) -> tuple[Tensor]:
    x_r, x_z, x_n = x.chunk(3, dim=1)
    r_r, r_z, r_n = r.chunk(3, dim=1)
    z = F.hardsigmoid(x_z + r_z)
    n = F.softsign(x_n + F.hardsigmoid(x_r + r_r) * r_n)
    return ((1 - z) * n + z * h,)
