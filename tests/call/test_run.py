# SPDX-License-Identifier: Apache-2.0
"""What a call runs on where no Problem is made for the question."""

from __future__ import annotations

from itertools import product

import pytest
import torch

import gpu_rnn
from gpu_rnn import cells
from gpu_rnn.call import run, transforms
from gpu_rnn.call.controls import NONE, StackControls
from gpu_rnn.call.stack import Stack
from gpu_rnn.dispatch import choice

T, B, F, H = 4, 3, 5, 6
MASK = StackControls(mask=torch.ones(T, B, dtype=torch.bool))
LSTMS = {True: cells.lstm(), False: cells.lstm("relu")}


def selected(stack: Stack, x: torch.Tensor, controls: StackControls) -> str:
    weights = [x.new_empty(shape) for shape in stack.weight_shapes(F, H)]
    problem = stack.problem(x, None, weights, None, controls)
    try:
        return choice.select(problem, stack.backend)
    except ValueError:
        return "refused"


def test_what_aten_takes_is_what_dispatch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """In each of 2,048 combinations."""
    monkeypatch.delenv("GPU_RNN_BACKEND", raising=False)
    taken = 0
    for standard, norm, all_states, masked, named, complex_, transformed, grad, bias, both, projects in product(
        (False, True), repeat=11
    ):
        stack = Stack(
            recurrence=LSTMS[standard],
            norm=norm,
            all_states=all_states,
            backend="aten" if named else "auto",
            bias=bias,
            bidirectional=both,
            proj_size=3 if projects else 0,
        )
        x = torch.empty(T, B, F, dtype=torch.complex64 if complex_ else torch.float32)
        controls = MASK if masked else NONE
        monkeypatch.setattr(transforms, "active", lambda transformed=transformed: transformed)
        with torch.set_grad_enabled(grad):
            takes = run._takes_aten(stack, x, controls)
            assert takes == (selected(stack, x, controls) == "aten"), (stack, controls, x.dtype, transformed)
        taken += takes
    assert taken == 2**5  # standard cell and options, no transform, real: the other five do not matter


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch.jit is old, and says so in some versions
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")  # the checks of a call's arguments
@pytest.mark.parametrize("preferred", ["step", "aten", "auto"])
def test_a_preference_is_for_auto_alone(preferred: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_RNN_BACKEND", preferred)
    x = torch.empty(T, B, F)
    assert run._takes_aten(Stack(recurrence=LSTMS[True], backend="aten"), x, NONE)
    assert not run._takes_aten(Stack(recurrence=LSTMS[True]), x, NONE)  # dispatch is asked
    layer = gpu_rnn.LSTM(F, H, backend="aten")
    x = torch.randn(T, B, F)
    with torch.no_grad():
        traced = torch.jit.trace(layer, x, check_trace=False)
        torch.testing.assert_close(traced(x), layer(x))
