# SPDX-License-Identifier: Apache-2.0
"""Small layers and cells for whoever records torch's operations, and what a recorded graph holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

import gpu_rnn
from tests.support import native

T, B, I, H = 5, 3, 4, 6  # noqa: E741
FORWARD, BACKWARD = torch.ops.gpu_rnn.rnn.default, torch.ops.gpu_rnn.rnn_backward.default


class Net(nn.Module):
    """A layer or a cell as a model has it: a tensor in, a tensor out, with what steers its steps made of the input."""

    def __init__(self, layer: nn.Module, *controls: str) -> None:
        super().__init__()
        self.layer, self.controls = layer, controls

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.RNNCell | nn.GRUCell | nn.LSTMCell | gpu_rnn.layers.cell.CellBase):
            found = self.layer(x[0])
            return found[0] if isinstance(found, tuple) else found
        every = {
            "mask": lambda: x[..., 0] > -0.5,
            "lengths": lambda: 1 + (x[0, :, 0] > 0).long(),
            "resets": lambda: x[..., 1] > 0.5,
            "return_all_states": lambda: True,
        }
        y, *states = self.layer(x, **{name: every[name]() for name in self.controls})
        return y * 2 + sum(state.mean() for state in tree_leaves(states))


LAYERS: dict[str, Callable[[], Net]] = {
    "lstm": lambda: Net(gpu_rnn.LSTM(I, H)),
    "stack": lambda: Net(gpu_rnn.GRU(I, H, 2, bidirectional=True)),
    "reset before": lambda: Net(gpu_rnn.GRU(I, H, reset_after=False), "lengths"),
    "peephole": lambda: Net(gpu_rnn.LSTM(I, H, 2, peephole=True), "mask"),
    "norm": lambda: Net(gpu_rnn.LSTM(I, H, layer_norm=True), "resets"),
    "rms": lambda: Net(gpu_rnn.LSTM(I, H, rms_norm=True, heads=2, bidirectional=True), "resets"),
    "softsign": lambda: Net(
        gpu_rnn.RNN(I, H, activation="softsign", bidirectional=True), "mask", "resets", "return_all_states"
    ),
    "step": lambda: Net(gpu_rnn.LSTM(I, H, backend="step"), "return_all_states"),
    "native": lambda: Net(gpu_rnn.LSTM(I, H, backend="native", layer_norm=True, proj_size=2), "mask"),
    "reference": lambda: Net(gpu_rnn.GRU(I, H, backend="reference")),
    "cell": lambda: Net(gpu_rnn.GRUCell(I, H, reset_after=False)),
    "lstm cell": lambda: Net(gpu_rnn.LSTMCell(I, H)),
}
SOME = ("lstm", "peephole", "softsign", "step")
every_layer = pytest.mark.parametrize(
    "name", [native.BACKEND if name == native.BACKEND.values[0] else name for name in LAYERS]
)
some_layers = pytest.mark.parametrize("name", SOME)
every_mode = pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])


def make(name: str) -> Net:
    torch.manual_seed(0)
    return LAYERS[name]()


def draw(seed: int, steps: int = T, batch: int = B) -> Tensor:
    return torch.randn(steps, batch, I, generator=torch.Generator().manual_seed(seed))


def loss_of(net: Net) -> Callable[[Tensor], Tensor]:
    return lambda x: net(x).sin().sum()


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def recorded(function: Callable[[Tensor], Any], mode: str, **options: Any) -> torch.fx.GraphModule:
    return make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True, **options)(draw(1))


def operations(graph: torch.fx.GraphModule) -> set[Any]:
    return {node.target for node in graph.graph.nodes}
