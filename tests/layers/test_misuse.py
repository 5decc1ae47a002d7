# SPDX-License-Identifier: Apache-2.0
"""What people try that torch.nn does not have: it is taken as it is meant, or refused where it is written, in words."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import gpu_rnn
from gpu_rnn import interop
from tests.support import layers as support
from tests.support.paths import ROOT

T, B, I, H = 6, 4, 3, 5  # noqa: E741
X, PAD = torch.zeros(T, B, I), torch.ones(T, B, dtype=torch.bool)
STATE = torch.zeros(1, B, H)

CONSTRUCTORS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "masks for each gate of no dropout": (
        lambda: gpu_rnn.LSTM(I, H, recurrent_dropout_per_gate=True),
        ValueError,
        "give recurrent_dropout=p, too",
    ),
    "softmax": (
        lambda: gpu_rnn.LSTM(I, H, activation=lambda v: v.softmax(-1)),
        ValueError,
        "which a recurrence cannot hold",
    ),
    "a mean": (lambda: gpu_rnn.GRUCell(I, H, activation=lambda v: v - v.mean()), ValueError, "gru: .* a recurrence"),
    "dropout": (lambda: gpu_rnn.RNN(I, H, activation=F.dropout), ValueError, "draws random numbers"),
    "a module that draws": (lambda: gpu_rnn.RNN(I, H, activation=nn.RReLU()), ValueError, "draws random numbers"),
    "a module with weights": (lambda: gpu_rnn.RNN(I, H, activation=nn.PReLU()), TypeError, "a PReLU has weights"),
    "a class": (lambda: gpu_rnn.RNN(I, H, activation=nn.Tanh), TypeError, r"such as torch.tanh or torch.nn.Tanh\(\)"),
    "an option of others": (
        lambda: gpu_rnn.RNN(I, H, recurrent_activation="tanh"),
        TypeError,
        "besides torch.nn's it takes activation, clip, backend, recurrent_dropout",
    ),
    "a mask": (
        lambda: gpu_rnn.GRU(I, H, mask=PAD),
        TypeError,
        r"mask is an argument of the call: layer\(x, mask=...\)",
    ),
    "all states": (
        lambda: gpu_rnn.RNN(I, H, return_all_states=True),
        TypeError,
        "return_all_states is an argument of the call",
    ),
    "a function of two": (
        lambda: gpu_rnn.GRU(I, H, recurrent_activation=lambda v, w: v),
        ValueError,
        r"^gru: recurrent_activation <lambda>: test_misuse.py:\d+ `<lambda>`: .* missing 1 required",
    ),
    "one of torch's of two": (
        lambda: gpu_rnn.LSTM(I, H, activation=torch.softmax),
        ValueError,
        # Of Python's own signature, and of torch 2.11's.
        "^lstm: activation softmax: `softmax`: .* (missing 1 required|invalid combination of arguments)",
    ),
    "one of NumPy's": (
        lambda: gpu_rnn.LSTM(I, H, activation=np.tanh),
        ValueError,
        "^lstm: activation tanh: `tanh` branches on",
    ),
    "a module of many units": (
        lambda: gpu_rnn.LSTM(I, H, activation=nn.Softmax(0)),
        ValueError,
        "^lstm: activation Softmax: `Softmax` uses aten",
    ),
    "two values": (
        lambda: gpu_rnn.RNN(I, H, activation=lambda v: (v, v)),
        ValueError,
        "^rnn: activation <lambda>: test_misuse.py:.* returned 2 values",
    ),
    "Keras's None": (lambda: gpu_rnn.LSTM(I, H, activation=None), TypeError, "Keras's None is 'linear' here"),
    "a clip of nothing": (lambda: gpu_rnn.LSTM(I, H, clip=0), ValueError, "clip should be a positive, finite number"),
    "a clip of NaN": (lambda: gpu_rnn.GRUCell(I, H, clip=float("nan")), ValueError, "clip should be a positive"),
    "a clip that is true": (
        lambda: gpu_rnn.RNN(I, H, clip=True),
        TypeError,
        "clip should be a positive number or None",
    ),
    "a probability in words": (lambda: gpu_rnn.LSTM(I, H, zoneout="half"), TypeError, "zoneout should be a number"),
    "a probability of NumPy": (lambda: gpu_rnn.LSTM(I, H, weight_drop=np.float32(7)), ValueError, r"in range \[0, 1\]"),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_what_cannot_be_is_said_by_the_constructor(name: str) -> None:
    make, error, words = CONSTRUCTORS[name]
    with pytest.raises(error, match=words):
        make()


CALLS: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "a mask by place": (
        lambda: gpu_rnn.LSTM(I, H)(X, None, PAD),
        TypeError,
        r"LSTM: .* by name: layer\(x, hx, mask=mask\)",
    ),
    "all states in words": (
        lambda: gpu_rnn.GRU(I, H)(X, return_all_states="last"),
        TypeError,
        "True or False, got: 'last'",
    ),
    "no c": (lambda: gpu_rnn.LSTM(I, H)(X, (STATE, None)), TypeError, r"\(h, c\), got NoneType for c"),
    "no c of a cell": (lambda: gpu_rnn.LSTMCell(I, H)(X[0], (STATE[0], None)), TypeError, "got NoneType for c"),
    "h of float64": (
        lambda: gpu_rnn.GRU(I, H)(X, STATE.double()),
        RuntimeError,
        "hidden tensors are not the same dtype",
    ),
    "c of float64": (lambda: gpu_rnn.LSTM(I, H)(X, (STATE, STATE.double())), RuntimeError, "are not the same dtype"),
    "h of a cell": (lambda: gpu_rnn.GRUCell(I, H)(X[0], STATE[0].double()), RuntimeError, "are not the same dtype"),
    "x of a cell": (
        lambda: gpu_rnn.GRUCell(I, H)(X[0].double()),
        RuntimeError,
        "Input and parameter tensors are not the same dtype, found input tensor with torch.float64",
    ),
    "x and h of a cell": (
        lambda: gpu_rnn.LSTMCell(I, H)(X[0].double(), (STATE[0].double(), STATE[0].double())),
        RuntimeError,
        "parameter tensors are not the same dtype",
    ),
    "quantized numbers": (
        lambda: gpu_rnn.GRU(I, H)(support.quantized(X)),
        TypeError,
        r"input should hold floating-point numbers, got a quantized tensor: use .dequantize\(\)",
    ),
    "an array": (lambda: gpu_rnn.GRU(I, H)(X.numpy()), TypeError, "input should be a Tensor, got ndarray"),
    "an array with a mask": (
        lambda: gpu_rnn.GRU(I, H)(X.numpy(), mask=PAD.numpy()),
        TypeError,
        "input should be a Tensor",
    ),
    "lengths of nothing": (
        lambda: gpu_rnn.GRU(I, H)(X, lengths=[None, X, 1]),
        TypeError,
        r"lengths are a list or tensor of \(B\) integers",
    ),
    "states as a number": (lambda: gpu_rnn.LSTM(I, H)(X, 0), TypeError, r"a tuple of 2 Tensors \(h, c\), got int"),
    "a list": (lambda: gpu_rnn.GRUCell(I, H)(X[0].tolist()), TypeError, "input should be a Tensor, got list"),
    "a sparse tensor": (lambda: gpu_rnn.GRU(I, H)(X.to_sparse()), TypeError, r"use .to_dense\(\)"),
    "one length": (
        lambda: gpu_rnn.GRU(I, H)(X[:, 0], lengths=3),
        TypeError,
        r"a list or tensor of \(B\) integers, .* got 3",
    ),
    "lengths of one row": (lambda: gpu_rnn.GRU(I, H)(X[:, 0], lengths=[3, 2]), ValueError, "each of the 1 rows"),
    "a mask turned": (lambda: gpu_rnn.GRU(I, H)(X, mask=PAD.T), ValueError, r"features, \(6, 4\), got \(4, 6\)"),
    "a mask of steps": (lambda: gpu_rnn.GRU(I, H)(X, mask=PAD[:, 0]), ValueError, r"features, \(6, 4\), got \(6,\)"),
    "a mask turned, batch first": (
        lambda: gpu_rnn.GRU(I, H, batch_first=True)(X.transpose(0, 1), mask=PAD),
        ValueError,
        r"features, \(4, 6\), got \(6, 4\)",
    ),
    "a mask of steps, batch first": (
        lambda: gpu_rnn.GRU(I, H, batch_first=True)(X.transpose(0, 1), resets=PAD[:, 0]),
        ValueError,
        r"resets is .* features, \(4, 6\), got \(6,\)",
    ),
    "a mask with rows, unbatched": (
        lambda: gpu_rnn.GRU(I, H)(X[:, 0], mask=PAD[:, :1]),
        ValueError,
        r"features, \(6,\), got \(6, 1\)",
    ),
    "a short mask, unbatched": (
        lambda: gpu_rnn.GRU(I, H, batch_first=True)(X[:, 0], mask=PAD[1:, 0]),
        ValueError,
        r"features, \(6,\), got \(5,\)",
    ),
    "explain a layer of torch": (
        lambda: gpu_rnn.explain(nn.LSTM(I, H), X),
        TypeError,
        "gpu_rnn.LSTM, not torch.nn.LSTM",
    ),
    "debug without values": (
        lambda: gpu_rnn.debug(gpu_rnn.GRU(I, H), X.to("meta")),
        ValueError,
        "x is on meta, the layer on cpu",
    ),
    "debug of a layer without values": (
        lambda: gpu_rnn.debug(gpu_rnn.GRU(I, H, device="meta"), X.to("meta")),
        ValueError,
        "x is on meta, the layer on meta",
    ),
    "more layers than it was made with": (lambda: set_to("num_layers", 2)(X), RuntimeError, "has 4 weights, and 8 for"),
    "no biases": (lambda: set_to("bias", False)(X), RuntimeError, "LSTM has 4 weights, and 2 .*: make another layer"),
    "a mask of floats": (lambda: gpu_rnn.GRU(I, H)(X, mask=np.ones((T, B))), TypeError, "mask is a bool tensor"),
    "a packed sequence's mask": (
        lambda: gpu_rnn.GRU(I, H)(pack_sequence([X[:, 0]]), mask=np.ones((T, 1), bool)),
        ValueError,
        "mask cannot come with a PackedSequence",
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_what_cannot_be_is_said_by_the_call(name: str) -> None:
    call, error, words = CALLS[name]
    with pytest.raises(error, match=words):
        call()


def set_to(name: str, value: Any, **options: Any) -> Any:
    layer = gpu_rnn.LSTM(I, H, **options)
    setattr(layer, name, value)
    return layer


ASSIGNMENTS: dict[str, tuple[str, Any, type[Exception], str]] = {
    "recurrent_dropout": (
        "recurrent_dropout",
        7,
        ValueError,
        r"recurrent_dropout should be a number in range \[0, 1\]",
    ),
    "weight_drop": ("weight_drop", "0.5", TypeError, "weight_drop should be a number"),
    "dropout": ("dropout", -1, ValueError, r"dropout should be a number in range \[0, 1\]"),
    "zoneout": ("zoneout", (0.1,), ValueError, "one for each state"),
    "per gate": ("recurrent_dropout_per_gate", "yes", TypeError, "True or False, got: 'yes'"),
    "return_sequences": ("return_sequences", None, TypeError, "True or False"),
    "kernel_initializer": ("kernel_initializer", "glorot", ValueError, "unknown initializer"),
    "backend": ("backend", "cudnn", ValueError, "backend must be"),
    "activation": ("activation", torch.relu, AttributeError, "activation is part of the recurrence"),
    "recurrent_activation": ("recurrent_activation", "hard_sigmoid", AttributeError, "make another layer"),
    "peephole": ("peephole", True, AttributeError, "peephole is part of the recurrence"),
    "clip": ("clip", 2.0, AttributeError, "clip is part of the recurrence"),
    "layer_norm": ("layer_norm", True, AttributeError, "layer_norm"),
}


@pytest.mark.parametrize("name", ASSIGNMENTS)
def test_attributes_are_checked_when_they_are_set(name: str) -> None:
    attribute, value, error, words = ASSIGNMENTS[name]
    with pytest.raises(error, match=words):
        set_to(attribute, value)


def test_attributes_may_be_set_to_what_they_may_be() -> None:
    layer = set_to("recurrent_dropout", np.float32(0.5), num_layers=2)
    layer.recurrent_dropout_per_gate, layer.zoneout, layer.dropout, layer.backend = True, np.float64(0.25), 0.5, "step"
    assert layer.zoneout == (0.25, 0.25) and layer.recurrent_dropout == 0.5
    assert copy.deepcopy(layer)(X)[0].shape == (T, B, H)
    relu = gpu_rnn.RNN(I, H, nonlinearity="relu")
    with pytest.raises(AttributeError, match="nonlinearity is part of the recurrence"):
        relu.nonlinearity = "tanh"
    with pytest.raises(AttributeError, match="activation is part"):
        gpu_rnn.GRUCell(I, H).activation = "relu"


def test_a_subclass_has_attributes_of_its_own() -> None:
    class Classifier(gpu_rnn.GRU):
        def __init__(self) -> None:
            super().__init__(I, H)
            self.activation = nn.ReLU()

    assert isinstance(Classifier().activation, nn.ReLU)


@pytest.mark.parametrize("name", ["LSTM", "GRUCell"])
def test_sizes_that_the_weights_do_not_have(name: str) -> None:
    module = getattr(gpu_rnn, name)(I, H)
    module(X[0])
    module.hidden_size = H + 2
    with pytest.raises(RuntimeError, match=rf"{name}: weight_ih\w* should be \(\d+, 3\), got"):
        module(X[0])


@pytest.mark.parametrize(
    "module", [nn.Tanh(), nn.Hardtanh(), nn.SiLU(), nn.GELU("tanh"), nn.ReLU(inplace=False)], ids=str
)
def test_modules_that_are_plain_functions_are_activations(module: nn.Module) -> None:
    layer = gpu_rnn.LSTM(I, H, activation=module)
    other = gpu_rnn.LSTM(I, H, activation=lambda v: module(v))
    other.load_state_dict(layer.state_dict())
    x = torch.randn(T, B, I)
    torch.testing.assert_close(layer(x)[0], other(x)[0], rtol=0, atol=0)
    assert f"activation={type(module).__name__}" in repr(layer)


@pytest.mark.parametrize("name", support.LAYERS)
def test_masks_of_arrays_are_taken(name: str) -> None:
    layer, x = getattr(gpu_rnn, name)(I, H, batch_first=True), torch.randn(B, T, I)
    mask, resets = np.random.default_rng(0).random((2, B, T)) < 0.7
    given = layer(x, mask=mask, resets=resets)
    expected = layer(x, mask=torch.from_numpy(mask), resets=torch.from_numpy(resets))
    for own, other in zip(support.leaves(given), support.leaves(expected), strict=True):
        assert torch.equal(own, other)
    one = layer(x[0], mask=mask[0])[0]
    torch.testing.assert_close(one, layer(x[:1], mask=mask[:1])[0][0])


def test_weights_of_arrays_in_another_byte_order() -> None:
    layer = gpu_rnn.LSTM(I, H)
    state = {name: tensor.numpy() for name, tensor in layer.state_dict().items()}
    other = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in state.items()}
    for own, expected in zip(*(interop.to_keras(each, "lstm")[0] for each in (other, state)), strict=True):
        np.testing.assert_array_equal(own, expected)


def test_code_for_torch_nn_finds_what_it_calls() -> None:
    layer, theirs = gpu_rnn.LSTM(I, H), nn.LSTM(I, H)
    for each in (layer, theirs):
        each._flat_weights = [
            getattr(each, name) for name in each._flat_weights_names
        ]  # as after a weight was replaced
        each.check_forward_args(X, (STATE, STATE), None)
        with pytest.raises(RuntimeError, match=r"Expected hidden\[1\] size"):
            each.check_forward_args(X, (STATE, STATE[:, 1:]), None)
        h, c = each.permute_hidden((STATE, STATE + 1), torch.arange(B).flip(0))
        assert (c == 1).all() and each.permute_hidden((h, c), None) == (h, c)
    with pytest.raises(AttributeError, match="set weight_hh_l0 of this layer"):
        layer._flat_weights = [w if w.dim() != 2 or w.shape[1] != H else w.clone() for w in layer._flat_weights]


TYPED = """
import torch
from torch import Tensor
import gpu_rnn

