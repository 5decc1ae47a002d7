# SPDX-License-Identifier: Apache-2.0
"""The models with recurrent layers and cells that torch's wheel carries for torch's own tests, converted and back.

Its tests of those layers it does not carry; the samples of its module database are in tests/layers/test_module_db.py.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import gpu_rnn

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what is deprecated in them
    from torch.testing._internal import common_pruning, common_quantization

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # so is quantization

X, ROW = torch.randn(5, 3, 2), torch.randn(3, 2)
STATES = torch.randn(1, 3, 2), torch.randn(1, 3, 2)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[Any, ...], str]] = {
    "LSTM": (lambda: common_quantization.RNNDynamicModel("LSTM"), (X,), "LSTM"),
    "GRU": (lambda: common_quantization.RNNDynamicModel("GRU"), (X,), "GRU"),
    **{
        name: (lambda name=name: common_quantization.RNNCellDynamicModel(name), (ROW,), kind)
        for name, kind in (
            ("LSTMCell", "LSTMCell"),
            ("GRUCell", "GRUCell"),
            ("RNNTanh", "RNNCell"),
            ("RNNReLU", "RNNCell"),
        )
    },
    "LSTM with states": (common_quantization.LSTMwithHiddenDynamicModel, (X, STATES), "LSTM"),
    "LSTM and Linear": (lambda: common_pruning.LSTMLinearModel(2, 4, 3, 2), (X,), "LSTM"),
    "LSTM, LayerNorm and Linear": (lambda: common_pruning.LSTMLayerNormLinearModel(2, 4, 3, 1), (X,), "LSTM"),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_the_same_converted_and_back(name: str) -> None:
    make, inputs, kind = MODELS[name]
    model = make()
    expected = model(*inputs)
    report = gpu_rnn.convert(model)
    assert [type(each.module).__name__ for each in report.replaced] == [kind] and not report.left
    torch.testing.assert_close(model(*inputs), expected)
    gpu_rnn.convert(model, to="torch")
    torch.testing.assert_close(model(*inputs), expected)


@pytest.mark.parametrize("name", [name for name in MODELS if "and Linear" not in name])
def test_a_model_that_goes_back_is_quantized_as_it_would_have_been(name: str) -> None:
    """quantize_dynamic asks for the class: it leaves our layer as it is, and takes torch's."""
    make, inputs, kind = MODELS[name]
    model = make().eval()
    whole = {getattr(nn, kind): torch.ao.quantization.default_dynamic_qconfig}
    expected = torch.ao.quantization.quantize_dynamic(model, whole)
    gpu_rnn.convert(model)
    untouched = torch.ao.quantization.quantize_dynamic(model, whole)
    assert isinstance(untouched.mod if hasattr(untouched, "mod") else untouched.lstm, getattr(gpu_rnn, kind))
    gpu_rnn.convert(model, to="torch")
    again = torch.ao.quantization.quantize_dynamic(model, whole)
    torch.testing.assert_close(again(*inputs), expected(*inputs), rtol=0, atol=0)
