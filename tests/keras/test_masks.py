# SPDX-License-Identifier: Apache-2.0
"""Masks on their way through layers: what each hands on stands where its outputs do, and none is lost beside states."""

from __future__ import annotations

import importlib.util
import itertools
from typing import Any

import pytest
import torch

if importlib.util.find_spec("keras") is None:
    pytest.skip("Keras is not installed: pip install gpu-rnn[keras]", allow_module_level=True)
from tests.support import keras_layers as support
from tests.support.keras_layers import gpu_rnn, keras

pytestmark = support.quiet

NAMES = ("LSTM", "GRU", "SimpleRNN")
names = pytest.mark.parametrize("name", NAMES)
SLOW = ("left", "none valid")
patterns = pytest.mark.parametrize(
    "pattern", [pytest.param(p, marks=pytest.mark.slow) if p in SLOW else p for p in support.MASKS]
)
TOLERANCE = {"rtol": 1e-6, "atol": 1e-6}


def layer_of(name: str, **options: Any) -> Any:
    return getattr(gpu_rnn.keras, name)(support.UNITS, **options)


def both_of(name: str, merge: str | None, backwards: bool, **options: Any) -> Any:
    """A Bidirectional whose forward layer may be the one that runs backwards: all its outputs are turned then."""
    layers = (
        layer_of(name, go_backwards=turned, return_sequences=True, **options) for turned in (backwards, not backwards)
    )
    return gpu_rnn.keras.Bidirectional(next(layers), backward_layer=next(layers), merge_mode=merge)


def inputs() -> torch.Tensor:
    return support.draw(support.BATCH, support.STEPS, support.FEATURES).float()


