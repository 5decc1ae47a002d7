# SPDX-License-Identifier: Apache-2.0
"""torch.nn's layer as the shortest operation of Python's that torch.compile can record: what torch takes around one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gpu_rnn.call.stack_ops import recording

LIBRARY = torch.library.Library("gpu_rnn_benchmark", "FRAGMENT")
_layer: nn.RNNBase | None = None  # the one that all operations run
_output: Tensor | None = None  # of its last call in training


class InOneOperation(nn.Module):
    """A layer of torch.nn with one layer and direction; the last that was made is the one that runs."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        global _layer
        _layer, self.weights = layer, nn.ParameterList(layer.parameters())
        self.tuple = isinstance(layer, nn.LSTM)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        operations = torch.ops.gpu_rnn_benchmark
        operation = operations.training if torch.is_grad_enabled() else operations.inference
        y, *states = operation(x, list(self.weights))
        return y, tuple(states) if self.tuple else states[0]


def _outputs(x: Tensor) -> list[Tensor]:
    assert _layer is not None
    y, states = _layer(x)
    return [y, *(states if isinstance(states, tuple) else (states,))]


def _training(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    global _output
    with recording():
        outputs = _outputs(x)
    _output = outputs[0]
    return [output.detach() for output in outputs]


def _inference(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return _outputs(x)


def _backward(d_y: Tensor, weights: list[Tensor]) -> list[Tensor]:
    assert _layer is not None and _output is not None
    return list(torch.autograd.grad(_output, [*_layer.parameters()], d_y))


def _sizes(x: Tensor, weights: list[Tensor]) -> list[Tensor]:
    (steps, batch, _), hidden = x.shape, weights[1].shape[1]
    count = 1 + isinstance(_layer, nn.LSTM)
    return [x.new_empty(steps, batch, hidden), *(x.new_empty(1, batch, hidden) for _ in range(count))]


def _keep_weights(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    ctx.save_for_backward(*inputs[1])


def _derivative(ctx: Any, grads: list[Tensor]) -> tuple[None, list[Tensor]]:
    return None, list(torch.ops.gpu_rnn_benchmark.backward(grads[0], list(ctx.saved_tensors)))


for _name, _first, _kernel in (
    ("training", "x", _training),
    ("inference", "x", _inference),
    ("backward", "d_y", _backward),
):
    LIBRARY.define(f"{_name}(Tensor {_first}, Tensor[] weights) -> Tensor[]", tags=())
    LIBRARY.impl(_name, _kernel, "CPU")
for _name in ("training", "inference"):
    torch.library.register_fake(f"gpu_rnn_benchmark::{_name}", _sizes, lib=LIBRARY)
torch.library.register_fake(
    "gpu_rnn_benchmark::backward", lambda _, weights: [torch.empty_like(weight) for weight in weights], lib=LIBRARY
)
torch.library.register_autograd("gpu_rnn_benchmark::training", _derivative, setup_context=_keep_weights, lib=LIBRARY)
