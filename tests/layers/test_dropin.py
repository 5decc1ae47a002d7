# SPDX-License-Identifier: Apache-2.0
"""RNN, LSTM and GRU beside torch.nn's: values, gradients, state, names, initial values, repr, signature."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

import gpu_rnn
from tests.support import layers as support

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

KINDS = ("batched", "unbatched", "packed", "packed_unsorted")
OPTIONS = [
    {},
    {"num_layers": 2, "bidirectional": True},
    {"num_layers": 3, "bias": False, "batch_first": True},
    {"bidirectional": True, "batch_first": True},
    {"bias": False, "bidirectional": True},
]
LAYER_OPTIONS = [
    *itertools.product(support.LAYERS, OPTIONS),
    ("RNN", {"nonlinearity": "relu", "num_layers": 2}),
    ("LSTM", {"proj_size": 2, "num_layers": 2, "bidirectional": True}),
    ("LSTM", {"proj_size": 2, "bias": False, "batch_first": True}),
]


def label(value: object) -> str | None:
    return ",".join(f"{k}={v}" for k, v in value.items()) or "defaults" if isinstance(value, dict) else None


@pytest.mark.parametrize("with_states", [False, True], ids=["zeros", "states"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["auto", "step", "reference"])
@pytest.mark.parametrize(("name", "options"), LAYER_OPTIONS, ids=label)
def test_values_and_gradients(name: str, options: dict, backend: str, kind: str, with_states: bool) -> None:
    theirs, mine = support.pair(name, support.INPUT, support.HIDDEN, ours={"backend": backend}, **options)
    x, given = support.make_input(theirs, kind)
    if not with_states:
        support.assert_same(theirs, mine, given, sources={"x": x})
        return
    hx = support.states(theirs, None if kind == "unbatched" else support.BATCH)
    sources = {"x": x} | {f"state {i}": state for i, state in enumerate(support.leaves(hx))}
    support.assert_same(theirs, mine, given, hx, sources=sources)


@pytest.mark.parametrize(("name", "options"), LAYER_OPTIONS, ids=label)
def test_same_seed_gives_the_same_weights_under_the_same_names(name: str, options: dict) -> None:
    torch.manual_seed(0)
    theirs = getattr(nn, name)(4, 6, **options)
    after_theirs = torch.rand(())
    torch.manual_seed(0)
    mine = getattr(gpu_rnn, name)(4, 6, **options)
    assert torch.rand(()) == after_theirs, "the construction drew other random numbers than torch.nn's"
    assert [(n, p.shape) for n, p in mine.named_parameters()] == [(n, p.shape) for n, p in theirs.named_parameters()]
    torch.testing.assert_close(mine.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    theirs.load_state_dict(mine.state_dict(), strict=True)
    assert [[p.shape for p in own] for own in mine.all_weights] == [
        [p.shape for p in own] for own in theirs.all_weights
    ]


@pytest.mark.parametrize(("name", "options"), LAYER_OPTIONS, ids=label)
def test_repr_is_torchs_at_our_defaults(name: str, options: dict) -> None:
    assert repr(getattr(gpu_rnn, name)(4, 6, **options)) == repr(getattr(nn, name)(4, 6, **options))


def test_repr_shows_our_options_where_they_differ() -> None:
    layer = gpu_rnn.LSTM(4, 6, 2, activation="relu", peephole=True, backend="reference")
    assert repr(layer) == "LSTM(4, 6, num_layers=2, activation=relu, peephole=True, backend=reference)"
    assert repr(gpu_rnn.GRU(4, 6, reset_after=False, recurrent_activation=torch.relu)) == (
        "GRU(4, 6, recurrent_activation=relu, reset_after=False)"
    )
    assert repr(gpu_rnn.RNN(4, 6, activation=lambda x: x)) == "RNN(4, 6, activation=<lambda>)"
    assert repr(gpu_rnn.RNNCell(4, 6, nonlinearity="relu")) == "RNNCell(4, 6, nonlinearity=relu)"


@pytest.mark.parametrize("name", [*support.LAYERS, *support.CELLS])
def test_signature_has_torchs_arguments_first_and_in_order(name: str) -> None:
    theirs = getattr(nn, name)
    written = {
        # torch.nn's layers take *args; these are the orders that its documentation and overloads give.
        "RNN": "input_size hidden_size num_layers nonlinearity bias batch_first dropout bidirectional device dtype",
        "LSTM": "input_size hidden_size num_layers bias batch_first dropout bidirectional proj_size device dtype",
        "GRU": "input_size hidden_size num_layers bias batch_first dropout bidirectional device dtype",
    }
    positional = written[name].split() if name in written else list(inspect.signature(theirs).parameters)
    parameters = inspect.signature(getattr(gpu_rnn, name)).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    others = {p.kind for p in parameters if p.name not in positional}
    assert others <= {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}  # the latter: LayerOptions
    assert issubclass(getattr(gpu_rnn, name), nn.RNNBase if name in support.LAYERS else nn.modules.rnn.RNNCellBase)


def test_packed_output_keeps_order_and_sizes() -> None:
    packed = pack_sequence([torch.randn(t, 3) for t in (2, 5, 3)], enforce_sorted=False)
    output, h = gpu_rnn.GRU(3, 4)(packed)
    assert isinstance(output, PackedSequence)
    assert torch.equal(output.batch_sizes, packed.batch_sizes)
    assert torch.equal(output.sorted_indices, packed.sorted_indices)
    assert torch.equal(output.unsorted_indices, packed.unsorted_indices)
    padded, lengths = nn.utils.rnn.pad_packed_sequence(output)
    assert lengths.tolist() == [2, 5, 3]
    torch.testing.assert_close(h[0], padded[lengths - 1, torch.arange(3)])


@pytest.mark.parametrize("name", support.LAYERS)
def test_dropout_draws_as_torch_does(name: str) -> None:
    theirs, mine = support.pair(name, 3, 5, 3, dropout=0.5)
    x = support.draw(4, 2, 3)
    torch.manual_seed(0)
    expected = theirs(x)[0]
    torch.manual_seed(0)
    assert torch.equal(mine(x)[0], expected)
    assert not torch.equal(mine(x)[0], expected), "training without fresh dropout"
    assert torch.equal(mine.eval()(x)[0], theirs.eval()(x)[0])


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_dropout_is_fresh_for_each_element_and_step_and_only_between_layers(backend: str) -> None:
    layer = gpu_rnn.RNN(8, 8, 2, nonlinearity="relu", bias=False, dropout=0.25, backend=backend)
    with torch.no_grad():
        for name, weight in layer.named_parameters():
            weight.copy_(torch.eye(8) if "ih" in name else torch.zeros(8, 8))
    torch.manual_seed(0)
    output = layer(torch.ones(50, 40, 8))[0]
    # The second layer passes on what the first one's output became: 0, or 1 / (1 - p); nothing is dropped after it.
    torch.testing.assert_close(output.unique(), torch.tensor([0, 1 / 0.75]))
    assert output.eq(0).float().mean().item() == pytest.approx(0.25, abs=0.02)  # 16,000 draws: 6 standard deviations
    for axis in range(3):
        assert output.ne(output.select(axis, 0).unsqueeze(axis)).any(), f"one mask for all of axis {axis}"
    assert layer.eval()(torch.ones(2, 1, 8))[0].eq(1).all()


def test_dropout_with_one_layer_warns() -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer"):
        gpu_rnn.LSTM(3, 5, dropout=0.5)
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last recurrent layer"):
        gpu_rnn.Recurrent(gpu_rnn.cells.slstm(), 3, 5, dropout=0.5)


@pytest.mark.parametrize("name", support.LAYERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtype_and_device_reach_parameters_and_outputs(name: str, dtype: torch.dtype) -> None:
    layer = getattr(gpu_rnn, name)(3, 5, device="cpu", dtype=dtype)
    assert {p.dtype for p in layer.parameters()} == {dtype}
    assert {out.dtype for out in support.leaves(layer(torch.randn(2, 4, 3, dtype=dtype)))} == {dtype}
    assert next(getattr(gpu_rnn, name)(3, 5, device="meta").parameters()).is_meta


@pytest.mark.parametrize("name", support.LAYERS)
def test_autocast_gives_torchs_values_in_autocasts_dtype(name: str) -> None:
    """torch.nn's GRU and RNN give float32 under a CPU's autocast, its LSTM, and all of them on a GPU, 16 bits."""
    theirs, mine = support.pair(name, 3, 5, dtype=torch.float32)
    x = torch.randn(4, 2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = support.leaves(theirs(x)), support.leaves(mine(x))
    assert {out.dtype for out in actual} == {torch.bfloat16}
    if name == "LSTM":
        torch.testing.assert_close(actual, expected)  # also compares dtypes
    torch.testing.assert_close(actual, support.leaves(theirs.bfloat16()(x.bfloat16())))


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", support.LAYERS)
def test_empty_batch(name: str, backend: str) -> None:
    theirs, mine = support.pair(name, 3, 5, 2, bidirectional=True, ours={"backend": backend})
    support.assert_same(theirs, mine, x := support.draw(4, 0, 3), sources={"x": x})
    assert mine(x)[0].shape == (4, 0, 10)
