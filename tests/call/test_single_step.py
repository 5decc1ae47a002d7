# SPDX-License-Identifier: Apache-2.0
"""One step in C: the same values and derivatives of any order as the reference, and who it is not for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import gpu_rnn
from gpu_rnn import functional, memo
from gpu_rnn.backends.native import limits, one_step
from gpu_rnn.cells import CELLS
from gpu_rnn.recurrence import Recurrence
from tests.support import native

BOUND = {torch.float32: 1e-5, torch.float64: 1e-13}  # of values around 1, and sums over 40 units


@pytest.fixture(autouse=True)
def compiler() -> None:
    native.any_compiler()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The passes that ran in C at once."""
    found: list[str] = []

    def counted(name: str) -> Any:
        function = getattr(one_step, name)

        def run(*arguments: Any) -> Any:
            found.append(name)
            return function(*arguments)

        return run

    for name in ("forward", "backward"):
        monkeypatch.setattr(one_step, name, counted(name))
    yield found


def drawn(recurrence: Recurrence, rows: int, width: int, units: int, dtype: torch.dtype, bias: bool = True) -> Any:
    """x, hx and the weights of one step."""
    torch.manual_seed(rows)
    gates, params = len(recurrence.gates), len(recurrence.params)
    shapes = [(gates * units, width), (gates * units, units), *[(gates * units,)] * 2 * bias]
    weights = [torch.randn(shape, dtype=dtype).mul(0.1) for shape in shapes]
    weights += [torch.rand(params, units, dtype=dtype)] * bool(params)
    # positive, as one of slstm's, which it divides by, always is
    states = tuple(torch.rand(rows, units, dtype=dtype).add(0.5) for _ in recurrence.states)
    return torch.randn(rows, width, dtype=dtype), states, weights


def derived(recurrence: Recurrence, backend: str, x: Tensor, states: Any, weights: Any) -> list[Tensor]:
    """The new states and the gradients of everything."""
    inputs = [t.detach().clone().requires_grad_() for t in (x, *states, *weights)]
    count = 1 + len(states)
    new = functional.cell(
        inputs[0], inputs[1:count], inputs[count:], recurrence, bias=len(weights) > 3, backend=backend
    )
    total = sum((state * (k + 1)).sin().sum() for k, state in enumerate(new))
    return [*new, *torch.autograd.grad(total, inputs)]


def of(name: str) -> Recurrence:
    return CELLS[name]()


@pytest.mark.parametrize("dtype", BOUND, ids=str)
@pytest.mark.parametrize("name", [name for name in CELLS if len(CELLS[name]().program.stages) <= 2])
def test_it_computes_what_the_reference_does(name: str, dtype: torch.dtype, runs: list[str]) -> None:
    recurrence = of(name)
    for rows, width, units, bias in ((1, 3, 5, True), (3, 19, 40, True), (2, 16, 1, False)):
        x, states, weights = drawn(recurrence, rows, width, units, dtype, bias)
        exact = derived(
            recurrence, "reference", x.double(), [s.double() for s in states], [w.double() for w in weights]
        )
        found = derived(recurrence, "native", x, states, weights)
        for value, right in zip(found, exact, strict=True):
            torch.testing.assert_close(value.double(), right, rtol=BOUND[dtype], atol=BOUND[dtype])
        with torch.inference_mode():
            new = functional.cell(x, states, weights, recurrence, bias=bias, backend="native")
        assert all(torch.equal(a, b) for a, b in zip(new, found, strict=False))
    assert runs == ["forward", "backward", "forward"] * 3


