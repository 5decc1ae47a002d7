# SPDX-License-Identifier: Apache-2.0
"""A call by a plan computes what the same call computes without one, and what a plan is not for goes without.

Triton's interpreter runs the kernel; `tests/benchmarks/test_host.py` counts what a plan saves.
"""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpu_rnn
from gpu_rnn.backends.building import Relaunch, TritonLaunch
from gpu_rnn.call import plans
from gpu_rnn.dispatch import choice
from tests.support.profiling import operations

pytestmark = [pytest.mark.interpreter, pytest.mark.usefixtures("fresh_choices")]

LAYERS: dict[str, Callable[..., Any]] = {
    "LSTM": lambda **options: gpu_rnn.LSTM(3, 5, backend="resident", **options),
    "GRU": lambda **options: gpu_rnn.GRU(3, 5, backend="resident", **options),
    "peephole": lambda **options: gpu_rnn.LSTM(3, 5, peephole=True, backend="resident", **options),
    "no bias": lambda **options: gpu_rnn.GRU(3, 5, bias=False, backend="resident", **options),
    "batch first": lambda **options: gpu_rnn.GRU(3, 5, batch_first=True, backend="resident", **options),
    "reset before": lambda **options: gpu_rnn.GRU(3, 5, reset_after=False, backend="resident", **options),
    "both directions": lambda **options: gpu_rnn.LSTM(3, 5, bidirectional=True, backend="resident", **options),
    "a stack": lambda **options: gpu_rnn.GRU(3, 5, num_layers=3, backend="resident", **options),
    "one layer by step": lambda **options: gpu_rnn.GRU(3, 5, backend="step", **options),
    "step": lambda **options: gpu_rnn.LSTM(3, 5, 2, bidirectional=True, layer_norm=True, backend="step", **options),
    "heads": lambda **options: gpu_rnn.GRU(3, 5, 2, heads=5, backend="resident", **options),
    "one layer of step": lambda **options: gpu_rnn.GRU(3, 5, backend="step", **options),
    "rms": lambda **options: gpu_rnn.LSTM(3, 5, rms_norm=True, backend="step", **options),
    "rms of heads": lambda **options: gpu_rnn.GRU(
        3, 5, bidirectional=True, heads=5, rms_norm=True, backend="step", **options
    ),
    "projected": lambda **options: gpu_rnn.LSTM(3, 5, 2, proj_size=2, backend="resident", **options),
}


@pytest.fixture(autouse=True)
def planned(monkeypatch: pytest.MonkeyPatch) -> list[plans.Plan]:
    """The plans that were followed, in order."""
    followed: list[plans.Plan] = []
    follow = plans.Plan.__call__

    def call(self: plans.Plan, *tensors: Any) -> Any:
        followed.append(self)
        return follow(self, *tensors)

    monkeypatch.setattr(plans.Plan, "__call__", call)
    return followed


def states(layer: Any, batch: int = 1) -> Any:
    count = layer.num_layers * (1 + layer.bidirectional)
    widths = [layer.proj_size or 5, 5]
    each = tuple(torch.randn(count, batch, width) for width, _ in zip(widths, layer.recurrence.states, strict=False))
    return each if len(each) > 1 else each[0]


def flat(result: Any) -> list[Tensor]:
    y, final = result
    return [y, *(final if isinstance(final, tuple) else (final,))]


def alone(layer: Any, *given: Any) -> list[Tensor]:
    """What a layer that has no plan gives."""
    with torch.no_grad():
        return flat(copy.deepcopy(layer)(*given))


def same(layer: Any, *given: Any) -> None:
    with torch.no_grad():
        found = flat(layer(*given))
    for actual, expected in zip(found, alone(layer, *given), strict=True):
        assert torch.equal(actual, expected) and actual.shape == expected.shape
        assert not actual._is_view() or actual is found[0]


def warm(layer: Any, x: Tensor) -> None:
    with torch.no_grad():
        layer(x), layer(x)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", LAYERS)
def test_the_bits_are_the_same(name: str, batch: int, planned: list[plans.Plan]) -> None:
    layer, x = LAYERS[name](), torch.randn(1, batch, 3)  # without a gap either way
    warm(layer, x)
    for _ in range(3):
        same(layer, torch.randn_like(x), states(layer, 1 if layer.batch_first else batch))
        same(layer, torch.randn_like(x))
    assert len(planned) == 6


def test_it_has_the_weights_as_they_are(planned: list[plans.Plan]) -> None:
    layer, x = LAYERS["GRU"](), torch.randn(2, 3, 3)
    warm(layer, x)
    changes: list[Callable[[], object]] = [
        lambda: nn.init.normal_(layer.bias_hh_l0),
        lambda: layer.bias_ih_l0.data.copy_(torch.randn(15)),
        lambda: layer.weight_hh_l0.data.mul_(0.5),
        lambda: setattr(layer.weight_hh_l0, "data", torch.randn(15, 5)),
        lambda: setattr(layer.weight_ih_l0, "data", torch.randn(15, 3)),
    ]
    for change in changes:
        change()
        same(layer, x, states(layer, 3))
    assert len(planned) == len(changes)
    layer.weight_hh_l0.data = torch.randn(5, 15).T  # lies otherwise
    same(layer, x)
    layer.weight_hh_l0 = nn.Parameter(torch.randn(15, 5))
    same(layer, x)
    assert len(planned) == len(changes)
    warm(layer, x)
    same(layer, x)
    assert len(planned) > len(changes)


