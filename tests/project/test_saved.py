# SPDX-License-Identifier: Apache-2.0
"""What an earlier version has written is loaded, and computes what it did then; `tools/write_saved.py` writes such
files."""

from __future__ import annotations

import importlib.util
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_rnn
from tests.support.paths import DATA

VERSIONS = sorted((DATA / "saved").iterdir())
EXPORTED = ("lstm", "lstm_options", "recurrent")
TIGHT = {"rtol": 0, "atol": 1e-6}  # float32 after six steps, sums in another order

every_version = pytest.mark.parametrize("folder", VERSIONS, ids=lambda folder: folder.name)


def expected(folder: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    written = torch.load(folder / "expected.pt")
    return written["x"], written["expected"]


@every_version
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_layers(folder: Path) -> None:
    x, written = expected(folder)
    layers = torch.load(folder / "layers.pt", weights_only=False)
    assert layers.keys() == written.keys()
    for name, layer in layers.items():
        with torch.no_grad():
            found = layer(x[0] if name.endswith("_cell") else x)
        torch.testing.assert_close(found, written[name], **TIGHT, msg=lambda text, name=name: f"{name}: {text}")


@every_version
def test_recurrence(folder: Path) -> None:
    loaded = pickle.loads((folder / "recurrence.pkl").read_bytes())
    layers = torch.load(folder / "layers.pt", weights_only=False)
    assert isinstance(loaded, gpu_rnn.Recurrence)
    assert loaded == layers["recurrent"].recurrence


@every_version
@pytest.mark.filterwarnings("ignore:The given buffer is not writable:UserWarning")  # torch 2.11's own loader
@pytest.mark.parametrize("name", EXPORTED)
def test_exported_programs(folder: Path, name: str) -> None:
    x, written = expected(folder)
    program = torch.export.load(folder / f"{name}.pt2")
    torch.testing.assert_close(program.module()(x), written[name], **TIGHT)


@every_version
@pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)  # Keras's own
def test_keras_model(folder: Path) -> None:
    if importlib.util.find_spec("keras") is None:
        pytest.skip("Keras is not installed: pip install gpu-rnn[keras]")
    import numpy as np

    from tests.support.keras_layers import keras

    stored = np.load(folder / "model.npz")
    model = keras.models.load_model(folder / "model.keras")
    np.testing.assert_allclose(keras.ops.convert_to_numpy(model(stored["x"])), stored["expected"], rtol=0, atol=1e-6)
