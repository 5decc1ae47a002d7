# SPDX-License-Identifier: Apache-2.0
"""What the public functions check before any kernel, which reads and writes wherever the shapes given lead it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import gpu_rnn
from gpu_rnn import cells, functional

T, B, I, H = 4, 3, 5, 2  # noqa: E741
WEIGHTS = [torch.zeros(4 * H, I), torch.zeros(4 * H, H), torch.zeros(4 * H), torch.zeros(4 * H)]


def state(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(shape), torch.zeros(shape)


@pytest.mark.parametrize("backend", ["auto", "aten", "step", "reference"])
@pytest.mark.parametrize("shape", [(1, 1, H), (1, B, H + 1), (1, B + 1, H), (2, B, H), (B, H)])
def test_states_of_another_shape(shape: tuple[int, ...], backend: str) -> None:
    with pytest.raises(RuntimeError, match=r"hx is \[\(1, 3, 2\), \(1, 3, 2\)\]"):
        functional.rnn(torch.zeros(T, B, I), state(*shape), WEIGHTS, cells.lstm(), backend=backend)


@pytest.mark.parametrize("backend", ["auto", "aten", "step", "reference"])
def test_features_and_weights_of_another_shape(backend: str) -> None:
    with pytest.raises(RuntimeError, match="for an input of 1000 features the weights are"):
        functional.rnn(torch.zeros(T, B, 1000), None, WEIGHTS, cells.lstm(), backend=backend)
    for wrong in (WEIGHTS[:3], [*WEIGHTS, WEIGHTS[0]], [WEIGHTS[0], torch.zeros(4 * H, H + 1), *WEIGHTS[2:]]):
        with pytest.raises(RuntimeError, match="features the weights are"):
            functional.rnn(torch.zeros(T, B, I), None, wrong, cells.lstm(), backend=backend)
    with pytest.raises(RuntimeError, match="features the weights are"):
        functional.rnn(torch.zeros(T, B, I), None, WEIGHTS, cells.lstm(), num_layers=2, backend=backend)


def test_every_kind_of_stack_passes() -> None:
    """The shapes expected are those of the layers' own weights."""
    import gpu_rnn

    options = {"num_layers": 2, "bidirectional": True, "layer_norm": True}
    for layer in (
        gpu_rnn.LSTM(I, H + 1, proj_size=H, peephole=True, **options),
        gpu_rnn.GRU(I, H, bias=False, **options),
    ):
        weights = layer._weights()
        stack = layer._stack()
        assert [tuple(w.shape) for w in weights] == stack.weight_shapes(I, layer.hidden_size)


GRU = [torch.zeros(3 * H, I), torch.zeros(3 * H, H), torch.zeros(3 * H), torch.zeros(3 * H)]
HX = torch.zeros(1, B, H)
DEEP = torch.zeros(1, 1, 5, 127, 1)
STEP = torch.zeros(B, H)
PROJECTED = [torch.zeros(4 * H, I), torch.zeros(4 * H, H), *WEIGHTS[2:], torch.zeros(H, H)]

CELLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "GRU, h of five dimensions": (
        {"hx": (DEEP,), "weights": GRU, "recurrence": cells.gru()},
        RuntimeError,
        r"hx is \(B, H\) each",
    ),
    "LSTM, h of five dimensions": ({"hx": (DEEP, STEP)}, RuntimeError, r"got \(1, 1, 5, 127, 1\) for h"),
    "LSTM, c of three dimensions": ({"hx": (STEP, torch.zeros(1, 1, 4))}, RuntimeError, r"got \(1, 1, 4\) for c"),
    "LSTM, no c": ({"hx": (STEP, None)}, TypeError, r"2 Tensors \(h, c\), got NoneType for c; .* give hx=None"),
    "LSTM, h alone": ({"hx": (STEP,)}, RuntimeError, r"2 Tensors \(h, c\), got 1"),
    "LSTM, a tensor": ({"hx": torch.zeros(2, B, H)}, TypeError, "in a tuple, got Tensor"),
    "another batch": (
        {"hx": (torch.zeros(B + 1, H),) * 2},
        RuntimeError,
        r"hx is \[\(3, 2\), \(3, 2\)\]",
    ),
    "another width": ({"hx": (torch.zeros(B, H + 1),) * 2}, RuntimeError, "hx is"),
    "another dtype": ({"hx": (STEP.double(), STEP)}, RuntimeError, "hidden tensors are not the same dtype"),
    "another device": ({"hx": (STEP.to("meta"), STEP)}, RuntimeError, "hidden tensors are not at the same device"),
    "no biases": ({"weights": WEIGHTS[:2]}, RuntimeError, "the weights are"),
    "biases too many": ({"bias": False}, RuntimeError, "the weights are"),
    "a weight missing": (
        {"weights": [*WEIGHTS[:3], None]},
        TypeError,
        r"weights\[3\] should be a Tensor, got NoneType",
    ),
    "no weights": ({"weights": []}, RuntimeError, r"in a row w_ih \(4·H, 5\)"),
    "a weight": ({"weights": WEIGHTS[0]}, TypeError, "a sequence of Tensors, got Tensor"),
    "weights of a GRU": ({"weights": GRU}, RuntimeError, "the weights are"),
    "x of three dimensions": ({"x": torch.zeros(1, B, I)}, RuntimeError, r"x is \(B, I\), got \(1, 3, 5\)"),
    "x of integers": (
        {"x": torch.zeros(B, I, dtype=torch.int64)},
        TypeError,
        "floating-point or complex numbers, got torch.int64",
    ),
    "x of float64": (
        {"x": torch.zeros(B, I, dtype=torch.float64)},
        RuntimeError,
        "parameter tensors are not the same dtype",
    ),
    "x an array": ({"x": np.zeros((B, I))}, TypeError, "x should be a Tensor, got ndarray"),
    "x sparse": ({"x": torch.zeros(B, I).to_sparse()}, TypeError, "strided"),
    "bias a number": ({"bias": 1}, TypeError, "bias should be True or False, got: 1"),
    "a backend": ({"backend": "cudnn"}, ValueError, "backend must be 'auto' or one of"),
    "a recurrence by name": ({"recurrence": "lstm"}, TypeError, "recurrence should be a gpu_rnn.Recurrence"),
}


@pytest.mark.parametrize("backend", ["auto", "step", "reference"])
@pytest.mark.parametrize("name", CELLS)
def test_malformed_steps_are_refused_in_words(name: str, backend: str) -> None:
    wrong, error, words = CELLS[name]
    call = {
        "x": torch.zeros(B, I),
        "hx": None,
        "weights": WEIGHTS,
        "recurrence": cells.lstm(),
        "backend": backend,
        **wrong,
    }
    with pytest.raises(error, match=words):
        functional.cell(call.pop("x"), call.pop("hx"), call.pop("weights"), call.pop("recurrence"), **call)


def packed(*sizes: int) -> dict[str, Any]:
    return {"x": torch.zeros(7, I), "batch_sizes": torch.tensor(sizes)}


