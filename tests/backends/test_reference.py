# SPDX-License-Identifier: Apache-2.0
"""The reference against torch.nn and formulas written out; the step loop against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from gpu_rnn import cells, functional
from gpu_rnn.backends.tensors import PLAIN
from gpu_rnn.recurrence import Recurrence
from tests.support import loops as support

EXACT = 1e-10
RAGGED = (5, 0, 3)

pytestmark = [
    pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN"),
    pytest.mark.usefixtures("uninitialised_memory_is_nan"),
]


STANDARD: list[tuple[type[nn.RNNBase], dict[str, Any], Recurrence]] = [
    (nn.LSTM, {}, cells.lstm()),
    (nn.GRU, {}, cells.gru()),
    (nn.RNN, {}, cells.rnn()),
    (nn.RNN, {"nonlinearity": "relu"}, cells.rnn("relu")),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "batch_first": True}, cells.lstm()),
    (nn.GRU, {"num_layers": 2, "bidirectional": True}, cells.gru()),
    (nn.RNN, {"num_layers": 3, "bias": False}, cells.rnn()),
    (nn.LSTM, {"proj_size": 3, "num_layers": 2, "bidirectional": True, "bias": False}, cells.lstm()),
]


@pytest.mark.parametrize("backend", ["reference", "step"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("module", "options", "recurrence"), STANDARD)
def test_torch_nn(
    module: type[nn.RNNBase], options: dict[str, Any], recurrence: Recurrence, packed: bool, backend: str
) -> None:
    torch.manual_seed(0)
    theirs = module(2, 4, dtype=torch.float64, **options)
    rows = theirs.num_layers * (2 if theirs.bidirectional else 1)
    widths = [theirs.proj_size or 4, 4][: len(recurrence.states)]
    hx = tuple(support.draw(rows, 3, width, seed=3).requires_grad_() for width in widths)
    x = support.draw(3, 5, 2, seed=4) if theirs.batch_first else support.draw(5, 3, 2, seed=4)
    x.requires_grad_()
    pack = pack_padded_sequence(x, [5, 4, 2], batch_first=theirs.batch_first) if packed else None
    y, final = theirs(x if pack is None else pack, hx if len(hx) > 1 else hx[0])
    expected = [y if pack is None else y.data, *(final if len(hx) > 1 else [final])]

    weights = list(theirs.parameters())
    names = ("num_layers", "bias", "bidirectional", "proj_size")
    same = {name: getattr(theirs, name) for name in names} | {"batch_first": theirs.batch_first and not packed}
    given = (x, None) if pack is None else (pack.data, pack.batch_sizes)
    y, states = functional.rnn(given[0], hx, weights, recurrence, batch_sizes=given[1], backend=backend, **same)
    actual = [y, *states]
    torch.testing.assert_close(actual, expected, rtol=EXACT, atol=EXACT)

    def gradients(outputs: list[Tensor]) -> list[Tensor]:
        total = sum((out * support.draw(*out.shape, seed=5)).sum() for out in outputs)
        return list(torch.autograd.grad(total, [x, *hx, *weights], retain_graph=True))

    torch.testing.assert_close(gradients(actual), gradients(expected), rtol=EXACT, atol=EXACT)


def sequential(inputs: support.Inputs, step: Callable[..., tuple[Tensor, ...]]) -> dict[str, Tensor]:
    """A loop written out: `step(gates, *states)` with the gates x + r (G, B, H), as `support.values_and_gradients`."""
    w = inputs.weights
    states = [state[:, 0] for state in inputs.states]
    outputs = []
    for x in inputs.x:
        gates = torch.einsum("bi,ghi->gbh", x, w.w_ih[0]) + torch.einsum("bp,ghp->gbh", states[0], w.w_hh[0])
        gates = gates + w.b_ih[0][:, None] + w.b_hh[0][:, None]
        states = list(step(gates, *states))
        outputs.append(states[0])
    found = [torch.stack(outputs)[:, :, None], *(state[:, None] for state in states)]
    total = sum((out * support.draw(*out.shape, seed=90 + k)).sum() for k, out in enumerate(found))
    wanted = inputs.named()
    grads = torch.autograd.grad(total, list(wanted.values()))
    return dict(enumerate([*found, *grads]))


def coupled(gates: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, ...]:
    f, g, o = gates
    c = f.sigmoid() * c + (1 - f.sigmoid()) * g.tanh()
    return o.sigmoid() * c.tanh(), c


def slstm_without_stabiliser(gates: Tensor, h: Tensor, c: Tensor, n: Tensor, m: Tensor) -> tuple[Tensor, ...]:
    """The paper's eqs. 8 to 14: c and n stand for the stabilised ones times exp(m)."""
    i, f, z, o = gates
    c = f.sigmoid() * c * m.exp() + i.exp() * z.tanh()
    n = f.sigmoid() * n * m.exp() + i.exp()
    new = torch.maximum(f.sigmoid().log() + m, i)
    return o.sigmoid() * c / n, c / new.exp(), n / new.exp(), new


@pytest.mark.parametrize(
    ("recurrence", "step"),
    [(cells.coupled_lstm(), coupled), (cells.slstm(), slstm_without_stabiliser)],
    ids=["coupled_lstm", "slstm"],
)
def test_cells_beside_their_formulas(recurrence: Recurrence, step: Callable[..., tuple[Tensor, ...]]) -> None:
    inputs = support.make(recurrence)
    actual = support.values_and_gradients(recurrence, inputs, "reference")
    support.assert_same(dict(enumerate(actual.values())), sequential(inputs, step), EXACT)


