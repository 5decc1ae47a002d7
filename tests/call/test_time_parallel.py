# SPDX-License-Identifier: Apache-2.0
"""The argument `time_parallel` of a call: what it may be, when it is followed, and where it travels."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import gpu_rnn
from benchmarks.certifying.random_calls import values_and_gradients
from gpu_rnn import functional, memo
from gpu_rnn.call import loops, passes
from gpu_rnn.call.controls import NONE
from gpu_rnn.call.passes import Options
from gpu_rnn.dispatch import choice, relaxation_plan, wavefront_plan
from tests.support.time_chunks import EXACT, draw, forgetful, in_chunks, outputs, same

TIGHT = 1e-9


def test_a_long_sequence_takes_chunks_by_itself() -> None:
    """Where each step costs a call of torch's, as in the step loop on a CPU, and steps in a row where it does not."""
    layer, x = forgetful(), draw(2048, 1, 3)
    explained = gpu_rnn.explain(layer, x, time_parallel=1e-9)
    forward, backward = explained.time_plans
    assert forward.steps >= relaxation_plan.SHORTEST and forward.seconds < forward.alone
    assert "\nforward parallel in time: " in str(explained) and "\nbackward parallel in time: " in str(explained)
    found = outputs(layer, x, time_parallel=1e-9)
    assert "settled in 2 passes when it last ran" in str(gpu_rnn.explain(layer, x, time_parallel=1e-9))
    assert "when it last ran" not in str(gpu_rnn.explain(layer, x, time_parallel=1e-8))  # which never ran
    same(found, outputs(layer, x), 1e-8)
    assert backward.chunks * backward.steps >= 2048


@pytest.mark.parametrize(
    ("options", "call", "words"),
    [
        ({"backend": "step"}, {}, "there are 40 steps, and a chunk has at least 32"),
        ({"backend": "aten"}, {}, "aten takes all steps by itself"),
        ({"backend": "reference"}, {}, "the reference runs one step after the other"),
        ({"dtype": torch.bfloat16}, {}, r"rounded: the tolerance is at least 0\.0078125 there"),
    ],
)
def test_why_not(options: dict[str, Any], call: dict[str, Any], words: str, caplog: pytest.LogCaptureFixture) -> None:
    memo.clear(relaxation_plan.__name__)
    layer = gpu_rnn.LSTM(3, 6, **{"dtype": torch.float32} | options)
    x = torch.randn(40, 1, 3, dtype=layer.weight_ih_l0.dtype)
    explained = gpu_rnn.explain(layer, x, time_parallel=1e-6)
    assert explained.time_plans == ()
    assert words.replace("\\", "") in str(explained).partition("not parallel in time: ")[2]
    with torch.no_grad(), caplog.at_level(logging.INFO, "gpu_rnn"):
        assert torch.equal(layer(x, time_parallel=1e-6)[0], layer(x)[0])
    assert any("not parallel in time: " in record.getMessage() for record in caplog.records)
    assert not relaxation_plan._outcomes


def test_the_backend_aten_is_recorded_as_without_the_argument() -> None:
    layer, x = gpu_rnn.LSTM(3, 6, backend="aten"), torch.randn(64, 1, 3)
    compiled = torch.compile(lambda x: layer(x, time_parallel=1e-6)[0], backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x)[0])


def test_no_rows() -> None:
    memo.clear(relaxation_plan.__name__)
    layer, x = forgetful(), draw(4096, 0, 3)
    y, _ = layer(x, time_parallel=1e-6)
    assert not torch.autograd.grad(y.sum(), layer.weight_hh_l0)[0].any() and not relaxation_plan._outcomes


def test_recorded_calls_run_in_chunks() -> None:
    """The passes are inside of the operation that is recorded."""
    layer, x = forgetful(), draw(64, 2, 3)
    expected = values_and_gradients([layer(x)[0]], [x])

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layer(x, time_parallel=EXACT)[0]
            return y

    exported = torch.export.export(Model(), (x,)).module()
    compiled = torch.compile(Model(), backend="aot_eager", fullgraph=True)
    for recorded in (exported, compiled):
        with in_chunks(4) as launches:
            found = values_and_gradients([recorded(x)], [x])
        assert {direction for direction, _ in launches} >= {"training", "backward"} or recorded is exported
        assert launches
        same(found, expected, TIGHT)


