# SPDX-License-Identifier: Apache-2.0
"""Our Keras layers under every dtype policy: states go on, shapes are inferred without drawing, values are
float32's."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("keras") is None:
    pytest.skip("Keras is not installed: pip install gpu-rnn[keras]", allow_module_level=True)
from gpu_rnn import functional
from tests.support import keras_layers as support
from tests.support.keras_layers import gpu_rnn, keras

pytestmark = support.quiet

NAMES = ("LSTM", "GRU", "SimpleRNN")
policies = pytest.mark.parametrize("policy", support.POLICIES)
names = pytest.mark.parametrize("name", NAMES)


def single(layers: Any, kind: str, policy: Any, /, **options: Any) -> Any:
    # Keras's default recurrent initializer is a factorization that torch does not have in 16 bits.
    return getattr(layers, kind)(support.UNITS, dtype=policy, recurrent_initializer="he_normal", **options)


def both(layers: Any, kind: str, policy: Any, /, **options: Any) -> Any:
    return layers.Bidirectional(single(layers, kind, policy, **options), dtype=policy)


kinds = pytest.mark.parametrize("make", [single, both])


def inputs(steps: int = support.STEPS) -> torch.Tensor:
    return support.draw(support.BATCH, steps, support.FEATURES).float()


def close(found: Any, expected: Any, policy: str) -> None:
    for a, b in zip(support.flat(found), support.flat(expected), strict=True):
        torch.testing.assert_close(a.float(), b.float(), rtol=0, atol=support.POLICIES[policy])


@policies
@kinds
@names
def test_a_stateful_layer_goes_on_where_it_stopped(name: str, make: Callable[..., Any], policy: str) -> None:
    """Two calls are Keras's one in float32 over both parts; of a Bidirectional, each direction's."""
    layer = make(gpu_rnn.keras, name, policy, stateful=True, return_state=True, return_sequences=True)
    theirs = make(keras.layers, name, "float32", return_state=True, return_sequences=True)
    support.randomize(layer), support.randomize(theirs)
    x, mask = inputs(), support.mask_of("any")
    whole, *states = theirs(x, mask=mask)
    layer(x[:, :4], mask=mask[:, :4])
    _, *found = layer(x[:, 4:], mask=mask[:, 4:])
    for state, value in zip(layer.states, found, strict=True):
        assert state.dtype == ("float32" if "mixed" in policy else policy)
        torch.testing.assert_close(state.value.to(value.dtype), value, rtol=0, atol=0)
    forward = slice(0, len(found) // (1 if make is single else 2))
    close(found[forward], states[forward], policy)
    layer.reset_states()
    assert all(not state.value.any() for state in layer.states)
    first = layer(x[:, :4], mask=mask[:, :4])[0]
    if make is single:
        later = layer(x[:, 4:], mask=mask[:, 4:])[0]
        close(torch.cat([first, later], 1)[mask], whole[mask], policy)  # elsewhere a call repeats its own last output


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_a_stateful_model_trains_and_predicts_over_several_batches(policy: str) -> None:
    found = []
    for layers, dtype in ((gpu_rnn.keras, policy), (keras.layers, "float32")):
        keras.utils.set_random_seed(0)
        x = keras.Input((4, 3), batch_size=2)
        options = {"stateful": True, "return_sequences": True}
        loop = {} if layers is gpu_rnn.keras else {"use_cudnn": False}  # without which Keras's do not train
        y, h = single(layers, "GRU", dtype, return_state=True, **options, **loop)(x)
        y = single(layers, "LSTM", dtype, **options, **loop)(y)
        y = single(layers, "SimpleRNN", dtype, stateful=True)(y, initial_state=keras.layers.Dense(support.UNITS)(h))
        model = keras.Model(x, keras.layers.Dense(1)(y))
        model.compile("sgd", "mse")
        data = support.draw(6, 4, 3).float().numpy()
        model.fit(data, data[:, 0, :1], batch_size=2, epochs=2, shuffle=False, verbose=0)
        found.append(torch.tensor(model.predict(data, batch_size=2, verbose=0)))
    # A few steps of training add up what each rounds.
    torch.testing.assert_close(*found, rtol=0, atol=4 * support.POLICIES[policy])


class Around(keras.Layer):
    """A layer of somebody's own: Keras infers its shapes by calling it."""

    def __init__(self, layer: Any) -> None:
        super().__init__(dtype=layer.dtype_policy)
        self.layer = layer
        self.built = True

    def call(self, x: Any, valid: Any = None, initial_state: Any = None) -> Any:
        return self.layer(x, mask=valid, initial_state=initial_state, training=True)


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Where the loops run: those of a symbolic call on meta, unless something raised there and Keras tried once
    more."""
    seen: list[str] = []
    loop = functional.rnn

    def watched(x: torch.Tensor, *args: Any, **options: Any) -> Any:
        seen.append(x.device.type)
        return loop(x, *args, **options)

    monkeypatch.setattr(functional, "rnn", watched)
    yield seen


SYMBOLIC: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in NAMES),
    *((name, {"dropout": 0.3, "recurrent_dropout": 0.3}) for name in NAMES),
    *((name, {"dropout": 0.3, "recurrent_dropout": 0.3, "seed": 3}) for name in NAMES),
    ("LSTM", {"activation": "relu", "return_sequences": True, "return_state": True}),
    ("GRU", {"reset_after": False, "implementation": 1, "dropout": 0.3}),
    ("LSTM", {"use_cudnn": False, "stateful": True}),
    ("GRU", {"use_cudnn": False, "return_sequences": True, "zero_output_for_mask": True}),
    ("SimpleRNN", {"activation": "softsign", "return_sequences": True}),
]


@pytest.mark.parametrize(
    "policy", ["mixed_bfloat16", *(pytest.param(p, marks=pytest.mark.slow) for p in ("float32", "float16"))]
)
@kinds
@pytest.mark.parametrize(
    "given", ["nothing", "both", *(pytest.param(g, marks=pytest.mark.slow) for g in ("mask", "states"))]
)
@pytest.mark.parametrize(("name", "options"), SYMBOLIC, ids=str)
def test_a_symbolic_call_draws_nothing(
    name: str, options: dict[str, Any], given: str, make: Callable[..., Any], policy: str, devices: list[str]
) -> None:
    layer = make(gpu_rnn.keras, name, policy, **options)
    layer.build((2, 4, 3))
    batch = 2 if options.get("stateful") else None
    call: dict[str, Any] = {}
    if given in ("mask", "both"):
        call["valid"] = keras.Input((4,), batch_size=batch, dtype="bool")
    if given in ("states", "both"):
        count = len(support.flat_sizes(layer))
        call["initial_state"] = [keras.Input((support.UNITS,), batch_size=batch) for _ in range(count)]
    before = torch.get_rng_state(), [seed.value.clone() for seed in support.seeds(layer)]
    symbolic = Around(layer)(keras.Input((4, 3), batch_size=batch), **call)
    assert devices and set(devices) == {"meta"}
    torch.testing.assert_close((torch.get_rng_state(), [seed.value for seed in support.seeds(layer)]), before)
    real = keras.tree.flatten(layer(torch.ones(2, 4, 3)))
    symbolic = keras.tree.flatten(symbolic)
    assert [part.dtype for part in symbolic] == [keras.backend.standardize_dtype(part.dtype) for part in real]
    assert [part.shape[-1] for part in symbolic] == [part.shape[-1] for part in real]


@pytest.mark.parametrize("policy", ["float32", "mixed_float16"])
def test_building_a_model_changes_no_mask_that_it_draws(policy: str) -> None:
    found = []
    for symbolic in (False, True):
        keras.utils.set_random_seed(0)
        layer = single(gpu_rnn.keras, "LSTM", policy, dropout=0.3, recurrent_dropout=0.3)  # of the global generator
        layer.build((2, 4, 3))
        around = Around(layer)
        if symbolic:
            around(keras.Input((4, 3)))
        found.append(around(torch.ones(2, 4, 3)))
    torch.testing.assert_close(*found, rtol=0, atol=0)


def own_policy_of_the_cell() -> Any:
    policy = keras.dtype_policies.DTypePolicyMap(default_policy="mixed_bfloat16")
    policy["layer/lstm_cell"] = keras.dtype_policies.DTypePolicy("float32")
    return policy


def changed(attribute: str) -> Callable[[Any], None]:
    def change(layer: Any) -> None:
        (layer if attribute == "layer" else layer.cell).dtype_policy = "mixed_bfloat16"

    return change


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("policy", "change"),
    [(own_policy_of_the_cell, None), ("float32", changed("layer")), ("float32", changed("cell"))],
)
def test_a_cell_may_have_a_policy_of_its_own(policy: Any, change: Any, training: bool) -> None:
    """The cell computes in its dtype, and the layer gives its own; Keras's loop casts at each step."""
    found = []
    options = {"name": "layer", "return_state": True, "dropout": 0.3, "recurrent_dropout": 0.3, "seed": 3}
    for layers in (gpu_rnn.keras, keras.layers):
        layer = single(layers, "LSTM", policy() if callable(policy) else policy, **options)
        support.randomize(layer)
        if change is not None:
            change(layer)
        found.append(layer(inputs(), mask=support.mask_of("right"), training=training))
    assert [part.dtype for part in found[0]] == [part.dtype for part in found[1]]
    assert str(found[0][0].dtype) == f"torch.{layer.compute_dtype}"
    for ours, theirs in zip(
        *found, strict=True
    ):  # Keras rounds the states to the layer's dtype or the cell's at each step
        torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=2**-6)


