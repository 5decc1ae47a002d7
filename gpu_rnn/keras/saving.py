# SPDX-License-Identifier: Apache-2.0
"""Models with Keras's recurrent layers become models with this library's, and the reverse.

A .keras file names the class of each layer in its config.json. Those names are all that differs between the two.
"""

from __future__ import annotations

import json
import tempfile
import warnings
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import h5py
import keras

from gpu_rnn.keras import hdf5
from gpu_rnn.keras.naming import MODULES, NAMES, rename

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

        >>> import gpu_rnn.keras, keras
        >>> model = keras.Sequential([keras.Input((5, 3)), keras.layers.LSTM(4)])
        >>> model.save(folder / "model.keras")
        >>> [type(layer).__module__ for layer in gpu_rnn.keras.load_model(folder / "model.keras").layers]
        ['gpu_rnn.keras.layers']
    """
    if layers not in MODULES:
        raise ValueError(f"layers must be one of {', '.join(MODULES)}, got {layers!r}")
    if not Path(filepath).exists():
        raise FileNotFoundError(f"there is no file {filepath}")
    if not h5py.is_hdf5(filepath) and not _is_archive(filepath):
        raise ValueError(f"{filepath} is no .keras or HDF5 file, as model.save writes them")
    with tempfile.TemporaryDirectory() as folder:
        if h5py.is_hdf5(filepath):
            copy = Path(folder) / "model.h5"
            hdf5.convert(Path(filepath), copy, layers)
            return keras.models.load_model(copy, **options)
        copy = Path(folder) / "model.keras"
        _convert(filepath, copy, layers)
        return keras.models.load_model(copy, **options)


def _is_archive(path: str | Path) -> bool:
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return CONFIG in archive.namelist()


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

        >>> import gpu_rnn.keras, keras
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
        known = {**_classes(model), **(options.pop("custom_objects", None) or {})}
        copy = load_model(path, layers=layers, custom_objects=known, **options)
    _check_exchanged(copy, layers)
    for new, old in zip(_seeds(copy), _seeds(model), strict=True):  # files hold none of these
        new.assign(old)
    return copy


def _classes(model: Any) -> dict[str, type]:
    """The user's own classes of layers and models, which `keras.models.load_model` would ask for."""
    kinds = {type(layer) for layer in model._flatten_layers()}
    return {kind.__name__: kind for kind in kinds if kind.__module__.split(".")[0] not in ("keras", "gpu_rnn")}


def _check_exchanged(model: Any, layers: str) -> None:
    """Warns of layers that the code of a model makes, where no configuration names them."""
    others = [
        getattr(import_module(module), name) for key, module in MODULES.items() if key != layers for name in NAMES
    ]
    left = [layer.name for layer in model._flatten_layers() if type(layer) in others]
    if left:
        warnings.warn(
            f"{', '.join(left)} is as it was: the code of a model's class makes it, which has to name the other "
            "library's",
            stacklevel=3,
        )


def _seeds(model: Any) -> list[Any]:
    """The states of a model's random generators, in the order of its layers."""
    return [variable for variable in model.variables if variable.name == "seed_generator_state"]


def _renamed(content: bytes, layers: str) -> bytes:
    return json.dumps(rename(json.loads(content), layers)).encode()
