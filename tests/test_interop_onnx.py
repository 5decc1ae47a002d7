# SPDX-License-Identifier: Apache-2.0
"""Weights and attributes to ONNX's operators and back: ONNX's reference evaluator computes the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import gpu_rnn
from gpu_rnn import interop
from tests.support.converted import BATCH, GRID, HIDDEN, INPUT, STEPS, TOLERANCE, draw, make


def onnx_node(cell: str, bidirectional: bool, weights: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    """Y (T, D, B, H) of one node, by ONNX's reference evaluator."""
    onnx = pytest.importorskip("onnx", reason="ONNX is not installed: pip install onnx")
    from onnx.reference import ReferenceEvaluator

    operator = {"lstm": "LSTM", "rnn": "RNN"}.get(cell, "GRU")
    attributes = {"hidden_size": HIDDEN, "direction": "bidirectional" if bidirectional else "forward"}
    if operator == "GRU":
        attributes["linear_before_reset"] = int(cell == "gru")
    given = {"X": x, **weights}
    places = ["X", "W", "R", "B", "", "", "", "P"] if "P" in given else ["X", "W", "R", "B"]
    names = [name if name in given else "" for name in places]
    node = onnx.helper.make_node(operator, names, ["Y"], **attributes)
    inputs = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.DOUBLE, None) for n in given]
    output = onnx.helper.make_tensor_value_info("Y", onnx.TensorProto.DOUBLE, None)
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "layer", inputs, [output]))
    return ReferenceEvaluator(model).run(None, given)[0]


@pytest.mark.parametrize(
    ("cell", "bidirectional", "bias", "num_layers", "peephole"),
    [(*case, False) for case in GRID] + [(*case, True) for case in GRID if case[0] == "lstm"],
)
def test_onnx(cell: str, bidirectional: bool, bias: bool, num_layers: int, peephole: bool) -> None:
    layer = make(cell, bidirectional, bias, num_layers, **({"peephole": True} if peephole else {}))
    x = draw(STEPS, BATCH, INPUT)
    expected, y = layer(x)[0].detach(), x.numpy()
    nodes = interop.to_onnx(layer.state_dict(), cell=cell)
    for weights in nodes:
        y = onnx_node(cell, bidirectional, weights, y).transpose(0, 2, 1, 3).reshape(STEPS, BATCH, -1)
    torch.testing.assert_close(torch.from_numpy(y), expected, **TOLERANCE)
    state = layer.state_dict()
    found = interop.from_onnx(*nodes, cell=cell)
    torch.testing.assert_close(found, dict(state), rtol=0, atol=0)


ATTRIBUTES = [
    ("LSTM", {"clip": 0.3, "bidirectional": True}),
    ("LSTM", {"activation": "relu", "recurrent_activation": "keras2_hard_sigmoid"}),
    ("GRU", {"clip": 0.3, "reset_after": False}),
    ("GRU", {"clip": 2.5}),
    ("RNN", {"nonlinearity": "relu", "clip": 1.0}),
    ("RNN", {"activation": "softsign"}),
    ("LSTM", {"clip": 1}),
]


@pytest.mark.parametrize(("operator", "options"), ATTRIBUTES)
def test_onnx_attributes_there_and_back(operator: str, options: dict[str, Any]) -> None:
    layer = getattr(gpu_rnn, operator)(INPUT, HIDDEN, **options)
    attributes = interop.onnx_attributes(layer)
    assert ("clip" in attributes) == ("clip" in options)
    assert type(attributes.get("clip", 1.0)) is float  # ONNX's attribute of an int is another, which it refuses
    as_read = {name: value.encode() if isinstance(value, str) else value for name, value in attributes.items()}
    again = getattr(gpu_rnn, operator)(INPUT, **interop.options_of_onnx(as_read, operator))
    assert again.recurrence == layer.recurrence and again.bidirectional == layer.bidirectional
    assert interop.onnx_attributes(again) == attributes


def test_onnx_attributes_of_torchs_layers() -> None:
    found = interop.onnx_attributes(nn.GRU(INPUT, HIDDEN, bidirectional=True))
    names = ["Sigmoid", "Tanh"] * 2
    assert found == {
        "hidden_size": HIDDEN,
        "direction": "bidirectional",
        "activations": names,
        "linear_before_reset": 1,
    }


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"input_forget": 1}, "no input_forget"),
        ({"direction": b"reverse"}, "no direction 'reverse'"),
        ({"activations": ["Sigmoid", "Tanh", "Relu"]}, "the same wherever it stands"),
        ({"activations": ["Affine", "Tanh", "Tanh"]}, "recurrent_activation is one of Tanh"),
        ({"clip": -1.0}, "clip should be a positive"),
    ],
)
def test_onnx_attributes_that_no_layer_has(attributes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        gpu_rnn.LSTM(INPUT, **interop.options_of_onnx({"hidden_size": HIDDEN, **attributes}, "LSTM"))
    with pytest.raises(ValueError, match="not 'QLSTM'"):
        interop.options_of_onnx({"hidden_size": HIDDEN}, "QLSTM")
    with pytest.raises(ValueError, match="not gelu"):
        interop.onnx_attributes(gpu_rnn.RNN(INPUT, HIDDEN, activation="gelu"))
    with pytest.raises(ValueError, match="none for slstm"):
        interop.onnx_attributes(gpu_rnn.Recurrent(gpu_rnn.cells.slstm(), INPUT, HIDDEN))


@pytest.mark.parametrize("cell", ["lstm", "gru", "gru_reset_before"])
def test_clip_is_onnxs(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX's reference evaluator ignores the attribute: its activations get the cut that the operator asks for."""
    pytest.importorskip("onnx", reason="ONNX is not installed: pip install onnx")
    from onnx.reference.ops.op_gru import CommonGRU
    from onnx.reference.ops.op_lstm import CommonLSTM

    for operator, names in ((CommonLSTM, "fgh"), (CommonGRU, "fg")):
        for name in names:
            activation = getattr(operator, name)
            monkeypatch.setattr(operator, name, lambda self, x, f=activation: f(self, np.clip(x, -0.3, 0.3)))
    layer = make(cell, clip=0.3)
    x = draw(STEPS, BATCH, INPUT)
    (weights,) = interop.to_onnx(layer.state_dict(), cell=cell)
    y = onnx_node(cell, False, weights, x.numpy()).transpose(0, 2, 1, 3).reshape(STEPS, BATCH, -1)
    torch.testing.assert_close(torch.from_numpy(y), layer(x)[0].detach(), **TOLERANCE)


@pytest.mark.parametrize(
    ("node", "words"),
    [
        ({"W": np.zeros((1, 16, 3))}, "has R, W, and may have B, P; got W"),
        ({"W": np.zeros((1, 12, 3)), "R": np.zeros((1, 12, 4))}, "is `cell` the right one"),
        ({"W": np.zeros((3, 16, 3)), "R": np.zeros((3, 16, 4))}, "one direction or two"),
    ],
)
def test_onnx_weights_that_cannot_be_converted(node: dict[str, np.ndarray], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        interop.from_onnx(node, cell="lstm")


def test_a_tensor_of_an_onnx_file_is_named() -> None:
    onnx = pytest.importorskip("onnx", reason="ONNX is not installed: pip install onnx")
    node = {"W": onnx.numpy_helper.from_array(np.zeros((1, 16, 3))), "R": np.zeros((1, 16, 4))}
    with pytest.raises(TypeError, match=r"got TensorProto of dtype object: onnx\.numpy_helper\.to_array"):
        interop.from_onnx(node, cell="lstm")
