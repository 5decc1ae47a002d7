# SPDX-License-Identifier: Apache-2.0
"""Models through torch.onnx.export and ONNX Runtime, and what a file's graph holds."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import onnx
import onnxruntime
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import gpu_rnn.onnx  # noqa: F401  # torch.onnx.export knows the layers then

STEPS, BATCH = torch.export.Dim("steps"), torch.export.Dim("batch")

# What torch's exporter warns of, whatever it exports.
OF_TORCH = (r"`isinstance\(treespec, LeafSpec\)` is deprecated", "# The axis name: .* will not be used")


class Exported:
    """A model as an ONNX file, checked, in a session of ONNX Runtime."""

    def __init__(self, model: nn.Module, given: tuple[Any, ...], dynamic_shapes: Any, **options: Any) -> None:
        with warnings.catch_warnings():
            for words in OF_TORCH:
                warnings.filterwarnings("ignore", words)
            program = torch.onnx.export(
                model, given, dynamo=True, dynamic_shapes=dynamic_shapes, verbose=False, **options
            )
        assert program is not None
        file = io.BytesIO()
        onnx.save(program.model_proto, file)
        self.model = program.model_proto
        onnx.checker.check_model(self.model, full_check=True)
        self.session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])

    @property
    def operators(self) -> Counter[str]:
        return Counter(node.op_type for node in self.model.graph.node)

    def __call__(self, *given: Any) -> list[Tensor]:
        """What the file gives for arguments of the model; what nothing reads is no input of the file."""
        tensors = [tensor.detach().numpy() for tensor in tree_leaves(given)]
        names = [value.name for value in self.session.get_inputs()]
        assert len(names) == len(tensors)
        return [torch.from_numpy(array) for array in self.session.run(None, dict(zip(names, tensors, strict=True)))]


def agrees(exported: Exported, model: nn.Module, given: Sequence[Any], tolerance: float = 1e-5) -> None:
    with torch.no_grad():
        expected = tree_leaves(model(*given))
    torch.testing.assert_close(exported(*given), expected, rtol=tolerance, atol=tolerance)