def row_by_row(layers: list[Any], x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """What a stack computes of each sample by itself, its masked steps cut out: no layer sees a mask."""
    rows = []
    for row, valid in zip(x, mask, strict=True):
        y = row[valid][None]
        for layer in layers:
            y = layer(y)
        rows.append(y)
    return torch.cat(rows)


@pytest.mark.parametrize("backwards", list(itertools.product((False, True), repeat=3)), ids=str)
@names
def test_a_stack_in_any_direction_computes_each_row_by_itself(name: str, backwards: tuple[bool, ...]) -> None:
    below, between = (layer_of(name, go_backwards=turned, return_sequences=True) for turned in backwards[:2])
    above = layer_of(name, go_backwards=backwards[2])
    x, valid = keras.Input((support.STEPS, support.FEATURES)), keras.Input((support.STEPS,), dtype="bool")
    model = keras.Model([x, valid], above(between(below(x, mask=valid))))
    mask = support.mask_of("any").clone()
    mask[2, 1] = True  # a row needs a step to be a row by itself
    found = model([inputs(), mask])
    torch.testing.assert_close(found, row_by_row([below, between, above], inputs(), mask), **TOLERANCE)


@pytest.mark.parametrize("merge", ["concat", "sum", "mul", "ave"])
@pytest.mark.parametrize("backwards", [False, True])
@names
def test_a_layer_above_a_bidirectional_too(name: str, backwards: bool, merge: str) -> None:
    below, above = both_of(name, merge, backwards), layer_of(name)
    mask = support.mask_of("right")
    x = inputs()
    x._keras_mask = mask  # as a Masking layer leaves it
    torch.testing.assert_close(above(below(x)), row_by_row([below, above], inputs(), mask), **TOLERANCE)


@patterns
@pytest.mark.parametrize("backwards", [False, True])
@pytest.mark.parametrize("return_state", [False, True])
@pytest.mark.parametrize("merge", ["none", "sum", None])
@names
def test_the_mask_of_an_output_is_where_its_valid_steps_are(
    name: str, merge: str | None, return_state: bool, backwards: bool, pattern: str
) -> None:
    """Zeros show where an output has no step; of a stateful layer, as of others."""
    for stateful in (False, True):
        options = {"zero_output_for_mask": True, "return_state": return_state, "stateful": stateful}
        if merge == "none":
            layer = layer_of(name, go_backwards=backwards, return_sequences=True, **options)
        else:
            layer = both_of(name, merge, backwards, **options)
        outputs = support.flat(layer(inputs(), mask=support.mask_of(pattern)))
        masks = keras.tree.flatten(layer.compute_mask(inputs(), support.mask_of(pattern)))
        masks += [None] * (len(outputs) - len(masks))
        for output, mask in zip(outputs, masks, strict=True):
            assert (mask is None) == (output.dim() == 2)
            if mask is not None:
                torch.testing.assert_close(output.ne(0).any(-1), mask.expand(output.shape[:2]))


@names
def test_masks_of_every_kind_are_turned(name: str) -> None:
    layer = layer_of(name, go_backwards=True, return_sequences=True)
    mask = support.mask_of("any")
    expected = layer.compute_mask(None, mask)
    torch.testing.assert_close(expected, mask.flip(1))
    for other in (mask.numpy(), [mask], mask[..., None]):
        found = layer.compute_mask(None, other)
        torch.testing.assert_close(found.reshape(mask.shape), expected)
    assert layer.compute_mask(None, None) is None
    assert layer_of(name, go_backwards=True).compute_mask(None, mask) is None  # the last output has none
    symbolic = layer.compute_mask(None, keras.Input((support.STEPS,), dtype="bool"))
    assert tuple(symbolic.shape) == (None, support.STEPS)


@patterns
@pytest.mark.parametrize("return_state", [False, True])
@names
def test_zero_output_for_mask_is_about_sequences(name: str, return_state: bool, pattern: str) -> None:
    """Keras documents it so, and makes a single output 0 where the last step is masked."""
    found = []
    for zero in (False, True):
        layer = layer_of(name, zero_output_for_mask=zero, return_state=return_state)
        support.randomize(layer)
        found.append(support.flat(layer(inputs(), mask=support.mask_of(pattern))))
    torch.testing.assert_close(*found, rtol=0, atol=0)


@pytest.mark.parametrize("wrap", ["alone", "ours", "theirs inside"])
@names
def test_a_mask_is_not_lost_beside_initial_states(name: str, wrap: str) -> None:
    """Keras fetches the mask that its input carries only where the input is the one tensor of a call."""
    inner = getattr(keras.layers if wrap == "theirs inside" else gpu_rnn.keras, name)(support.UNITS)
    layer = inner if wrap == "alone" else gpu_rnn.keras.Bidirectional(inner)
    count = (1 + (name == "LSTM")) * (1 if wrap == "alone" else 2)
    words = torch.tensor([[1, 2, 0, 0], [3, 1, 2, 2]])
    states = [support.draw(2, support.UNITS, seed=k).float() for k in range(count)]
    embedded = keras.layers.Embedding(4, 3, mask_zero=True)
    eager = layer(embedded(words), initial_state=states)
    torch.testing.assert_close(eager, layer(embedded(words), initial_state=states, mask=words != 0), rtol=0, atol=0)
    x, given = keras.Input((4,), dtype="int32"), [keras.Input((support.UNITS,)) for _ in states]
    model = keras.Model([x, *given], layer(embedded(x), initial_state=given))
    torch.testing.assert_close(model([words, *states]), eager, rtol=0, atol=0)


@pytest.mark.parametrize("wrap", [lambda layer: layer, gpu_rnn.keras.Bidirectional])
def test_dropout_masks_of_a_failed_call_are_forgotten(wrap: Any) -> None:
    """Wherever the call fails: the next one may be of another batch size."""
    layer = wrap(gpu_rnn.keras.GRU(3, dropout=0.5, recurrent_dropout=0.5))
    layer(torch.ones(4, 6, 2))
    with pytest.raises(ValueError, match="a mask has shape"):
        layer(torch.ones(4, 6, 2), mask=torch.ones(4, 5), training=True)
    assert layer(torch.ones(2, 6, 2), training=True).shape[0] == 2
