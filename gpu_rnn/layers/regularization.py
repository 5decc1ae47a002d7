# SPDX-License-Identifier: Apache-2.0
"""What a layer adds at random in training, drawn from torch's generator, and what evaluation puts in its place.

The masks are tensors that the time loops read: forward, backward, recomputation and every backend see the same ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_rnn.call import onlookers
from gpu_rnn.call.controls import StackControls
from gpu_rnn.compiler.builder import Builder
from gpu_rnn.compiler.program import Program
from gpu_rnn.layers import options as layer_options
from gpu_rnn.layers.module import RecurrenceHolder
from gpu_rnn.memo import memoize
from gpu_rnn.recurrence import Recurrence


class Regularized(RecurrenceHolder):
    """The part of a layer that draws: its probabilities, and what a call takes of them."""

    num_layers: int
    bidirectional: bool
    hidden_size: int
    proj_size: int
    recurrent_dropout: float
    recurrent_dropout_per_gate: bool
    weight_drop: float

    @property
    def zoneout(self) -> tuple[float, ...]:
        """The probability of each state."""
        return self._zoneout

    @zoneout.setter
    def zoneout(self, value: float | tuple[float, ...]) -> None:
        self._zoneout = layer_options.zoneout(value, self.recurrence, self.proj_size)
        self._at_evaluation = expected(self.recurrence, self._zoneout)

    def _draws(self) -> bool:
        """Whether controls are drawn in training."""
        return bool(self.recurrent_dropout) or any(self._zoneout)

    def _with_noise(self, controls: StackControls, like: Tensor, steps: int, batch: int) -> StackControls:
        """The controls with those that are drawn, in training."""
        if not self.training:
            return controls
        if self._draws():
            onlookers.check_draws(type(self).__name__)
        rows = self.num_layers * (2 if self.bidirectional else 1)
        if self.recurrent_dropout:
            masks = len(self.recurrence.gates) if self.recurrent_dropout_per_gate else 1
            shape = (rows, batch, masks, self.proj_size or self.hidden_size)
            controls = controls._replace(recurrent_mask=recurrent_mask(like, self.recurrent_dropout, shape))
        if any(self._zoneout):
            controls = controls._replace(zone=zone(like, self._zoneout, (steps, rows, batch, self.hidden_size)))
        return controls

    def _with_dropped(self, names: Sequence[str], weights: Sequence[Tensor]) -> Sequence[Tensor]:
        """The weights, by their names, with the recurrent ones dropped."""
        onlookers.check_draws(type(self).__name__)
        return [
            F.dropout(weight, self.weight_drop) if name.startswith("weight_hh") else weight
            for name, weight in zip(names, weights, strict=True)
        ]


def recurrent_mask(like: Tensor, probability: float, shape: tuple[int, ...]) -> Tensor:
    """Factors 0 or 1 / (1 - p), the same for all steps (Gal & Ghahramani, arXiv:1512.05287)."""
    return F.dropout(like.new_ones(shape), probability)


def zone(like: Tensor, probabilities: tuple[float, ...], shape: tuple[int, ...]) -> Tensor:
    """(states, *shape) bool: the units of each step that keep their state (Krueger et al., arXiv:1606.01305)."""
    draws = [torch.rand(shape, dtype=torch.float32, device=like.device) for _ in probabilities]
    return torch.stack([draw < probability for draw, probability in zip(draws, probabilities, strict=True)])


def expected(recurrence: Recurrence, probabilities: tuple[float, ...]) -> Recurrence:
    """Zoneout at evaluation: each state s' becomes its expectation p s + (1 - p) s'."""
    return _expected(recurrence.program.text, probabilities) if any(probabilities) else recurrence


@memoize(64)
def _expected(text: str, probabilities: tuple[float, ...]) -> Recurrence:
    program = Program.parse(text)
    last = program.stages[-1]
    builder = Builder(start=1 + max((int(op.result[1:]) for stage in program.stages for op in stage.ops), default=-1))
    outputs = [
        (builder.value(f"s_{state}") * p + builder.value(output) * (1 - p)).name
        for state, output, p in zip(program.state_names, last.outputs, probabilities, strict=True)
    ]
    stage = replace(last, ops=(*last.ops, *builder.ops), outputs=tuple(outputs))
    return Recurrence.from_program(replace(program, stages=(*program.stages[:-1], stage)).text)
