# SPDX-License-Identifier: Apache-2.0
"""Many streams that step together, each with states of its own: `gpu_rnn.Streams` beside what else a server can do.

An input (T, B, I) is T ticks of B streams, all of which have a sample at each. torch.nn's layer is called for each
stream by itself, as a server does that handles one request after the other. By hand, and in ONNX Runtime, the streams
are one batch, whose states the caller keeps: the most that either can do, and possible only while all have samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import gpu_rnn
from benchmarks.cases import onnx_runtime
from benchmarks.cases.names import BY_HAND, ONNXRUNTIME
from benchmarks.cases.variants import Case, Variant

Outputs = tuple[Tensor, Any]


class Served(nn.Module):
    """Our layer, in `gpu_rnn.Streams`."""

    def __init__(self, layer: nn.Module, count: int) -> None:
        super().__init__()
        self.layer, self.count = layer, count

    def forward(self, x: Tensor) -> Outputs:
        if "streams" not in vars(self):  # when the weights have come
            self.streams = gpu_rnn.Streams(self.layer, self.count)
            self.streams.join(*range(self.count))
        names = list(self.streams)
        self.streams.reset(*names)
        y = torch.stack([self.streams.step_batch(names, samples) for samples in x])
        return y, tuple(state[:, : self.count].clone() for state in self.streams._states)


class OneByOne(nn.Module):
    """torch.nn's layer, called for each stream with the states that it had."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Outputs:
        states: list[Any] = [None] * x.shape[1]
        ticks = []
        for samples in x:
            outputs = []
            for name, sample in enumerate(samples):
                y, states[name] = self.layer(sample[None], states[name])
                outputs.append(y)
            ticks.append(torch.cat(outputs))
        pairs = [(each,) if isinstance(each, Tensor) else each for each in states]
        return torch.stack(ticks), tuple(torch.stack(each, 1) for each in zip(*pairs, strict=True))


def by_hand(case: Case, layers: list[nn.Module], call: Mapping[str, Any]) -> Variant:
    """torch.nn's layer on all streams as a batch."""
    layer = layers[0].layer

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        states, ticks = None, []
        for samples in x:
            y, states = layer(samples[None], states)
            ticks.append(y[0])
        return torch.stack(ticks), *((states,) if isinstance(states, Tensor) else states)

    return Variant(BY_HAND, forward, _weights(layers[0]), "one batch, its states kept")


def onnxruntime(case: Case, layers: list[nn.Module], call: Mapping[str, Any]) -> Variant:
    """One operator on all streams as a batch, its states fed back."""
    problem = case.problem
    names = ["initial_h", "initial_c"][: 2 if problem.cell == "LSTM" else 1]
    session = onnx_runtime.session(onnx_runtime.model(case, layers[0].layer, 1, states=names))
    zeros = torch.zeros(1, problem.B, problem.H).numpy()

    def forward(x: Tensor) -> tuple[Tensor, ...]:
        states, ticks = [zeros] * len(names), []
        for samples in x:
            y, *states = session.run(None, {"X": samples[None].numpy(), **dict(zip(names, states, strict=True))})
            ticks.append(torch.from_numpy(y).view(problem.B, problem.H))
        return torch.stack(ticks), *map(torch.from_numpy, states)

    note = f"one batch, its states kept; intra_op_num_threads {torch.get_num_threads()}"
    return Variant(ONNXRUNTIME, forward, _weights(layers[0]), note)


def _weights(layer: nn.Module) -> dict[str, tuple[Tensor, ...]]:
    return {name: (weight,) for name, weight in layer.named_parameters()}
