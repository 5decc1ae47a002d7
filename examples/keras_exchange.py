# SPDX-License-Identifier: Apache-2.0
"""A working Keras model changes its recurrent layers: same file, same predictions, and training goes on.

The model tells nine speakers by recordings of /ae/ that are 7 to 29 steps long. Zeros pad the shorter ones, and a
Masking layer hides them; recurrent_dropout fights overfitting. Either option takes Keras's own layers off cuDNN, to a
loop over time in Python.

    python examples/keras_exchange.py    # needs gpu-rnn[keras]
"""

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"  # before keras is imported

try:
    import keras
except ModuleNotFoundError:
    raise SystemExit("this example needs Keras: pip install 'gpu-rnn[keras]'") from None
import numpy as np

import gpu_rnn.keras
from gpu_rnn.demo.datasets import japanese_vowels


def make() -> keras.Model:
    """Layers of Keras alone."""
    model = keras.Sequential(
        [
            keras.Input((None, 12)),
            keras.layers.Masking(),
            keras.layers.Bidirectional(keras.layers.GRU(24, recurrent_dropout=0.2, return_sequences=True)),
            keras.layers.LSTM(24),
            keras.layers.Dense(9),
        ]
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss, metrics=["accuracy"])
    return model


def classes_of(model: keras.Model) -> list[str]:
    return [f"{type(layer).__module__}.{type(layer).__name__}" for layer in model.layers]


def exchange(path: Path, first: int, second: int) -> dict[str, Any]:
    """Trains Keras's layers, saves them, loads them as gpu_rnn's and trains those; what can be compared is returned."""
    keras.utils.set_random_seed(0)
    data = japanese_vowels()
    x, labels = data.train.inputs.numpy(), data.train.labels.numpy()
    model = make()
    before = model.fit(x, labels, epochs=first, verbose=2).history["loss"]
    model.save(path)

    loaded = gpu_rnn.keras.load_model(path)
    difference = np.abs(loaded.predict(x, verbose=0) - model.predict(x, verbose=0)).max()
    after = loaded.fit(x, labels, epochs=second, verbose=2).history["loss"]
    _, accuracy = loaded.evaluate(data.test.inputs.numpy(), data.test.labels.numpy(), verbose=0)
    return {"difference": difference, "losses": [*before, *after], "accuracy": accuracy, "layers": classes_of(loaded)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        found = exchange(Path(folder) / "model.keras", first=4, second=8)
    print("layers after loading:", *found["layers"], sep="\n  ")
    print(f"largest difference of a prediction {found['difference']:.1e}")
    print(f"accuracy {found['accuracy']:.3f} on other recordings")