PAD = torch.ones(T, B, dtype=torch.bool)
CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "two dimensions": ({"x": torch.zeros(T, I)}, RuntimeError, r"x is \(T, B, I\), got \(4, 5\)"),
    "batch first": ({"x": torch.zeros(T, I), "batch_first": True}, RuntimeError, r"x is \(B, T, I\)"),
    "no steps": ({"x": torch.zeros(0, B, I)}, RuntimeError, "larger than 0"),
    "packed, three dimensions": (packed(3, 4) | {"x": torch.zeros(7, 1, I)}, RuntimeError, "packed"),
    "packed, growing": (packed(3, 4), ValueError, r"never grow and end above 0.*\[3, 4\]"),
    "packed, negative": (packed(8, -1), ValueError, "never grow and end above 0"),
    "packed, another sum": (packed(4, 4), ValueError, "add up to the rows of x, 7, got 8"),
    "packed, no steps": (
        {"x": torch.zeros(0, I), "batch_sizes": torch.zeros(0, dtype=torch.int64)},
        RuntimeError,
        "larger than 0",
    ),
    "packed, int32": (
        packed(4, 3) | {"batch_sizes": torch.tensor([4, 3], dtype=torch.int32)},
        TypeError,
        "int64 tensor .* on the CPU",
    ),
    "packed, on a device": (
        packed(4, 3) | {"batch_sizes": torch.tensor([4, 3]).to("meta")},
        TypeError,
        "on the CPU.* on meta",
    ),
    "packed, a list": (packed(4, 3) | {"batch_sizes": [4, 3]}, TypeError, "batch_sizes is an int64 tensor"),
    "packed, and a mask": (packed(4, 3) | {"mask": PAD}, ValueError, "mask cannot come with a PackedSequence"),
    "no c": ({"hx": (HX, None)}, TypeError, "got NoneType for c"),
    "layers of half": ({"num_layers": 0.5}, TypeError, "num_layers should be an integer"),
    "no layers": ({"num_layers": 0}, ValueError, "num_layers should be 1 or more"),
    "dropout": ({"dropout": 7}, ValueError, r"dropout should be a number in range \[0, 1\]"),
    "dropout, half": ({"dropout": "half"}, TypeError, "dropout should be a number"),
    "projection": ({"proj_size": -1}, ValueError, "proj_size should be 0 or more"),
    "projection as wide": ({"proj_size": H, "weights": PROJECTED}, ValueError, "smaller than hidden_size"),
    "projection of a GRU": ({"proj_size": 1, "recurrence": cells.gru()}, ValueError, "only supported for LSTM"),
    "projection of a cell that takes h": (
        {"proj_size": 1, "recurrence": cells.gru(reset_after=False)},
        ValueError,
        "unit by unit",
    ),
    "bidirectional": ({"bidirectional": 1}, TypeError, "bidirectional should be True or False"),
    "training": ({"training": None}, TypeError, "training should be True or False"),
    "mask of floats": ({"mask": torch.ones(T, B)}, TypeError, "mask is a bool tensor"),
    "mask of an array of floats": ({"mask": np.ones((T, B))}, TypeError, "mask is a bool tensor"),
    "mask, a list": ({"mask": [True]}, TypeError, "mask is a bool tensor"),
    "mask of another shape": ({"mask": PAD[1:]}, ValueError, r"without its features, \(4, 3\), got \(3, 3\)"),
    "lengths, one": ({"lengths": torch.tensor(3)}, ValueError, "one number for each"),
    "lengths beyond": ({"lengths": np.array([1, 2, 400_000])}, ValueError, "between 0 and 4"),
    "reset_state, one": ({"resets": PAD, "reset_state": (HX,)}, RuntimeError, "reset_state should be 2 Tensors"),
    "reset_state, None": ({"resets": PAD, "reset_state": (HX, None)}, TypeError, "got NoneType for c"),
    "recurrent_mask": ({"recurrent_mask": torch.ones(1, B, 3, H)}, ValueError, "recurrent_mask is"),
    "recurrent_mask, a list": ({"recurrent_mask": [1.0]}, TypeError, "recurrent_mask is a tensor"),
    "zone of floats": ({"zone": torch.ones(2, T, 1, B, H)}, ValueError, "zone is bool"),
}


@pytest.mark.parametrize("backend", ["auto", "step", "reference"])
@pytest.mark.parametrize("name", CALLS)
def test_malformed_calls_are_refused_in_words(name: str, backend: str) -> None:
    wrong, error, words = CALLS[name]
    call = {
        "x": torch.zeros(T, B, I),
        "hx": None,
        "weights": WEIGHTS,
        "recurrence": cells.lstm(),
        "backend": backend,
        **wrong,
    }
    with pytest.raises(error, match=words):
        functional.rnn(call.pop("x"), call.pop("hx"), call.pop("weights"), call.pop("recurrence"), **call)


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.uint64, np.dtype(">i4"), np.dtype(">i8")], ids=str)
def test_lengths_of_any_integers_and_masks_of_arrays_are_taken(dtype: Any) -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(300, B, I), [torch.randn_like(w) for w in WEIGHTS]
    lengths = np.array([300, 256, 1]).clip(max=255 if dtype == np.uint8 else 300)
    given = functional.rnn(x, None, weights, cells.lstm(), lengths=lengths.astype(dtype))
    expected = functional.rnn(x, None, weights, cells.lstm(), lengths=torch.as_tensor(lengths))
    masked = functional.rnn(x, None, weights, cells.lstm(), mask=np.arange(300)[:, None] < lengths)
    for own, other, third in zip(
        (given[0], *given[1]), (expected[0], *expected[1]), (masked[0], *masked[1]), strict=True
    ):
        assert torch.equal(own, other)
        torch.testing.assert_close(third, other)


def test_under_autocast_tensors_of_other_dtypes_are_taken_as_torch_takes_them() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = functional.rnn(torch.randn(T, B, I).bfloat16(), (HX, HX), WEIGHTS, cells.lstm(), backend="step")
        (h, _) = functional.cell(torch.randn(B, I).bfloat16(), (STEP, STEP), WEIGHTS, cells.lstm(), backend="step")
    assert y.dtype == h.dtype == torch.bfloat16


def test_a_packed_sequence_under_another_default_device() -> None:
    """batch_sizes are on the CPU, wherever tensors are made by default."""
    layer = gpu_rnn.LSTM(2, 3, activation="relu")
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(3, 2), torch.randn(2, 2)])
    wanted = layer(packed)[0].data
    with torch.device("meta"):
        found = layer(packed)[0].data
    assert torch.equal(found, wanted)
