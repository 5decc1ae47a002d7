# SPDX-License-Identifier: Apache-2.0
"""What surrounds ATen's kernels: cuDNN's weight buffer, tried without cuDNN, and the row's reasons."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpu_rnn
from gpu_rnn import cells
from gpu_rnn.backends import aten, throughput
from gpu_rnn.backends.problem import Problem
from gpu_rnn.dispatch import choice
from tests.support.paths import ROOT

GAP = 5  # elements that the stand-in for cuDNN leaves between two weights


def flatten(weights: list[Tensor], *layout: Any) -> Tensor:
    """As torch._cudnn_rnn_flatten_weight: makes the weights views of one buffer, here with gaps between them."""
    buffer = torch.zeros(sum(w.numel() + GAP for w in weights))
    start = 0
    for weight in weights:
        weight.set_(buffer[start : start + weight.numel()].view_as(weight))
        start += weight.numel() + GAP
    return buffer


class Cudnn:
    """Stands in for torch._cudnn_rnn: takes its weights from the buffer alone, and what lies between them has to be
    0."""

    def __init__(self, theirs: nn.LSTM) -> None:
        self.theirs, self.calls = theirs, 0

    def __call__(
        self, x: Tensor, weights: list[Tensor], per_layer: int, buffer: Tensor, *rest: Any
    ) -> tuple[Tensor, ...]:
        self.calls += 1
        hx, cx, _, _, _, layers, batch_first, dropout, training, bidirectional, sizes, state = rest
        assert (dropout, state, sizes) == (0, None, []) and training == torch.is_grad_enabled()
        read, start = [], 0
        for weight in weights:
            read.append(buffer[start : start + weight.numel()].view_as(weight))
            gap = buffer[start + weight.numel() : start + weight.numel() + GAP]
            torch.testing.assert_close(gap, torch.zeros_like(gap))
            start += weight.numel() + GAP
        assert start == buffer.numel()
        own = self.theirs.bias, layers, 0.0, training, bidirectional, batch_first
        return *torch._VF.lstm(x, (hx, cx), read, *own), torch.empty(0), buffer


@pytest.fixture
def cudnn(monkeypatch: pytest.MonkeyPatch, uninitialised_memory_is_nan: None) -> Iterator[Callable[..., Cudnn]]:
    """Puts a stand-in into cuDNN's place."""

    def stand_in(theirs: nn.LSTM) -> Cudnn:
        found = Cudnn(theirs)
        monkeypatch.setattr(torch, "_cudnn_rnn_flatten_weight", flatten, raising=False)
        monkeypatch.setattr(torch, "_cudnn_rnn", found, raising=False)
        monkeypatch.setattr(torch, "cudnn_is_acceptable", lambda x: True)
        return found

    aten._cudnn_places.cache_clear()
    yield stand_in
    aten._cudnn_places.cache_clear()


def test_the_buffer_holds_what_the_weights_are_now(cudnn: Callable[..., Cudnn]) -> None:
    """Also after a change through .data, which leaves a tensor's version as it was."""
    layer = nn.LSTM(3, 4)
    cudnn(layer)
    weights = list(layer.parameters())
    for change in (0.0, 1.0):
        for weight in weights:
            weight.data.add_(change)
        buffer = aten._cudnn_buffer(weights, 4, 3, (2, 4, 0, 1, False, False))
        start = 0
        for weight in weights:
            torch.testing.assert_close(buffer[start : start + weight.numel()].view_as(weight), weight.detach())
            start += weight.numel() + GAP
        assert all(weight.untyped_storage().data_ptr() != buffer.data_ptr() for weight in weights)


def test_atens_word_on_projections_reaches_nobody() -> None:
    """oneDNN has none, which the choice among backends knows. ATen says so once in a process."""
    code = "import gpu_rnn, torch; gpu_rnn.LSTM(3, 4, {}, proj_size=2, backend='aten')(torch.zeros(2, 1, 3))"
    for options in ("1, bias=False", "2, bidirectional=True"):
        command = [sys.executable, "-W", "error", "-c", code.format(options)]
        assert subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT).stderr == ""


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize(
    "options",
    [{}, {"bias": False}, {"proj_size": 2}, {"bias": False, "proj_size": 2, "num_layers": 2, "bidirectional": True}],
)
def test_cudnn_reads_nothing_that_nobody_wrote(options: dict[str, Any], cudnn: Callable[..., Cudnn]) -> None:
    """cuDNN reads two biases whether a layer has them or not, and what its own alignment leaves between weights."""
    theirs = nn.LSTM(3, 4, **options)
    stand_in = cudnn(theirs)
    rows = theirs.num_layers * (1 + theirs.bidirectional)
    x, hx = torch.randn(5, 2, 3), (torch.randn(rows, 2, theirs.proj_size or 4), torch.randn(rows, 2, 4))
    y, states = aten._cudnn(
        "LSTM", x, hx, list(theirs.parameters()), theirs.num_layers, theirs.bidirectional, False, None
    )
    assert stand_in.calls == 1
    torch.testing.assert_close((y, states), theirs(x, hx))


