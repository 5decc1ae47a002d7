# SPDX-License-Identifier: Apache-2.0
"""Keras's own tests, which its wheel carries, with our layers in the place of Keras's."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.keras_layers import gpu_rnn, keras

FOLDER = Path(keras.__file__).parent / "src"
OURS = {name: getattr(gpu_rnn.keras, name) for name in ("LSTM", "GRU", "SimpleRNN", "Bidirectional")}
WITHOUT_LAYERS = ("dispatch_fires", "symbolic_batch_size")  # skip themselves: they want a GPU, or TensorFlow


class Layers:
    """keras.layers, with ours, which it counts."""

    def __init__(self) -> None:
        self.taken = 0

    def __getattr__(self, name: str) -> Any:
        self.taken += name in OURS
        return OURS.get(name) or getattr(keras.src.layers, name)


def suite(file: str, name: str, wanted: str = "") -> type:
    """The tests of a class that have `wanted` in their names, from a module by another name: whoever imports Keras's
    finds Keras's. Each asserts that it had a layer of ours."""
    if not (FOLDER / file).exists():
        pytest.skip(f"Keras {keras.__version__} came without its tests", allow_module_level=True)
    spec = importlib.util.spec_from_file_location(f"with_gpu_rnn.{Path(file).stem}", FOLDER / file)
    assert spec is not None and spec.loader is not None
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.layers = layers = Layers()

    class Suite(getattr(module, name)):
        def setUp(self) -> None:
            super().setUp()
            layers.taken = 0

        def tearDown(self) -> None:
            super().tearDown()
            assert layers.taken or any(words in self._testMethodName for words in WITHOUT_LAYERS)

    for test in dir(Suite):
        if test.startswith("test_") and wanted not in test:
            setattr(Suite, test, None)
    return Suite
