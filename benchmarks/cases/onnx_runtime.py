# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime's LSTM, GRU and RNN beside ours: inference on a CPU.

    pip install 'gpu-rnn[benchmark]'

One operator with the layer's weights as constants, as an exported model has it; it runs on as many threads as torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases.names import ONNXRUNTIME
from benchmarks.cases.variants import Case, Variant
from gpu_rnn import interop

OPTIONS = ("", "lengths", "peephole", "activation")
OPSET = 17  # the operators are as in ONNX 14 to 21
IR = 8  # of that opset


def refuses(case: Case) -> str:
    problem = case.problem
    if case.direction != "forward":
        return "runs inference only"
    if case.dtype not in ("fp32", "ieee"):
        return "takes fp32 only on a CPU"
    if problem.layers > 1 or problem.bidirectional or problem.heads > 1 or problem.option not in OPTIONS:
        return f"takes one layer, forward in time, of the options {', '.join(OPTIONS[1:])}"
    return ""


def variant(case: Case, layers: list[nn.Module], call: Mapping[str, Any]) -> Variant:
    layer, problem = layers[0], case.problem
    running = session(model(case, layer, problem.T, "lengths" in call))
    given = {"lengths": call["lengths"].int().numpy()} if "lengths" in call else {}

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        y, *states = running.run(None, {"X": x.numpy(), **given})
        return torch.from_numpy(y).view(problem.T, problem.B, problem.H), *map(torch.from_numpy, states)

    weights = {name: (weight,) for name, weight in layer.named_parameters()}
    return Variant(ONNXRUNTIME, forward, weights, f"intra_op_num_threads {torch.get_num_threads()}")


def session(stored: bytes) -> Any:
    """What runs a model on as many threads as torch."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = torch.get_num_threads()
    settings.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(stored, settings, ["CPUExecutionProvider"])


def model(case: Case, layer: nn.Module, steps: int, ragged: bool = False, states: Sequence[str] = ()) -> bytes:
    """A model of the layer alone, as it is stored; with the initial states of these names as inputs."""
    from onnx import TensorProto, helper, numpy_helper

    operator = case.problem.cell
    (weights,) = interop.to_onnx(layer.state_dict(), cell=operator.lower())
    names = ["X", "W", "R", "B", *(["lengths"] if ragged else []), *(["", "", "", "P"] if "P" in weights else [])]
    names += ["", *states] if states else []
    final = ["Y_h", "Y_c"] if operator == "LSTM" else ["Y_h"]
    node = helper.make_node(operator, names, ["Y", *final], **interop.onnx_attributes(layer))
    inputs = [helper.make_tensor_value_info("X", TensorProto.FLOAT, [steps, case.problem.B, case.problem.I])]
    state = [1, case.problem.B, case.problem.H]
    inputs += [helper.make_tensor_value_info(name, TensorProto.FLOAT, state) for name in states]
    if ragged:
        inputs.append(helper.make_tensor_value_info("lengths", TensorProto.INT32, [case.problem.B]))
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("Y", *final)]
    constants = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    graph = helper.make_graph([node], "layer", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR).SerializeToString()
