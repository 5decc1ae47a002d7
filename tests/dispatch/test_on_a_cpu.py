# SPDX-License-Identifier: Apache-2.0
"""What a CPU takes by itself: the fastest of native, aten and step, asked once for calls that are alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpu_rnn
from gpu_rnn import cells, devices
from gpu_rnn.backends import rates
from gpu_rnn.backends.native import direct
from gpu_rnn.backends.native import launch as native
from gpu_rnn.backends.problem import Problem
from gpu_rnn.call.stack import Stack
from gpu_rnn.dispatch import choice

pytestmark = pytest.mark.usefixtures("native_by_itself", "one_thread")


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The time loops in C that ran."""
    found: list[str] = []
    for module in (native, direct):
        forward = module.forward
        monkeypatch.setattr(module, "forward", lambda *a, run=forward: (found.append("native"), run(*a))[1])
    return found


def problem(**sizes: Any) -> Problem:
    return Problem(recurrence=cells.gru("softsign"), **{"T": 50, "B": 4, "N": 1, "I": 8, "H": 16} | sizes)


@pytest.mark.parametrize("direction", ["inference", "training", "backward"])
@pytest.mark.parametrize("name", ["native", "step"])
def test_what_is_more_costs_more_and_threads_less(name: str, direction: str) -> None:
    def cost(**sizes: Any) -> float:
        return choice.BACKENDS[name].cost(problem(direction=direction, **sizes))

    assert cost() < min(cost(T=51), cost(B=5), cost(I=9), cost(H=17), cost(N=2), cost(layers=2))
    large = {"B": 64, "H": 64}  # a small call is not worth another thread
    together = cost(device=replace(devices.CPU, sms=2), **large)
    assert together < cost(**large) < 2 * together


def test_it_is_the_least_by_the_models_and_threads_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = problem()
    names = [name for name in ("native", "step") if not choice.BACKENDS[name].unsupported(asked)]
    assert choice.select(asked) == min(names, key=lambda name: choice.total_cost(asked, name)) == "native"
    assert devices.of(torch.device("cpu")).sms == 1
    torch.set_num_threads(2)
    assert devices.of(torch.device("cpu")).sms == 2
    given = rates.PREDICTED.having({"cpu_plain": {"start": 1.0}}, "slow")
    monkeypatch.setattr(rates, "of", lambda device: given)
    assert choice.select(replace(asked, device=devices.of(torch.device("cpu")))) == "step"


@pytest.mark.parametrize("grad", [False, True])
def test_a_packed_sequence_is_no_matter_of_onednn(grad: bool) -> None:
    """ATen loops over its steps: 2 to 9 times as long as the loop in C, on an EPYC."""
    layer, x = gpu_rnn.LSTM(64, 128).requires_grad_(grad), torch.randn(100, 32, 64)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.arange(32, 96, 2), enforce_sorted=False)
    assert gpu_rnn.explain(layer, x).chosen == "aten"
    assert gpu_rnn.explain(layer, packed).chosen == "native"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_16_bits_are_converted_at_each_call(dtype: torch.dtype) -> None:
    """One step does not pay for it, many do."""
    layer = gpu_rnn.LSTM(1024, 1024, dtype=dtype, activation="softsign").eval().requires_grad_(False)
    x = torch.empty(1, 1, 1024, dtype=dtype)
    assert gpu_rnn.explain(layer, x).chosen != "native"
    assert gpu_rnn.explain(layer, x.expand(5000, -1, -1)).chosen == "native"


def test_calls_that_are_alike_ask_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    described = Stack.problem

    def counted(*arguments: Any, **more: Any) -> Problem:
        asked.append(1)
        return described(*arguments, **more)

    monkeypatch.setattr(Stack, "problem", counted)
    layer, x = gpu_rnn.LSTM(12, 112, num_layers=2), torch.randn(25, 64, 12)
    assert gpu_rnn.explain(layer, x).chosen == "aten"
    once_asked(asked, layer, x)
    once_asked(asked, gpu_rnn.GRU(8, 8), x[:, :, :8])


