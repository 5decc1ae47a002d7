# SPDX-License-Identifier: Apache-2.0
"""debug finds agreement, or names the first difference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gpu_rnn
from gpu_rnn import cells
from gpu_rnn.backends.step import launch as step

pytestmark = pytest.mark.usefixtures("fresh_choices")

DEBUGGED = {
    "lstm": gpu_rnn.LSTM(2, 4, 2, bidirectional=True, batch_first=True),
    "gru": gpu_rnn.GRU(2, 4, dtype=torch.bfloat16),
    "slstm": gpu_rnn.Recurrent(cells.slstm(), 2, 4, dtype=torch.float64),
    "projected": gpu_rnn.LSTM(2, 4, proj_size=3),
}


@pytest.mark.parametrize("name", DEBUGGED)
def test_debug_finds_agreement(name: str) -> None:
    layer = DEBUGGED[name]
    found = gpu_rnn.debug(layer, torch.randn(6, 3, 2, dtype=layer.weight_ih_l0.dtype), backend="step")
    assert [difference.layer for difference in found] == list(range(layer.num_layers))
    for difference in found:
        assert difference.where == "" and difference.backend == "step"
        assert f"layer {difference.layer}: step agrees with the reference" in str(difference)


@pytest.mark.parametrize(("own", "looked_at"), [("reference", "reference"), ("step", "step"), ("aten", "step")])
def test_debug_looks_at_the_layers_own_backend(own: str, looked_at: str) -> None:
    """Where that is a loop."""
    (found,) = gpu_rnn.debug(gpu_rnn.GRU(2, 4, backend=own), torch.randn(6, 3, 2))
    assert found.backend == looked_at


FAULTS = [
    ("y", (4, 1, 0, 2), "step 4, sample 1, direction 0, unit 2: the output h is off by 1"),
    (
        "y",
        (4, 1, 1, 2),
        "step 1, sample 1, direction 1, unit 2: the output h is off by 1",
    ),  # the fifth from its end
    (
        "gates",
        (3, 0, 0, 2, 1),
        "step 3, sample 0, direction 0, unit 1: the pre-activation of gate n is off by 1",
    ),
    (
        "recurrent",
        (2, 2, 0, 0, 3),
        "step 2, sample 2, direction 0, unit 3: the product of gate n is off by 1",
    ),
]


@pytest.mark.parametrize(("field", "index", "where"), FAULTS)
def test_debug_names_the_first_difference(
    monkeypatch: pytest.MonkeyPatch, field: str, index: tuple[int, ...], where: str
) -> None:
    forward = step.forward

    def broken(*arguments: Any) -> Any:
        result = forward(*arguments)
        getattr(result, field)[index] += 1
        if field == "y" and index[2] == 0:
            result.gates[5, :, 0] += 1  # compared before y, but of a later step
            result.y[5, :, 0] += 1
        return result

    monkeypatch.setattr(step, "forward", broken)
    (found,) = gpu_rnn.debug(gpu_rnn.GRU(2, 4, bidirectional=True), torch.randn(6, 3, 2), backend="step")
    assert found.where == where
    assert str(found) == f"layer 0: step first differs from the reference at {where}"
