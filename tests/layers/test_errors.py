# SPDX-License-Identifier: Apache-2.0
"""What torch.nn refuses, ours refuses: the same kind of error, in the same words where it has good ones."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import gpu_rnn
from tests.support import layers as support


def error_of(call: Callable[[], Any]) -> BaseException:
    with pytest.raises((TypeError, ValueError, RuntimeError)) as caught:
        call()
    return caught.value


def assert_same_error(theirs: Callable[[], Any], mine: Callable[[], Any], *, words: bool = True) -> None:
    expected, actual = error_of(theirs), error_of(mine)
    assert isinstance(actual, type(expected)), f"{actual!r} instead of {expected!r}"
    if words:
        assert str(actual).startswith(str(expected)), f"{actual} instead of {expected}"


BAD_ARGUMENTS = {
    "input_size 0": ((0, 5), {}),
    "input_size -1": ((-1, 5), {}),
    "input_size float": ((3.0, 5), {}),
    "hidden_size 0": ((3, 0), {}),
    "hidden_size str": ((3, "5"), {}),
    "num_layers 0": ((3, 5, 0), {}),
    "num_layers float": ((3, 5, 1.5), {}),
    "bias 1": ((3, 5), {"bias": 1}),
    "batch_first str": ((3, 5), {"batch_first": "yes"}),
    "dropout 1.5": ((3, 5, 2), {"dropout": 1.5}),
    "dropout -1": ((3, 5, 2), {"dropout": -1}),
    "dropout True": ((3, 5, 2), {"dropout": True}),
    "dropout str": ((3, 5, 2), {"dropout": "half"}),
    "dtype int": ((3, 5), {"dtype": torch.int64}),
}


@pytest.mark.parametrize("name", support.LAYERS)
@pytest.mark.parametrize(("args", "kwargs"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments(name: str, args: tuple, kwargs: dict) -> None:
    assert_same_error(lambda: getattr(nn, name)(*args, **kwargs), lambda: getattr(gpu_rnn, name)(*args, **kwargs))


@pytest.mark.parametrize(("args", "kwargs"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_bad_arguments_of_recurrent(args: tuple, kwargs: dict) -> None:
    recurrence = gpu_rnn.cells.gru()
    assert_same_error(lambda: nn.GRU(*args, **kwargs), lambda: gpu_rnn.Recurrent(recurrence, *args, **kwargs))


@pytest.mark.parametrize("proj_size", [5, 6, -1])
def test_bad_projection(proj_size: int) -> None:
    assert_same_error(lambda: nn.LSTM(3, 5, proj_size=proj_size), lambda: gpu_rnn.LSTM(3, 5, proj_size=proj_size))


@pytest.mark.parametrize("name", ["RNN", "GRU"])
def test_projection_is_for_lstm_only(name: str) -> None:
    assert_same_error(lambda: getattr(nn, name)(3, 5, proj_size=2), lambda: getattr(gpu_rnn, name)(3, 5, proj_size=2))


def test_bad_nonlinearity() -> None:
    assert_same_error(lambda: nn.RNN(3, 5, nonlinearity="sin"), lambda: gpu_rnn.RNN(3, 5, nonlinearity="sin"))
    with pytest.raises(ValueError, match="not both"):
        gpu_rnn.RNN(3, 5, nonlinearity="relu", activation="tanh")
    with pytest.raises(ValueError, match="Unknown nonlinearity"):
        gpu_rnn.RNNCell(3, 5, nonlinearity="sin")


@pytest.mark.parametrize("name", [*support.LAYERS, *support.CELLS])
def test_unknown_argument(name: str) -> None:
    with pytest.raises(TypeError, match=r"unexpected keyword argument .hidden."):
        getattr(gpu_rnn, name)(3, 5, hidden=5)


@pytest.mark.parametrize("name", [*support.LAYERS, *support.CELLS])
def test_a_call_s_unknown_argument_names_the_layer(name: str) -> None:
    """As torch.nn's error does, word for word; a layer's goes on with the argument that was perhaps meant."""
    for arguments in ({"steps": None}, {}):
        layers = (getattr(library, name)(3, 5) for library in (nn, gpu_rnn))
        inputs = [torch.ones(2, 1, 3)] * bool(arguments)
        theirs, ours = (partial(layer, *inputs, **arguments) for layer in layers)
        assert_same_error(theirs, ours)
    assert inspect.signature(getattr(gpu_rnn, name).forward) == inspect.signature(
        getattr(gpu_rnn, name).__mro__[1].forward
    )


def test_an_unknown_argument_is_answered_with_all_there_are() -> None:
    with pytest.raises(
        TypeError, match=r"'peepholes'; did you mean peephole\? besides torch.nn's it takes activation, .*layer_norm"
    ):
        gpu_rnn.LSTM(3, 5, peepholes=True)
    with pytest.raises(TypeError, match=r"'num_layer'; did you mean num_layers\?"):
        gpu_rnn.GRU(3, 5, num_layer=2)
    with pytest.raises(TypeError, match=r"'wobble'; besides torch.nn's it takes activation"):
        gpu_rnn.GRU(3, 5, wobble=2)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
def test_complex_numbers_have_no_normalisation() -> None:
    with pytest.raises(TypeError, match="RMS normalisation takes real numbers, not dtype="):
        gpu_rnn.LSTM(3, 5, rms_norm=True, dtype=torch.complex64)
    with pytest.raises(TypeError, match="layer normalisation takes real numbers, not dtype="):
        gpu_rnn.LSTM(3, 5, layer_norm=True, dtype=torch.complex64)
    layer = gpu_rnn.LSTM(3, 5, layer_norm=True).to(torch.complex64)
    with pytest.raises(TypeError, match="layer normalisation takes real numbers"):
        layer(torch.ones(2, 1, 3, dtype=torch.complex64))


@pytest.mark.parametrize(
    "build, operation",
    [
        (lambda dtype: gpu_rnn.RNN(3, 5, nonlinearity="relu", dtype=dtype), r"rnn's relu \(cells.py:\d+"),
        (lambda dtype: gpu_rnn.RNNCell(3, 5, activation="leaky_relu", dtype=dtype), "rnn's gt"),
        (lambda dtype: gpu_rnn.LSTM(3, 5, recurrent_activation="hard_sigmoid", dtype=dtype), "lstm's clamp"),
        (lambda dtype: gpu_rnn.GRUCell(3, 5, activation="gelu", dtype=dtype), "gru's erf"),
        (lambda dtype: gpu_rnn.Recurrent(gpu_rnn.cells.slstm(), 3, 5, dtype=dtype), "slstm's minimum"),
    ],
    ids=["relu", "leaky_relu", "hard_sigmoid", "gelu", "slstm"],
)
def test_what_complex_numbers_have_not_is_said_at_once(build: Callable[[torch.dtype], Any], operation: str) -> None:
    with pytest.raises(TypeError, match=f"dtype=torch.complex64 does not go with {operation}.*take a real dtype"):
        build(torch.complex64)
    build(torch.float64)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "LSTMCell", "GRUCell"])
def test_bad_activation_names_the_known_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"'tanhh'.*hard_sigmoid"):
        getattr(gpu_rnn, name)(3, 5, activation="tanhh")
    with pytest.raises(TypeError, match="plain torch function"):
        getattr(gpu_rnn, name)(3, 5, recurrent_activation=nn.PReLU())


INPUTS = {
    "1-D": torch.zeros(3),
    "4-D": torch.zeros(1, 2, 4, 3),
    "features": torch.zeros(2, 4, 7),
    "features unbatched": torch.zeros(2, 7),
    "float64": torch.zeros(2, 4, 3, dtype=torch.float64),
    "int64": torch.zeros(2, 4, 3, dtype=torch.int64),
    "no steps": torch.zeros(0, 4, 3),
    "no steps unbatched": torch.zeros(0, 3),
    "another device": torch.zeros(2, 4, 3, device="meta"),
}


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", support.LAYERS)
@pytest.mark.parametrize("x", INPUTS.values(), ids=INPUTS)
def test_bad_input(name: str, x: torch.Tensor, backend: str) -> None:
    theirs, mine = support.pair(name, 3, 5, dtype=torch.float32, ours={"backend": backend})
    # Elman's message says "4D tensor" where the others' say "4D": one wording here.
    assert_same_error(lambda: theirs(x), lambda: mine(x), words=not (name == "RNN" and x.dim() not in (2, 3)))


@pytest.mark.parametrize("name", support.LAYERS)
def test_bad_packed_input(name: str) -> None:
    theirs = nn.GRU(3, 5)  # torch.nn.LSTM does not check packed input
    mine = getattr(gpu_rnn, name)(3, 5)
    for sequence in (torch.zeros(2, 7), torch.zeros(2, 3, dtype=torch.float64)):
        packed = pack_sequence([sequence])
        assert_same_error(lambda packed=packed: theirs(packed), lambda packed=packed: mine(packed))


STATES = {
    "batch": (torch.zeros(2, 4, 3), (1, 3, 5)),
    "batch of 1": (torch.zeros(2, 4, 3), (1, 1, 5)),
    "layers": (torch.zeros(2, 4, 3), (2, 4, 5)),
    "width": (torch.zeros(2, 4, 3), (1, 4, 6)),
    "rank": (torch.zeros(2, 4, 3), (1, 5)),
    "rank unbatched": (torch.zeros(2, 3), (1, 1, 5)),
    "width unbatched": (torch.zeros(2, 3), (1, 6)),
}


@pytest.mark.parametrize("name", support.LAYERS)
@pytest.mark.parametrize(("x", "shape"), STATES.values(), ids=STATES)
def test_bad_states(name: str, x: torch.Tensor, shape: tuple[int, ...]) -> None:
    theirs, mine = support.pair(name, 3, 5, dtype=torch.float32)
    h = torch.zeros(shape)
    hx = (h, h) if name == "LSTM" else h
    assert_same_error(lambda: theirs(x, hx), lambda: mine(x, hx))


@pytest.mark.parametrize("index", [0, 1])
def test_the_bad_state_is_named(index: int) -> None:
    theirs, mine = support.pair("LSTM", 3, 5, dtype=torch.float32)
    hx = [torch.zeros(1, 4, 5), torch.zeros(1, 4, 5)]
    hx[index] = torch.zeros(1, 4, 4)
    assert_same_error(lambda: theirs(torch.zeros(2, 4, 3), hx), lambda: mine(torch.zeros(2, 4, 3), hx))


@pytest.mark.parametrize("enforce_sorted", [True, False])
@pytest.mark.parametrize("name", support.LAYERS)
def test_bad_states_of_packed_input(name: str, enforce_sorted: bool) -> None:
    packed = pack_sequence([torch.zeros(3, 3), torch.zeros(2, 3)], enforce_sorted)
    for shape in ((1, 1, 5), (1, 5), (1, 2, 6)):
        h = torch.zeros(shape)
        # torch.nn.LSTM does not check these: it broadcasts or fails somewhere in ATen.
        with pytest.raises(RuntimeError, match=r"Expected hidden(\[0\])? size \(1, 2, 5\), got"):
            getattr(gpu_rnn, name)(3, 5)(packed, (h, h) if name == "LSTM" else h)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", support.LAYERS)
def test_states_of_another_dtype_or_device(name: str, backend: str) -> None:
    layer = getattr(gpu_rnn, name)(3, 5, backend=backend)
    for options in ({"dtype": torch.float64}, {"device": "meta"}):
        h = torch.zeros(1, 4, 5, **options)
        with pytest.raises(RuntimeError):
            layer(torch.zeros(2, 4, 3), (h, h) if name == "LSTM" else h)


def test_states_in_the_wrong_form() -> None:
    x, h = torch.zeros(2, 4, 3), torch.zeros(1, 4, 5)
    with pytest.raises(TypeError, match="GRU: hx should be a Tensor, got tuple"):
        gpu_rnn.GRU(3, 5)(x, (h,))
    with pytest.raises(TypeError, match=r"LSTM: hx should be a tuple of 2 Tensors \(h, c\), got Tensor"):
        gpu_rnn.LSTM(3, 5)(x, h)
    with pytest.raises(RuntimeError, match=r"LSTM: hx should be a tuple of 2 Tensors \(h, c\), got 3"):
        gpu_rnn.LSTM(3, 5)(x, (h, h, h))
    with pytest.raises(TypeError, match="GRUCell: hx should be a Tensor, got tuple"):
        gpu_rnn.GRUCell(3, 5)(x[0], (h[0],))


@pytest.mark.parametrize("wrong", [nn.GRUCell(3, 5), gpu_rnn.GRUCell, "gru", torch.tanh])
def test_recurrent_says_what_belongs_there(wrong: Any) -> None:
    with pytest.raises(TypeError, match=r"should be a gpu_rnn\.Recurrence, such as gpu_rnn\.cells\.gru\(\)"):
        gpu_rnn.Recurrent(wrong, 3, 5)


@pytest.mark.parametrize("name", [*support.LAYERS, *support.CELLS])
def test_backend_of_an_unknown_name(name: str) -> None:
    with pytest.raises(ValueError, match=r"reference.*got 'no such'"):
        getattr(gpu_rnn, name)(3, 5, backend="no such")


def test_backend_that_cannot_run_the_call_says_why() -> None:
    layer = gpu_rnn.LSTM(3, 5, peephole=True, backend="aten")
    with pytest.raises(ValueError, match=r"(?s)'aten' cannot run.*peephole_lstm"):
        layer(torch.zeros(2, 4, 3))


@pytest.mark.parametrize("name", [*support.LAYERS, *support.CELLS])
def test_script_names_export(name: str) -> None:
    module = nn.Sequential(nn.Linear(3, 3), getattr(gpu_rnn, name)(3, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of torch deprecate torch.jit.script itself
        with pytest.raises(RuntimeError, match=r"torch\.export"):
            torch.jit.script(module)


CELL_CALLS = {
    "input 3-D": (torch.zeros(2, 4, 3), None),
    "features": (torch.zeros(4, 7), None),
    "features unbatched": (torch.zeros(7), None),
    "hidden 4-D": (torch.zeros(4, 3), (4, 1, 1, 5)),
    "hidden 0-D": (torch.zeros(4, 3), ()),
    "width": (torch.zeros(4, 3), (4, 6)),
    "batch": (torch.zeros(4, 3), (2, 5)),
    "batch of 1": (torch.zeros(4, 3), (1, 5)),
    "unbatched width": (torch.zeros(3), (6,)),
}


@pytest.mark.parametrize("name", support.CELLS)
@pytest.mark.parametrize(("x", "shape"), CELL_CALLS.values(), ids=CELL_CALLS)
def test_bad_calls_of_cells(name: str, x: torch.Tensor, shape: tuple[int, ...] | None) -> None:
    theirs, mine = support.pair(name, 3, 5, dtype=torch.float32)
    h = None if shape is None else torch.zeros(shape)
    hx = (h, h) if name == "LSTMCell" and h is not None else h
    assert_same_error(lambda: theirs(x, hx), lambda: mine(x, hx))


@pytest.mark.parametrize("name", support.CELLS)
def test_cell_states_of_another_rank_than_the_input(name: str) -> None:
    cell = getattr(gpu_rnn, name)(3, 5)
    for x, h in ((torch.zeros(3), torch.zeros(1, 5)), (torch.zeros(5, 3), torch.zeros(5))):
        with pytest.raises(RuntimeError, match=f"should also be {x.dim()}-D"):
            cell(x, (h, h) if name == "LSTMCell" else h)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", support.CELLS)
def test_cell_input_of_another_dtype_or_device(name: str, backend: str) -> None:
    cell = getattr(gpu_rnn, name)(3, 5, backend=backend)
    with pytest.raises(RuntimeError):
        cell(torch.zeros(4, 3, dtype=torch.float64))
    with pytest.raises(RuntimeError):
        cell(torch.zeros(4, 3, device="meta"))
