# SPDX-License-Identifier: Apache-2.0
"""Our Keras layers in Keras's models: built, trained, saved and loaded, and exchanged for Keras's own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("keras") is None:
    pytest.skip("Keras is not installed: pip install gpu-rnn[keras]", allow_module_level=True)
from tests.support import keras_layers as support
from tests.support.keras_layers import gpu_rnn, keras
from tests.support.paths import ROOT
from tests.support.waiting import PATIENCE

pytestmark = support.quiet

NAMES = ("LSTM", "GRU", "SimpleRNN")
MODULES = {"gpu_rnn": gpu_rnn.keras, "keras": keras.layers}
OTHER = {"gpu_rnn": "keras", "keras": "gpu_rnn"}
BOTH = pytest.mark.parametrize("written_by", MODULES)
VOCABULARY, LENGTH = 12, 7


def tokens(rows: int = 16) -> np.ndarray:
    """Sequences of words; 0 is padding."""
    rng = np.random.default_rng(0)
    words = rng.integers(1, VOCABULARY, (rows, LENGTH))
    return np.where(np.arange(LENGTH) < rng.integers(1, LENGTH + 1, (rows, 1)), words, 0)


def targets(rows: int = 16) -> np.ndarray:
    return (tokens(rows) == 3).any(1).astype("float32")[:, None]


def reader(layers: Any) -> Any:
    """A functional model with every layer, masks from an Embedding, regularizers, dropout, nesting."""
    keras.utils.set_random_seed(1)
    words = keras.Input((LENGTH,), dtype="int32")
    x = keras.layers.Embedding(VOCABULARY, 4, mask_zero=True)(words)
    x = layers.Bidirectional(layers.LSTM(5, return_sequences=True, kernel_regularizer="l2"))(x)
    x = layers.SimpleRNN(6, return_sequences=True, seed=3)(x)
    x, h = layers.GRU(4, reset_after=False, return_sequences=True, return_state=True, dropout=0.2, seed=4)(x)
    mask = keras.ops.not_equal(words, 0)  # which Keras forgets beside initial_state, unless it is told
    x = layers.GRU(4, recurrent_dropout=0.2, activation="softsign", seed=5)(x, initial_state=h, mask=mask)
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Reshape((2, 2)), layers.LSTM(3, use_bias=False)])
    model = keras.Model(words, keras.layers.Dense(1, activation="sigmoid")(inner(x)))
    model.compile(keras.optimizers.Adam(0.01), "binary_crossentropy", metrics=["accuracy"])
    return model


def recurrent(model: Any) -> list[Any]:
    """Every recurrent layer of a model."""
    return [
        layer for layer in model._flatten_layers() if isinstance(layer, (keras.layers.RNN, keras.layers.Bidirectional))
    ]


def is_ours(layer: Any) -> bool:
    return type(layer).__module__.startswith("gpu_rnn.keras")


def predict(model: Any) -> np.ndarray:
    return model.predict(tokens(), verbose=0)


def train(model: Any) -> list[float]:
    return model.fit(tokens(), targets(), epochs=2, batch_size=8, verbose=0, shuffle=False).history["loss"]


@BOTH
def test_the_same_file_gives_the_same_predictions_and_training_continues(written_by: str, tmp_path: Path) -> None:
    """The file of one library's layers, trained for a while, is loaded with the other's."""
    model = reader(MODULES[written_by])
    first = train(model)
    model.save(tmp_path / "model.keras")
    loaded = gpu_rnn.keras.load_model(tmp_path / "model.keras", layers=OTHER[written_by])
    assert len(recurrent(loaded)) == len(recurrent(model)) == 7  # a Bidirectional has two, and a model within has one
    assert all(is_ours(layer) == (written_by == "keras") for layer in recurrent(loaded))
    same = keras.models.load_model(tmp_path / "model.keras")  # not the model itself: files hold no state of seeds
    assert all(is_ours(layer) == (written_by == "gpu_rnn") for layer in recurrent(same))
    np.testing.assert_allclose(predict(same), predict(model), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(predict(loaded), predict(model), rtol=1e-5, atol=1e-6)
    before, after = train(same), train(loaded)  # of the same optimizer's state and the same dropout masks
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    assert after[-1] < first[0]


@BOTH
def test_a_models_layers_are_exchanged_in_memory(written_by: str) -> None:
    model = reader(MODULES[written_by])
    exchanged = gpu_rnn.keras.exchange(model, layers=OTHER[written_by])
    assert all(is_ours(layer) == (written_by == "keras") for layer in recurrent(exchanged))
    np.testing.assert_allclose(predict(exchanged), predict(model), rtol=1e-5, atol=1e-6)


@BOTH
def test_an_exchanged_model_draws_what_the_model_would(written_by: str) -> None:
    model = reader(MODULES[written_by])
    train(model)
    exchanged = gpu_rnn.keras.exchange(model, layers=OTHER[written_by])
    np.testing.assert_allclose(train(exchanged), train(model), rtol=1e-4, atol=1e-5)


class Own(keras.layers.LSTM):
    """A user's, which nobody registered."""


