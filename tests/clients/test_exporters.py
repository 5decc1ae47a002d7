# SPDX-License-Identifier: Apache-2.0
"""ONNX files that other libraries write of models with our layers, in ONNX Runtime beside the model.

docs/deploy.md has their versions.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpu_rnn
from tests.clients.libraries import library

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the exporters warn of what they do
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}
KINDS = {"lstm": "LSTM", "gru": "GRU"}


def teach_the_exporter() -> None:
    library("onnxscript", "onnxscript", "onnx")
    importlib.import_module("gpu_rnn.onnx")


def nodes(path: Path) -> list[str]:
    return [node.op_type for node in library("onnx", "onnx", "test").load(path).graph.node]


def session(path: Path) -> Any:
    library("onnx", "onnx", "test").checker.check_model(str(path))
    return library("onnxruntime", "onnxruntime", "test").InferenceSession(str(path))


def run(opened: Any, *inputs: Tensor) -> list[Tensor]:
    names = [each.name for each in opened.get_inputs()]
    return [
        torch.from_numpy(y) for y in opened.run(None, {name: x.numpy() for name, x in zip(names, inputs, strict=True)})
    ]


def policy(kind: str) -> tuple[Any, Any]:
    """An actor of rsl_rl with one environment, and how to draw what it sees."""
    models = library("rsl_rl.models", "rsl-rl-lib")
    data = library("tensordict", "rsl-rl-lib").TensorDict

    def see() -> Any:
        return data({"policy": torch.randn(1, 8)}, [1])

    normal = {"class_name": "GaussianDistribution", "init_std": 1.0, "std_type": "scalar"}
    sizes = {"hidden_dims": [32, 32], "rnn_hidden_dim": 16, "rnn_num_layers": 2}
    actor = models.RNNModel(
        see(),
        {"actor": ["policy"]},
        "actor",
        4,
        rnn_type=kind,
        distribution_cfg=normal,
        obs_normalization=True,
        **sizes,
    )
    return actor.eval(), see


def assert_onnx_file_acts_alike(actor: Any, see: Any, exported: Any, path: Path) -> None:
    """Written as rsl_rl's runner writes it, and as rsl_rl's own tests check it; over some steps, besides."""
    exported.eval()
    names = {"input_names": exported.input_names, "output_names": exported.output_names}
    torch.onnx.export(exported, exported.get_dummy_inputs(), str(path), opset_version=18, verbose=False, **names)
    opened = session(path)
    assert [each.name for each in opened.get_inputs()] == exported.input_names
    assert [each.name for each in opened.get_outputs()] == exported.output_names
    _, *states = exported.get_dummy_inputs()
    for _ in range(3):
        seen = see()
        actions, *states = run(opened, seen["policy"], *states)
        torch.testing.assert_close(actions, actor(seen, stochastic_output=False).detach(), **TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_rsl_rl_writes_a_policy_made_of_our_classes(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """rsl_rl takes the classes from torch.nn, and asks torch.nn for the class again as it exports."""
    monkeypatch.setattr(nn, KINDS[kind], getattr(gpu_rnn, KINDS[kind]))
    actor, see = policy(kind)
    assert type(actor.rnn.rnn) is getattr(gpu_rnn, KINDS[kind])
    teach_the_exporter()
    assert_onnx_file_acts_alike(actor, see, actor.as_onnx(), tmp_path / "policy.onnx")
    assert KINDS[kind] in nodes(tmp_path / "policy.onnx")


@pytest.mark.parametrize("kind", KINDS)
def test_rsl_rl_exports_a_policy_that_is_converted_back(kind: str, tmp_path: Path) -> None:
    actor, see = policy(kind)
    gpu_rnn.convert(actor)
    with pytest.raises(NotImplementedError, match="Unsupported RNN type"):  # rsl_rl's words
        actor.as_onnx()
    actor(see())
    actor.reset()
    gpu_rnn.convert(actor, to="torch")
    script = torch.jit.script(actor.as_jit())
    for _ in range(3):
        seen = see()
        torch.testing.assert_close(script(seen["policy"]), actor(seen, stochastic_output=False), **TOLERANCE)
    actor.reset()
    assert_onnx_file_acts_alike(actor, see, actor.as_onnx(), tmp_path / "policy.onnx")


@pytest.mark.parametrize(
    ("options", "node"), [({}, "LSTM"), ({"layer_norm": True, "num_layers": 2}, "Scan")], ids=["node", "Scan"]
)
def test_lightnings_to_onnx(options: dict[str, Any], node: str, tmp_path: Path) -> None:
    """For every number of steps and samples."""
    lightning = library("lightning", "lightning", "distributed")
    teach_the_exporter()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = gpu_rnn.LSTM(6, 8, bidirectional=True, **options), nn.Linear(16, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    module, path = Module(), tmp_path / "module.onnx"
    sizes = {0: torch.export.Dim("steps"), 1: torch.export.Dim("batch")}
    module.to_onnx(path, torch.randn(5, 2, 6), dynamic_shapes=(sizes,), verbose=False)
    assert node in nodes(path)
    for steps, batch in ((5, 2), (1, 1), (9, 4)):
        x = torch.randn(steps, batch, 6)
        torch.testing.assert_close(run(session(path), x)[0], module(x).detach(), **TOLERANCE)


def keras_layers(name: str) -> list[Any]:
    """What a model of Keras consists of; samples end in zeros, which Masking masks."""
    ours, keras = (
        importlib.import_module("tests.support.keras_layers").gpu_rnn.keras,
        library("keras", "keras", "keras"),
    )
    sequences = {"return_sequences": True}
    both = ours.Bidirectional(ours.GRU(3, reset_after=False, **sequences))
    return {
        "LSTM": [ours.LSTM(4)],
        "LSTM, softsign": [ours.LSTM(4, activation="softsign", **sequences)],
        "LSTM, use_cudnn=True": [ours.LSTM(4, use_cudnn=True)],
        "GRU, reset_after=False": [ours.GRU(4, reset_after=False)],
        "SimpleRNN": [ours.SimpleRNN(3)],
        "a mask": [keras.layers.Masking(), ours.LSTM(4, **sequences)],
        "a mask in both directions": [keras.layers.Masking(), both, ours.LSTM(4, go_backwards=True)],
    }[name]


KERAS_MODELS = (
    "LSTM",
    "LSTM, softsign",
    "LSTM, use_cudnn=True",
    "GRU, reset_after=False",
    "SimpleRNN",
    "a mask",
    "a mask in both directions",
)


def keras_model(keras: Any, name: str) -> Any:
    """A model of these layers that was called once; the exporter knows them."""
    layers = keras_layers(name)
    teach_the_exporter()
    model = keras.Sequential([keras.Input((None, 3)), *layers])
    model(torch.randn(2, 6, 3))
    return model


def assert_keras_model_agrees(model: Any, path: Path, sizes: list[tuple[int, int]]) -> None:
    for batch, steps in sizes:
        x = torch.randn(batch, steps, 3)
        x[0, -2:] = 0
        torch.testing.assert_close(run(session(path), x)[0], model(x).detach(), **TOLERANCE)


@pytest.mark.parametrize("name", KERAS_MODELS)
def test_keras_exports_a_model_of_one_size(name: str, tmp_path: Path) -> None:
    """model.export with an input_signature without None: Keras asks the exporter that knows the layers."""
    keras, path = library("keras", "keras", "keras"), tmp_path / "model.onnx"
    model = keras_model(keras, name)
    model.export(path, format="onnx", verbose=False, input_signature=[keras.InputSpec(shape=(2, 6, 3))])
    assert_keras_model_agrees(model, path, [(2, 6)])


@pytest.mark.parametrize("name", KERAS_MODELS)
def test_torch_exports_a_keras_model_of_every_size(name: str, tmp_path: Path) -> None:
    keras, path = library("keras", "keras", "keras"), tmp_path / "model.onnx"
    model = keras_model(keras, name)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("steps")}
    torch.onnx.export(model.eval(), (torch.randn(2, 6, 3),), path, dynamic_shapes=((sizes,),), verbose=False)
    assert_keras_model_agrees(model, path, [(2, 6), (1, 3), (5, 9)])
