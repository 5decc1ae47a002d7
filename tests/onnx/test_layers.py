# SPDX-License-Identifier: Apache-2.0
"""Layers and cells as ONNX nodes: which, and what ONNX Runtime makes of them at other numbers of steps and samples."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gpu_rnn
from gpu_rnn import cells
from gpu_rnn.call import loops
from gpu_rnn.compiler.onnx_nodes import ONNX, emit_operations
from gpu_rnn.compiler.operations import OPERATIONS, Op
from gpu_rnn.onnx import operators, translation
from tests.support import onnx_runtime as support

I, H = 3, 5  # noqa: E741
SIZES = ((7, 4), (12, 3), (1, 1))

Call = Callable[[Tensor], dict[str, Any]]


class Model(nn.Module):
    """Layers side by side, each with what steers its steps made of the input."""

    def __init__(self, *layers: tuple[nn.Module, Call | None]) -> None:
        super().__init__()
        self.layers, self.calls = nn.ModuleList(layer for layer, _ in layers), [call for _, call in layers]

    def forward(self, x: Tensor) -> list[Any]:
        return [layer(x, **(call(x) if call else {})) for layer, call in zip(self.layers, self.calls, strict=True)]


def lengths(x: Tensor) -> dict[str, Any]:
    return {"lengths": (x[:, :, 0] > -0.5).sum(0)}


def right(model: nn.Module, dtype: torch.dtype = torch.float32, tolerance: float = 1e-5) -> support.Exported:
    model = model.eval()
    x = torch.randn(6, 2, I, dtype=dtype)
    exported = support.Exported(model, (x,), ({0: support.STEPS, 1: support.BATCH},))
    for sizes in SIZES:
        support.agrees(exported, model, (torch.randn(*sizes, I, dtype=dtype),), tolerance)
    return exported


def test_what_onnx_has_a_node_for() -> None:
    model = Model(
        (gpu_rnn.LSTM(I, H, 2, bidirectional=True, backend="aten"), None),
        (gpu_rnn.LSTM(I, H, peephole=True, bidirectional=True), lengths),
        (gpu_rnn.GRU(I, H, recurrent_activation="keras2_hard_sigmoid", clip=0.3), None),
        (gpu_rnn.GRU(I, H, reset_after=False, activation="softsign"), lengths),
        (gpu_rnn.RNN(I, H, nonlinearity="relu", bias=False), lambda x: {"return_all_states": True}),
    )
    found = right(model).operators
    assert {name: found[name] for name in ("LSTM", "GRU", "RNN", "Scan")} == {"LSTM": 3, "GRU": 2, "RNN": 1, "Scan": 0}


def leaky(x: Any, r: Any, s: Any, p: Any) -> Any:
    """Its second state knows nothing of the input."""
    return torch.sigmoid(p.rate) * s.h + F.gelu(x.a + r.a), p.rate


def test_what_is_a_scan() -> None:
    own = gpu_rnn.Recurrence(leaky, gates=("a",), states=("h", "last"), params=("rate",))
    model = Model(
        (gpu_rnn.Recurrent(own, I, H), lambda x: {"return_all_states": True}),
        (gpu_rnn.LSTM(I, H, batch_first=True, zoneout=0.2, clip=0.5), None),
    )
    assert right(model).operators["Scan"] == 2


class Steps(nn.Module):
    """Cells, which take one step."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = gpu_rnn.LSTMCell(I, H), gpu_rnn.GRUCell(H, H, activation="gelu")

    def forward(self, x: Tensor, h: Tensor) -> Tensor:
        return self.second(self.first(x)[0], h)


def test_cells() -> None:
    model, draw = Steps().eval(), (lambda batch: (torch.randn(batch, I), torch.randn(batch, H)))
    exported = support.Exported(model, draw(3), ({0: support.BATCH}, {0: support.BATCH}))
    for batch in (4, 1, 9):
        support.agrees(exported, model, draw(batch))