def test_a_stack_runs_so_layer_by_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither as a wavefront nor in ATen's kernels."""
    monkeypatch.setattr(wavefront_plan, "idles", lambda device: True)
    monkeypatch.setattr(choice, "staggers", lambda problem, backend: True)
    layer, x = gpu_rnn.LSTM(3, 6, 2), torch.randn(64, 1, 3)
    stack = replace(layer._stack(), time_parallel=1e-6)
    weights, states = layer._weights(), stack.initial(x, layer._weights(), 1)
    assert loops._staggered(layer._stack(), x, states, weights, NONE)
    assert not loops._staggered(stack, x, states, weights, NONE)
    assert layer._stack().is_atens and not stack.is_atens


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is:DeprecationWarning")
def test_transforms_and_second_derivatives() -> None:
    """Derivatives beyond the first are the reference's, as with the other options."""
    layer, x = forgetful("GRU"), draw(24, 2, 3)

    def loss(x: Tensor, **call: Any) -> Tensor:
        total: Tensor = layer(x, **call)[0].square().sum()
        return total

    chunked = partial(loss, time_parallel=EXACT)
    with in_chunks(3):
        same([torch.func.grad(chunked)(x)], [torch.func.grad(loss)(x)], TIGHT)
        batch = torch.stack([x, -x]).detach()
        same([torch.vmap(chunked)(batch)], [torch.vmap(loss)(batch)], TIGHT)
        tangent = torch.func.jvp(chunked, (x.detach(),), (torch.ones_like(x),))[1]
        same([tangent], [torch.func.jvp(loss, (x.detach(),), (torch.ones_like(x),))[1]], TIGHT)
        (once,) = torch.autograd.grad(chunked(x), x, create_graph=True)
        (plain,) = torch.autograd.grad(loss(x), x, create_graph=True)
        same([*torch.autograd.grad(once.sum(), x)], [*torch.autograd.grad(plain.sum(), x)], TIGHT)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (True, TypeError),
        ("1e-6", TypeError),
        (torch.tensor(1e-6), TypeError),
        (0.0, ValueError),
        (-1e-6, ValueError),
        (float("nan"), ValueError),
        (float("inf"), ValueError),
    ],
)
def test_what_a_tolerance_is(value: Any, error: type[Exception]) -> None:
    layer, x = forgetful(), draw(8, 1, 3)
    call: list[Callable[[], Any]] = [
        lambda: layer(x, time_parallel=value),
        lambda: functional.rnn(x, None, list(layer.parameters()), layer.recurrence, time_parallel=value),
        lambda: gpu_rnn.explain(layer, x, time_parallel=value),
    ]
    for each in call:
        with pytest.raises(error, match="time_parallel"):
            each()


def test_none_and_false_ask_for_nothing() -> None:
    layer, x = forgetful(), draw(64, 1, 3)
    for value in (None, False):
        with in_chunks(4) as launches:
            layer(x, time_parallel=value)
        assert not launches


@pytest.mark.parametrize("tolerance", [1e-6, 0.1, 123.0, 5e-324])
def test_options_travel_as_text(tolerance: float) -> None:
    for rms in (False, True):
        options = Options("step", "01", save=True, rms=rms, time_parallel=tolerance)
        assert Options.decode(options.encode()) == options
    with pytest.raises(ValueError, match="the options of a layer read like"):
        Options.decode("auto 0 save y within 1")


def test_a_captured_graph_holds_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = forgetful()._stack().problem(draw(64, 1, 3), None, list(forgetful().parameters()), None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    on_a_gpu = type("OnGpu", (), {"is_cuda": True})()
    with in_chunks(4):
        assert passes._in_chunks(problem, Options(time_parallel=1e-6), on_a_gpu) is None
