# SPDX-License-Identifier: Apache-2.0
"""Parameters of Flax's cells: by Flax's formulas, and beside Flax itself where it is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

import gpu_rnn
from gpu_rnn import interop
from tests.support.converted import BATCH, INPUT, STEPS, TOLERANCE, draw, make

CELLS = ("lstm", "gru", "rnn")


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def dense(parameters: Mapping[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    return x @ parameters["kernel"] + parameters.get("bias", 0)


def linen(cell: str, p: Mapping[str, Any], xs: np.ndarray, size: int) -> np.ndarray:
    """(T, B, I) -> (T, B, H) by the formulas of flax.linen's LSTMCell, GRUCell and SimpleCell."""
    h = c = np.zeros((xs.shape[1], size))
    steps = []
    for x in xs:
        if cell == "lstm":
            i, f, g, o = (dense(p[f"i{gate}"], x) + dense(p[f"h{gate}"], h) for gate in "ifgo")
            c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
            h = sigmoid(o) * np.tanh(c)
        elif cell == "gru":
            r, z = (sigmoid(dense(p[f"i{gate}"], x) + dense(p[f"h{gate}"], h)) for gate in "rz")
            h = (1 - z) * np.tanh(dense(p["in"], x) + r * dense(p["hn"], h)) + z * h
        else:
            h = np.tanh(dense(p["i"], x) + dense(p["h"], h))
        steps.append(h)
    return np.stack(steps)


def without_bias_of_n(layer: Any) -> None:
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("bias_hh"):
                parameter[parameter.shape[0] // 3 * 2 :] = 0


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", CELLS)
def test_linens_formulas(cell: str, bias: bool) -> None:
    layer, x = make(cell, bias=bias), draw(STEPS, BATCH, INPUT)
    (parameters,) = interop.to_flax(layer.state_dict(), cell)
    found = linen(cell, parameters, x.numpy(), layer.hidden_size)
    torch.testing.assert_close(torch.from_numpy(found), layer(x)[0].detach(), **TOLERANCE)
    back = make(cell)
    back.load_state_dict(interop.from_flax({"params": parameters}, cell=cell))
    torch.testing.assert_close(back(x)[0], layer(x)[0], **TOLERANCE)


@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.parametrize("cell", CELLS)
def test_stacks_of_both_directions_there_and_back(cell: str, api: str) -> None:
    layer, x = make(cell, bidirectional=True, num_layers=2), draw(STEPS, BATCH, INPUT)
    if api == "nnx" and cell == "gru":
        without_bias_of_n(layer)
    parameters = interop.to_flax(layer.state_dict(), cell, api=api)
    assert [len(pair) for pair in parameters] == [2, 2]
    back = make(cell, bidirectional=True, num_layers=2)
    with torch.no_grad():
        for parameter in back.parameters():
            parameter.zero_()
    back.load_state_dict(interop.from_flax(*parameters, cell=cell))
    torch.testing.assert_close(back(x)[0], layer(x)[0], **TOLERANCE)


def test_nnx_has_one_matrix_for_all_gates() -> None:
    layer = make("lstm")
    (parameters,) = interop.to_flax(layer.state_dict(), "lstm", api="nnx")
    shapes = {name: {key: array.shape for key, array in part.items()} for name, part in parameters.items()}
    size = layer.hidden_size
    assert shapes == {
        "dense_i": {"kernel": (INPUT, 4 * size)},
        "dense_h": {"kernel": (size, 4 * size), "bias": (4 * size,)},
    }


GOOD = interop.to_flax(gpu_rnn.LSTM(3, 4).state_dict(), "lstm")[0]
MISTAKES: list[tuple[Any, str, type[Exception], str]] = [
    (GOOD, "gru_reset_before", ValueError, "one of lstm, gru, rnn, got 'gru_reset_before': Flax's GRUCell"),
    (GOOD, "gru", ValueError, "Flax's gru has hn, hr, hz, in, ir, iz; got"),
    ({name: part for name, part in GOOD.items() if name != "hf"}, "lstm", ValueError, "Flax's lstm has"),
    (GOOD | {"hi": {"kernel": np.ones((4, 5)), "bias": np.ones(5)}}, "lstm", ValueError, "recurrent kernels"),
    (GOOD | {"hi": {"kernel": np.ones((4, 4)), "bias": np.ones(5)}}, "lstm", ValueError, "the bias of hi"),
    (GOOD | {"hi": {"weight": np.ones((4, 4))}}, "lstm", ValueError, "hi of Flax's lstm has kernel"),
    ([3], "lstm", TypeError, "are a mapping, got int"),
]


@pytest.mark.parametrize(("parameters", "cell", "error", "words"), MISTAKES, ids=lambda value: str(value)[:20])
def test_parameters_that_cannot_be_converted(parameters: Any, cell: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        interop.from_flax(parameters, cell=cell)


def test_layers_that_flax_has_not() -> None:
    with pytest.raises(ValueError, match=r"nnx\.GRUCell has no bias beside the recurrent product of n"):
        interop.to_flax(make("gru").state_dict(), "gru", api="nnx")
    with pytest.raises(ValueError, match="no peepholes"):
        interop.to_flax(make("lstm", peephole=True).state_dict(), "lstm")
    with pytest.raises(ValueError, match="api is 'linen' or 'nnx', not 'haiku'"):
        interop.to_flax(make("lstm").state_dict(), "lstm", api="haiku")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["OptimizedLSTMCell", "LSTMCell", "GRUCell", "SimpleCell"])
@pytest.mark.parametrize("api", ["linen", "nnx"])
@pytest.mark.filterwarnings("ignore")
def test_beside_flax(api: str, kind: str) -> None:
    if importlib.util.find_spec("flax") is None:
        pytest.skip("needs Flax: pip install 'gpu-rnn[flax]'")
    import jax
    from flax import linen as flax_linen
    from flax import nnx

    cell = {"GRUCell": "gru", "SimpleCell": "rnn"}.get(kind, "lstm")
    xs = torch.randn(5, 2, INPUT)
    if api == "linen":
        module = flax_linen.RNN(getattr(flax_linen, kind)(features=4), time_major=True)
        variables = module.init(jax.random.key(0), xs.numpy())
        expected = module.apply(variables, xs.numpy())
        parameters = variables["params"]["cell"]
    else:
        own = getattr(nnx, kind)(INPUT, 4, rngs=nnx.Rngs(0))
        expected = nnx.RNN(own, time_major=True)(xs.numpy())
        parameters = nnx.to_pure_dict(nnx.state(own, nnx.Param))
    layer = {"lstm": gpu_rnn.LSTM, "gru": gpu_rnn.GRU, "rnn": gpu_rnn.RNN}[cell](INPUT, 4)
    layer.load_state_dict(interop.from_flax(parameters, cell=cell))
    torch.testing.assert_close(layer(xs)[0].detach(), torch.from_numpy(np.array(expected)), rtol=1e-5, atol=1e-5)
