# SPDX-License-Identifier: Apache-2.0
"""Keras's own tests of its recurrent layers, run on ours. `RNN` and the cells, which we leave to Keras, are not
among them."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("keras") is None:
    pytest.skip("Keras is not installed: pip install 'gpu-rnn[keras]'", allow_module_level=True)
from tests.support.keras_suites import suite

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # Keras's tests do not raise on warnings

TestLSTM = suite("layers/rnn/lstm_test.py", "LSTMTest")
TestGRU = suite("layers/rnn/gru_test.py", "GRUTest")
TestSimpleRNN = suite("layers/rnn/simple_rnn_test.py", "SimpleRNNTest")
TestBidirectional = suite("layers/rnn/bidirectional_test.py", "SimpleRNNTest")
TestMasking = suite("layers/core/masking_test.py", "MaskingTest", "with_tensor")

if importlib.util.find_spec("onnxruntime"):
    TestExportONNX = suite("export/onnx_test.py", "ExportONNXTest", "lstm")