PROBLEM = Problem(recurrence=cells.lstm(), T=5, B=2, N=1, I=3, H=4)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"recurrence": cells.lstm("relu")}, "torch.nn's activations"),
        ({"transforms": True}, "torch.func"),
        ({"lengths": True}, "PackedSequence"),
        ({"dtype": torch.complex64}, "real"),
    ],
)
def test_reasons(change: dict[str, Any], word: str) -> None:
    assert aten.unsupported(PROBLEM) == []
    (reason,) = aten.unsupported(replace(PROBLEM, **change))
    assert word in reason


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize(
    "options", [{}, {"bias": False}, {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}]
)
def test_cudnn_beside_torch_nn(name: str, options: dict[str, Any]) -> None:
    """First and second gradients, in training and in evaluation, with weights that change."""
    torch.full((1 << 22,), torch.nan, device="cuda")  # what the allocator hands out next holds no zeros
    theirs = getattr(nn, name)(16, 32, **options).cuda()
    ours = getattr(gpu_rnn, name)(16, 32, **options, backend="aten").cuda().eval()
    for _ in range(2):
        ours.load_state_dict(theirs.state_dict())
        x = torch.randn(6, 4, 16, device="cuda", requires_grad=True)
        expected = torch.autograd.grad(theirs(x)[0].sin().sum(), [x, *theirs.parameters()])
        y = ours(x)[0]
        found = torch.autograd.grad(y.sin().sum(), [x, *ours.parameters()], create_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-3)  # tf32 products
        second = torch.autograd.grad(sum(g.square().sum() for g in found), x)[0]
        assert second.abs().max() > 0
        for weight in theirs.parameters():
            weight.data.mul_(0.5)


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
def test_cudnn_with_projections_beside_torch_nn(bias: bool) -> None:
    theirs = nn.LSTM(16, 32, 2, bias=bias, proj_size=8).cuda()
    ours = gpu_rnn.LSTM(16, 32, 2, bias=bias, proj_size=8, backend="aten").cuda()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(6, 4, 16, device="cuda")
    torch.full((1 << 22,), torch.nan, device="cuda")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-2, atol=1e-3)  # tf32 products


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_dropout_on_a_gpu_beside_torch_nn(name: str) -> None:
    """It repeats under manual_seed, its mean is what torch.nn's is, and it can be derived twice."""
    theirs = getattr(nn, name)(16, 32, 2, dropout=0.4).cuda()
    ours = getattr(gpu_rnn, name)(16, 32, 2, dropout=0.4, backend="aten").cuda()
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(5, 512, 16, device="cuda")
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(ours(x)[0])
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    with torch.no_grad():
        means = [torch.stack([layer(x)[0].mean((0, 1)) for _ in range(40)]).mean(0) for layer in (ours, theirs)]
    torch.testing.assert_close(
        means[0], means[1], rtol=0, atol=5e-3
    )  # of 100,000 draws each: a hundredth of their spread
    x.requires_grad_()
    (first,) = torch.autograd.grad(ours(x)[0].sin().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert second.abs().max() > 0


def on_a_gpu(cell: gpu_rnn.Recurrence, device: str = "H100", **options: Any) -> Problem:
    sizes = {"T": 1024, "B": 16, "N": 1, "I": options.get("H", 768), "H": 768, "dtype": torch.float16} | options
    return choice.described(Problem(recurrence=cell, **sizes), device)


def a_step(problem: Problem) -> float:
    """µs without the products over all steps."""
    return 1e6 * (aten.cost(problem) - throughput.products(problem)) / problem.T


def test_a_step_of_cudnn_takes_what_is_published() -> None:
    """FlashRNN, arXiv:2412.07752: 1.96 µs forward, 5.07 both passes."""
    forward, backward = (on_a_gpu(cells.lstm(), direction=direction) for direction in ("training", "backward"))
    assert a_step(forward) == pytest.approx(1.96)
    assert a_step(forward) + a_step(backward) == pytest.approx(5.07)
    assert aten.source(forward) == aten.source(backward) == "published"
    assert aten.source(replace(forward, B=17)) == aten.source(on_a_gpu(cells.lstm(), "A100")) == "modelled"


@pytest.mark.parametrize(
    ("cell", "most"), [(cells.rnn(), (384, 256)), (cells.lstm(), (192, 128)), (cells.gru(), (192, 128))], ids=str
)
def test_cudnn_keeps_few_units_on_chip(cell: gpu_rnn.Recurrence, most: tuple[int, int]) -> None:
    """native/cudnn/RNN.cpp, use_rnn_persist_small_h."""
    for direction, units in zip(("inference", "training"), most, strict=True):
        few, many = (on_a_gpu(cell, H=H, direction=direction, dtype=torch.float32) for H in (units, units + 1))
        assert a_step(few) < 2 < a_step(many)


def test_cudnn_has_bfloat16_since_9_13(monkeypatch: pytest.MonkeyPatch) -> None:
    described = on_a_gpu(cells.lstm(), H=64, dtype=torch.bfloat16)
    there = replace(described, device=replace(described.device, name="NVIDIA H100 80GB HBM3"))
    for version, persistent in ((91300, True), (91002, False), (None, False)):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        assert (a_step(there) < 2) == persistent
        assert a_step(described) < 2  # a described device has the newest
        assert a_step(replace(there, dtype=torch.float16)) < 2
