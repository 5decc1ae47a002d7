# SPDX-License-Identifier: Apache-2.0
"""Keras's Bidirectional around our layers: alike directions are one loop, others are each their own."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

if importlib.util.find_spec("keras") is None:
    pytest.skip("Keras is not installed: pip install gpu-rnn[keras]", allow_module_level=True)
from tests.support import keras_layers as support
from tests.support.keras_layers import combinations, exact, gpu_rnn, keras  # noqa: F401  (a fixture)

pytestmark = [support.quiet, pytest.mark.usefixtures("exact")]


MERGES = ("concat", "sum", "mul", "ave", None)
BIDIRECTIONAL = combinations(
    ("LSTM", "GRU", "SimpleRNN"),
    MERGES,
    (False, True),  # return_sequences
    (False, True),  # return_state
    (False, True),  # stateful
    (0.0, 0.4),  # dropout
    (0.0, 0.4),  # recurrent_dropout
    (None, *support.MASKS),
    (False, True),  # initial states
    (False, True),  # training
)


@pytest.mark.parametrize("case", BIDIRECTIONAL, ids=str)
def test_bidirectional(case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    name, merge, sequences, return_state, stateful, dropout, recurrent_dropout, mask, initial, training = case
    options = {
        "return_sequences": sequences,
        "return_state": return_state,
        "stateful": stateful,
        "dropout": dropout,
        "recurrent_dropout": recurrent_dropout,
        "dtype": "float64",
    }
    if name != "SimpleRNN":
        options["use_cudnn"] = "auto" if not stateful else False  # see without_bugs
    count = 2 * (1 + (name == "LSTM"))
    states = [support.draw(support.BATCH, support.UNITS, seed=k) for k in range(count)] if initial else None
    found = []
    for module in (gpu_rnn.keras, keras.layers):
        both = module.Bidirectional(getattr(module, name)(support.UNITS, **options), merge_mode=merge, dtype="float64")
        for seed, layer in enumerate((both.forward_layer, both.backward_layer)):
            layer.cell.seed_generator = keras.random.SeedGenerator(seed)  # Keras's SimpleRNN loses its own
        if stateful and return_state:
            monkeypatch.setattr(keras.layers.Bidirectional, "compute_mask", lambda *_: None)  # TypeError, see below
        support.randomize(both)
        found.append(support.outcome(both, support.mask_of(mask), states, training, calls=2))
    support.assert_same(*found)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ours_inside", [False, True])
def test_bidirectional_of_layers_that_differ(ours_inside: bool, masked: bool) -> None:
    found = []
    for module in (gpu_rnn.keras, keras.layers):
        inside = gpu_rnn.keras if ours_inside else keras.layers
        options = {"return_sequences": True, "dtype": "float64"}
        forward = inside.GRU(support.UNITS, go_backwards=True, **options)
        backward = inside.SimpleRNN(support.UNITS, **options)
        both = module.Bidirectional(forward, backward_layer=backward, dtype="float64")
        support.randomize(both)
        found.append(support.outcome(both, support.mask_of("any") if masked else None))
    support.assert_same(*found)


UNLIKE = [
    ({"activity_regularizer": "l2"}, {"activity_regularizer": "l2"}),
    ({}, {"recurrent_dropout": 0.4}),
    ({"recurrent_dropout": 0.4}, {}),
    ({"activation": "softsign"}, {}),
    ({}, {"use_bias": False}),
    ({"go_backwards": True}, {"go_backwards": False}),
]


@pytest.mark.parametrize(("forward", "backward"), UNLIKE, ids=str)
def test_what_two_directions_do_not_share(forward: dict[str, Any], backward: dict[str, Any]) -> None:
    found, losses = [], []
    for module in (gpu_rnn.keras, keras.layers):
        options = {"return_sequences": True, "seed": 3, "dtype": "float64"}
        layer = module.LSTM(support.UNITS, **options | forward)
        other = module.LSTM(support.UNITS, **options | {"go_backwards": True} | backward)
        both = module.Bidirectional(layer, backward_layer=other, dtype="float64")
        support.randomize(both)
        found.append(support.outcome(both, training=True))
        losses.append([loss.detach() for loss in both.losses])
    support.assert_same(*found)
    torch.testing.assert_close(*losses, **support.TOLERANCE)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_bidirectional_needs_the_states_of_both_directions(count: int, dropout: float) -> None:
    layer = gpu_rnn.keras.Bidirectional(gpu_rnn.keras.LSTM(2, dropout=dropout))
    with pytest.raises(ValueError, match=f"is a list of 4 states, .*; got {count}"):
        layer(torch.ones(3, 5, 4), initial_state=[torch.ones(3, 2)] * count, training=True)


def test_alike_directions_are_one_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    run = gpu_rnn.keras.bidirectional.run

    def counted(layers: Any, *args: Any) -> Any:
        counts.append(len(layers))
        return run(layers, *args)

    monkeypatch.setattr(gpu_rnn.keras.bidirectional, "run", counted)
    monkeypatch.setattr(gpu_rnn.keras.layers, "run", counted)
    x = support.draw(support.BATCH, support.STEPS, support.FEATURES)
    layer = gpu_rnn.keras.Bidirectional(gpu_rnn.keras.LSTM(4, dropout=0.5, recurrent_dropout=0.5))
    layer(x)
    layer(x, training=True)
    assert counts == [2, 1, 1]
    gpu_rnn.keras.Bidirectional(gpu_rnn.keras.GRU(4, dtype="float64"))(x)  # itself in float32
    assert counts == [2, 1, 1, 1, 1]
