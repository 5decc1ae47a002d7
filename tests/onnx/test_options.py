# SPDX-License-Identifier: Apache-2.0
"""Calls with every option, of every cell, in ONNX Runtime: at three sizes each, with weights that are inputs."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.certifying import random_calls
from benchmarks.certifying.given import Given
from gpu_rnn import cells
from gpu_rnn.recurrence import Recurrence
from tests.support import onnx_runtime as support

SIZES = [random_calls.Sizes(6, 4, 3, 5), random_calls.Sizes(9, 3, 3, 5), random_calls.Sizes(2, 7, 3, 5)]
STEPS, BATCH = support.STEPS, support.BATCH
AXES: dict[str, dict[int, Any]] = {
    "x": {0: STEPS, 1: BATCH},
    "mask": {0: STEPS, 1: BATCH},
    "resets": {0: STEPS, 1: BATCH},
    "lengths": {0: BATCH},
    "states": {1: BATCH},
    "recurrent_mask": {1: BATCH},
    "zone": {1: STEPS, 3: BATCH},
}

Case = tuple[str, Collection[str]]
TOGETHER: list[Case] = [
    ("rnn", {"resets", "reset_state_per_step", "recurrent_dropout", "bidirectional", "clip"}),
    ("lstm", {"mask", "resets", "reset_state", "zoneout", "layer_norm", "recurrent_dropout_per_gate", "all_states"}),
    ("gru", {"lengths", "bidirectional", "recurrent_dropout", "batch_first", "all_states"}),
    ("gru", {"heads", "rms_norm", "bidirectional", "mask", "recurrent_dropout_per_gate"}),
    ("lstm", {"heads", "lengths", "num_layers"}),
    ("gru_reset_before", {"mask", "lengths", "recurrent_dropout_per_gate", "layer_norm", "zoneout"}),
    ("peephole_lstm", {"lengths", "proj_size", "no_bias", "clip"}),
    ("coupled_lstm", {"lengths", "resets", "all_states", "num_layers"}),
    ("slstm", {"lengths", "zoneout", "save_states"}),
]
TOGETHER += [(name, {"lengths"}) for name in cells.CELLS if name not in dict(TOGETHER)]


def recurrence_of(case: Case) -> Recurrence:
    name, options = case
    return cells.CELLS[name](**random_calls.of_the_cell(options))


class Calls(nn.Module):
    """Calls of `functional.rnn` whose tensors are all arguments."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.cases = [(name, random_calls.sensible(options)) for name, options in cases]
        self.recurrences = [recurrence_of(case) for case in self.cases]

    def forward(self, every: list[dict[str, Any]]) -> list[list[Tensor]]:
        return [
            random_calls.call(Given(name, **random_calls.flags(options), **tensors), own, options, "auto")
            for (name, options), own, tensors in zip(self.cases, self.recurrences, every, strict=True)
        ]

    def draw(self, sizes: random_calls.Sizes, seed: int, dtype: torch.dtype) -> list[dict[str, Any]]:
        made = []
        for (name, options), own in zip(self.cases, self.recurrences, strict=True):
            fitting = random_calls.fitting(sizes, options)
            given = random_calls.tensors(name, own, fitting, options, seed).to(dtype)
            given = replace(given, x=given.x.detach())
            made.append({field: getattr(given, field) for field in FIELDS if getattr(given, field) is not None})
        return made


FIELDS = (*AXES, "weights", "reset_state")


def axes(tensors: dict[str, Any]) -> dict[str, Any]:
    """The dynamic axes of a call's tensors."""
    of_call: dict[str, Any] = {}
    for name, value in tensors.items():
        if name == "weights":
            of_call[name] = [{key: {} for key in own} for own in value]
        elif name == "reset_state":
            of_call[name] = [{0: STEPS, 2: BATCH} if each.dim() == 4 else {1: BATCH} for each in value]
        else:
            of_call[name] = [AXES[name]] * len(value) if isinstance(value, list) else AXES[name]
    return of_call


def right(cases: list[Case], dtype: torch.dtype = torch.float32, tolerance: float = 1e-5) -> support.Exported:
    model = Calls(cases).eval()
    given = model.draw(SIZES[0], 0, dtype)
    exported = support.Exported(model, (given,), ([axes(tensors) for tensors in given],))
    for seed, sizes in enumerate(SIZES, 1):
        support.agrees(exported, model, (model.draw(sizes, seed, dtype),), tolerance)
    return exported


def test_every_option_is_called() -> None:
    named = {option for _, options in TOGETHER for option in options}
    assert named == set(random_calls.OPTIONS), "an option belongs into a row of TOGETHER"


def test_options_together() -> None:
    right(TOGETHER)


def test_double_precision() -> None:
    exported = right([("lstm", ()), ("gru", {"lengths"})], torch.float64, 1e-12)
    assert exported.operators["Scan"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("option", [option for option in random_calls.OPTIONS if option != "clip"])
def test_each_option_of_each_cell(option: str) -> None:
    several = {name for name, make in cells.CELLS.items() if len(make().states) > 1}  # as a projection wants
    right([(name, {option}) for name in cells.CELLS if option != "proj_size" or name in several])
