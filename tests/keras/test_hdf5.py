# SPDX-License-Identifier: Apache-2.0
"""HDF5 files of 2018, made here by hand as Keras 2 wrote them: CuDNNLSTM and CuDNNGRU are loaded, whole or as
weights."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("keras") is None:
    pytest.skip("Keras is not installed: pip install gpu-rnn[keras]", allow_module_level=True)
import h5py

from gpu_rnn import interop
from tests.support import keras_layers as support
from tests.support.keras_layers import gpu_rnn, keras

pytestmark = support.quiet

INPUT, UNITS, STEPS, BATCH = 3, 5, 7, 2
GATES = {"CuDNNLSTM": "ifco", "CuDNNGRU": "zrh"}
ACTS = {"i": "sigmoid", "f": "sigmoid", "o": "sigmoid", "z": "sigmoid", "r": "sigmoid"}
KINDS = pytest.mark.parametrize("kind", GATES)


class CuDNN:
    """One direction as NVIDIA documents it (cudnnRNNMode_t): for each gate W (H, I), R (H, H) and two biases."""

    def __init__(self, kind: str, features: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.kind, self.features = kind, features
        self.w = {gate: rng.normal(size=(UNITS, features)).astype("float32") for gate in GATES[kind]}
        self.r = {gate: rng.normal(size=(UNITS, UNITS)).astype("float32") for gate in GATES[kind]}
        self.b_w = {gate: rng.normal(size=UNITS).astype("float32") for gate in GATES[kind]}
        self.b_r = {gate: rng.normal(size=UNITS).astype("float32") for gate in GATES[kind]}

    def weights(self) -> dict[str, np.ndarray]:
        """As the file has them: gate beside gate, each a matrix (I, H) or (H, H) that cuDNN reads row by row as (H,
        I)."""
        order = GATES[self.kind]
        return {
            "kernel": np.hstack([self.w[gate].reshape(self.features, UNITS) for gate in order]),
            "recurrent_kernel": np.hstack([self.r[gate].reshape(UNITS, UNITS) for gate in order]),
            "bias": np.concatenate([part[gate] for part in (self.b_w, self.b_r) for gate in order]),
        }

    def __call__(self, x: np.ndarray) -> np.ndarray:
        h = c = np.zeros((len(x), UNITS))
        outputs = []
        for step in x.transpose(1, 0, 2):
            own = {gate: step @ self.w[gate].T + self.b_w[gate] for gate in self.w}
            rec = {gate: h @ self.r[gate].T + self.b_r[gate] for gate in self.r}
            act = {gate: 1 / (1 + np.exp(-own[gate] - rec[gate])) for gate in own if gate in ACTS}
            if self.kind == "CuDNNLSTM":
                c = act["f"] * c + act["i"] * np.tanh(own["c"] + rec["c"])
                h = act["o"] * np.tanh(c)
            else:
                h = (1 - act["z"]) * np.tanh(own["h"] + act["r"] * rec["h"]) + act["z"] * h
            outputs.append(h)
        return np.stack(outputs, 1)


def initializer() -> dict[str, Any]:
    scaling = {"scale": 1.0, "mode": "fan_avg", "distribution": "uniform", "seed": None}
    return {"class_name": "VarianceScaling", "config": scaling}


def config_of(kind: str, name: str, **more: Any) -> dict[str, Any]:
    """A layer's configuration as Keras 2.2 wrote it."""
    unset = ("regularizer", "constraint")
    config = {f"{part}_{what}": None for part in ("kernel", "recurrent", "bias") for what in unset}
    config |= {
        "name": name,
        "trainable": True,
        "return_sequences": True,
        "return_state": False,
        "go_backwards": False,
        "stateful": False,
        "units": UNITS,
        "activity_regularizer": None,
        "kernel_initializer": initializer(),
        "recurrent_initializer": {"class_name": "Orthogonal", "config": {"gain": 1.0, "seed": None}},
        "bias_initializer": {"class_name": "Zeros", "config": {}},
    }
    if kind == "CuDNNLSTM":
        config["unit_forget_bias"] = True
    return {"class_name": kind, "config": config | more}


def stack(kind: str) -> tuple[CuDNN, CuDNN, CuDNN]:
    return CuDNN(kind, INPUT, 0), CuDNN(kind, UNITS, 1), CuDNN(kind, UNITS, 2)


def expected(kind: str, x: np.ndarray) -> np.ndarray:
    """A layer, and a Bidirectional on it."""
    first, forward, backward = stack(kind)
    y = first(x)
    return np.concatenate([forward(y), backward(y[:, ::-1])[:, ::-1]], -1)


