# SPDX-License-Identifier: Apache-2.0
"""Converted weights compute the same in the other library: torch.nn, Keras's own layers, Haste."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gpu_rnn
from gpu_rnn import interop
from tests.support.converted import BATCH, GRID, HIDDEN, INPUT, LAYERS, STEPS, TOLERANCE, draw, make

KERAS_TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # keras.ops.matmul multiplies float64 in float32
grid = pytest.mark.parametrize(("cell", "bidirectional", "bias", "num_layers"), GRID)


def load(layer: nn.Module, state: interop.State) -> nn.Module:
    """A second layer like the first, with other weights."""
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    layer.load_state_dict(state, strict=True)
    return layer


def keras_layer(cell: str, bidirectional: bool, bias: bool) -> Any:
    if importlib.util.find_spec("keras") is None:
        pytest.skip("Keras is not installed: pip install gpu-rnn[keras]")
    keras = importlib.import_module("tests.support.keras_layers").keras
    name = {"lstm": "LSTM", "rnn": "SimpleRNN"}.get(cell, "GRU")
    options = {"reset_after": cell == "gru"} if name == "GRU" else {}
    layer = getattr(keras.layers, name)(HIDDEN, use_bias=bias, return_sequences=True, dtype="float64", **options)
    return keras.layers.Bidirectional(layer, dtype="float64") if bidirectional else layer


@grid
def test_keras(cell: str, bidirectional: bool, bias: bool, num_layers: int) -> None:
    layer = make(cell, bidirectional, bias, num_layers, batch_first=True)
    x = draw(BATCH, STEPS, INPUT)
    state = layer.state_dict()
    expected, y = layer(x)[0].detach(), x
    theirs = interop.to_keras(state, cell=cell)
    for weights in theirs:
        own = keras_layer(cell, bidirectional, bias)
        own.build(tuple(y.shape))
        own.set_weights(weights)
        y = own(y)
    torch.testing.assert_close(y.detach(), expected, **KERAS_TOLERANCE)
    back = load(layer, interop.from_keras(*theirs, cell=cell))
    torch.testing.assert_close(back(x)[0].detach(), expected, **TOLERANCE)


def haste_lstm(weights: interop.State, x: Tensor) -> Tensor:
    """The LSTM of Haste's documentation, gates i g f o."""
    h = c = x.new_zeros(x.shape[1], HIDDEN)
    outputs = []
    for step in x:
        i, g, f, o = (step @ weights["kernel"] + h @ weights["recurrent_kernel"] + weights["bias"]).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        outputs.append(h)
    return torch.stack(outputs)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("num_layers", [1, 2])
def test_haste(num_layers: int, bias: bool) -> None:
    layer = make("lstm", bias=bias, num_layers=num_layers)
    x = draw(STEPS, BATCH, INPUT)
    expected, y = layer(x)[0].detach(), x
    theirs = interop.to_haste(layer.state_dict())
    for weights in theirs:
        y = haste_lstm(weights, y)
    torch.testing.assert_close(y, expected, **TOLERANCE)
    layer = make("lstm", num_layers=num_layers)  # Haste's always has a bias
    torch.testing.assert_close(load(layer, interop.from_haste(*theirs))(x)[0].detach(), expected, **TOLERANCE)


@pytest.mark.parametrize(("name", "cell"), [("LSTM", "lstm"), ("GRU", "gru"), ("RNN", "rnn")])
def test_torch_nn_takes_the_same_state_dict(name: str, cell: str) -> None:
    theirs = getattr(nn, name)(INPUT, HIDDEN, num_layers=2, bidirectional=True, dtype=torch.float64)
    x = draw(STEPS, BATCH, INPUT)
    expected = theirs(x)[0].detach()
    state = interop.from_onnx(*interop.to_onnx(theirs.state_dict(), cell=cell), cell=cell)
    torch.testing.assert_close(load(theirs, state)(x)[0].detach(), expected, **TOLERANCE)


def test_what_comes_back_is_a_copy() -> None:
    kernel = np.ones((INPUT, 4 * HIDDEN))
    state = interop.from_keras([kernel, np.ones((HIDDEN, 4 * HIDDEN)), np.zeros(4 * HIDDEN)], cell="lstm")
    kernel[:] = 7
    assert state["weight_ih_l0"].eq(1).all()
    node = {"W": torch.ones(1, HIDDEN, INPUT), "R": torch.ones(1, HIDDEN, HIDDEN)}
    state = interop.from_onnx(node, cell="rnn")
    node["W"].fill_(7)
    assert state["weight_ih_l0"].eq(1).all()
    layer = make("rnn")
    (arrays,) = interop.to_keras(layer.state_dict(), cell="rnn")
    arrays[1][:] = 7
    assert not layer.weight_hh_l0.eq(7).any()


