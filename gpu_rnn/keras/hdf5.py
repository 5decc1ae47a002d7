# SPDX-License-Identifier: Apache-2.0
"""HDF5 files of Keras 2, in which CuDNNLSTM and CuDNNGRU stand for what LSTM and GRU are today.

Keras 2 turned their weights as it loaded them (`keras/engine/saving.py`, `_convert_rnn_weights`); Keras 3 knows neither
class.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import h5py
import torch

from gpu_rnn import interop
from gpu_rnn.keras.naming import rename

RECURRENT = re.compile(r"recurrent_kernel((_\d+)?(:0)?)")


def load_weights(model: Any, filepath: str | Path, **options: Any) -> None:
    """`model.load_weights` that also takes Keras 2's HDF5 files with weights of CuDNNLSTM and CuDNNGRU.

    Those become weights of LSTM and of GRU with reset_after=True, whether the model's layers are Keras's or this
    library's.

    Args:
        model: a `keras.Model`.
        filepath: a file that `model.load_weights` takes.
        options: of `model.load_weights`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a file that is none of weights, or Keras's, if the weights are not those of the model.

    Example::

        >>> import gpu_rnn.keras, keras
        >>> model = keras.Sequential([keras.Input((5, 3)), gpu_rnn.keras.LSTM(4)])
        >>> model.save_weights(folder / "some.weights.h5")
        >>> gpu_rnn.keras.load_weights(model, folder / "some.weights.h5")
    """
    filepath = Path(filepath)
    if not filepath.exists():
        raise FileNotFoundError(f"there is no file {filepath}")
    if filepath.is_file() and not (h5py.is_hdf5(filepath) or zipfile.is_zipfile(filepath)):
        raise ValueError(f"{filepath} is no file of weights, as model.save_weights writes them")
    if filepath.name.endswith(".weights.h5") or not h5py.is_hdf5(filepath):
        model.load_weights(filepath, **options)  # Keras 3's
        return
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "weights.h5"
        convert(filepath, copy)
        model.load_weights(copy, **options)


def convert(source: Path, target: Path, layers: str = "gpu_rnn") -> None:
    """A copy of a file whose recurrent layers, in its weights and in its configuration if it has one, are today's."""
    shutil.copyfile(source, target)
    with h5py.File(target, "r+") as file:
        groups: list[h5py.Group] = [file]
        file.visititems(lambda _, item: groups.append(item) if isinstance(item, h5py.Group) else None)
        recurrent = [(group, match[1]) for group in groups for name in group if (match := RECURRENT.fullmatch(name))]
        for group, suffix in recurrent:
            _turn(group, suffix)
        config = file.attrs.get("model_config")
        if config is not None:
            file.attrs["model_config"] = json.dumps(rename(_modern(json.loads(config)), layers)).encode()


def _turn(group: h5py.Group, suffix: str) -> None:
    """The weights of one layer, if they are cuDNN's."""
    names = [part + suffix for part in ("kernel", "recurrent_kernel", "bias")]
    if not all(isinstance(group.get(name), h5py.Dataset) for name in names):
        return
    kernel, recurrent_kernel, bias = (torch.from_numpy(group[name][()]) for name in names)
    rows = recurrent_kernel.shape[-1]
    if bias.shape != (2 * rows,):  # of all of Keras's layers, cuDNN's alone have these
        return
    for name, weight in zip(names, interop.keras_of_cudnn(kernel, recurrent_kernel, bias), strict=True):
        del group[name]
        group[name] = weight.numpy()


def _modern(config: Any) -> Any:
    """A configuration with Keras 2's Sequential as Keras 3 has it: a dict, and its first layer's input a layer of its
    own."""
    if isinstance(config, list):
        return [_modern(part) for part in config]
    if not isinstance(config, dict):
        return config
    config = {key: _modern(value) for key, value in config.items()}
    if config.get("class_name") != "Sequential" or "module" in config:
        return config
    inner = config["config"]
    inner = {"name": "sequential", "layers": inner} if isinstance(inner, list) else inner
    first = inner["layers"][0] if inner["layers"] else {}
    if first.get("class_name") != "InputLayer" and "batch_input_shape" in first.get("config", {}):
        shape = first["config"].pop("batch_input_shape")
        entry = {
            "name": f"{first['config']['name']}_input",
            "batch_shape": shape,
            "dtype": first["config"].get("dtype"),
        }
        inner["layers"] = [{"class_name": "InputLayer", "config": entry}, *inner["layers"]]
    return config | {"config": inner}
