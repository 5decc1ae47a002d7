# SPDX-License-Identifier: Apache-2.0
"""The layers and their cells: torch.nn's classes with more options.

They own the weights, under torch.nn's names, and know no backend: so state dicts go both ways, and a backend may come
or go without a layer that changes. `sequence` and `cell` are constructors with explicit arguments, since type
checkers, editors and `help` read those; everything else stands once, in `base` and `module`. They derive from torch's
own base classes, whose checks, errors and `repr` are then not imitated but inherited. What is random is drawn here,
before the call, so that every pass and every backend sees the same masks.
"""

from gpu_rnn.layers.cell import GRUCell, LSTMCell, RNNCell
from gpu_rnn.layers.conversion import Conversion, LeftAlone, Replaced, convert
from gpu_rnn.layers.options import LayerOptions
from gpu_rnn.layers.sequence import GRU, LSTM, RNN, Recurrent

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Conversion",
    "GRUCell",
    "LSTMCell",
    "LayerOptions",
    "LeftAlone",
    "RNNCell",
    "Recurrent",
    "Replaced",
    "convert",
]
