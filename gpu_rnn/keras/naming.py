# SPDX-License-Identifier: Apache-2.0
"""The names of recurrent layers in configurations of models: Keras 3's, and those of its HDF5 files and of Keras 2."""

from __future__ import annotations

from typing import Any

NAMES = ("LSTM", "GRU", "SimpleRNN", "Bidirectional")
CUDNN: dict[str, tuple[str, dict[str, Any]]] = {"CuDNNLSTM": ("LSTM", {}), "CuDNNGRU": ("GRU", {"reset_after": True})}
MODULES = {"gpu_rnn": "gpu_rnn.keras", "keras": "keras.layers"}
OURS = "gpu_rnn>"  # what Keras finds our classes by; its own it finds by their module


def rename(config: Any, layers: str) -> Any:
    """A configuration with the recurrent layers' classes, at any depth, named as `layers`, a key of MODULES, names
    them."""
    if isinstance(config, list):
        return [rename(part, layers) for part in config]
    if not isinstance(config, dict):
        return config
    renamed = {key: rename(value, layers) for key, value in config.items()}
    name = str(config.get("class_name")).removeprefix(OURS)
    if name in CUDNN and "module" not in config:
        name, more = CUDNN[name]
        renamed["config"] = renamed["config"] | more
    registered = OURS + name
    # A class without a module is one of an HDF5 file.
    known = (
        "module" not in config or config.get("registered_name") == registered or config["module"] == MODULES["keras"]
    )
    if name in NAMES and known:
        renamed |= {"class_name": name, "module": MODULES[layers]}
        renamed["registered_name"] = registered if layers == "gpu_rnn" else None
    return renamed