@names
def test_what_a_float32_cell_computes_is_float32(name: str) -> None:
    """Its weights are not rounded on the way to it."""
    policy = keras.dtype_policies.DTypePolicyMap(default_policy="mixed_bfloat16")
    exact, mixed = single(gpu_rnn.keras, name, "float32"), single(gpu_rnn.keras, name, policy, name="layer")
    policy[f"layer/{mixed.cell.name}"] = keras.dtype_policies.DTypePolicy("float32")
    support.randomize(exact), support.randomize(mixed)
    assert (mixed.compute_dtype, mixed.cell.compute_dtype) == ("bfloat16", "float32")
    x = inputs().bfloat16()
    torch.testing.assert_close(mixed(x), exact(x.float()).bfloat16(), rtol=0, atol=0)


@kinds
@names
def test_mixed_precision_trains_with_a_scaled_loss(name: str, make: Callable[..., Any]) -> None:
    keras.utils.set_random_seed(0)
    layer = make(gpu_rnn.keras, name, "mixed_float16", recurrent_dropout=0.1)
    model = keras.Sequential(
        [keras.Input((5, 3)), keras.layers.Masking(), layer, keras.layers.Dense(1, dtype="float32")]
    )
    model.compile(keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.02), initial_scale=2.0**6), "mse")
    x = np.random.default_rng(0).normal(size=(32, 5, 3)).astype("float32")
    losses = model.fit(x, x[:, 0, :1], epochs=4, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    assert all(variable.dtype == "float32" for variable in layer.trainable_variables)
