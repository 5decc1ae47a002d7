# SPDX-License-Identifier: Apache-2.0
"""Models of torch.nn's layers converted in place and back: what stays one object, what is left, what is refused."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import gpu_rnn
from tests.support import layers as support

CELLS = ("RNNCell", "LSTMCell", "GRUCell")
SIZES = [
    {},
    {"num_layers": 2, "bidirectional": True, "dropout": 0.3},
    {"bias": False, "batch_first": True},
]
KINDS: list[tuple[str, dict[str, Any]]] = [
    *itertools.product(support.LAYERS, SIZES),
    *itertools.product(CELLS, [{}, {"bias": False}]),
    ("RNN", {"nonlinearity": "relu"}),
    ("RNNCell", {"nonlinearity": "relu"}),
    ("LSTM", {"proj_size": 2, "num_layers": 2}),
]


class Network(nn.Module):
    """Two names for one GRU, a stack in a Sequential, a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(4, 8, 2, bidirectional=True, proj_size=3)
        self.inner = nn.Sequential(nn.Linear(6, 6), nn.GRU(6, 5))
        self.again = self.inner[1]
        self.cell = nn.LSTMCell(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.again(self.inner(self.first(x)[0])[0].repeat(1, 1, 2)[..., :6])[0]
        return self.cell(y[-1])[0]


def input_for(kind: str) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn((3, 4) if kind in CELLS else (5, 3, 4))


@pytest.mark.parametrize(("kind", "sizes"), KINDS, ids=str)
@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_a_layer_becomes_what_its_twin_is_and_returns(kind: str, sizes: dict[str, Any]) -> None:
    torch.manual_seed(0)
    module, x = getattr(nn, kind)(4, 6, **sizes).eval(), input_for(kind)
    expected, untouched = module(x), copy.deepcopy(module)
    parameters, shown = list(module.named_parameters()), repr(module)
    gpu_rnn.convert(module)
    made = getattr(gpu_rnn, kind)(4, 6, **sizes)
    assert type(module) is type(made) and repr(module) == shown
    assert vars(module).keys() - {"_stacks"} == vars(made).keys() - {"_stacks"}
    torch.testing.assert_close(module(x), expected)
    torch.testing.assert_close(pickle.loads(pickle.dumps(module))(x), expected)
    assert not gpu_rnn.convert(module).replaced, "a second time there is nothing to do"
    gpu_rnn.convert(module, to="torch")
    assert type(module) is getattr(nn, kind) and repr(module) == shown
    assert vars(module).keys() == vars(untouched).keys()
    torch.testing.assert_close(module(x), expected, rtol=0, atol=0)
    for (name, before), (other, after) in zip(parameters, module.named_parameters(), strict=True):
        assert name == other and before is after


def test_a_model_keeps_its_parameters_hooks_flags_and_shared_modules() -> None:
    torch.manual_seed(0)
    model, x, called = Network(), torch.randn(7, 3, 4), []
    model.first.weight_ih_l0.requires_grad_(False)
    model.cell.eval()
    model.cell.register_forward_hook(lambda *_: called.append("hook"))
    model.again.of_the_user = "stays"
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    twin = copy.deepcopy(model)
    held, flags = list(model.parameters()), [module.training for module in model.modules()]
    report = gpu_rnn.convert(model)
    assert [each.names for each in report.replaced] == [("first",), ("inner.1", "again"), ("cell",)]
    assert not report.left and model.again is model.inner[1] and model.again.of_the_user == "stays"
    assert [module.training for module in model.modules()] == flags
    assert all(a is b for a, b in zip(model.parameters(), held, strict=True))
    assert model.state_dict().keys() == twin.state_dict().keys()
    model(x).sum().backward()
    twin(x).sum().backward()
    assert called == ["hook"] * 2 and model.first.weight_ih_l0.grad is None
    optimizer.step()
    torch.optim.SGD(twin.parameters(), 0.1).step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict())
    assert repr(report).startswith("3 of 3 recurrent modules are gpu_rnn's now\n  first: LSTM(4, 8, proj_size=3")
    assert "  inner.1, again: GRU(6, 5)\n" in repr(report)


class Subclass(nn.LSTM):
    pass


def replaced_forward(module: nn.Module) -> nn.Module:
    module.forward = module.forward
    return module


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "subclass": (lambda: Subclass(4, 6), "a subclass of torch.nn.LSTM: change its base class"),
    "parametrized": (
        lambda: parametrizations.weight_norm(nn.GRU(4, 6), "weight_hh_l0"),
        "parametrized: convert before",
    ),
    "quantized": (lambda: torch.ao.nn.quantized.dynamic.LSTM(4, 6), "compiled or quantized"),
    "forward": (lambda: replaced_forward(nn.RNN(4, 6)), "whose forward somebody replaced"),
}


