# SPDX-License-Identifier: Apache-2.0
"""Models with Keras's recurrent layers become models with this library's, and the reverse.

A .keras file names the class of each layer in its config.json. Those names are all that differs between the two.
"""

from __future__ import annotations

import json
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import h5py
import keras

from gpu_rnn.keras import hdf5
from gpu_rnn.keras.naming import MODULES, rename

CONFIG = "config.json"


def load_model(filepath: str | Path, *, layers: str = "gpu_rnn", **options: Any) -> Any:
    """A model from a .keras or HDF5 file, its LSTM, GRU, SimpleRNN and Bidirectional layers being those of one library.

    Weights, the optimizer's state and the compile settings are loaded as `keras.models.load_model` loads them. In HDF5
    files of Keras 2, CuDNNLSTM and CuDNNGRU become LSTM and GRU.

    Args:
        filepath: a file that `model.save` wrote, with either library's layers or both.
        layers: "gpu_rnn", or "keras": a model of which nothing needs this library, to save for others.
        options: of `keras.models.load_model`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another value of `layers`, or a file that is neither a .keras archive nor HDF5.

    Example::

        >>> model = keras.Sequential([keras.Input((5, 3)), keras.layers.LSTM(4)])
        >>> model.save(folder / "model.keras")
        >>> [type(layer).__module__ for layer in gpu_rnn.keras.load_model(folder / "model.keras").layers]
        ['gpu_rnn.keras.layers']
    """
    if layers not in MODULES:
        raise ValueError(f"layers must be one of {', '.join(MODULES)}, got {layers!r}")
    if not Path(filepath).exists():
        raise FileNotFoundError(f"there is no file {filepath}")
    if not zipfile.is_zipfile(filepath) and not h5py.is_hdf5(filepath):
        raise ValueError(
            f"{filepath} is no .keras or HDF5 file: load it with keras.models.load_model and exchange() the model"
        )
    with tempfile.TemporaryDirectory() as folder:
        if h5py.is_hdf5(filepath):
            copy = Path(folder) / "model.h5"
            hdf5.convert(Path(filepath), copy, layers)
            return keras.models.load_model(copy, **options)
        copy = Path(folder) / "model.keras"
        _convert(filepath, copy, layers)
        return keras.models.load_model(copy, **options)


def _convert(source: str | Path, target: Path, layers: str) -> None:
    """A copy of a .keras file with other layers in its configuration."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, _renamed(content, layers) if name == CONFIG else content)


def exchange(model: Any, *, layers: str = "gpu_rnn", **options: Any) -> Any:
    """A copy of a model, its weights, its optimizer's and its random generators' states, with its recurrent layers
    exchanged.

    Args:
        model: a `keras.Model`.
        layers, options: as for `load_model`.

    Raises:
        TypeError: `model` is none.
        ValueError: another value of `layers`.

    Example::

        >>> model = keras.Sequential([keras.Input((5, 3)), keras.layers.GRU(4)])
        >>> type(gpu_rnn.keras.exchange(model).layers[0]) is gpu_rnn.keras.GRU
        True
    """
    if not isinstance(model, keras.Model):
        raise TypeError(
            f"exchange takes a keras.Model, got {type(model).__name__}; a layer by itself is made anew, such as "
            "gpu_rnn.keras.LSTM.from_config(layer.get_config())"
        )
    if model.compiled and model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)  # Keras warns when it loads the state of one that is not
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.keras"
        model.save(path)
        copy = load_model(path, layers=layers, **options)
    for new, old in zip(_seeds(copy), _seeds(model), strict=True):  # files hold none of these
        new.assign(old)
    return copy


def _seeds(model: Any) -> list[Any]:
    """The states of a model's random generators, in the order of its layers."""
    return [variable for variable in model.variables if variable.name == "seed_generator_state"]


def _renamed(content: bytes, layers: str) -> bytes:
    return json.dumps(rename(json.loads(content), layers)).encode()