@pytest.mark.parametrize("batch_first", [False, True])
def test_a_layers_step_is_its_cells(batch_first: bool, runs: list[str]) -> None:
    layer = gpu_rnn.LSTM(4, 7, peephole=True, batch_first=batch_first, backend="native")
    x = torch.randn(3, 1, 4) if batch_first else torch.randn(1, 3, 4)
    y, (h, c) = layer(x)
    assert runs == ["forward"] and y.shape == ((3, 1, 7) if batch_first else (1, 3, 7))
    assert h.shape == c.shape == (1, 3, 7) and torch.equal(y.flatten(), h.flatten())
    (y.sum() + 2 * c.sum()).backward()
    found = [weight.grad.clone() for weight in layer.parameters()]
    layer.zero_grad()
    layer.backend = "reference"
    again, (_, c) = layer(x)
    (again.sum() + 2 * c.sum()).backward()
    torch.testing.assert_close(found, [weight.grad for weight in layer.parameters()], rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        layer.backend = "native"
        y, (h, _) = layer(x)
        y.zero_()
        assert h.abs().sum() > 0  # memory of its own


def test_a_decoder_trains_through_all_of_its_steps(runs: list[str]) -> None:
    cell = gpu_rnn.GRUCell(6, 6, reset_after=False, backend="native")

    def loss() -> Tensor:
        h = torch.full((2, 6), 0.1)
        for _ in range(5):
            h = cell(h, h)
        return h.square().sum()

    found = torch.autograd.grad(loss(), list(cell.parameters()))
    assert runs == ["forward"] * 5 + ["backward"] * 5
    cell.backend = "reference"
    torch.testing.assert_close(found, torch.autograd.grad(loss(), list(cell.parameters())), rtol=1e-5, atol=1e-6)


def test_second_derivatives_and_batches_of_gradients() -> None:
    cell = gpu_rnn.LSTMCell(2, 3, peephole=True, dtype=torch.float64, backend="native")
    x, h, c = (torch.randn(2, n, dtype=torch.float64, requires_grad=True) for n in (2, 3, 3))
    assert torch.autograd.gradcheck(lambda *t: cell(t[0], t[1:]), (x, h, c), check_batched_grad=True)
    assert torch.autograd.gradgradcheck(lambda *t: cell(t[0], t[1:]), (x, h, c))


def test_what_is_frozen_gets_no_gradient_and_gaps_do_not_matter(runs: list[str]) -> None:
    cell = gpu_rnn.LSTMCell(5, 4, activation="softsign", backend="native")
    cell.weight_hh.data = cell.weight_hh.data.T.contiguous().T
    cell.weight_ih.requires_grad_(False)
    x, hx = torch.randn(5, 3).T, tuple(torch.randn(4, 3).T for _ in range(2))
    found = cell(x, hx)
    found[1].sum().backward()  # no gradient for h
    assert runs == ["forward", "backward"] and cell.weight_ih.grad is None
    weights = [cell.weight_hh, cell.bias_ih, cell.bias_hh]
    grads = [weight.grad.clone() for weight in weights]
    cell.zero_grad()
    cell.backend = "reference"
    torch.testing.assert_close(found, cell(x, hx), rtol=1e-5, atol=1e-6)
    cell(x, hx)[1].sum().backward()
    torch.testing.assert_close(grads, [weight.grad for weight in weights], rtol=1e-5, atol=1e-6)


class Counts(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = [*getattr(self, "seen", []), str(function)]
        return function(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # torch's own, at the first use of forward mode
def test_who_looks_on_transforms_or_records_sees_the_operation(runs: list[str]) -> None:
    cell = gpu_rnn.RNNCell(3, 4, activation="softsign", backend="native").requires_grad_(False)
    x, h = torch.randn(2, 3), torch.randn(2, 4)
    right = cell(x, h)
    assert runs == ["forward"]
    with Counts() as counts:
        torch.testing.assert_close(cell(x, h), right)
    assert any("gpu_rnn.rnn" in name for name in counts.seen)
    torch.testing.assert_close(torch.func.vmap(cell)(x[:, None], h[:, None])[:, 0], right)
    _, tangent = torch.func.jvp(lambda x: cell(x, h), (x,), (torch.ones_like(x),))
    assert tangent.abs().sum() > 0
    exported = torch.export.export(nn.ModuleList([cell])[0], (x, h))
    torch.testing.assert_close(exported.module()(x, h), right)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cell(x, h)
    cell(torch.randn(limits.MOST_ROWS + 1, 3))
    assert runs == ["forward"]


@pytest.mark.usefixtures("native_by_itself", "one_thread")
def test_it_is_taken_by_itself_unless_another_is_preferred(
    runs: list[str], monkeypatch: pytest.MonkeyPatch, cache_folder: object
) -> None:
    x = torch.randn(1, 1, 8)
    layers = [gpu_rnn.LSTM(8, 8), gpu_rnn.GRU(8, 8, reset_after=False), gpu_rnn.RNN(8, 8, activation="softsign")]
    for layer in layers:
        with torch.no_grad():
            layer(x)
            assert gpu_rnn.explain(layer, x).chosen == "native"
    assert runs == ["forward"] * 3
    monkeypatch.setenv("GPU_RNN_BACKEND", "step")
    layers[0](x)
    assert runs == ["forward"] * 3
    monkeypatch.delenv("GPU_RNN_BACKEND")
    monkeypatch.setenv("CC", "no-such-compiler")
    memo.clear("gpu_rnn.dispatch")
    memo.clear("gpu_rnn.call")
    found = gpu_rnn.explain(layers[1], x)
    assert found.chosen == "step" and "'no-such-compiler'" in str(found)
    layers[1](x)
    assert runs == ["forward"] * 3