def test_a_wavefront(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of a stack by one operation, as a model on a GPU is recorded."""
    monkeypatch.setattr(loops, "_staggered", lambda stack, x, *rest: torch.compiler.is_compiling())
    layer = gpu_rnn.Recurrent(cells.coupled_lstm(), I, H, 3)
    model = Model((layer, lambda x: {"mask": x[..., 0] > -0.5, "return_all_states": True}))
    assert right(model).operators["Scan"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("activation", gpu_rnn.activations.ACTIVATIONS)
def test_every_activation(activation: str) -> None:
    model = Model(*((layer(I, H, activation=activation), None) for layer in (gpu_rnn.LSTM, gpu_rnn.GRU, gpu_rnn.RNN)))
    if activation == "exp":  # with a new layer's weights it outgrows float32 in a few steps
        for weight in model.parameters():
            nn.init.uniform_(weight, -0.1, 0.1)
    right(model)


@pytest.mark.slow
@pytest.mark.parametrize("cell", cells.CELLS)
def test_every_cell_in_a_stack(cell: str) -> None:
    layers = [gpu_rnn.Recurrent(cells.CELLS[cell](), I, H, 2, bidirectional=b) for b in (False, True)]
    right(Model(*((layer, lengths) for layer in layers)))


@pytest.mark.slow
def test_half_precision() -> None:
    """Of float16 the operators, which ONNX Runtime computes in float32 on a CPU."""
    model = Model((gpu_rnn.LSTM(I, H, dtype=torch.float16), None), (gpu_rnn.GRU(I, H, activation="gelu").half(), None))
    right(model, torch.float16, 5e-3)


def test_every_operation_has_its_nodes() -> None:
    assert ONNX.keys() == OPERATIONS.keys()


class InNumPy:
    """The nodes of a row as NumPy computes them."""

    def __call__(self, operator: str, *inputs: Any) -> Any:
        names = {"Mul": "multiply", "Sub": "subtract", "Div": "divide"}
        return getattr(np, names.get(operator, operator.lower()))(*inputs)

    def number(self, value: float) -> Any:
        return np.float32(value)


@pytest.mark.parametrize("name", ["expm1", "log1p", "relu"])
@pytest.mark.filterwarnings("ignore:(divide by zero|invalid value|overflow):RuntimeWarning")
def test_rows_of_several_nodes(name: str) -> None:
    """To the last places of float32, near 0 too, and at infinity and NaN."""
    small = [0.0, 1e-30, -1e-12, 1e-7, -3e-5, 0.01, -0.3, 0.7, 3.0, 40.0, float("inf"), float("nan")]
    values = {"x": np.array(small if name == "log1p" else [*small, -5.0, -60.0, -float("inf")], np.float32)}
    emit_operations(InNumPy(), [Op("t0", name, ("x",))], values)
    expected = OPERATIONS[name].torch(torch.from_numpy(values["x"]).double())
    torch.testing.assert_close(torch.from_numpy(values["t0"]).double(), expected, rtol=5e-7, atol=0, equal_nan=True)


def test_a_cell_that_is_an_operator_is_known_whoever_wrote_it() -> None:
    def step(x: Any, r: Any, s: Any) -> Any:
        return torch.relu(x.h + r.h)

    written = gpu_rnn.Recurrence(step, gates=("h",), states=("h",), name="mine")
    assert operators.of(written.text()) == operators.Operator("RNN", "rnn", ("Relu",), None)
    assert operators.of(cells.gru("elu", clip=2.0).text()) == operators.Operator("GRU", "gru", ("Sigmoid", "Elu"), 2.0)
    assert operators.of(cells.lstm(clip=0.5).text()) is None
    assert operators.of(cells.coupled_lstm().text()) is None


def test_what_keeps_something_for_its_derivative_is_refused() -> None:
    with pytest.raises(ValueError, match="for inference"):
        translation.rnn(*[None] * 15, [], [], cells.lstm().text(), "auto 0 save y")


NOT_IMPORTED = """
import torch, gpu_rnn
try:
    torch.onnx.export(gpu_rnn.GRU(3, 4).eval(), (torch.randn(5, 2, 3),), dynamo=True, verbose=False)
except torch.onnx.OnnxExporterError as error:
    print("import gpu_rnn.onnx" in str(error))
"""


@pytest.mark.slow
def test_an_export_without_the_import_names_it() -> None:
    done = subprocess.run([sys.executable, "-c", NOT_IMPORTED], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True", done.stderr


@pytest.mark.parametrize("option", ["recurrent_dropout", "zoneout", "weight_drop"])
def test_what_is_drawn_while_a_file_is_written(option: str) -> None:
    """It would stay in the file."""
    layer = gpu_rnn.GRU(I, H, **{option: 0.5})
    with (
        pytest.warns(UserWarning, match="Exporting a model while it is in training mode"),
        pytest.warns(UserWarning, match="GRU is in training mode: an ONNX file would hold"),
    ):
        support.Exported(layer, (torch.randn(4, 2, I),), None)
