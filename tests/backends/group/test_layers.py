# SPDX-License-Identifier: Apache-2.0
"""Layers on the group kernel, from dispatch to the gradients: on the CPU runtime with only the launch replaced, and on
a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import gpu_rnn
from gpu_rnn.backends.group import deadline
from gpu_rnn.backends.group import launch as group
from tests.support.cuda.machines import NEEDS_COMPILER
from tests.support.group import FLOORS, PRECISIONS, TIGHT, pretend, relative_error
from tests.support.layer_options import OPTIONS, with_options
from tests.support.loops import RECURRENCES, make, values_and_gradients

PLACES = [
    pytest.param("cpu", marks=[pytest.mark.cuda_cpu, NEEDS_COMPILER]),
    pytest.param("cuda", marks=pytest.mark.gpu),
]
# cell, precision, (T, B, H), reverse, lengths, options
CASES: list[tuple[str, str, tuple[int, int, int], str, bool, tuple[str, ...]]] = [
    ("lstm", "fp32", (5, 3, 20), "01", False, tuple(OPTIONS)),
    ("gru", "bf16", (4, 9, 130), "0", False, ("mask", "drop", "zone")),
    ("slstm", "fp32", (4, 3, 17), "10", False, ("resets", "mask", "all_states")),
    ("minimal", "fp16", (3, 17, 33), "1", True, ("drop_per_gate", "all_states")),
    ("peephole_lstm", "bf16", (3, 2, 64), "00", False, ("norm",)),
    ("gru", "fp32", (4, 3, 40), "01", False, ("rms", "mask", "zone")),
    ("gru_reset_before", "fp32", (3, 3, 40), "01", False, ("norm", "mask", "resets", "zone", "all_states")),
    ("rnn", "tf32", (1, 1, 16), "0", False, ("reset_values",)),
]


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The device that tensors lie on; a CPU counts as an H100."""
    if request.param == "cpu":
        pretend(monkeypatch)
    before = torch.backends.cudnn.rnn.fp32_precision
    yield request.param
    torch.backends.cudnn.rnn.fp32_precision = before


@pytest.mark.parametrize(("cell", "precision", "shape", "reverse", "lengths", "options"), CASES)
def test_values_and_gradients(
    cell: str, precision: str, shape: tuple[int, int, int], reverse: str, lengths: bool, options: Any, place: str
) -> None:
    recurrence, (steps, batch, hidden) = RECURRENCES[cell], shape
    dtype, torch.backends.cudnn.rnn.fp32_precision = PRECISIONS[precision]
    rows = tuple((3 * b) % (steps + 1) for b in range(batch)) if lengths else None
    exact = make(recurrence, steps, batch, 3, hidden, reverse, lengths=rows, scale=hidden**-0.5)
    inputs = with_options(exact, recurrence, options).to(dtype)
    truth = values_and_gradients(recurrence, inputs.to(torch.float64), "reference")
    plain = inputs.to(torch.float16) if precision == "tf32" else inputs
    rounded = values_and_gradients(recurrence, plain, "reference")
    found = values_and_gradients(recurrence, inputs.on(place), "group")
    for name, value in truth.items():
        allowed = 2 * relative_error(rounded[name], value) + FLOORS[precision] if precision != "fp32" else 2 * TIGHT
        assert relative_error(found[name].cpu(), value) <= allowed, name


def test_a_layer_with_options(place: str) -> None:
    """By the layer's own arguments; masked outputs are 0, and a failure of an earlier launch is raised."""
    torch.manual_seed(0)
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    layer = gpu_rnn.LSTM(4, 40, 2, zoneout=0.2, recurrent_dropout=0.3, backend="group", device=place)
    x, mask = torch.randn(5, 3, 4, device=place), torch.rand(5, 3, device=place) < 0.7
    y, (h, _) = layer(x, mask=mask, resets=~mask)
    (y.sum() + h.sum()).backward()
    assert not y[~mask].any() and y[mask].any()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in layer.parameters())
    if place == "cuda":
        torch.cuda.synchronize()
    number = deadline.number_of(_any_layout(), torch.Size((5, 3, 1, 4, 40)))
    deadline.error_word(y.device).fill_(number << 48 | 1 << 32 | 4)
    with pytest.raises(RuntimeError, match=r"group_forward of lstm \(T 5, B 3, .*gave up in step 4 of group 1"):
        layer(x)
    gpu_rnn.check()


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_a_batch_without_rows_launches_nothing(cell: str, place: str) -> None:
    layer = getattr(gpu_rnn, cell)(4, 40, backend="group", device=place)
    x = torch.randn(5, 0, 4, device=place, requires_grad=True)
    y, _ = layer(x)
    y.sum().backward()
    assert y.shape == (5, 0, 40) and x.grad is not None and x.grad.shape == x.shape
    assert all(weight.grad is not None and not weight.grad.any() for weight in layer.parameters())


@pytest.mark.parametrize("place", PLACES[:1], indirect=True)
def test_gradients_of_each_sample_with_lengths_of_its_own(place: str) -> None:
    """The backward pass then gets views with gaps between their rows."""
    torch.manual_seed(0)
    torch.backends.cudnn.rnn.fp32_precision = "ieee"
    layer = gpu_rnn.GRU(3, 20, device=place)
    x, lengths = torch.randn(2, 4, 3, 3, device=place), torch.tensor([[4, 1, 0], [2, 4, 3]], device=place)

    def loss(weights: dict[str, torch.Tensor], x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        y, h = torch.func.functional_call(layer, weights, (x,), {"lengths": lengths})
        return y.square().sum() + h.sum()

    found = []
    for layer.backend in ("group", "reference"):
        gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
        found.append(gradients({n: w.detach() for n, w in layer.named_parameters()}, x, lengths))
    torch.testing.assert_close(*found, rtol=0, atol=1e-5)


def _any_layout() -> group.Layout:
    recurrence = RECURRENCES["lstm"]
    return group.Layout(recurrence.program.text, torch.float32, "ieee", False, 2, 1, 1, 1)


@pytest.mark.gpu
@pytest.mark.parametrize("hidden", [64, 512])  # alone, and with others
def test_a_graph_replays_it(hidden: int) -> None:
    layer = gpu_rnn.GRU(16, hidden, backend="group", device="cuda", dtype=torch.bfloat16)
    x = torch.randn(7, 24, 16, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        layer(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = layer(x)
        for seed in range(3):
            x.copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            assert torch.equal(y, layer(x)[0])
    gpu_rnn.check()


@pytest.mark.gpu
def test_streams_do_not_disturb_each_other() -> None:
    layers = [gpu_rnn.LSTM(16, hidden, backend="group", device="cuda") for hidden in (96, 256, 700)]
    x = torch.randn(50, 24, 16, device="cuda")
    with torch.no_grad():
        expected = [layer(x)[0] for layer in layers]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in layers]
        found = []
        for _ in range(4):
            for layer, stream in zip(layers, streams, strict=True):
                with torch.cuda.stream(stream):
                    found.append(layer(x)[0])
    torch.cuda.synchronize()
    gpu_rnn.check()
    for k, y in enumerate(found):
        assert torch.equal(y, expected[k % len(layers)])
