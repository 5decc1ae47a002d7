# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers for PyTorch that run the whole time loop on the GPU, with every option at the speed of the
default."""

from gpu_rnn import activations, cells
from gpu_rnn.cell_layers import GRUCell, LSTMCell, RNNCell
from gpu_rnn.debugging import debug
from gpu_rnn.explanation import explain
from gpu_rnn.launch.group import check
from gpu_rnn.layers import GRU, LSTM, RNN, Recurrent
from gpu_rnn.recurrence import Recurrence
from gpu_rnn.tracing import TraceError
from gpu_rnn.tuning import Tuned, tune

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Recurrence",
    "Recurrent",
    "TraceError",
    "Tuned",
    "__version__",
    "activations",
    "cells",
    "check",
    "debug",
    "explain",
    "tune",
]
