# SPDX-License-Identifier: Apache-2.0
"""ONNX: importing this module teaches torch.onnx.export the layers.

An LSTM, GRU or RNN with ONNX's activations is one node of that name, also with peepholes, clip, lengths, both
directions. Every other recurrence is a Scan, whose body is printed from its program. The numbers of steps and samples
may be dynamic. Needs onnx and onnxscript: ``pip install 'gpu-rnn[onnx]'``. Opset 18 or later.

Example::

    >>> import gpu_rnn.onnx, torch
    >>> layer = gpu_rnn.LSTM(3, 8, layer_norm=True).eval()
    >>> sizes = {0: torch.export.Dim("steps"), 1: torch.export.Dim("batch")}
    >>> program = torch.onnx.export(layer, (torch.randn(5, 2, 3),), dynamic_shapes=(sizes,), verbose=False)
    >>> program.save(folder / "layer.onnx")
"""

from __future__ import annotations

from importlib.util import find_spec

import torch

if find_spec("onnxscript") is None:  # torch's exporter needs it
    raise ModuleNotFoundError("gpu_rnn.onnx needs onnx and onnxscript: pip install 'gpu-rnn[onnx]'", name="onnxscript")

from torch.onnx._internal.exporter._torchlib._torchlib_registry import onnx_impl

from gpu_rnn.onnx import translation

onnx_impl(torch.ops.gpu_rnn.rnn.default, no_compile=True)(translation.rnn)