class MadeByCode(keras.Model):
    """Its layer stands in no configuration."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.rnn = keras.layers.LSTM(3, name="inner")

    def call(self, x: torch.Tensor) -> torch.Tensor:
        return self.rnn(x)


def test_classes_of_ones_own_are_left() -> None:
    model = keras.Sequential([keras.Input((5, 3)), Own(4, return_sequences=True), keras.layers.LSTM(2)])
    exchanged = gpu_rnn.keras.exchange(model)
    assert [type(layer) for layer in exchanged.layers] == [Own, gpu_rnn.keras.LSTM]
    x = np.random.default_rng(0).random((2, 5, 3), np.float32)
    np.testing.assert_allclose(exchanged(x).detach().numpy(), model(x).detach().numpy(), atol=1e-6)
    by_code = MadeByCode()
    by_code(x)
    with pytest.warns(UserWarning, match="^inner is as it was: the code of a model's class makes it"):
        gpu_rnn.keras.exchange(by_code)


def test_no_steps_are_refused() -> None:
    for layer in (gpu_rnn.keras.LSTM(4), gpu_rnn.keras.Bidirectional(gpu_rnn.keras.GRU(4))):
        with pytest.raises(ValueError, match=r"sequences have at least one step, got shape \(2, 0, 3\)"):
            layer(np.zeros((2, 0, 3), np.float32))


def test_what_is_no_model_is_not_exchanged() -> None:
    for given in (keras.layers.LSTM(2), torch.nn.LSTM(2, 3), "model.keras", None):
        with pytest.raises(TypeError, match=f"exchange takes a keras.Model, got {type(given).__name__}"):
            gpu_rnn.keras.exchange(given)


def test_our_models_are_saved_and_loaded_as_ours(tmp_path: Path) -> None:
    model = reader(gpu_rnn.keras)
    train(model)
    model.save(tmp_path / "model.keras")
    for loaded in (
        keras.models.load_model(tmp_path / "model.keras"),
        gpu_rnn.keras.load_model(tmp_path / "model.keras"),
    ):
        assert all(is_ours(layer) for layer in recurrent(loaded))
        np.testing.assert_array_equal(predict(loaded), predict(model))


def test_weights_files_are_the_same(tmp_path: Path) -> None:
    ours, theirs = reader(gpu_rnn.keras), reader(keras.layers)
    ours.save_weights(tmp_path / "ours.weights.h5")
    theirs.set_weights([0 * w for w in theirs.get_weights()])
    theirs.load_weights(tmp_path / "ours.weights.h5")
    np.testing.assert_allclose(predict(theirs), predict(ours), rtol=1e-5, atol=1e-6)


WITHOUT_GPU_RNN = """
import sys
sys.modules["gpu_rnn"] = None
import keras, numpy
model = keras.models.load_model(sys.argv[1])
print(model.predict(numpy.load(sys.argv[2]), verbose=0).tolist())
"""


def python(program: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False, timeout=PATIENCE
    )


def test_an_exchanged_model_needs_no_gpu_rnn(tmp_path: Path) -> None:
    model = reader(gpu_rnn.keras)
    gpu_rnn.keras.exchange(model, layers="keras").save(tmp_path / "theirs.keras")
    assert b"gpu_rnn" not in zipfile.ZipFile(tmp_path / "theirs.keras").read("config.json")
    np.save(tmp_path / "tokens.npy", tokens())
    done = python(WITHOUT_GPU_RNN, tmp_path / "theirs.keras", tmp_path / "tokens.npy", KERAS_BACKEND="torch")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(json.loads(done.stdout), predict(model), rtol=1e-5, atol=1e-6)


def test_other_layers_of_the_same_name_stay(tmp_path: Path) -> None:
    @keras.saving.register_keras_serializable(package="mine")
    class LSTM(keras.layers.LSTM):
        pass

    model = keras.Sequential([keras.Input((3, 2)), LSTM(2), keras.layers.Dense(1)])
    assert type(gpu_rnn.keras.exchange(model).layers[0]) is LSTM


def test_load_model_says_what_it_takes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="layers must be one of gpu_rnn, keras"):
        gpu_rnn.keras.load_model("model.keras", layers="torch")
    with pytest.raises(FileNotFoundError, match=r"there is no file .*missing\.keras"):
        gpu_rnn.keras.load_model(tmp_path / "missing.keras")
    (tmp_path / "old.h5").write_bytes(b"no archive")
    with pytest.raises(ValueError, match=r"old\.h5 is no \.keras or HDF5 file"):
        gpu_rnn.keras.load_model(tmp_path / "old.h5")
    with pytest.raises(ValueError, match=r"old\.h5 is no file of weights"):
        gpu_rnn.keras.load_weights(reader(keras.layers), tmp_path / "old.h5")
    torch.save({}, tmp_path / "torch.pt")  # a zip file, too
    with pytest.raises(ValueError, match=r"torch\.pt is no \.keras or HDF5 file"):
        gpu_rnn.keras.load_model(tmp_path / "torch.pt")


def test_training_is_keras_own() -> None:
    """The same seeds: the same dropout masks, losses and weights after two epochs."""
    models = [reader(layers) for layers in MODULES.values()]
    np.testing.assert_allclose(*map(train, models), rtol=1e-4, atol=1e-5)
    for a, b in zip(*(model.get_weights() for model in models), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_fit_shows_its_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    model = keras.Sequential([keras.Input((LENGTH, 1)), gpu_rnn.keras.LSTM(4), keras.layers.Dense(1)])
    model.compile("adam", "mse")
    model.fit(tokens()[..., None].astype("float32"), targets(), epochs=1, batch_size=8, verbose=1)
    shown = capsys.readouterr().out
    assert "Epoch 1/1" in shown or "2/2" in shown
    assert "loss" in shown


def test_masking_and_wrappers() -> None:
    """Keras's own wrappers around our layers, and a Masking layer before them."""
    found = []
    for layers in MODULES.values():
        keras.utils.set_random_seed(0)
        within = keras.Sequential([keras.Input((4, 2)), layers.GRU(3)])
        model = keras.Sequential(
            [
                keras.Input((5, 4, 2)),
                keras.layers.TimeDistributed(within),
                keras.layers.Masking(),
                keras.layers.Bidirectional(layers.LSTM(3, return_sequences=True), merge_mode="ave"),
                layers.SimpleRNN(2),
            ]
        )
        x = support.draw(3, 5, 4, 2).float()
        found.append(model(x))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("merge", ["concat", None])
