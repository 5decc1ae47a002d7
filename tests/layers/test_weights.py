# SPDX-License-Identifier: Apache-2.0
"""Whatever takes a parameter's place has its shape: kernels read and write wherever the weights lead them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import gpu_rnn
from tests.support import layers as support

INPUT, HIDDEN = 4, 5
MODULES: dict[str, tuple[str, dict[str, Any]]] = {
    "LSTM": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "projected": ("LSTM", {"proj_size": 2, "bias": False}),
    "peephole": ("LSTM", {"peephole": True}),
    "norm": ("GRU", {"layer_norm": True}),
    "RNN": ("RNN", {}),
    "LSTMCell": ("LSTMCell", {}),
    "peephole cell": ("LSTMCell", {"peephole": True}),
    "GRUCell": ("GRUCell", {"bias": False}),
}
SHAPES: dict[str, Callable[[torch.Size], tuple[int, ...]]] = {
    "wider": lambda size: (*size[:-1], size[-1] + 3),
    "narrower": lambda size: (*size[:-1], size[-1] - 1),
    "one": lambda size: (*size[:-1], 1),
    "more rows": lambda size: (size[0] + 1, *size[1:]),
    "flat": lambda size: (size.numel(),) if len(size) > 1 else (size[0], 1),
}


class Wrong(nn.Module):
    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, weight: Tensor) -> Tensor:
        return weight.new_zeros(self.shape)


def put(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    setattr(module, name, nn.Parameter(torch.zeros(shape)))


def data(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    getattr(module, name).data = torch.zeros(shape)


def attribute(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    delattr(module, name)
    setattr(module, name, torch.zeros(shape))


def parametrization(module: nn.Module, name: str, shape: tuple[int, ...]) -> None:
    parametrize.register_parametrization(module, name, Wrong(shape), unsafe=True)


def made(which: str, **options: Any) -> tuple[nn.Module, Tensor]:
    name, own = MODULES[which]
    return getattr(gpu_rnn, name)(INPUT, HIDDEN, **own, **options), torch.randn(3, INPUT)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("which", MODULES)
def test_a_weight_of_another_shape_is_refused(which: str, shape: str) -> None:
    """In the module's words, before any backend: ATen's kernels would corrupt memory, broadcasting give wrong
    numbers."""
    whole, _ = made(which)
    for name, weight in whole.named_parameters():
        other = SHAPES[shape](weight.shape)
        module, x = made(which)
        if other == weight.shape:
            continue
        put(module, name, other)
        words = rf"^{type(module).__name__}: {name} should be \({', '.join(map(str, weight.shape))},?\), got \(.*\)$"
        with pytest.raises(RuntimeError, match=words):
            module(x)


@pytest.mark.parametrize("way", [put, data, attribute, parametrization])
@pytest.mark.parametrize("backend", ["auto", "aten", "step", "reference"])
@pytest.mark.parametrize("which", ["RNN", "GRUCell"])
def test_whatever_way_it_came(which: str, backend: str, way: Callable[..., None]) -> None:
    module, x = made(which, backend=backend)
    module(x)
    name = next(name for name in module._flat_weights_names if "hh" in name)
    expected = tuple(getattr(module, name).shape)
    way(module, name, (expected[0], HIDDEN + 3))
    with pytest.raises(RuntimeError, match=rf"{name} should be \({expected[0]}, 5\), got \({expected[0]}, 8\)"):
        module(x)


def test_weights_of_functional_call_and_none() -> None:
    layer, x = made("RNN")
    with pytest.raises(RuntimeError, match=r"RNN: weight_hh_l0 should be \(5, 5\), got \(2, 5, 5\)"):
        torch.func.functional_call(layer, {"weight_hh_l0": torch.zeros(2, 5, 5)}, x)
    layer.bias_hh_l0 = None
    with pytest.raises(TypeError, match=r"RNN: bias_hh_l0 should be a Tensor \(5,\), got NoneType"):
        layer(x)


@pytest.mark.parametrize("which", ["peephole", "LSTMCell"])
def test_a_module_may_be_made_smaller(which: str) -> None:
    """Its sizes and all of its weights: the shapes are those of the sizes that it has now."""
    module, x = made(which)
    module(x)
    name, own = MODULES[which]
    smaller = getattr(gpu_rnn, name)(INPUT, HIDDEN - 2, **own)
    for each, weight in smaller.named_parameters():
        setattr(module, each, weight)
    with pytest.raises(RuntimeError, match=r"weight_ih\w* should be \(20, 4\), got \(12, 4\)"):
        module(x)
    module.hidden_size = HIDDEN - 2
    torch.testing.assert_close(support.leaves(module(x)), support.leaves(smaller(x)))


@pytest.mark.parametrize("which", ["RNN", "GRUCell"])
def test_modules_that_an_earlier_version_pickled(which: str) -> None:
    module, x = made(which)
    older = copy.deepcopy(module)
    del older.__dict__["_weight_shapes"]
    torch.testing.assert_close(support.leaves(older(x)), support.leaves(module(x)))
    put(older, module._flat_weights_names[1], (1, 1))
    with pytest.raises(RuntimeError, match="should be"):
        older(x)