def once_asked(asked: list[int], layer: torch.nn.Module, x: Tensor) -> None:
    for grad in (True, False):
        for given in (x, x[:, :3]):
            for expected in (True, False):
                asked.clear()
                with torch.set_grad_enabled(grad):
                    layer(given)
                assert bool(asked) == expected


@pytest.mark.parametrize("direction", ["inference", "training", "backward"])
@pytest.mark.parametrize("compiler", [True, False])
def test_the_reference_is_what_is_left(compiler: bool, direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However short a call, with a C compiler or without: it is there to be right."""
    if not compiler:
        monkeypatch.setattr(native, "cost", lambda problem, constants=None: float("inf"))
    for cell in (cells.rnn(), cells.rnn("softsign"), cells.gru("softsign")):
        for sizes in ({"T": 1, "B": 1, "I": 1, "H": 1}, {"T": 2}, {"T": 9}, {"H": 512}):
            asked = replace(problem(direction=direction, **sizes), recurrence=cell)
            assert choice.select(asked) != "reference"
            assert choice.BACKENDS["reference"].cost(asked) > choice.BACKENDS["step"].cost(asked)


def exported(layer: torch.nn.Module, x: Tensor) -> Callable[..., Any]:
    program = torch.export.export(layer, (x,))
    assert "'auto 0" in str(program.graph_module.code)  # whoever runs it decides
    return program.module()


def compiled(layer: torch.nn.Module, x: Tensor) -> Callable[..., Any]:
    return torch.compile(layer, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("record", [exported, compiled])
def test_what_is_recorded_holds_no_choice(
    record: Callable[..., Any], forwards: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = gpu_rnn.GRU(4, 6, bidirectional=True, zoneout=0.1).eval(), torch.randn(5, 2, 4)
    with torch.no_grad():
        program = record(layer, x)
        program(x)
        forwards.clear()
        y = program(x)[0]
        assert forwards == ["native"]
        monkeypatch.setenv("GPU_RNN_BACKEND", "step")
        torch.testing.assert_close(program(x)[0], y)
        assert forwards == ["native"]


def test_deterministic_algorithms_and_the_number_of_threads_change_nothing(forwards: list[str]) -> None:
    layer, x = gpu_rnn.LSTM(16, 24, activation="softsign", bidirectional=True), torch.randn(40, 9, 16)
    weights = list(layer.parameters())

    def found() -> list[Tensor]:
        y, (h, c) = layer(x)
        return [y, h, c, *torch.autograd.grad(y.sum() + c.sum(), weights)]

    first = found()
    assert forwards == ["native"]
    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(a, b) for a, b in zip(first, found(), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.set_num_threads(2)
    y, (h, c) = layer(x)  # the gradients of weights are products of torch, which may depend on threads
    assert all(torch.equal(a, b) for a, b in zip(first[:3], (y, h, c), strict=True))


@pytest.mark.parametrize("make", [gpu_rnn.GRU, gpu_rnn.LSTM])
def test_rows_packed_of_one_length_run_as_a_batch(make: Any) -> None:
    layer, x = make(5, 6, 2, activation="softsign"), torch.randn(7, 3, 5)
    packed = nn.utils.rnn.pack_sequence(list(x.unbind(1)))
    dense, found = layer(x), layer(packed)
    assert found[0].batch_sizes.tolist() == [3] * 7
    assert torch.equal(found[0].data, dense[0].flatten(0, 1))
    states = [[final] if isinstance(final, Tensor) else final for final in (found[1], dense[1])]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
    weights = list(layer.parameters())
    grads = [torch.autograd.grad(y.sum(), weights) for y in (found[0].data, dense[0])]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"num_layers": 2}], ids=str)
def test_the_step_loop_takes_the_same_call_again(options: dict[str, Any]) -> None:
    """By a plan, from the third time on."""
    layer, x = gpu_rnn.LSTM(4, 6, backend="step", **options), torch.randn(5, 3, 4)
    with torch.no_grad():
        first, *others = (layer(x)[0] for _ in range(4))
    assert all(torch.equal(first, other) for other in others)
