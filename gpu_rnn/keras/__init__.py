# SPDX-License-Identifier: Apache-2.0
"""LSTM, GRU, SimpleRNN and Bidirectional for Keras 3 on its PyTorch backend, in the place of `keras.layers`'.

Each layer is a subclass of Keras's own that replaces one method, the loop over time steps (`inner_loop`). So the
constructor, weights, regularizers, constraints, dropout masks, states, shapes and files are Keras's by construction,
`isinstance(layer, keras.layers.LSTM)` holds, and what runs is `gpu_rnn.functional.rnn`, for every option::

    import gpu_rnn.keras

    model = keras.Sequential([keras.Input((None, 8)), gpu_rnn.keras.LSTM(64, recurrent_dropout=0.2)])
    model = gpu_rnn.keras.load_model("model.keras")  # its RNN layers, whosever they are, become these

This module needs Keras 3 and its PyTorch backend: ``pip install gpu-rnn[keras]`` and ``KERAS_BACKEND=torch``.
"""

SWITCH = (
    "Set the environment variable KERAS_BACKEND=torch before keras is imported for the first time, "
    'or "backend": "torch" in ~/.keras/keras.json'
)

try:
    import keras
except ImportError as error:
    if error.name == "keras":
        raise ImportError("gpu_rnn.keras needs Keras 3: pip install 'gpu-rnn[keras]'", name="keras") from error
    raise ImportError(
        f"Keras could not start its backend ({error}); gpu_rnn.keras runs on PyTorch. {SWITCH}", name=error.name
    ) from error

if not keras.__version__.startswith("3."):
    raise ImportError(
        f"gpu_rnn.keras needs Keras 3, not {keras.__version__}: pip install 'gpu-rnn[keras]'", name="keras"
    )
if keras.backend.backend() != "torch":
    raise ImportError(
        f"gpu_rnn.keras runs on Keras's PyTorch backend, and this process uses {keras.backend.backend()!r}. {SWITCH}",
        name="keras",
    )

from gpu_rnn.keras.bidirectional import Bidirectional  # noqa: E402
from gpu_rnn.keras.hdf5 import load_weights  # noqa: E402
from gpu_rnn.keras.layers import GRU, LSTM, SimpleRNN  # noqa: E402
from gpu_rnn.keras.saving import exchange, load_model  # noqa: E402

__all__ = ["GRU", "LSTM", "Bidirectional", "SimpleRNN", "exchange", "load_model", "load_weights"]
