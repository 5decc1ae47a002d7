# SPDX-License-Identifier: Apache-2.0
"""Each example runs and reaches what it says; the cell of the first is what its formula says."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import loop_support as support
import pytest
import torch
from torch import Tensor

import gpu_rnn

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_example_is_named_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"minimal_gated_unit"}


def test_minimal_gated_unit_learns_to_add() -> None:
    command = [sys.executable, str(EXAMPLES / "minimal_gated_unit.py")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    error = re.search(r"^error (\S+) ", done.stdout, re.M)
    assert error and float(error[1]) < 0.02  # 0.002 where it was written; 0.167 without learning
    assert "m.sigmoid(a_f)  # minimal_gated_unit.py:" in done.stdout


def by_hand(layer: gpu_rnn.Recurrent, x: Tensor, h: Tensor, sharpness: float) -> Tensor:
    outputs = []
    for step in x:
        x_f, x_n = (step @ layer.weight_ih_l0.T + layer.bias_ih_l0).chunk(2, 1)
        r_f, r_n = (h @ layer.weight_hh_l0.T + layer.bias_hh_l0).chunk(2, 1)
        f = torch.sigmoid(sharpness * (x_f + r_f))
        h = (1 - f) * h + f * torch.tanh(x_n + f * r_n)
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("sharpness", [1.0, 3.0])
@pytest.mark.parametrize("backend", ["reference", "step"])
def test_minimal_gated_unit_is_its_formula(backend: str, sharpness: float) -> None:
    recurrence = load("minimal_gated_unit").minimal_gated_unit(sharpness)
    layer = support.layer(recurrence, backend)
    x, h = support.draw(6, 4, 2, seed=1).requires_grad_(), support.draw(1, 4, 3, seed=2).requires_grad_()
    y, final = layer(x, h)
    expected = by_hand(layer, x, h[0], sharpness)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(final, expected[-1:], rtol=1e-12, atol=1e-12)
    d = support.draw(*y.shape, seed=3)
    wanted = [x, h, *layer.parameters()]
    grads = torch.autograd.grad(y, wanted, d)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, wanted, d), rtol=1e-12, atol=1e-12)
