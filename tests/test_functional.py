# SPDX-License-Identifier: Apache-2.0
"""What the public function checks before ATen's kernels, which read and write wherever the shapes given lead them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gpu_rnn import cells, functional

T, B, I, H = 4, 3, 5, 2  # noqa: E741
WEIGHTS = [torch.zeros(4 * H, I), torch.zeros(4 * H, H), torch.zeros(4 * H), torch.zeros(4 * H)]


def state(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(shape), torch.zeros(shape)


@pytest.mark.parametrize("backend", ["auto", "aten", "step", "reference"])
@pytest.mark.parametrize("shape", [(1, 1, H), (1, B, H + 1), (1, B + 1, H), (2, B, H), (B, H)])
def test_states_of_another_shape(shape: tuple[int, ...], backend: str) -> None:
    with pytest.raises(RuntimeError, match=r"hx is \[\(1, 3, 2\), \(1, 3, 2\)\]"):
        functional.rnn(torch.zeros(T, B, I), state(*shape), WEIGHTS, cells.lstm(), backend=backend)


@pytest.mark.parametrize("backend", ["auto", "aten", "step", "reference"])
def test_features_and_weights_of_another_shape(backend: str) -> None:
    with pytest.raises(RuntimeError, match="for an input of 1000 features the weights are"):
        functional.rnn(torch.zeros(T, B, 1000), None, WEIGHTS, cells.lstm(), backend=backend)
    for wrong in (WEIGHTS[:3], [*WEIGHTS, WEIGHTS[0]], [WEIGHTS[0], torch.zeros(4 * H, H + 1), *WEIGHTS[2:]]):
        with pytest.raises(RuntimeError, match="features the weights are"):
            functional.rnn(torch.zeros(T, B, I), None, wrong, cells.lstm(), backend=backend)
    with pytest.raises(RuntimeError, match="features the weights are"):
        functional.rnn(torch.zeros(T, B, I), None, WEIGHTS, cells.lstm(), num_layers=2, backend=backend)


def test_every_kind_of_stack_passes() -> None:
    """The shapes expected are those of the layers' own weights."""
    import gpu_rnn

    options = {"num_layers": 2, "bidirectional": True, "layer_norm": True}
    for layer in (gpu_rnn.LSTM(I, H + 1, proj_size=H, peephole=True, **options), gpu_rnn.GRU(I, H, bias=False, **options)):
        weights = layer._weights()
        stack = layer._stack()
        assert [tuple(w.shape) for w in weights] == stack.weight_shapes(I, layer.hidden_size)
