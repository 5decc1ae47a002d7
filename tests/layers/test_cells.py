# SPDX-License-Identifier: Apache-2.0
"""RNNCell, LSTMCell and GRUCell beside torch.nn's, and beside one step of our layers."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import gpu_rnn
from tests.support import layers as support

OPTIONS = {"RNNCell": [{}, {"nonlinearity": "relu"}], "LSTMCell": [{}], "GRUCell": [{}]}
CELL_OPTIONS = [
    (name, {**own, **bias}) for name in support.CELLS for own in OPTIONS[name] for bias in ({}, {"bias": False})
]


@pytest.mark.parametrize("with_states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("batch", [(), (4,), (0,)], ids=["unbatched", "batched", "empty"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize(("name", "options"), CELL_OPTIONS)
def test_values_and_gradients(name: str, options: dict, backend: str, batch: tuple, with_states: bool) -> None:
    theirs, mine = support.pair(name, 3, 5, ours={"backend": backend}, **options)
    x, h, c = support.draw(*batch, 3), support.draw(*batch, 5, seed=2), support.draw(*batch, 5, seed=3)
    hx = ((h, c) if name == "LSTMCell" else h) if with_states else None
    support.assert_same(theirs, mine, x, hx, sources={"x": x, "h": h, "c": c})
    assert [out.shape for out in support.leaves(mine(x, hx))] == [out.shape for out in support.leaves(theirs(x, hx))]


@pytest.mark.parametrize("activation", ["tanh", "softsign"])
@pytest.mark.parametrize("name", ["RNNCell", "LSTMCell", "GRUCell"])
def test_states_are_detached_in_place(name: str, activation: str) -> None:
    """As loops over truncated sequences do; views would refuse."""
    cell = getattr(gpu_rnn, name)(3, 5, activation=activation)
    states, x = None, torch.randn(4, 3)
    for _ in range(3):
        states = cell(x, states)
        for state in support.leaves(states):
            assert state.grad_fn is not None
            state.detach_()


@pytest.mark.parametrize(("name", "options"), CELL_OPTIONS)
def test_same_seed_same_names_same_repr(name: str, options: dict) -> None:
    torch.manual_seed(0)
    theirs = getattr(nn, name)(4, 6, **options)
    torch.manual_seed(0)
    mine = getattr(gpu_rnn, name)(4, 6, **options)
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    assert repr(mine) == repr(theirs)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RNN", {"activation": "softsign"}),
        ("LSTM", {"activation": "relu", "recurrent_activation": "hard_sigmoid"}),
        ("LSTM", {"peephole": True}),
        ("GRU", {"reset_after": False, "activation": torch.sin}),
    ],
)
def test_cell_is_one_step_of_the_layer(name: str, options: dict) -> None:
    layer = getattr(gpu_rnn, name)(3, 5, dtype=torch.float64, **options)
    cell = getattr(gpu_rnn, name + "Cell")(3, 5, dtype=torch.float64, **options)
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in layer.state_dict().items()}, strict=True)
    x = support.draw(6, 2, 3)
    outputs, hx = [], None
    for step in x:
        hx = cell(step, hx)
        outputs.append(support.leaves(hx)[0])
    output, state = layer(x)
    torch.testing.assert_close(torch.stack(outputs), output, **support.TOLERANCE)
    torch.testing.assert_close([part[0] for part in support.leaves(state)], support.leaves(hx), **support.TOLERANCE)