@pytest.mark.parametrize("reverse", ["0", "1", "01"])
@pytest.mark.parametrize("name", support.RECURRENCES)
def test_each_row_ends_at_its_own_length(name: str, reverse: str) -> None:
    """A row with a length gives what it gives alone and cut off; a row of length 0 keeps its states."""
    recurrence = support.RECURRENCES[name]
    inputs = support.make(recurrence, lengths=RAGGED, reverse=reverse)
    y, *final = support.run(recurrence, inputs, "reference")
    for row, length in enumerate(RAGGED):
        own = [state[row : row + 1] for state in inputs.states]
        assert y[length:, row].eq(0).all()
        if length:
            alone = inputs._replace(x=inputs.x[:length, row : row + 1], states=own, controls=PLAIN)
            y_alone, *own = support.run(recurrence, alone, "reference")
            torch.testing.assert_close(y[:length, row : row + 1], y_alone, rtol=EXACT, atol=EXACT)
        torch.testing.assert_close([f[row : row + 1] for f in final], own, rtol=EXACT, atol=EXACT)


@pytest.mark.parametrize("name", support.RECURRENCES)
def test_backwards_is_forwards_on_the_flipped_input(name: str) -> None:
    recurrence = support.RECURRENCES[name]
    inputs = support.make(recurrence)
    y, *final = support.run(recurrence, inputs, "reference")
    turned = inputs._replace(x=inputs.x.flip(0), reverse="1")
    y_turned, *final_turned = support.run(recurrence, turned, "reference")
    torch.testing.assert_close([y_turned.flip(0), *final_turned], [y, *final], rtol=EXACT, atol=EXACT)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"reverse": "01"},
    {"lengths": RAGGED},
    {"lengths": (2, 5, 5), "reverse": "10", "bias": False},
    {"T": 1, "B": 1, "H": 1},
]


PAIRS = [
    pytest.param(recurrence, OPTIONS[number % len(OPTIONS)], id="-".join([*names, str(number % len(OPTIONS))]))
    for number, (*names, recurrence) in enumerate(support.pairs())
]


@pytest.mark.parametrize(("recurrence", "options"), PAIRS)
def test_step_gives_what_the_reference_gives(recurrence: Recurrence, options: dict[str, Any]) -> None:
    inputs = support.make(recurrence, scale=0.2, **options)  # exp and relu of exp run away with larger weights
    expected = support.values_and_gradients(recurrence, inputs, "reference")
    support.assert_same(support.values_and_gradients(recurrence, inputs, "step"), expected, EXACT)
    assert all(value.isfinite().all() for value in expected.values())


SIZES: list[dict[str, Any]] = [
    *OPTIONS,
    {"reverse": "01", "lengths": (0, 5, 1)},
    {"B": 0},
    {"T": 7, "B": 5, "I": 1, "H": 3, "reverse": "011"},
]


@pytest.mark.parametrize("options", SIZES, ids=str)
@pytest.mark.parametrize("name", support.RECURRENCES)
def test_step_at_every_size(name: str, options: dict[str, Any]) -> None:
    recurrence = support.RECURRENCES[name]
    inputs = support.make(recurrence, **options)
    expected = support.values_and_gradients(recurrence, inputs, "reference")
    support.assert_same(support.values_and_gradients(recurrence, inputs, "step"), expected, EXACT)


@pytest.mark.parametrize("options", [{}, {"reverse": "01"}, {"lengths": RAGGED, "bias": False}], ids=str)
@pytest.mark.parametrize("name", ["lstm", "peephole_lstm", "coupled_lstm", "slstm"])
def test_step_with_a_projection(name: str, options: dict[str, Any]) -> None:
    recurrence = support.RECURRENCES[name]
    inputs = support.make(recurrence, proj=3, **options)
    expected = support.values_and_gradients(recurrence, inputs, "reference")
    support.assert_same(support.values_and_gradients(recurrence, inputs, "step"), expected, EXACT)


@pytest.mark.parametrize("backend", ["reference", "step"])
@pytest.mark.parametrize("name", support.RECURRENCES)
def test_states_start_from_the_recurrences_own_values(name: str, backend: str) -> None:
    """sLSTM's stabiliser starts at minus infinity, which must leave no NaN behind in any gradient."""
    layer = support.layer(support.RECURRENCES[name], backend)
    x = support.draw(4, 2, 2, seed=1).requires_grad_()
    given = tuple(torch.full((1, 2, 3), v, dtype=x.dtype) for v in layer.recurrence.initial)
    y, _ = layer(x)
    torch.testing.assert_close(y, layer(x, given if len(given) > 1 else given[0])[0], rtol=EXACT, atol=EXACT)
    grads = torch.autograd.grad(y.sum(), [x, *layer.parameters()])
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)


def error(actual: Tensor, truth: Tensor) -> float:
    """Relative to the size of the whole tensor."""
    return ((actual.double() - truth).norm() / truth.norm().clamp(min=1e-6)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", support.RECURRENCES)
def test_step_in_lower_precision(name: str, dtype: torch.dtype) -> None:
    """16 bits: an error of at most twice that of plain PyTorch in the same precision, plus one rounding. fp32: 1e-5."""
    recurrence = support.RECURRENCES[name]
    exact = support.make(recurrence, T=20, B=4, I=8, H=16, reverse="01").to(dtype).to(torch.float64)
    truth = support.values_and_gradients(recurrence, exact, "reference")
    plain = support.values_and_gradients(recurrence, exact.to(dtype), "reference")
    ours = support.values_and_gradients(recurrence, exact.to(dtype), "step")
    for key, value in truth.items():
        assert ours[key].dtype == dtype
        limit = 1e-5 if dtype == torch.float32 else 2 * error(plain[key], value) + torch.finfo(dtype).eps / 2
        assert error(ours[key], value) <= limit, key
