# SPDX-License-Identifier: Apache-2.0
"""The options torch.nn does not have, beside their formulas written out; and Recurrent, for any recurrence."""

from __future__ import annotations

import pickle
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import gpu_rnn
from gpu_rnn import cells
from tests.support import layers as support

Function = Callable[[Tensor], Tensor]


def lstm_by_hand(layer: nn.Module, x: Tensor, phi: Function, sigma: Function) -> Tensor:
    h = c = x.new_zeros(x.shape[1], layer.hidden_size)
    p_i, p_f, p_o = getattr(layer, "weight_peephole_l0", torch.zeros(3, layer.hidden_size, dtype=x.dtype))
    outputs = []
    for step in x:
        gates = step @ layer.weight_ih_l0.T + layer.bias_ih_l0 + h @ layer.weight_hh_l0.T + layer.bias_hh_l0
        i, f, g, o = gates.chunk(4, 1)
        c = sigma(f + p_f * c) * c + sigma(i + p_i * c) * phi(g)
        h = sigma(o + p_o * c) * phi(c)
        outputs.append(h)
    return torch.stack(outputs)


def gru_by_hand(layer: nn.Module, x: Tensor, phi: Function, sigma: Function, reset_after: bool) -> Tensor:
    h = x.new_zeros(x.shape[1], layer.hidden_size)
    w_r, w_z, w_n = layer.weight_hh_l0.chunk(3)
    b_r, b_z, b_n = layer.bias_hh_l0.chunk(3)
    outputs = []
    for step in x:
        x_r, x_z, x_n = (step @ layer.weight_ih_l0.T + layer.bias_ih_l0).chunk(3, 1)
        r, z = sigma(x_r + h @ w_r.T + b_r), sigma(x_z + h @ w_z.T + b_z)
        n = phi(x_n + r * (h @ w_n.T + b_n)) if reset_after else phi(x_n + (r * h) @ w_n.T + b_n)
        h = (1 - z) * n + z * h
        outputs.append(h)
    return torch.stack(outputs)


FUNCTIONS: list[tuple[str | Function, Function]] = [
    ("tanh", torch.tanh),
    ("relu", torch.relu),
    ("hard_sigmoid", lambda x: (x / 6 + 0.5).clamp(0, 1)),
    ("keras2_hard_sigmoid", lambda x: (0.2 * x + 0.5).clamp(0, 1)),
    (torch.sin, torch.sin),
    (lambda x: x / (1 + x.abs()), nn.functional.softsign),
]


@pytest.mark.parametrize("peephole", [False, True])
@pytest.mark.parametrize(("activation", "phi"), FUNCTIONS)
def test_lstm_activation(activation: str | Function, phi: Function, peephole: bool) -> None:
    layer = gpu_rnn.LSTM(3, 5, activation=activation, peephole=peephole, dtype=torch.float64)
    x = support.draw(4, 2, 3)
    torch.testing.assert_close(layer(x)[0], lstm_by_hand(layer, x, phi, torch.sigmoid), **support.TOLERANCE)


@pytest.mark.parametrize("reset_after", [False, True])
@pytest.mark.parametrize(("activation", "phi"), FUNCTIONS)
def test_gru_activation(activation: str | Function, phi: Function, reset_after: bool) -> None:
    layer = gpu_rnn.GRU(3, 5, activation=activation, reset_after=reset_after, dtype=torch.float64)
    x = support.draw(4, 2, 3)
    expected = gru_by_hand(layer, x, phi, torch.sigmoid, reset_after)
    torch.testing.assert_close(layer(x)[0], expected, **support.TOLERANCE)


@pytest.mark.parametrize(("activation", "sigma"), FUNCTIONS)
def test_recurrent_activation(activation: str | Function, sigma: Function) -> None:
    x = support.draw(4, 2, 3)
    lstm = gpu_rnn.LSTM(3, 5, recurrent_activation=activation, dtype=torch.float64)
    torch.testing.assert_close(lstm(x)[0], lstm_by_hand(lstm, x, torch.tanh, sigma), **support.TOLERANCE)
    gru = gpu_rnn.GRU(3, 5, recurrent_activation=activation, dtype=torch.float64)
    torch.testing.assert_close(gru(x)[0], gru_by_hand(gru, x, torch.tanh, sigma, True), **support.TOLERANCE)


