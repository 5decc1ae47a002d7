# SPDX-License-Identifier: Apache-2.0
"""The layers and their cells: torch.nn's classes with more options."""

from gpu_rnn.layers.cell import GRUCell, LSTMCell, RNNCell
from gpu_rnn.layers.options import LayerOptions
from gpu_rnn.layers.sequence import GRU, LSTM, RNN, Recurrent

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "LayerOptions", "RNNCell", "Recurrent"]
