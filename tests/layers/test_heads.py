# SPDX-License-Identifier: Apache-2.0
"""Block-diagonal recurrent matrices: a layer with heads is the plain layer whose W_hh has zeros beside its blocks."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gpu_rnn
from gpu_rnn import cells, functional, initializers, interop
from tests.support import layers as support
from tests.support.pairwise import spread

HEADS, FEATURES, HIDDEN = 3, 4, 12
MADE: dict[str, tuple[str, dict[str, Any]]] = {
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
    "rnn": ("RNN", {"nonlinearity": "relu"}),
    "two products": ("GRU", {"reset_after": False}),
    "peepholes": ("LSTM", {"peephole": True}),
    "projection": ("LSTM", {"proj_size": 6}),
    "stack": ("GRU", {"num_layers": 2, "bidirectional": True, "batch_first": True}),
    "no bias": ("LSTM", {"bias": False, "clip": 0.4, "bidirectional": True}),
    "slstm": ("slstm", {"num_layers": 2}),
}
KINDS = ("plain", "lengths", "mask", "resets")
BACKENDS = ("auto", "reference", "step", "native")


def make(name: str, heads: int = HEADS, **more: Any) -> gpu_rnn.Recurrent:
    kind, options = MADE[name]
    options = {"dtype": torch.float64, **options, **more}
    if kind == "slstm":
        return gpu_rnn.Recurrent(cells.slstm(), FEATURES, HIDDEN, heads=heads, **options)
    return getattr(gpu_rnn, kind)(FEATURES, HIDDEN, heads=heads, **options)


def dense(name: str, weight: Tensor, gates: int) -> Tensor:
    """A weight of a layer with heads as the plain layer has it, gate after gate; differentiable."""
    if name.startswith("weight_hr"):
        return torch.block_diag(*weight)
    if name.startswith(("weight_peephole", "weight_unit")):
        return weight.transpose(0, 1).flatten(1)
    by_gate = weight.unflatten(1, (gates, -1)).transpose(0, 1)  # (G, k, H/k, ...)
    return torch.cat([torch.block_diag(*gate) for gate in by_gate]) if "weight_hh" in name else by_gate.flatten(0, 2)


def plain(name: str, layer: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """The layer with heads=1, and its weights as functions of those of a layer with heads."""
    gates = len(layer.recurrence.gates)
    return make(name, 1), {key: dense(key, weight, gates) for key, weight in layer.named_parameters()}


def inputs(layer: nn.Module) -> tuple[Tensor, Any]:
    shape = (3, 5, FEATURES) if layer.batch_first else (5, 3, FEATURES)
    rows = layer.num_layers * (1 + layer.bidirectional)
    widths = [layer.proj_size or HIDDEN, *[HIDDEN] * (len(layer.recurrence.states) - 1)]
    hx = tuple(0.5 * support.draw(rows, 3, width, seed=k).abs() for k, width in enumerate(widths))
    return support.draw(*shape), hx if len(hx) > 1 else hx[0]


def controls(layer: nn.Module, kind: str) -> dict[str, Any]:
    steps = (3, 5) if layer.batch_first else (5, 3)
    generator = torch.Generator().manual_seed(5)
    mask = torch.rand(steps, generator=generator) < 0.7
    every = {
        "plain": {},
        "lengths": {"lengths": torch.tensor([5, 0, 3])},
        "mask": {"mask": mask, "return_all_states": True},
        "resets": {"resets": ~mask, "reset_state": inputs(layer)[1]},
    }
    return every[kind]


@pytest.mark.parametrize(("name", "kind"), spread([*product(MADE, KINDS)], 2, apart=True))
def test_a_layer_with_heads_is_the_plain_layer_with_zeros(name: str, kind: str) -> None:
    """Outputs, states and every gradient, on each backend."""
    layer = make(name)
    x, hx = inputs(layer)
    call = controls(layer, kind)
    other, weights = plain(name, layer)
    wanted = {"x": x, **{f"h{k}": s for k, s in enumerate(support.leaves(hx))}, **dict(layer.named_parameters())}
    expected = support.gradients(lambda: torch.func.functional_call(other, weights, (x, hx), call), wanted)
    for backend in BACKENDS:
        layer.backend = backend
        actual = support.gradients(lambda: layer(x, hx, **call), wanted)
        torch.testing.assert_close(actual, expected, **support.TOLERANCE)


@pytest.mark.parametrize("name", ["lstm", "stack", "projection"])
def test_packed_input(name: str) -> None:
    layer = make(name)
    sequences = [support.draw(t, FEATURES) for t in (2, 5, 3)]
    packed = nn.utils.rnn.pack_sequence(sequences, enforce_sorted=False)
    other, weights = plain(name, layer)
    expected, actual = torch.func.functional_call(other, weights, (packed,)), layer(packed)
    torch.testing.assert_close(support.leaves(actual), support.leaves(expected), **support.TOLERANCE)


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")  # torch itself, of a decomposition
@pytest.mark.parametrize("name", ["lstm", "two products", "stack"])
def test_second_and_forward_mode_derivatives(name: str) -> None:
    layer = make(name)
    x, _ = inputs(layer)
    other, weights = plain(name, layer)
    loss: list[Callable[[Tensor], Tensor]] = [
        lambda v: layer(v)[0].square().sum(),
        lambda v: torch.func.functional_call(other, weights, (v,))[0].square().sum(),
    ]
    values = []
    for function in loss:
        (first,) = torch.autograd.grad(function(x), x, create_graph=True)
        second = torch.autograd.grad(first.square().sum(), [x, *layer.parameters()])
        pushed = torch.func.jvp(function, (x.detach(),), (torch.cos(x.detach()),))
        values.append((first, *second, *pushed))
    torch.testing.assert_close(*values, **support.TOLERANCE)


@pytest.mark.parametrize("name", ["gru", "stack", "slstm"])
def test_vmap_over_inputs_and_over_members(name: str) -> None:
    members = [make(name) for _ in range(2)]
    xs = torch.stack([inputs(members[0])[0].detach() * scale for scale in (1.0, 0.5)])
    each = torch.stack([members[0](x)[0] for x in xs])
    torch.testing.assert_close(torch.vmap(lambda x: members[0](x)[0])(xs), each, **support.TOLERANCE)
    stacked, _ = torch.func.stack_module_state(members)
    empty = copy.deepcopy(members[0]).to("meta")
    both = torch.vmap(lambda weights, x: torch.func.functional_call(empty, weights, (x,))[0])(stacked, xs)
    each = torch.stack([member(x)[0] for member, x in zip(members, xs, strict=True)])
    torch.testing.assert_close(both, each, **support.TOLERANCE)


def test_compiled_and_exported() -> None:
    torch._dynamo.reset()
    layer = make("no bias", dtype=torch.float32, batch_first=True)
    x = torch.randn(3, 5, FEATURES)
    wanted = {"x": x.requires_grad_(), **dict(layer.named_parameters())}
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    actual, expected = (support.gradients(lambda one=one: one(x), wanted) for one in (compiled, layer))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    sizes = {0: torch.export.Dim("B", min=2, max=9), 1: torch.export.Dim("T", min=2, max=9)}
    program = torch.export.export(layer, (x.detach(),), dynamic_shapes=(sizes,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    other = torch.randn(4, 7, FEATURES)
    torch.testing.assert_close(torch.export.load(file).module()(other), layer(other), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["RNN", "LSTM", "GRU"])
def test_cells(kind: str) -> None:
    layer = getattr(gpu_rnn, kind)(FEATURES, HIDDEN, heads=HEADS, dtype=torch.float64)
    cell = getattr(gpu_rnn, f"{kind}Cell")(FEATURES, HIDDEN, heads=HEADS, dtype=torch.float64)
    cell.load_state_dict({key.removesuffix("_l0"): value for key, value in layer.state_dict().items()})
    x, hx = inputs(layer)
    states = tuple(s[0] for s in hx) if kind == "LSTM" else hx[0]
    after = cell(x[0], states)
    assert repr(cell) == f"{kind}Cell({FEATURES}, {HIDDEN}, heads={HEADS})"
    torch.testing.assert_close(after[0] if kind == "LSTM" else after, layer(x[:1], hx)[0][0], **support.TOLERANCE)
    assert pickle.loads(pickle.dumps(cell)).weight_hh.shape == cell.weight_hh.shape


def test_each_head_is_a_plain_layer() -> None:
    """On the same input; that is what the first axis of the weights means."""
    layer = make("lstm")
    x, _ = inputs(layer)
    parts = []
    for head in range(HEADS):
        one = gpu_rnn.LSTM(FEATURES, HIDDEN // HEADS, dtype=torch.float64)
        one.load_state_dict({name: weight[head] for name, weight in layer.state_dict().items()})
        parts.append(one(x)[0])
    torch.testing.assert_close(layer(x)[0], torch.cat(parts, 2), **support.TOLERANCE)


def test_one_head_is_the_plain_layer() -> None:
    torch.manual_seed(0)
    layer = gpu_rnn.LSTM(FEATURES, HIDDEN, heads=1)
    torch.manual_seed(0)
    other = gpu_rnn.LSTM(FEATURES, HIDDEN)
    x = torch.randn(5, 3, FEATURES)
    assert repr(layer) == repr(other) and torch.equal(layer(x)[0], other(x)[0])
    assert {n: p.shape for n, p in layer.named_parameters()} == {n: p.shape for n, p in other.named_parameters()}


def test_weights_and_what_they_cost() -> None:
    layer = gpu_rnn.LSTM(FEATURES, HIDDEN, 2, bidirectional=True, peephole=True, layer_norm=True, heads=HEADS)
    units, k = HIDDEN // HEADS, HEADS
    shapes = {name.partition("_l")[0]: tuple(p.shape) for name, p in layer.named_parameters() if "_l1" in name}
    assert shapes == {
        "weight_ih": (k, 4 * units, 2 * HIDDEN),
        "weight_hh": (k, 4 * units, units),
        "bias_ih": (k, 4 * units),
        "bias_hh": (k, 4 * units),
        "weight_peephole": (k, 3, units),
        "norm_ih": (k, 4 * units),
        "norm_hh": (k, 4 * units),
    }
    assert repr(layer) == "LSTM(4, 12, num_layers=2, bidirectional=True, peephole=True, layer_norm=True, heads=3)"
    again = pickle.loads(pickle.dumps(layer))
    x = torch.randn(5, 3, FEATURES)
    assert again.heads == HEADS and torch.equal(again(x)[0], layer(x)[0])
    fewer, all_units = gpu_rnn.GRU(1, 64, heads=8), gpu_rnn.GRU(1, 64)
    assert 8 * fewer.weight_hh_l0.numel() == all_units.weight_hh_l0.numel()
    flops = [gpu_rnn.explain(each, torch.empty(10, 2, 1)).problem.flops for each in (fewer, all_units)]
    assert flops == [2 * 3 * 64 * (1 + width) * 2 * 10 for width in (8, 64)]


def test_options_in_training() -> None:
    """Whatever is drawn has the layer's shape, and its gradients reach every weight."""
    layer = make("slstm", recurrent_dropout=0.5, zoneout=(0.2, 0.2, 0.0, 0.0), weight_drop=0.3, layer_norm=True)
    x, _ = inputs(layer)
    torch.manual_seed(0)
    expected = layer(x)[0]
    torch.manual_seed(0)
    layer.backend = "reference"
    torch.testing.assert_close(layer(x)[0], expected, **support.TOLERANCE)
    expected.sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())
    assert layer.eval()(x)[0].shape == expected.shape