@pytest.mark.parametrize(("activation", "phi"), FUNCTIONS)
def test_rnn_activation(activation: str | Function, phi: Function) -> None:
    layer = gpu_rnn.RNN(3, 5, activation=activation, dtype=torch.float64)
    x = support.draw(2, 2, 3)
    first = phi(x[0] @ layer.weight_ih_l0.T + layer.bias_ih_l0 + layer.bias_hh_l0)
    input_part = x[1] @ layer.weight_ih_l0.T + layer.bias_ih_l0
    second = phi(input_part + first @ layer.weight_hh_l0.T + layer.bias_hh_l0)
    torch.testing.assert_close(layer(x)[0], torch.stack([first, second]), **support.TOLERANCE)


def test_peephole_weights() -> None:
    layer = gpu_rnn.LSTM(3, 5, 2, bidirectional=True, peephole=True)
    named = {name: p for name, p in layer.named_parameters() if "peephole" in name}
    assert sorted(named) == [f"weight_peephole_l{k}{suffix}" for k in range(2) for suffix in ("", "_reverse")]
    assert {p.shape for p in named.values()} == {(3, 5)}
    assert all(0 < p.abs().max() <= 5**-0.5 for p in named.values())
    assert gpu_rnn.LSTMCell(3, 5, peephole=True).weight_peephole.shape == (3, 5)
    layer(torch.randn(4, 2, 3))[0].sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in named.values())


def cut(function: Function) -> Function:
    """Of an argument in [-0.2, 0.2], which about half of these are outside of."""
    return lambda x: function(x.clip(-0.2, 0.2))


def test_clip() -> None:
    """Every argument of an activation is cut, that of the output's too, and no state."""
    x, phi, sigma = 2 * support.draw(12, 2, 3), cut(torch.tanh), cut(torch.sigmoid)
    for peephole in (False, True):
        lstm = gpu_rnn.LSTM(3, 5, clip=0.2, peephole=peephole, dtype=torch.float64)
        nn.init.ones_(lstm.bias_ih_l0)  # c grows beyond the border
        y, (h, c) = lstm(x)
        torch.testing.assert_close(y, lstm_by_hand(lstm, x, phi, sigma), **support.TOLERANCE)
        assert h.abs().max() < 0.2 < c.abs().max()
    for reset_after in (False, True):
        gru = gpu_rnn.GRU(3, 5, clip=0.2, reset_after=reset_after, dtype=torch.float64)
        torch.testing.assert_close(gru(x)[0], gru_by_hand(gru, x, phi, sigma, reset_after), **support.TOLERANCE)
    rnn = gpu_rnn.RNN(3, 5, clip=0.2, nonlinearity="relu", dtype=torch.float64)
    assert rnn(x)[0].max() == 0.2


@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_clip_of_cells(name: str) -> None:
    layer = getattr(gpu_rnn, name)(3, 5, clip=np.float32(0.25), dtype=torch.float64)
    cell = getattr(gpu_rnn, name + "Cell")(3, 5, clip=0.25, dtype=torch.float64)
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in layer.state_dict().items()})
    x = 2 * support.draw(1, 2, 3)
    states = cell(x[0])
    h = states[0] if name == "LSTM" else states
    torch.testing.assert_close(layer(x)[0][0], h, **support.TOLERANCE)
    assert repr(layer) == f"{name}(3, 5, clip=0.25)" and repr(cell) == f"{name}Cell(3, 5, clip=0.25)"
    again = pickle.loads(pickle.dumps(layer))
    assert torch.equal(again(x)[0], layer(x)[0]) and repr(again) == repr(layer)
    assert layer.recurrence != getattr(gpu_rnn, name)(3, 5).recurrence and layer.recurrence.aten is None


@pytest.mark.parametrize("backend", ["reference", "step"])
def test_gradients_at_clips_border_are_those_of_torch_clamp(backend: str) -> None:
    """1 there, and 0 beyond."""
    layer = gpu_rnn.RNN(1, 1, bias=False, activation="linear", clip=0.5, backend=backend, dtype=torch.float64)
    nn.init.ones_(layer.weight_ih_l0)
    x = torch.tensor([0.25, 0.5, -0.5, 0.75, -1.0], dtype=torch.float64).view(1, 5, 1).requires_grad_()
    y = layer(x)[0]
    y.sum().backward()
    assert y.flatten().tolist() == [0.25, 0.5, -0.5, 0.5, -0.5]
    assert x.grad.flatten().tolist() == [1, 1, 1, 0, 0]