LSTM = [np.zeros((INPUT, 4 * HIDDEN)), np.zeros((HIDDEN, 4 * HIDDEN)), np.zeros(4 * HIDDEN)]
GRU = [np.zeros((INPUT, 3 * HIDDEN)), np.zeros((HIDDEN, 3 * HIDDEN)), np.zeros((2, 3 * HIDDEN))]
ODD_STATES = {
    "Of a model give model.<layer>.state_dict": {"rnn.weight_ih_l0": np.zeros((4, 3))},
    "exist in torch's layout only": gpu_rnn.LSTM(3, 4, proj_size=2).state_dict(),
    "have no peepholes": gpu_rnn.LSTM(3, 4, peephole=True).state_dict(),
    "is `cell` the right one": gpu_rnn.GRU(3, 4).state_dict(),
    "has no weight_hh_l0": {"weight_ih_l0": np.zeros((16, 3))},
    "NumPy has no bfloat16": gpu_rnn.LSTM(3, 4, dtype=torch.bfloat16).state_dict(),
}


@pytest.mark.parametrize("words", ODD_STATES)
def test_states_that_cannot_be_converted(words: str) -> None:
    with pytest.raises(ValueError, match=words):
        interop.to_keras(ODD_STATES[words], cell="lstm")


@pytest.mark.parametrize(
    ("cell", "layers", "words"),
    [
        ("sru", [LSTM], "cell must be one of lstm, gru"),
        ("lstm", [GRU], "is `cell` the right one"),
        ("gru_reset_before", [GRU], r"bias should have shape \(12\)"),
        ("gru", [[*GRU[:2], GRU[2][0]]], r"bias should have shape \(2, 12\)"),
        ("lstm", [[LSTM[0].T, LSTM[1]]], "kernel should have shape"),
        ("lstm", [LSTM[:1]], "one argument a layer"),
        ("lstm", [], "at least one layer"),
        ("lstm", [LSTM, LSTM], "input weights of layer 1"),
        ("lstm", [LSTM, LSTM[:2]], "the same size, directions and biases"),
        ("lstm", [[*LSTM, *(np.zeros(shape) for shape in ((3, 8), (2, 8), 8))]], "and so have the directions"),
        ("lstm", [[*LSTM, np.zeros((5, 16)), *LSTM[1:]]], "input weights of layer 0"),
        ("lstm", [[np.float64(1), np.float64(1)]], "recurrent_kernel should have shape"),
    ],
)
def test_keras_weights_that_cannot_be_converted(cell: str, layers: list[Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        interop.from_keras(*layers, cell=cell)


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (None, r"given as the list layer\.get_weights\(\), got NoneType"),
        (LSTM[0], "got ndarray"),
        ([part.astype("int32") for part in LSTM], r"floating-point numbers of 16, 32 or 64 bits, got torch\.int32"),
        ([part.astype(object) for part in LSTM], "got ndarray of dtype object"),
        ([part.astype("complex64") for part in LSTM], "got ndarray of dtype complex64"),
        ([part.astype("longdouble") for part in LSTM], "16, 32 or 64 bits, got ndarray"),
        ([[[1.0, 2.0], [3.0]], LSTM[1]], "got a list that is none"),
        (["kernel", LSTM[1]], "got str of dtype"),
        ([None, LSTM[1]], "got NoneType of dtype object"),
        ([torch.zeros(3, 16, device="meta"), LSTM[1]], "got a torch.strided tensor on meta"),
        ([torch.zeros(3, 16).to_sparse(), LSTM[1]], "got a torch.sparse_coo tensor"),
        ([torch.zeros(3, 16).to(torch.float8_e5m2), LSTM[1]], r"got torch\.float8_e5m2"),
    ],
)
def test_what_is_no_list_of_weights(layer: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        interop.from_keras(layer, cell="lstm")


def test_haste_has_one_direction() -> None:
    with pytest.raises(ValueError, match="one direction"):
        interop.to_haste(make("lstm", bidirectional=True).state_dict())
    with pytest.raises(ValueError, match="has bias, kernel, recurrent_kernel"):
        interop.from_haste({"kernel": LSTM[0]})


@pytest.mark.parametrize("dtype", [">f8", "<f8", ">f4", "<f4", ">f2", "<f2"])
def test_every_float_of_numpys_is_taken(dtype: str) -> None:
    state = {name: value.numpy() for name, value in make("gru").state_dict().items()}
    converted = {name: value.astype(dtype) for name, value in state.items()}
    native = {name: torch.from_numpy(value.astype(dtype[1:])) for name, value in state.items()}
    for convert in (interop.to_keras, interop.to_onnx):
        (found,), (expected,) = convert(converted, cell="gru"), convert(native, cell="gru")
        for a, b in zip(*(x if isinstance(x, list) else list(x.values()) for x in (found, expected)), strict=True):
            assert a.dtype == b.dtype == np.dtype(dtype[1:])
            np.testing.assert_array_equal(a, b)


def test_bfloat16_of_numpys_is_taken() -> None:
    dtype = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed: pip install keras").bfloat16
    node = {"W": np.full((1, 4, 3), 0.5, dtype), "R": np.full((1, 4, 4), -2.0, dtype)}
    state = interop.from_onnx(node, cell="rnn")
    assert state["weight_ih_l0"].dtype == torch.bfloat16
    assert state["weight_ih_l0"].eq(0.5).all() and state["weight_hh_l0"].eq(-2).all()


@pytest.mark.parametrize("given", [None, 3, "weights", [1.0]])
def test_what_is_no_mapping(given: Any) -> None:
    for convert in (interop.to_keras, interop.to_onnx):
        with pytest.raises(TypeError, match=r"given as its state_dict\(\), got"):
            convert(given, cell="lstm")
    with pytest.raises(TypeError, match=r"given as its state_dict\(\), got"):
        interop.to_haste(given)
    with pytest.raises(TypeError, match="an ONNX node is a mapping of names to arrays, got"):
        interop.from_onnx(given, cell="lstm")
    with pytest.raises(TypeError, match="Haste's LSTM is a mapping of names to arrays, got"):
        interop.from_haste(given)


def changed(arrays: dict[str, np.ndarray], data: st.DataObject) -> dict[str, np.ndarray]:
    """One array of another shape: a size changed, an axis more or less. Of input weights, their number of rows."""
    name = data.draw(st.sampled_from(sorted(arrays)))
    shape = list(arrays[name].shape)
    how = data.draw(st.sampled_from(["size", "more", "less"]))
    if how == "size":
        free = data.draw(st.integers(0, len(shape) - 1))
        shape[free] = data.draw(st.integers(0, 40).filter(lambda size: size != shape[free]))
    elif how == "more":
        shape.insert(data.draw(st.integers(0, len(shape))), data.draw(st.integers(0, 3)))
    else:
        shape = shape[1:]
    return arrays | {name: np.zeros(shape)}


def is_another_layer(before: dict[str, np.ndarray], after: dict[str, np.ndarray], width: dict[str, int]) -> bool:
    """Whether all that changed is the number of input features, which any layer may have."""
    (name,) = [key for key in before if before[key].shape != after[key].shape]
    a, b = list(before[name].shape), list(after[name].shape)
    if name not in width or len(a) != len(b) or not all(b):
        return False
    del a[width[name]], b[width[name]]
    return a == b


@settings(max_examples=120, deadline=None, derandomize=True)
@given(st.data())
def test_weights_of_the_wrong_width_are_refused_in_words(data: st.DataObject) -> None:
    """Every function, every layout: ValueError that names the weights and their shapes, or a right conversion."""
    cell = data.draw(st.sampled_from(sorted(LAYERS)))
    bidirectional, layers = data.draw(st.booleans()), data.draw(st.integers(1, 2))
    options = {"peephole": True} if cell == "lstm" and data.draw(st.booleans()) else {}
    state = {k: v.numpy() for k, v in make(cell, bidirectional, num_layers=layers, **options).state_dict().items()}
    way = data.draw(st.sampled_from(["to_keras", "to_onnx", "to_haste", "from_keras", "from_onnx", "from_haste"]))
    if ("haste" in way and (cell != "lstm" or bidirectional or options)) or ("keras" in way and options):
        return
    free = {} if bidirectional else {"weight_ih_l0": 1}
    if way.startswith("to"):
        call = functools.partial(getattr(interop, way), **({} if way == "to_haste" else {"cell": cell}))
        before, after = state, changed(state, data)
    elif way == "from_keras":
        (theirs, *_) = interop.to_keras(state, cell=cell)
        before, free = {str(k): v for k, v in enumerate(theirs)}, {} if bidirectional else {"0": 0}
        after = changed(before, data)
        call = lambda given: interop.from_keras(list(given.values()), cell=cell)  # noqa: E731
    else:
        theirs = interop.to_onnx(state, cell=cell) if way == "from_onnx" else interop.to_haste(state)
        before, free = {k: np.asarray(v) for k, v in theirs[0].items()}, {"W": 2, "kernel": 0}
        after = changed(before, data)
        call = functools.partial(getattr(interop, way), **({} if way == "from_haste" else {"cell": cell}))
    if is_another_layer(before, after, free) and layers == 1:
        call(after)
        return
    try:
        call(after)
    except ValueError as error:
        assert re.search(r"should have shape|one direction or two|the same size, directions", str(error)), error
    else:
        assert is_another_layer(before, after, free), f"{way} took {cell} {[v.shape for v in after.values()]}"