@pytest.mark.parametrize("norm", ["layer_norm", "rms_norm"])
def test_normalisation_is_each_head_s(norm: str) -> None:
    options: dict[str, Any] = {"heads": HEADS, norm: True, "activation": "linear", "dtype": torch.float64}
    layer = gpu_rnn.RNN(FEATURES, HIDDEN, **options)
    x, _ = inputs(layer)
    nn.init.normal_(layer.norm_ih_l0)
    products = (x[0] @ layer.weight_ih_l0.flatten(0, 1).T).unflatten(1, (HEADS, -1))
    normalise = getattr(nn.functional, norm)
    normal = normalise(products, products.shape[-1:], eps=1e-5) * layer.norm_ih_l0
    expected = (normal + layer.bias_ih_l0 + layer.bias_hh_l0).flatten(1)  # h is 0, and so is what is made of it
    torch.testing.assert_close(layer(x[:1])[0][0], expected, **support.TOLERANCE)


def test_initial_values() -> None:
    torch.manual_seed(0)
    layer = gpu_rnn.LSTM(FEATURES, 64, heads=4)
    assert 0.9 / 4 < layer.weight_hh_l0.abs().max() <= 1 / 4  # of 16 units
    assert max(p.abs().max() for name, p in layer.named_parameters() if "weight_hh" not in name) <= 1 / 8  # of 64
    cell = gpu_rnn.LSTMCell(FEATURES, 64, heads=4)
    assert 0.9 / 4 < cell.weight_hh.abs().max() <= 1 / 4 and cell.weight_ih.abs().max() <= 1 / 8
    given = {"recurrent_initializer": "orthogonal", "kernel_initializer": "glorot_uniform", "bias_initializer": "ones"}
    layer = gpu_rnn.LSTM(FEATURES, 64, heads=4, unit_forget_bias=True, **given)
    for block in layer.weight_hh_l0:
        torch.testing.assert_close(block.T @ block, torch.eye(16), rtol=1e-4, atol=1e-5)
    bound = (6 / (FEATURES + 4 * 64)) ** 0.5  # of the whole matrix
    assert 0.9 * bound < layer.weight_ih_l0.abs().max() <= bound
    assert (layer.bias_ih_l0 == 1).all() and (layer.bias_hh_l0 == 0).all()
    seen: list[tuple[int, ...]] = []
    initializers.apply(layer.named_parameters(), layer.recurrence, recurrent=lambda w: seen.append(w.shape), heads=4)
    assert seen == [(64, 16)] * 4