OPTIONS = [
    ("LSTM", {"activation": "relu"}),
    ("LSTM", {"peephole": True, "bias": False}),
    ("GRU", {"reset_after": False}),
    ("RNN", {"activation": "softsign"}),
    ("LSTM", {"clip": 0.2}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_options_work_in_stacks_directions_and_packs(name: str, options: dict) -> None:
    """Each sequence of a packed batch, run alone through one layer and direction after the other, gives the same."""
    layer = getattr(gpu_rnn, name)(3, 5, 2, bidirectional=True, dtype=torch.float64, **options)
    sequences = [support.draw(t, 3) for t in (2, 5, 3)]
    packed = nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    outputs = nn.utils.rnn.unpack_sequence(layer(packed)[0])
    for sequence, output in zip(sequences, outputs, strict=True):
        level = sequence
        for index in range(2):
            level = torch.cat(
                [
                    alone(layer, name, options, index, "")(level)[0],
                    alone(layer, name, options, index, "_reverse")(level.flip(0))[0].flip(0),
                ],
                1,
            )
        torch.testing.assert_close(output, level, **support.TOLERANCE)


def alone(layer: nn.Module, name: str, options: dict, index: int, suffix: str) -> nn.Module:
    """One layer and direction of a stack as a layer of its own."""
    end = f"_l{index}{suffix}"
    weights = {key.removesuffix(end) + "_l0": p for key, p in layer.state_dict().items() if key.endswith(end)}
    single = getattr(gpu_rnn, name)(weights["weight_ih_l0"].shape[1], 5, dtype=torch.float64, **options)
    single.load_state_dict(weights, strict=True)
    return single


def minimal_gated_unit() -> gpu_rnn.Recurrence:
    def minimal(x, r, s, p):
        f = torch.sigmoid(x.f + r.f + p.peep * s.h)
        return (1 - f) * s.h + f * torch.tanh(x.n + f * r.n)

    return gpu_rnn.Recurrence(minimal, gates=("f", "n"), states=("h",), params=("peep",))


def test_recurrent_runs_a_users_recurrence() -> None:
    layer = gpu_rnn.Recurrent(minimal_gated_unit(), 3, 5, dtype=torch.float64)
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {
        "weight_ih_l0": (10, 3),
        "weight_hh_l0": (10, 5),
        "bias_ih_l0": (10,),
        "bias_hh_l0": (10,),
        "weight_unit_l0": (1, 5),
    }
    assert repr(layer) == "Recurrent(minimal, 3, 5)"
    x, h = support.draw(4, 2, 3), support.draw(1, 2, 5)
    output, final = layer(x, h)
    expected, state = [], h[0]
    for step in x:
        x_f, x_n = (step @ layer.weight_ih_l0.T + layer.bias_ih_l0).chunk(2, 1)
        r_f, r_n = (state @ layer.weight_hh_l0.T + layer.bias_hh_l0).chunk(2, 1)
        f = torch.sigmoid(x_f + r_f + layer.weight_unit_l0[0] * state)
        state = (1 - f) * state + f * torch.tanh(x_n + f * r_n)
        expected.append(state)
    torch.testing.assert_close(output, torch.stack(expected), **support.TOLERANCE)
    torch.testing.assert_close(final, output[-1:])


def test_recurrent_with_many_states_takes_and_returns_them_in_order() -> None:
    layer = gpu_rnn.Recurrent(cells.slstm(), 3, 5, 2, bidirectional=True, dtype=torch.float64)
    x = support.draw(6, 2, 3)
    output, states = layer(x[:4])
    assert len(states) == len(layer.recurrence.states) == 4
    assert {tuple(state.shape) for state in states} == {(4, 2, 5)}
    single = gpu_rnn.Recurrent(cells.slstm(), 3, 5, dtype=torch.float64)
    output, states = single(x[:4])
    rest, _ = single(x[4:], states)
    torch.testing.assert_close(torch.cat([output, rest]), single(x)[0], **support.TOLERANCE)
    with pytest.raises(TypeError, match=r"Recurrent: hx should be a tuple of 4 Tensors \(h, c, n, m\), got Tensor"):
        single(x, states[0])
    with pytest.raises(RuntimeError, match=r"hx and cx and nx and mx should also be 3-D"):
        single(x, tuple(state[0] for state in states))


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True, "batch_first": True, "bias": False}])
def test_recurrent_equals_the_layer_of_the_same_recurrence(options: dict) -> None:
    for recurrence, layer in (
        (cells.gru(), gpu_rnn.GRU),
        (cells.lstm(), gpu_rnn.LSTM),
        (cells.rnn(), gpu_rnn.RNN),
    ):
        torch.manual_seed(0)
        general = gpu_rnn.Recurrent(recurrence, 3, 5, **options)
        torch.manual_seed(0)
        named = layer(3, 5, **options)
        x = torch.randn(4, 2, 3)
        torch.testing.assert_close(general(x), named(x))
        assert list(general.state_dict()) == list(named.state_dict())
