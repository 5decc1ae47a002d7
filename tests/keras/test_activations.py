# SPDX-License-Identifier: Apache-2.0
"""Activations of our Keras layers: every one of Keras's, functions and layers; and what is refused."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("keras") is None:
    pytest.skip("Keras is not installed: pip install gpu-rnn[keras]", allow_module_level=True)
from tests.support import keras_layers as support
from tests.support.keras_layers import exact, gpu_rnn, keras  # noqa: F401  (a fixture)

pytestmark = [support.quiet, pytest.mark.usefixtures("exact")]


ACTIVATIONS = sorted(
    name
    for name, function in vars(keras.activations).items()
    if name not in {"get", "serialize", "deserialize"} and callable(function)
)
NOT_POINTWISE = {"softmax", "log_softmax", "sparsemax", "glu"}
NEEDS_ARGUMENTS = {"threshold"}


@pytest.mark.parametrize("activation", sorted(set(ACTIVATIONS) - NOT_POINTWISE - NEEDS_ARGUMENTS))
def test_every_activation(activation: str) -> None:
    for options in ({"activation": activation}, {"recurrent_activation": activation}):
        theirs, ours = support.pair("GRU", options | {"return_sequences": True})
        for variable in (*theirs.trainable_variables, *ours.trainable_variables):
            variable.assign(0.3 * variable)  # gates without bounds make the states grow
        # torch's hardsigmoid has the 1/6 of its derivative in float32
        tolerance = {"rtol": 1e-6, "atol": 1e-6} if activation.startswith("hard_") else support.TOLERANCE
        support.assert_same(support.outcome(ours), support.outcome(theirs), tolerance)


@pytest.mark.parametrize("activation", sorted(NOT_POINTWISE))
def test_activations_that_mix_units_are_refused(activation: str) -> None:
    with pytest.raises(
        ValueError, match=rf"(?s)^rnn: activation {activation}: .* mixes units \(softmax\) or has weights"
    ):
        gpu_rnn.keras.SimpleRNN(3, activation=activation)


def swish(x: Any) -> Any:
    return x * keras.ops.sigmoid(1.5 * x)


def twice(x: Any) -> Any:
    return 2 * x


# The numbers in these are exact in float32, in which Keras's layers have them; so each is the same function here.
@pytest.mark.parametrize(
    "activation",
    [
        swish,
        torch.tanh,
        keras.ops.tanh,
        None,
        keras.layers.LeakyReLU(0.1, dtype="float64"),
        keras.layers.ReLU(max_value=0.5, negative_slope=0.125, threshold=0.25, dtype="float64"),
        keras.layers.Rescaling(0.5, 0.125, dtype="float64"),
        keras.layers.Lambda(twice, dtype="float64"),
        keras.layers.TorchModuleWrapper(torch.nn.Softplus(), dtype="float64"),
        lambda x: keras.ops.clip(x, -0.25, np.float32(0.5)),
        lambda x: keras.ops.maximum(x, keras.ops.cast(0.25, "float32")),
        lambda x: keras.ops.where(x > 0, keras.ops.power(x, 2), 0.5),
    ],
)
def test_functions_and_layers_as_activations(activation: Any) -> None:
    theirs, ours = support.pair("LSTM", {"activation": activation, "return_sequences": True})
    support.assert_same(support.outcome(ours), support.outcome(theirs))


class Wrapped(keras.layers.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.inner = keras.layers.Dropout(0.5)

    def call(self, x: Any) -> Any:
        return self.inner(x)


@pytest.mark.parametrize(
    "activation",
    [
        keras.layers.Dropout(0.5),
        keras.layers.GaussianNoise(0.5),
        keras.layers.Lambda(lambda x, training=False: 2 * x if training else x),
        Wrapped(),
    ],
)
def test_an_activation_that_is_another_in_training_is_refused(activation: Any) -> None:
    for options in ({"activation": activation}, {"recurrent_activation": activation}):
        with pytest.raises(ValueError, match="may be another function in training"):
            gpu_rnn.keras.GRU(3, **options)


def test_an_error_names_the_line_of_the_activation() -> None:
    with pytest.raises(ValueError, match=r"test_activations\.py:\d+ `.*torch\.cumsum"):
        gpu_rnn.keras.LSTM(3, activation=lambda x: torch.cumsum(x, 0))


def test_a_layer_with_weights_is_no_activation() -> None:
    layer = keras.layers.PReLU()
    layer.build((support.BATCH, support.UNITS))
    with pytest.raises(ValueError, match="has weights"):
        gpu_rnn.keras.LSTM(3, activation=layer)


def test_named_activations_keep_atens_name() -> None:
    assert gpu_rnn.keras.LSTM(3).recurrence.aten == "LSTM"
    assert gpu_rnn.keras.GRU(3, activation=torch.tanh, recurrent_activation=keras.ops.sigmoid).recurrence.aten == "GRU"