@pytest.mark.parametrize("name", NAMES)
def test_configurations_come_back(name: str, merge: str | None) -> None:
    own = {"activation": "softsign", "go_backwards": False, "dropout": 0.1, "seed": 4, "zero_output_for_mask": True}
    layer = getattr(gpu_rnn.keras, name)(5, **own, bias_regularizer="l1", kernel_constraint="non_neg", unroll=True)
    again = type(layer).from_config(layer.get_config())
    assert again.get_config() == layer.get_config()
    both = gpu_rnn.keras.Bidirectional(layer, merge_mode=merge)
    copied = gpu_rnn.keras.Bidirectional.from_config(both.get_config())
    assert {type(part) for part in (copied.forward_layer, copied.backward_layer)} == {type(layer)}
    assert copied.get_config() == both.get_config()
    assert copied.forward_layer.cell.seed == copied.backward_layer.cell.seed == 4


def test_a_function_of_ones_own_is_saved_by_its_name(tmp_path: Path) -> None:
    @keras.saving.register_keras_serializable(package="mine")
    def sharp(x: Any) -> Any:
        return torch.tanh(2 * x)

    model = keras.Sequential([keras.Input((3, 2)), gpu_rnn.keras.GRU(2, activation=sharp)])
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[0].activation is sharp
    x = np.ones((2, 3, 2), "float32")
    np.testing.assert_array_equal(loaded.predict(x, verbose=0), model.predict(x, verbose=0))


def test_the_example_exchanges_a_working_model(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("keras_exchange", ROOT / "examples" / "keras_exchange.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    found = example.exchange(tmp_path / "model.keras", first=2, second=2)
    assert found["layers"][1:3] == ["gpu_rnn.keras.bidirectional.Bidirectional", "gpu_rnn.keras.layers.LSTM"]
    assert found["difference"] < 1e-5  # logits
    assert found["losses"] == sorted(found["losses"], reverse=True)  # it learns on from where it was
    assert found["accuracy"] > 0.5  # nine speakers; 0.97 after 12 epochs


IMPORT = "import gpu_rnn.keras"
FAKE = """
import sys, types
fake = types.ModuleType("keras")
fake.__version__ = "{version}"
fake.backend = types.SimpleNamespace(backend=lambda: "{backend}")
sys.modules["keras"] = fake
import gpu_rnn.keras
"""


@pytest.mark.parametrize(
    ("program", "backend", "words"),
    [
        ("import sys; sys.modules['keras'] = None; " + IMPORT, "torch", "pip install 'gpu-rnn[keras]'"),
        (
            "import sys; sys.modules['tensorflow'] = None; " + IMPORT,
            "tensorflow",
            "KERAS_BACKEND=torch before keras is imported",
        ),
        (
            FAKE.format(version="3.9", backend="jax"),
            "torch",
            "this process uses 'jax'. Set the environment variable KERAS_BACKEND",
        ),
        (FAKE.format(version="2.15", backend="torch"), "torch", "needs Keras 3, not 2.15"),
    ],
)
def test_what_is_missing_is_said(program: str, backend: str, words: str) -> None:
    done = python(program, KERAS_BACKEND=backend)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ") and words in last


def test_gpu_rnn_by_itself_imports_no_keras() -> None:
    done = python("import sys, gpu_rnn, gpu_rnn.interop; print('keras' in sys.modules)")
    assert done.stdout.strip() == "False", done.stderr
