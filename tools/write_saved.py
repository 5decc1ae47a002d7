# SPDX-License-Identifier: Apache-2.0
"""Writes tests/data/saved: layers, a recurrence, an exported program and a Keras model, each with an input and its
output.

python tools/write_saved.py FOLDER [--keras]

What a version has written, every later one loads (tests/project/test_saved.py). So files in there are never written
again: a new version adds a folder of its own. Run it with the oldest torch that is supported, since newer ones read its
files.
"""

from __future__ import annotations

import argparse
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import torch

import gpu_rnn
from gpu_rnn import cells

INPUT, HIDDEN, STEPS, BATCH = 3, 5, 6, 4


def recurrence() -> gpu_rnn.Recurrence:
    """A cell of a user's own."""

    def step(x, r, s, p):  # type: ignore[no-untyped-def]
        f = torch.sigmoid(x.f + r.f + p.peep * s.h)
        return (1 - f) * s.h + f * torch.tanh(x.n + f * r.n)

    return gpu_rnn.Recurrence(step, gates=("f", "n"), states=("h",), params=("peep",), name="minimal")


LAYERS: dict[str, Callable[[], torch.nn.Module]] = {
    "lstm": lambda: gpu_rnn.LSTM(INPUT, HIDDEN, num_layers=2, bidirectional=True),
    "lstm_projected": lambda: gpu_rnn.LSTM(INPUT, HIDDEN, proj_size=2),
    "lstm_options": lambda: gpu_rnn.LSTM(
        INPUT, HIDDEN, activation="softsign", peephole=True, recurrent_dropout=0.2, zoneout=0.1, layer_norm=True
    ),
    "gru": lambda: gpu_rnn.GRU(INPUT, HIDDEN, batch_first=True),
    "gru_reset_before": lambda: gpu_rnn.GRU(INPUT, HIDDEN, reset_after=False, weight_drop=0.3),
    "rnn": lambda: gpu_rnn.RNN(INPUT, HIDDEN, nonlinearity="relu", backend="step"),
    "recurrent": lambda: gpu_rnn.Recurrent(recurrence(), INPUT, HIDDEN, bidirectional=True),
    "slstm": lambda: gpu_rnn.Recurrent(cells.slstm(), INPUT, HIDDEN),
    "lstm_cell": lambda: gpu_rnn.LSTMCell(INPUT, HIDDEN, activation="hard_tanh"),
    "gru_cell": lambda: gpu_rnn.GRUCell(INPUT, HIDDEN),
}
EXPORTED = ("lstm", "lstm_options", "recurrent")


def write_torch(folder: Path) -> None:
    """Whole modules by torch.save, a recurrence by pickle, exported programs."""
    layers = {name: make().eval() for name, make in LAYERS.items()}
    x = torch.randn(STEPS, BATCH, INPUT)
    with torch.no_grad():
        expected = {name: layer(x[0] if name.endswith("_cell") else x) for name, layer in layers.items()}
    torch.save(layers, folder / "layers.pt")
    torch.save({"x": x, "expected": expected}, folder / "expected.pt")
    (folder / "recurrence.pkl").write_bytes(pickle.dumps(recurrence()))
    for name in EXPORTED:
        program = torch.export.export(layers[name], (x,), strict=False)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # names files of the machine
        torch.export.save(program, folder / f"{name}.pt2")


def write_keras(folder: Path) -> None:
    """A model of our Keras layers as a .keras file."""
    os.environ["KERAS_BACKEND"] = "torch"
    import keras
    import numpy as np

    import gpu_rnn.keras as layers

    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((STEPS, INPUT)),
            keras.layers.Masking(0.0),
            layers.Bidirectional(layers.LSTM(HIDDEN, return_sequences=True, recurrent_dropout=0.1)),
            layers.GRU(HIDDEN, reset_after=False, activation="softsign", return_sequences=True),
            layers.SimpleRNN(HIDDEN, go_backwards=True),
        ]
    )
    x = np.random.default_rng(0).normal(size=(BATCH, STEPS, INPUT)).astype("float32")
    x[1, 4:] = 0
    model.save(folder / "model.keras")
    np.savez(folder / "model.npz", x=x, expected=keras.ops.convert_to_numpy(model(x)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--keras", action="store_true", help="the Keras model instead")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    (write_keras if options.keras else write_torch)(options.folder)


if __name__ == "__main__":
    main()