@pytest.mark.parametrize("name", LEFT)
@pytest.mark.filterwarnings("ignore:torch.quantize:UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_what_is_no_plain_layer_is_left_and_reported(name: str) -> None:
    make, reason = LEFT[name]
    model = nn.Sequential(make(), nn.LSTM(4, 6))
    kind = type(model[0])
    report = gpu_rnn.convert(model)
    assert type(model[0]) is kind and type(model[1]) is gpu_rnn.LSTM
    (left,) = report.left
    assert left.names == ("0",) and reason in left.reason and left.kind.endswith(kind.__qualname__)
    assert f"left:\n  0: {left.kind}, {left.reason}" in repr(report)


def test_pruned_and_replaced_weights_go_on() -> None:
    torch.manual_seed(0)
    layer, x = nn.LSTM(4, 6), torch.randn(5, 3, 4)
    prune.random_unstructured(layer, "weight_hh_l0", 0.5)
    expected = layer(x)
    gpu_rnn.convert(layer)
    torch.testing.assert_close(layer(x), expected)
    prune.remove(layer, "weight_hh_l0")
    torch.testing.assert_close(layer(x), expected)
    gpu_rnn.convert(layer, to="torch")
    torch.testing.assert_close(layer(x), expected)


def test_options_for_all() -> None:
    model = nn.Sequential(nn.LSTM(4, 6), nn.GRU(6, 5, dropout=0.0), nn.LSTMCell(5, 4), gpu_rnn.RNN(4, 3))
    report = gpu_rnn.convert(model, recurrent_dropout=0.2, layer_norm=True)
    assert model[0].recurrent_dropout == model[1].recurrent_dropout == 0.2
    assert isinstance(model[0].norm_hh_l0, nn.Parameter) and bool((model[0].norm_hh_l0 == 1).all())
    model[1](model[0](torch.randn(5, 3, 4))[0])[0].sum().backward()
    assert [(left.names, left.reason) for left in report.left] == [
        (("2",), "LSTMCell has no layer_norm, recurrent_dropout"),
        (("3",), "gpu_rnn's already: set its attributes"),
    ]
    heads = gpu_rnn.convert(nn.Sequential(nn.LSTM(4, 6)), heads=2)
    assert heads.left[0].reason == "whose weights have other shapes than those of heads"
    relu = nn.Sequential(nn.RNN(4, 6, nonlinearity="relu"))
    assert gpu_rnn.convert(relu, activation="softsign").left[0].reason == (
        "made with nonlinearity='relu', which activation would replace"
    )


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"recurent_dropout": 0.1}, TypeError, r"did you mean recurrent_dropout\? the layers take activation"),
        ({"recurrent_dropout": 2.0}, ValueError, "recurrent_dropout"),
        ({"num_layers": 2}, TypeError, "unexpected option 'num_layers'"),
        ({"to": "keras"}, ValueError, "to is 'gpu_rnn' or 'torch', not 'keras'"),
        ({"to": "torch", "zoneout": 0.1}, TypeError, "take none of zoneout"),
    ],
    ids=str,
)
def test_a_bad_argument_changes_nothing(options: dict[str, Any], error: type[Exception], words: str) -> None:
    model = nn.Sequential(nn.LSTM(4, 6), nn.GRU(6, 5))
    with pytest.raises(error, match=words):
        gpu_rnn.convert(model, **options)
    assert [type(layer) for layer in model] == [nn.LSTM, nn.GRU]
    with pytest.raises(TypeError, match=r"convert takes a torch\.nn\.Module, not list"):
        gpu_rnn.convert([model])


def test_the_way_back_refuses_by_name_what_torch_lacks() -> None:
    model = nn.ModuleDict(
        {
            "plain": gpu_rnn.LSTM(4, 6),
            "dropping": gpu_rnn.LSTM(4, 6, recurrent_dropout=0.2),
            "before": gpu_rnn.GRU(4, 6, reset_after=False, zoneout=0.1),
            "last": gpu_rnn.RNN(4, 6, return_sequences=False),
            "blocks": gpu_rnn.GRUCell(4, 6, heads=2),
            "own": gpu_rnn.Recurrent(gpu_rnn.cells.lstm(), 4, 6),
            "function": gpu_rnn.LSTMCell(4, 6, activation=torch.tanh),
        }
    )
    with pytest.raises(ValueError, match="nothing was changed") as refusal:
        gpu_rnn.convert(model, to="torch")
    text = str(refusal.value)
    assert "plain" not in text and type(model["plain"]) is gpu_rnn.LSTM
    for line in (
        "  dropping: gpu_rnn.layers.sequence.LSTM, recurrent_dropout=0.2",
        "  before: gpu_rnn.layers.sequence.GRU, reset_after=False, zoneout=(0.1,)",
        "  last: gpu_rnn.layers.sequence.RNN, return_sequences=False",
        "  blocks: gpu_rnn.layers.cell.GRUCell, heads=2",
        "  own: gpu_rnn.layers.sequence.Recurrent, the recurrence lstm",
        "  function: gpu_rnn.layers.cell.LSTMCell, activation='tanh'",
    ):
        assert line in text


def test_what_acts_in_training_alone_is_dropped_in_evaluation() -> None:
    options = {"recurrent_dropout": 0.2, "weight_drop": 0.1, "kernel_initializer": "orthogonal"}
    model = nn.Sequential(gpu_rnn.GRU(4, 6, **options), nn.RNN(6, 3)).eval()
    x = torch.randn(5, 3, 4)
    expected = model[0](x)
    report = gpu_rnn.convert(model, to="torch")
    assert report.replaced[0].note == "without recurrent_dropout=0.2, weight_drop=0.1, kernel_initializer=orthogonal"
    assert type(model[0]) is nn.GRU and not report.left and len(report.replaced) == 1
    torch.testing.assert_close(model[0](x), expected)


def test_relu_by_either_name_goes_back() -> None:
    layer = gpu_rnn.RNN(4, 6, activation="relu").eval()
    expected = layer(torch.ones(5, 3, 4))
    gpu_rnn.convert(layer, to="torch")
    assert layer.nonlinearity == "relu" and layer.mode == "RNN_RELU"
    torch.testing.assert_close(layer(torch.ones(5, 3, 4)), expected)


def test_nothing_to_convert_is_said() -> None:
    assert repr(gpu_rnn.convert(nn.Linear(2, 3))) == "no recurrent layers"
