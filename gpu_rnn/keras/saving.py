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

import keras

NAMES = ("LSTM", "GRU", "SimpleRNN", "Bidirectional")
MODULES = {"gpu_rnn": "gpu_rnn.keras", "keras": "keras.layers"}
CONFIG = "config.json"


def load_model(filepath: str | Path, *, layers: str = "gpu_rnn", **options: Any) -> Any:
    """A model from a .keras file, its LSTM, GRU, SimpleRNN and Bidirectional layers being those of one library.

    Weights, the optimizer's state and the compile settings are loaded as `keras.models.load_model` loads them.

    Args:
        filepath: a file that `model.save` wrote, with either library's layers or both.
        layers: "gpu_rnn", or "keras": a model of which nothing needs this library, to save for others.
        options: of `keras.models.load_model`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: another value of `layers`, or a file that is no .keras archive.

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
    if not zipfile.is_zipfile(filepath):
        raise ValueError(f"{filepath} is not a .keras file: load it with keras.models.load_model and exchange() the model")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model.keras"
        with zipfile.ZipFile(filepath) as source, zipfile.ZipFile(copy, "w") as target:
            for name in source.namelist():
                content = source.read(name)
                target.writestr(name, _renamed(content, layers) if name == CONFIG else content)
        return keras.models.load_model(copy, **options)


def exchange(model: Any, *, layers: str = "gpu_rnn", **options: Any) -> Any:
    """A copy of a model, its weights, its optimizer's and its random generators' states, with its recurrent layers exchanged.

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
    return json.dumps(_rename(json.loads(content), layers)).encode()


def _rename(config: Any, layers: str) -> Any:
    """A configuration with the recurrent layers' classes, at any depth, named as `layers` names them."""
    if isinstance(config, list):
        return [_rename(part, layers) for part in config]
    if not isinstance(config, dict):
        return config
    renamed = {key: _rename(value, layers) for key, value in config.items()}
    name = config.get("class_name")
    registered = f"gpu_rnn>{name}"  # what Keras finds our classes by; its own it finds by their module
    if name in NAMES and (config.get("registered_name") == registered or config.get("module") == MODULES["keras"]):
        renamed |= {"module": MODULES[layers], "registered_name": registered if layers == "gpu_rnn" else None}
    return renamed