@pytest.mark.parametrize("name", ["both directions", "step", "projected", "peephole"])
def test_it_has_every_weight_of_a_stack_as_it_is(name: str, planned: list[plans.Plan]) -> None:
    layer, x = LAYERS[name](), torch.randn(1, 1, 3)
    warm(layer, x)
    for weight in layer.parameters():
        weight.data = torch.randn_like(weight)
    same(layer, x)
    assert len(planned) == 1


NOT_FOR: dict[str, Callable[[Any, Tensor], object]] = {
    "gradients": lambda layer, x: layer(x)[0].sum().backward(),
    "vmap": lambda layer, x: torch.no_grad()(torch.vmap(lambda one: layer(one)[0]))(x[None]),
    "autocast": lambda layer, x: _autocast(layer, x),
    "controls": lambda layer, x: torch.no_grad()(layer)(x, lengths=[2]),
    "all states": lambda layer, x: torch.no_grad()(layer)(x, return_all_states=True),
    "rows apart": lambda layer, x: torch.no_grad()(layer)(x.expand(2, 2, 3)[:, :1]),
    "not aligned": lambda layer, x: torch.no_grad()(layer)(x, torch.zeros(6)[1:].view(1, 1, 5)),
    "other shape": lambda layer, x: torch.no_grad()(layer)(torch.randn(3, 1, 3)),
}


def _autocast(layer: Any, x: Tensor) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y: Tensor = layer(x)[0]
    assert y.dtype == torch.bfloat16
    return y


@pytest.mark.parametrize("name", NOT_FOR)
def test_what_a_plan_is_not_for(name: str, planned: list[plans.Plan]) -> None:
    layer, x = LAYERS["GRU"](), torch.randn(2, 1, 3)
    warm(layer, x)
    same(layer, x)
    assert len(planned) == 1
    NOT_FOR[name](layer, x)
    assert len(planned) == 1 or name == "rows apart"
    same(layer, x)
    assert len(planned) >= 2


def test_frozen_weights_need_no_mode(planned: list[plans.Plan]) -> None:
    layer, x = LAYERS["LSTM"]().requires_grad_(False), torch.randn(1, 1, 3)
    for _ in range(3):
        y = layer(x)[0]
    assert planned and not y.requires_grad
    wanting = x.clone().requires_grad_()
    layer(wanting)[0].sum().backward()
    assert wanting.grad is not None and len(planned) == 1


def test_settings_that_change_are_heeded(planned: list[plans.Plan], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = gpu_rnn.GRU(3, 5, activation="softsign"), torch.randn(1, 1, 3)
    monkeypatch.setenv("GPU_RNN_BACKEND", "resident")
    warm(layer, x)
    same(layer, x)
    assert len(planned) == 1
    monkeypatch.setenv("GPU_RNN_BACKEND", "reference")
    with torch.no_grad():
        assert "gpu_rnn::reference_forward" in operations(lambda: layer(x))
    monkeypatch.setenv("GPU_RNN_BACKEND", "resident")
    gpu_rnn.clear_caches()
    same(layer, x)
    assert len(planned) == 1  # made anew
    with choice.trial("step"), torch.no_grad():
        layer(x)
    assert len(planned) == 1
    layer.backend = "step"
    warm(layer, x)
    same(layer, x)
    assert planned[-1].layers[0].name == "gpu_rnn::step_forward"


def test_a_profiler_sees_the_name(planned: list[plans.Plan]) -> None:
    layer, x = LAYERS["GRU"](), torch.randn(1, 1, 3)
    warm(layer, x)
    with torch.no_grad():
        assert "gpu_rnn::resident_forward" in operations(lambda: layer(x))
    assert planned


def test_copies_have_no_plan(planned: list[plans.Plan]) -> None:
    layer, x = LAYERS["GRU"](), torch.randn(1, 1, 3)
    warm(layer, x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert "_stacks" not in vars(other)
        same(other, x)
    assert not planned


def test_few_shapes_are_kept(planned: list[plans.Plan]) -> None:
    layer = LAYERS["GRU"]()
    with torch.no_grad():
        for steps in range(1, 2 * plans.MOST_SHAPES):
            layer(torch.randn(steps, 1, 3))
    assert len(layer._stack().plans) <= plans.MOST_SHAPES and not planned


def test_threads_share_a_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each with its own tensors; Triton's interpreter itself takes one thread at a time."""
    seen: list[tuple[Any, ...]] = []

    class Compiled:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            assert grid == (2, 3, 1)
            return lambda *values, stream: seen.append((*values, stream))

    class Kernel:
        arg_names = ("p_x", "scale", "p_y")

        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Compiled]:
            return lambda **arguments: Compiled()

    active = SimpleNamespace(get_current_stream=lambda device: 7)
    monkeypatch.setitem(sys.modules, "triton.runtime.driver", SimpleNamespace(driver=SimpleNamespace(active=active)))
    like, start = torch.zeros(1), torch.ones(4)
    again = Relaunch(TritonLaunch(Kernel(), (2, 3), {"scale": 2, "num_warps": 4}))
    again(like, {"p_x": start, "p_y": start})
    assert again.ready is not None and not any(value is start for value in again.ready[2])
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda k: again(like, {"p_x": k, "p_y": -k}), range(1, 200)))
    assert sorted(seen) == [(k, 2, -k, 7) for k in range(1, 200)]


def test_no_rows_launch_nothing() -> None:
    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> None:
            raise AssertionError("launched")

    Relaunch(TritonLaunch(Kernel(), (0, 1), {}))(torch.zeros(1), {})
