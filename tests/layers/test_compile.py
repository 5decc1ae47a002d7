# SPDX-License-Identifier: Apache-2.0
"""Layers and cells under torch.compile and torch.export, with numbers of steps and samples that change."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import gpu_rnn
from tests.support import layers as support

OPTIONS = [
    ("RNN", {}),
    ("LSTM", {}),
    ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    ("LSTM", {"proj_size": 2, "bias": False}),
    ("LSTM", {"peephole": True, "activation": "softsign"}),
    ("GRU", {"reset_after": False}),
    ("LSTM", {"backend": "reference"}),
]
SIZES = ((6, 4), (9, 3), (5, 7))

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


def build(name: str, options: dict) -> nn.Module:
    torch._dynamo.reset()
    return getattr(gpu_rnn, name)(3, 5, **options)


def draw(layer: nn.Module, steps: int, batch: int) -> torch.Tensor:
    shape = (batch, steps) if layer.batch_first else (steps, batch)
    return support.draw(*shape, 3, dtype=torch.float32)


def same(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(support.leaves(actual), support.leaves(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_compile_once_for_all_sizes(name: str, options: dict) -> None:
    layer = build(name, options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    compiled(draw(layer, 8, 2))
    compilations = counter.frame_count
    for steps, batch in SIZES:
        x = draw(layer, steps, batch)
        wanted = {"x": x, **dict(layer.named_parameters())}
        actual = support.gradients(lambda x=x: compiled(x), wanted)
        expected = support.gradients(lambda x=x: layer(x), wanted)
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    assert counter.frame_count == compilations


@pytest.mark.parametrize("name", support.LAYERS)
def test_compile_with_states_and_unbatched(name: str) -> None:
    layer = build(name, {})
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    x, hx = draw(layer, 6, 4), support.states(layer)
    same(compiled(x, hx), layer(x, hx))
    same(compiled(single := x.detach()[:, 0]), layer(single))


@pytest.mark.parametrize("name", support.CELLS)
def test_compile_cells(name: str) -> None:
    cell = build(name, {})
    compiled = torch.compile(cell, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (4, 7):
        x = support.draw(batch, 3, dtype=torch.float32)
        h = torch.full((batch, 5), 0.5)
        hx = (h, h) if name == "LSTMCell" else h
        same(compiled(x), cell(x))
        same(compiled(x, hx), cell(x, hx))


def test_compiled_layer_sees_new_weights() -> None:
    layer = build("GRU", {})
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    x = draw(layer, 6, 4)
    before = compiled(x)[0]
    with torch.no_grad():
        layer.weight_hh_l0.mul_(2)
    assert not torch.allclose(compiled(x)[0], before)
    same(compiled(x), layer(x))


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_export_with_any_number_of_steps_and_samples(name: str, options: dict) -> None:
    layer = build(name, options).eval()
    steps, batch = torch.export.Dim("steps"), torch.export.Dim("batch")
    axes = {0: batch, 1: steps} if layer.batch_first else {0: steps, 1: batch}
    program = torch.export.export(layer, (draw(layer, 6, 4),), dynamic_shapes=(axes,))
    for size in SIZES:
        x = draw(layer, *size)
        same(program.module()(x), layer(x))


def test_exported_recurrence_needs_nothing_of_the_users_code(tmp_path: Path) -> None:
    def minimal(x, r, s):
        f = torch.sigmoid(x.f + r.f)
        return (1 - f) * s.h + f * torch.tanh(x.n + f * r.n)

    recurrence = gpu_rnn.Recurrence(minimal, gates=("f", "n"), states=("h",))
    layer = gpu_rnn.Recurrent(recurrence, 3, 5, 2, bidirectional=True).eval()
    axes = {0: torch.export.Dim("steps"), 1: torch.export.Dim("batch")}
    torch.export.save(torch.export.export(layer, (draw(layer, 6, 4),), dynamic_shapes=(axes,)), tmp_path / "m.pt2")
    x = draw(layer, 9, 2).detach()
    torch.save({"x": x, "y": layer(x)[0].detach()}, tmp_path / "calls.pt")
    script = """
import sys, torch, gpu_rnn
program, calls = torch.export.load(sys.argv[1]), torch.load(sys.argv[2])
torch.testing.assert_close(program.module()(calls["x"])[0], calls["y"])
"""
    command = [sys.executable, "-c", script, str(tmp_path / "m.pt2"), str(tmp_path / "calls.pt")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