def test_the_functions() -> None:
    layer = make("projection")
    x, hx = inputs(layer)
    weights, options = list(layer.parameters()), {"proj_size": 6, "heads": HEADS}
    y, states = functional.rnn(x, hx, weights, layer.recurrence, **options)
    torch.testing.assert_close((y, states), layer(x, hx))
    with pytest.raises(RuntimeError, match=r"weights are \[\(3, 16, 4\), \(3, 16, 2\), .*\(48, 4\)\]"):
        functional.rnn(x, hx, [weights[0], *[w.flatten(0, 1) for w in weights[:1]]], layer.recurrence, **options)
    with pytest.raises(RuntimeError, match=r"w_ih \(3, 4·H/3, 4\), w_hh \(3, 4·H/3, H/3\), and so on"):
        functional.rnn(x, hx, [w.flatten(0, 1) for w in weights], layer.recurrence, **options)
    with pytest.raises(ValueError, match="heads should be 1 or more, got: 0"):
        functional.rnn(x, hx, weights, layer.recurrence, heads=0)


@pytest.mark.parametrize("made", [gpu_rnn.LSTM, gpu_rnn.GRUCell])
def test_mistakes(made: Any) -> None:
    with pytest.raises(ValueError, match=r"heads has to divide hidden_size, .* got: heads=5, hidden_size=12"):
        made(FEATURES, HIDDEN, heads=5)
    with pytest.raises(ValueError, match="heads should be 1 or more, got: 0"):
        made(FEATURES, HIDDEN, heads=0)
    with pytest.raises(TypeError, match=r"heads should be an integer, got: 2\.0"):
        made(FEATURES, HIDDEN, heads=2.0)
    with pytest.raises(AttributeError):
        made(FEATURES, HIDDEN).heads = 2


def test_what_other_libraries_cannot_say() -> None:
    with pytest.raises(ValueError, match=r"heads has to divide proj_size, .* got: heads=3, proj_size=4"):
        gpu_rnn.LSTM(FEATURES, HIDDEN, heads=3, proj_size=4)
    with pytest.raises(TypeError, match="did you mean heads"):
        gpu_rnn.GRU(FEATURES, HIDDEN, head=2)
    layer = make("lstm")
    with pytest.raises(ValueError, match="block-diagonal recurrent weights"):
        interop.to_keras(layer.state_dict(), "lstm")
    with pytest.raises(ValueError, match="block-diagonal recurrent weights"):
        interop.onnx_attributes(layer)
    layer.backend = "aten"
    with pytest.raises(ValueError, match=r"ATen has no block-diagonal W_hh \(heads\)"):
        layer(inputs(layer)[0])


def test_diagnostics() -> None:
    layer = make("stack", dtype=torch.float32)
    x = torch.randn(3, 5, FEATURES)
    assert "hidden 12 in 3 heads, layers 2, both directions" in str(gpu_rnn.explain(layer, x))
    assert all(found.where == "" for found in gpu_rnn.debug(layer, x, backend="step"))