x, pad = torch.zeros(5, 2, 3), torch.ones(5, 2, dtype=torch.bool)
y, (h, c) = gpu_rnn.LSTM(3, 4)(x, mask=pad)
z, n, every = gpu_rnn.GRU(3, 4)(x, lengths=[5, 3], return_all_states=True)
tensors: list[Tensor] = [y, h, c, z, n, every, gpu_rnn.GRUCell(3, 4)(x[0])]
packed, _ = gpu_rnn.RNN(3, 4)(torch.nn.utils.rnn.pack_sequence([x[:, 0]]))
data: Tensor = packed.data
"""
UNTYPED = [
    'gpu_rnn.GRU(3, 4)(x, mask="no")',
    "gpu_rnn.GRU(3, 4)(x, masks=pad)",
    "gpu_rnn.LSTM(3, 4)(x, h)",
    "z + packed",
]


@pytest.mark.slow
def test_calls_are_typed(tmp_path: Path) -> None:
    if shutil.which("mypy", path=str(Path(sys.executable).parent)) is None:
        pytest.skip("mypy is not installed")
    program = tmp_path / "typed.py"
    program.write_text(TYPED + "\n".join(UNTYPED))
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(tmp_path / "cache"), str(program)]
    found = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=found)
    lines = [line for line in done.stdout.splitlines() if line.startswith("typed.py") and ": error:" in line]
    wrong = {int(line.split(":")[1]) for line in lines}
    first = len(TYPED.splitlines()) + 1
    assert wrong == set(range(first, first + len(UNTYPED))), done.stdout


def test_dropout_of_a_sweep_may_be_zero() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gpu_rnn.LSTM(I, H, recurrent_dropout=0.0, recurrent_dropout_per_gate=True)
