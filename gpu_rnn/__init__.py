# SPDX-License-Identifier: Apache-2.0
"""Recurrent layers for PyTorch that run the whole time loop on the GPU, with every option at the speed of the
default."""

import sys

from gpu_rnn import activations, cells
from gpu_rnn import functional as functional  # gpu_rnn.functional.rnn, after `import gpu_rnn` alone
from gpu_rnn._version import __version__
from gpu_rnn.backends.group.deadline import check
from gpu_rnn.compiler.tracing import TraceError
from gpu_rnn.diagnostics import tuning
from gpu_rnn.diagnostics.debugging import debug
from gpu_rnn.diagnostics.explanation import explain
from gpu_rnn.diagnostics.tuning import Tuned, tune
from gpu_rnn.layers import GRU, LSTM, RNN, Conversion, GRUCell, LSTMCell, Recurrent, RNNCell, cell, convert
from gpu_rnn.memo import clear_caches
from gpu_rnn.recurrence import Recurrence
from gpu_rnn.streams import Streams

# Names that programs import and pickled layers hold, from before these modules stood in packages.
sys.modules |= {"gpu_rnn.tuning": tuning, "gpu_rnn.cell_layers": cell}

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Conversion",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "Recurrence",
    "Recurrent",
    "Streams",
    "TraceError",
    "Tuned",
    "__version__",
    "activations",
    "cells",
    "check",
    "clear_caches",
    "convert",
    "debug",
    "explain",
    "tune",
]
