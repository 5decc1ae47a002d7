# SPDX-License-Identifier: Apache-2.0
"""The short way in training of layers on a loop that is not in C, beside the long one: values, gradients, who goes it.

`step` runs as torch's operations; `resident` in Triton's interpreter, where that is on.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import gpu_rnn
from gpu_rnn.call import direct, loop_plan
from tests.support.profiling import operations

pytestmark = pytest.mark.usefixtures("fresh_choices")

BACKENDS = ["step", pytest.param("resident", marks=pytest.mark.interpreter)]
DTYPES = {"step": torch.float64, "resident": torch.float32}
BOUNDS = {"step": 1e-11, "resident": 2e-5}
MASK = torch.tensor([[1, 1, 0, 1], [0, 1, 1, 1], [1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 0]], dtype=torch.bool)
RESETS = MASK.roll(1, 1).logical_not()
LENGTHS = [5, 0, 3, 4]
BOTH = {"bidirectional": True}
EVERY = {"return_all_states": True}
# Of a layer its options, and what a call is given.
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({"bias": False}, {}),
    ({"batch_first": True}, {}),
    ({"num_layers": 3, "dropout": 0.5}, {}),
    (BOTH | {"num_layers": 2, "batch_first": True}, {"lengths": LENGTHS}),
    (BOTH | {"num_layers": 2}, {"mask": MASK, "resets": RESETS} | EVERY),
    ({"recurrent_dropout": 0.4}, {"mask": MASK, "lengths": LENGTHS}),
    (BOTH | {"zoneout": 0.3}, EVERY),
]


def before(*sizes: int, **options: Any) -> gpu_rnn.GRU:
    return gpu_rnn.GRU(*sizes, reset_after=False, **options)


@pytest.fixture(autouse=True)
def ran(monkeypatch: pytest.MonkeyPatch) -> list[loop_plan.LoopPlan]:
    """The layers that went the short way."""
    layers: list[loop_plan.LoopPlan] = []
    run = loop_plan.run
    monkeypatch.setattr(loop_plan, "run", lambda plan, *given: (layers.append(plan), run(plan, *given))[1])
    return layers


@contextmanager
def the_long_way() -> Iterator[None]:
    run = direct.run
    direct.run = lambda *arguments: None
    try:
        yield
    finally:
        direct.run = run


def made(backend: str, make: Callable[..., Any] = gpu_rnn.LSTM, **options: Any) -> tuple[Any, Tensor]:
    torch.manual_seed(0)
    layer = make(3, 6, backend=backend, dtype=DTYPES[backend], **options)
    x = torch.randn(5, 4, 3, dtype=DTYPES[backend])
    return layer, (x.transpose(0, 1) if layer.batch_first else x).requires_grad_()


def flat(result: Any) -> list[Tensor]:
    return [t for each in result for t in ((each,) if isinstance(each, Tensor) else each)]


def differentiated(layer: Any, x: Tensor, *hx: Any, **given: Any) -> list[Tensor]:
    torch.manual_seed(1)
    outputs = flat(layer(x, *hx, **given))
    grads = torch.autograd.grad([out.sin().sum() for out in outputs], [x, *layer.parameters()])
    return [*outputs, *grads]


def agree(found: Any, expected: Any, backend: str) -> None:
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=BOUNDS[backend], atol=BOUNDS[backend])


@pytest.mark.parametrize("options, given", CASES, ids=lambda each: "-".join(each) or "plain")
@pytest.mark.parametrize("make", [gpu_rnn.LSTM, gpu_rnn.GRU, before], ids=["LSTM", "GRU", "two products"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_both_ways_are_the_same(
    backend: str, make: Any, options: dict[str, Any], given: dict[str, Any], ran: list[Any]
) -> None:
    """What stands in the padding is NaN, and reaches nothing."""
    layer, x = made(backend, make, **options)
    counts = given.get("mask", torch.ones(5, 4, dtype=torch.bool)).clone()
    for row, length in enumerate(given.get("lengths", ())):
        counts[length:, row] = False
    counts = counts.T if layer.batch_first else counts
    x = torch.where(counts.unsqueeze(2), x, torch.nan).detach().requires_grad_()
    short = differentiated(layer, x, **given)
    assert len(ran) == layer.num_layers and not any(each.isnan().any() for each in short)
    with the_long_way():
        agree(short, differentiated(layer, x, **given), backend)


@pytest.mark.parametrize("options", [{}, {"proj_size": 2}, {"peephole": True}], ids=lambda each: "-".join(each))
@pytest.mark.parametrize("backend", BACKENDS)
def test_states_that_are_given_and_what_is_not_wanted(backend: str, options: dict[str, Any], ran: list[Any]) -> None:
    layer, x = made(backend, **options)
    widths = (options.get("proj_size", 6), 6)
    hx = tuple(torch.randn(1, 4, width, dtype=x.dtype, requires_grad=True) for width in widths)
    layer.weight_hh_l0.requires_grad_(False)
    layer.bias_ih_l0.requires_grad_(False)
    x = x.detach()

    def gradients() -> tuple[Tensor, ...]:
        y, (h, _) = layer(x, hx)
        return torch.autograd.grad(y[-1].sum() + h.sum(), [*hx, layer.weight_ih_l0, layer.bias_hh_l0])

    short = gradients()
    assert len(ran) == 1
    with the_long_way():
        agree(short, gradients(), backend)


@pytest.mark.parametrize("options", [{}, BOTH], ids=["one", "both"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_the_final_state_alone(backend: str, options: dict[str, Any]) -> None:
    layer, x = made(backend, **options)
    short = torch.autograd.grad(layer(x)[1][0].sum(), x)
    with the_long_way():
        agree(short, torch.autograd.grad(layer(x)[1][0].sum(), x), backend)


@pytest.mark.parametrize("options", [{}, BOTH], ids=["one", "both"])
def test_second_derivatives(options: dict[str, Any], ran: list[Any]) -> None:
    layer, x = made("step", **options)
    assert torch.autograd.gradgradcheck(lambda x: layer(x)[0], [x])
    assert ran
    names = operations(lambda: torch.autograd.grad(layer(x)[0].sum(), x, create_graph=True))
    assert "gpu_rnn::step_backward" in names  # the first ones come from the backend that is asked for


def test_gradients_of_a_batch_of_directions(ran: list[Any]) -> None:
    layer, x = made("step", gpu_rnn.GRU)
    y = layer(x)[0]
    directions = torch.randn(3, *y.shape, dtype=y.dtype)
    together = torch.autograd.grad(y, x, directions, is_grads_batched=True, retain_graph=True)[0]
    for direction, gradient in zip(directions, together, strict=True):
        torch.testing.assert_close(gradient, torch.autograd.grad(y, x, direction, retain_graph=True)[0])
    assert len(ran) == 1


def test_what_is_saved_serves_twice_and_notices_changes(ran: list[Any]) -> None:
    layer, x = made("step")
    y = layer(x)[0].sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    assert ran and torch.equal(first, torch.autograd.grad(y, x, retain_graph=True)[0])
    with torch.no_grad():
        layer.weight_hh_l0.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(y, x)


@pytest.mark.parametrize("options", [{}, BOTH, {"num_layers": 2}], ids=lambda each: "-".join(each))
def test_outputs_may_be_changed_in_place(options: dict[str, Any], ran: list[Any]) -> None:
    layer, x = made("step", **options)
    y, final = layer(x)
    for state in final:
        state.detach_()
    y.mul_(2)
    doubled = torch.autograd.grad(layer(x)[0].sum(), x)[0]
    assert ran
    torch.testing.assert_close(layer(x)[0].mul_(2).sum(), y.sum())
    torch.testing.assert_close(torch.autograd.grad((2 * layer(x)[0]).sum(), x)[0], 2 * doubled)


@pytest.mark.parametrize("change", ["in place", "data", "swapped", "replaced", "copied"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_changed_weights_are_seen(backend: str, change: str, ran: list[Any]) -> None:
    layer, x = made(backend)
    first = layer(x)[0]
    layer = copy.deepcopy(layer) if change == "copied" else layer
    with torch.no_grad():
        weight = layer.weight_hh_l0
        if change == "data":
            weight.data.mul_(2)
        elif change == "swapped":
            weight.data = weight * 2
        elif change == "replaced":
            layer.weight_hh_l0 = nn.Parameter((weight * 2).T.contiguous().T)  # it lies otherwise, too
        else:
            weight.mul_(2)
    after = differentiated(layer, x)
    assert len(ran) == 2
    with the_long_way():
        assert not torch.allclose(after[0], first)
        agree(after, differentiated(layer, x), backend)


def test_hooks_of_saved_tensors_and_checkpoints(ran: list[Any]) -> None:
    layer, x = made("step")
    expected = torch.autograd.grad(layer(x)[0].sum(), x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        y = layer(x)[0]
    agree(torch.autograd.grad(y.sum(), x), expected, "step")
    again = checkpoint(lambda x: layer(x)[0], x, use_reentrant=False)
    agree(torch.autograd.grad(again.sum(), x), expected, "step")
    assert len(ran) == 4


@pytest.mark.parametrize("make", [gpu_rnn.LSTM, gpu_rnn.GRU, before], ids=["LSTM", "GRU", "two products"])
@pytest.mark.parametrize("options", [{}, {"layer_norm": True}], ids=["plain", "normalised"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_was_saved_may_lie_otherwise(backend: str, options: dict[str, Any], make: Callable[..., Any]) -> None:
    """As a hook of saved tensors gives it back."""
    if backend == "resident" and options:
        pytest.skip("resident has no layer normalisation")
    layer, x = made(backend, make, **options)
    expected = torch.autograd.grad(layer(x)[0].sin().sum(), [x, *layer.parameters()])
    with torch.autograd.graph.saved_tensors_hooks(otherwise, lambda t: t):
        y = layer(x)[0]
    agree(torch.autograd.grad(y.sin().sum(), [x, *layer.parameters()]), expected, backend)


def otherwise(t: Tensor) -> Tensor:
    """With the first axis the last in memory."""
    axes = tuple(reversed(range(t.dim())))
    return t.permute(axes).contiguous().permute(axes)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")  # torch's own, in forward mode
def test_who_goes_the_long_way(ran: list[Any]) -> None:
    layer, x = made("step", gpu_rnn.GRU)
    with torch.no_grad():
        layer(x)
    torch.func.grad(lambda x: layer(x)[0].sum())(x)
    torch.vmap(lambda x: layer(x)[0])(x[None])
    torch.func.jvp(lambda x: layer(x)[0], (x,), (torch.ones_like(x),))
    gpu_rnn.GRU(3, 6, heads=2, backend="step", dtype=x.dtype)(x)
    gpu_rnn.GRU(3, 6, backend="reference", dtype=x.dtype)(x)
    assert not ran


def test_autocast_and_other_dtypes(ran: list[Any]) -> None:
    layer, x = gpu_rnn.GRU(3, 6, backend="step"), torch.randn(5, 4, 3)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)[0]
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and layer.weight_hh_l0.grad is not None
    assert layer(x)[0].dtype == torch.float32 and layer.double()(x.double())[0].dtype == torch.float64
    assert [plan.dtype for plan in ran] == [torch.bfloat16, torch.float32, torch.float64]


def test_settings_that_change_are_heeded(ran: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = gpu_rnn.GRU(3, 4, activation="softsign"), torch.randn(2, 1, 3)
    for backend in ("step", "reference", "step"):
        monkeypatch.setenv("GPU_RNN_BACKEND", backend)
        assert f"gpu_rnn::{backend}_forward" in operations(lambda: layer(x)) or backend == "reference"
        assert len(ran) == {"step": 1, "reference": 0}[backend]
        ran.clear()
    layer.backend = "reference"
    layer(x)
    assert not ran


def test_errors_are_those_of_the_long_way() -> None:
    layer, x = made("step")
    with pytest.raises((RuntimeError, ValueError)) as short:
        layer(x, (torch.zeros(1, 4, 6), torch.zeros(1, 4, 6)))
    with the_long_way(), pytest.raises(type(short.value)) as long:
        layer(x, (torch.zeros(1, 4, 6), torch.zeros(1, 4, 6)))
    assert str(short.value) == str(long.value)
