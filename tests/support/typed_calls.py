# SPDX-License-Identifier: Apache-2.0
# pyright: reportUnnecessaryTypeIgnoreComment=true
"""What type checkers make of calls: read by mypy in `make lint`, and by pyright in a test. Each ignored line is an
error that they find: one that they do not is reported, too.
"""

from __future__ import annotations

from typing import Any, assert_type

import numpy as np
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

import gpu_rnn

Pair = tuple[Tensor, Tensor]


def layers(x: Tensor, packed: PackedSequence, wanted: bool) -> None:
    lstm, gru = gpu_rnn.LSTM(3, 4, recurrent_dropout=0.1), gpu_rnn.GRU(3, 4, activation=nn.Tanh())
    own = gpu_rnn.Recurrent(gpu_rnn.cells.lstm(), 3, 4)
    assert_type(lstm(x), tuple[Tensor, Pair])
    assert_type(lstm(x, mask=np.ones((5, 2), bool), lengths=[3, 2], resets=x > 0), tuple[Tensor, Pair])
    assert_type(lstm(x, (x, x), return_all_states=True), tuple[Tensor, Pair, Pair])
    assert_type(lstm(x, return_all_states=wanted), tuple[Tensor, Pair] | tuple[Tensor, Pair, Pair])
    assert_type(lstm(packed), tuple[PackedSequence, Pair])
    assert_type(gru(x, x), tuple[Tensor, Tensor])
    assert_type(gru(x, return_all_states=True), tuple[Tensor, Tensor, Tensor])
    assert_type(own(x), tuple[Tensor, Any])
    y, (h, c) = lstm(x)
    print(y.shape, h.shape, c.shape)
    lstm(x, x)  # type: ignore[call-overload]
    gru(x, (x, x))  # type: ignore[call-overload]
    lstm(x, maks=x)  # type: ignore[call-overload]
    lstm(packed, mask=x)  # type: ignore[call-overload]
    lstm(x, return_all_states="yes")  # type: ignore[call-overload]
    gpu_rnn.LSTM(3, 4, zoneot=0.1)  # type: ignore[call-arg]
    gpu_rnn.GRU(3, 4, reset_after="no")  # type: ignore[arg-type]


def cells(x: Tensor) -> None:
    assert_type(gpu_rnn.LSTMCell(3, 4)(x), Pair)
    assert_type(gpu_rnn.GRUCell(3, 4)(x, x), Tensor)
    gpu_rnn.RNNCell(3, 4)(x, (x, x))  # type: ignore[arg-type]
    gpu_rnn.LSTMCell(3, 4, clip="3")  # type: ignore[arg-type]


def models(x: Tensor) -> None:
    report = gpu_rnn.convert(nn.Sequential(nn.LSTM(3, 4)), zoneout=0.1)
    assert_type(report, gpu_rnn.Conversion)
    assert_type(report.replaced[0].names, tuple[str, ...])
    streams = gpu_rnn.Streams(gpu_rnn.GRU(3, 4))
    streams.join("a", 7)
    assert_type(streams.step({"a": x}), dict[str, Tensor])
    assert_type(streams.step_batch([7], x), Tensor)
    gpu_rnn.Streams(nn.LSTM(3, 4))  # type: ignore[arg-type]