def write(path: Path, kind: str, whole: bool) -> Path:
    """A model file, or a weights file, of a Sequential."""
    first, forward, backward = stack(kind)
    name = {"CuDNNLSTM": "cu_dnnlstm", "CuDNNGRU": "cu_dnngru"}[kind]
    inner = config_of(kind, f"{name}_2")
    layers = [
        config_of(kind, f"{name}_1", batch_input_shape=[None, None, INPUT], dtype="float32"),
        {
            "class_name": "Bidirectional",
            "config": {"name": "bidirectional_1", "trainable": True, "merge_mode": "concat", "layer": inner},
        },
    ]
    groups = {
        f"{name}_1": {f"{name}_1": first},
        "bidirectional_1": {
            f"bidirectional_1/forward_{name}_2": forward,
            f"bidirectional_1/backward_{name}_2": backward,
        },
    }
    with h5py.File(path, "w") as file:
        if whole:
            file.attrs["model_config"] = json.dumps({"class_name": "Sequential", "config": layers}).encode()
            file.attrs["keras_version"], file.attrs["backend"] = b"2.2.4", b"tensorflow"
        root = file.create_group("model_weights") if whole else file
        root.attrs["layer_names"] = [name.encode() for name in groups]
        root.attrs["keras_version"], root.attrs["backend"] = b"2.2.4", b"tensorflow"
        for layer, parts in groups.items():
            group = root.create_group(layer)
            arrays = {f"{path}/{key}:0": value for path, part in parts.items() for key, value in part.weights().items()}
            group.attrs["weight_names"] = [key.encode() for key in arrays]
            for key, value in arrays.items():
                group[key] = value
    return path


def inputs() -> np.ndarray:
    return np.random.default_rng(9).normal(size=(BATCH, STEPS, INPUT)).astype("float32")


@KINDS
def test_weights_become_a_layers_of_this_library(kind: str) -> None:
    layer = CuDNN(kind, INPUT, 0)
    cell = kind.removeprefix("CuDNN").lower()
    ours = {"lstm": gpu_rnn.LSTM, "gru": gpu_rnn.GRU}[cell](INPUT, UNITS, batch_first=True)
    ours.load_state_dict(interop.from_keras(list(layer.weights().values()), cell=cell))
    np.testing.assert_allclose(ours(torch.tensor(inputs()))[0].detach(), layer(inputs()), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"(bias|recurrent_kernel) should have shape"):
        interop.from_keras(list(layer.weights().values()), cell="gru_reset_before")


@pytest.mark.parametrize("layers", ["gpu_rnn", "keras"])
@KINDS
def test_a_whole_model_is_loaded(kind: str, layers: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.h5", kind, whole=True)
    before = path.read_bytes()
    model = gpu_rnn.keras.load_model(path, layers=layers, compile=False)
    library = {"gpu_rnn": gpu_rnn.keras, "keras": keras.layers}[layers]
    wanted = getattr(library, kind.removeprefix("CuDNN"))
    assert [type(layer) for layer in model.layers] == [wanted, library.Bidirectional]
    assert type(model.layers[1].backward_layer) is wanted
    np.testing.assert_allclose(model.predict(inputs(), verbose=0), expected(kind, inputs()), rtol=1e-5, atol=1e-5)
    assert path.read_bytes() == before


@pytest.mark.parametrize("whole", [False, True])
@KINDS
def test_weights_are_loaded_into_a_model(kind: str, whole: bool, tmp_path: Path) -> None:
    name = kind.removeprefix("CuDNN")
    for library in (gpu_rnn.keras, keras.layers):
        first, second = (getattr(library, name)(UNITS, return_sequences=True) for _ in range(2))
        model = keras.Sequential([keras.Input((None, INPUT)), first, library.Bidirectional(second)])
        gpu_rnn.keras.load_weights(model, write(tmp_path / "weights.h5", kind, whole))
        np.testing.assert_allclose(model.predict(inputs(), verbose=0), expected(kind, inputs()), rtol=1e-5, atol=1e-5)


def test_other_hdf5_files_are_loaded_as_keras_does(tmp_path: Path) -> None:
    keras.utils.set_random_seed(0)
    layers = [keras.layers.LSTM(4, return_sequences=True), keras.layers.Bidirectional(keras.layers.GRU(3))]
    model = keras.Sequential([keras.Input((None, INPUT)), *layers, keras.layers.Dense(2)])
    model.save(tmp_path / "model.h5")
    model.save_weights(tmp_path / "model.weights.h5")
    ours = gpu_rnn.keras.load_model(tmp_path / "model.h5")
    assert [type(layer) for layer in ours.layers[:2]] == [gpu_rnn.keras.LSTM, gpu_rnn.keras.Bidirectional]
    np.testing.assert_allclose(
        ours.predict(inputs(), verbose=0), model.predict(inputs(), verbose=0), rtol=1e-5, atol=1e-6
    )
    ours.save(tmp_path / "ours.h5")
    again = gpu_rnn.keras.load_model(tmp_path / "ours.h5", layers="keras")
    assert type(again.layers[0]) is keras.layers.LSTM
    for loaded in (again, ours):
        loaded.set_weights([0 * weight for weight in loaded.get_weights()])
        gpu_rnn.keras.load_weights(loaded, tmp_path / "model.weights.h5")
        np.testing.assert_allclose(
            loaded.predict(inputs(), verbose=0), model.predict(inputs(), verbose=0), rtol=1e-5, atol=1e-6
        )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input((None, INPUT)), gpu_rnn.keras.LSTM(2)])
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.h5"):
        gpu_rnn.keras.load_weights(model, tmp_path / "missing.h5")
