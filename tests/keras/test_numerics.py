# SPDX-License-Identifier: Apache-2.0
"""Our Keras layers compute what Keras's own do, values and gradients, for combinations of all options."""

from __future__ import annotations

import functools
import importlib.util
import random
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("keras") is None:
    pytest.skip("Keras is not installed: pip install gpu-rnn[keras]", allow_module_level=True)
from tests.support import keras_layers as support
from tests.support.keras_layers import exact, gpu_rnn, keras  # noqa: F401  (a fixture)
from tests.support.pairwise import pairwise

pytestmark = [support.quiet, pytest.mark.usefixtures("exact")]

GATED = {
    "recurrent_activation": ("sigmoid", "softsign", "tanh"),
    "implementation": (2, 1),
    "use_cudnn": ("auto", False),
}
AXES: dict[str, tuple[Any, ...]] = {
    "activation": ("tanh", "relu", "leaky_relu", "sigmoid"),
    "use_bias": (True, False),
    "dropout": (0.0, 0.4),
    "recurrent_dropout": (0.0, 0.4),
    "return_sequences": (False, True),
    "return_state": (False, True),
    "go_backwards": (False, True),
    "stateful": (False, True),
    "unroll": (False, True),
    "zero_output_for_mask": (False, True),
}
CALLS: dict[str, tuple[Any, ...]] = {
    "mask": (None, *support.MASKS),
    "initial": (False, True),
    "training": (True, False),
}
LAYERS = {
    "LSTM": AXES | GATED,
    "GRU": AXES | GATED | {"reset_after": (True, False)},
    "SimpleRNN": AXES,
}
RANDOM_CASES = 60  # for each layer, and for Bidirectional


def combinations(*axes: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Some in which every two values meet, and random ones."""
    rng = random.Random(0)
    return [*pairwise(*axes), *(tuple(map(rng.choice, axes)) for _ in range(RANDOM_CASES))]


@functools.cache
def cases(name: str) -> list[dict[str, Any]]:
    axes = LAYERS[name] | CALLS
    return [dict(zip(axes, case, strict=True)) for case in combinations(*axes.values())]


NUMBERED = [(name, number) for name in LAYERS for number in range(len(cases(name)))]


def without_bugs(name: str, options: dict[str, Any], masked: bool) -> dict[str, Any]:
    """Options with which Keras's layer computes what these stand for, on a path where it has no bug."""
    changed = {}
    if masked and options["go_backwards"]:
        changed["unroll"] = False  # AttributeError: flips a list of masks
    if name != "SimpleRNN" and (options["implementation"] == 1 or options["stateful"]):
        # Dropout of implementation=1 crashes there; the state of a stateful layer is overwritten before the gradient.
        changed["use_cudnn"] = False
    if not options["return_sequences"]:
        changed["zero_output_for_mask"] = False  # documented for sequences only
    return options | changed


@pytest.mark.parametrize(("name", "number"), NUMBERED)
def test_every_combination_is_keras_own(name: str, number: int) -> None:
    case = cases(name)[number]
    options = {key: case[key] for key in LAYERS[name]} | {"seed": 7}
    theirs, ours = support.pair(name, without_bugs(name, options, case["mask"] is not None), options)
    states = [support.draw(support.BATCH, support.UNITS, seed=k) for k in range(1 + (name == "LSTM"))]
    call = {
        "mask": support.mask_of(case["mask"]),
        "initial": states if case["initial"] else None,
        "training": case["training"],
        "calls": 2,  # the second sees what a stateful layer kept, and draws other masks
    }
    support.assert_same(support.outcome(ours, **call), support.outcome(theirs, **call))


def test_every_value_of_every_option_is_among_the_combinations() -> None:
    for name, axes in LAYERS.items():
        counts = Counter((key, value) for case in cases(name) for key, value in case.items())
        print(name, len(cases(name)), "combinations;", ", ".join(f"{k}={v}: {n}" for (k, v), n in counts.items()))
        assert all(counts[key, value] for key, values in (axes | CALLS).items() for value in values)


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
    with pytest.raises(ValueError, match=r"test_numerics\.py:\d+ `.*torch\.cumsum"):
        gpu_rnn.keras.LSTM(3, activation=lambda x: torch.cumsum(x, 0))


def test_a_layer_with_weights_is_no_activation() -> None:
    layer = keras.layers.PReLU()
    layer.build((support.BATCH, support.UNITS))
    with pytest.raises(ValueError, match="has weights"):
        gpu_rnn.keras.LSTM(3, activation=layer)


def test_named_activations_keep_atens_name() -> None:
    assert gpu_rnn.keras.LSTM(3).recurrence.aten == "LSTM"
    assert gpu_rnn.keras.GRU(3, activation=torch.tanh, recurrent_activation=keras.ops.sigmoid).recurrence.aten == "GRU"


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


def test_calls_draw_masks_in_training_or_not() -> None:
    """So that what a layer draws in training does not depend on whether it is one loop or two otherwise."""
    found = []
    for module in (gpu_rnn.keras, keras.layers):
        layer = module.GRU(support.UNITS, dropout=0.4, recurrent_dropout=0.4, seed=3, dtype="float64")
        both = module.Bidirectional(layer, dtype="float64")
        support.randomize(both)
        x = support.draw(support.BATCH, support.STEPS, support.FEATURES)
        found.append([both(x, training=training) for training in (False, True, False, True, True)])
    torch.testing.assert_close(*found, **support.TOLERANCE)


def test_masks_of_numbers_and_one_for_each_input() -> None:
    _, ours = support.pair("GRU", {"return_sequences": True})
    mask = support.mask_of("any")
    x = support.draw(support.BATCH, support.STEPS, support.FEATURES)
    for other in (mask.int().numpy(), mask.float(), [mask]):
        torch.testing.assert_close(ours(x, mask=other), ours(x, mask=mask), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(1, support.STEPS), (support.BATCH, support.STEPS, 1), (1, support.STEPS, 1)])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "SimpleRNN", "Bidirectional"])
def test_masks_are_broadcast(name: str, shape: tuple[int, ...]) -> None:
    found = []
    for module in (gpu_rnn.keras, keras.layers):
        inside = module.GRU if name == "Bidirectional" else getattr(module, name)
        layer = inside(support.UNITS, return_sequences=True, return_state=True, dtype="float64")
        if name == "Bidirectional":
            layer = module.Bidirectional(layer, dtype="float64")
        support.randomize(layer)
        found.append(support.outcome(layer, support.mask_of("any")[: shape[0]].reshape(shape)))
    support.assert_same(*found)


@pytest.mark.parametrize("shape", [(2, 6), (4, 5), (4, 1), (6,), (4, 6, 5)])
def test_masks_of_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    for layer in (gpu_rnn.keras.GRU(3), gpu_rnn.keras.Bidirectional(gpu_rnn.keras.GRU(3))):
        with pytest.raises(ValueError, match=r"a mask has shape \(B, T\) = \(4, 6\)"):
            layer(support.draw(support.BATCH, support.STEPS, support.FEATURES), mask=torch.ones(shape))


@pytest.mark.parametrize("recurrent_dropout", [0.0, 0.4])
@pytest.mark.parametrize("name", ["LSTM", "GRU", "SimpleRNN", "Bidirectional"])
def test_states_for_all_samples(name: str, recurrent_dropout: float) -> None:
    """As Keras's layers take a state that is learnt: (1, units)."""
    found = []
    for module in (gpu_rnn.keras, keras.layers):
        inside = module.LSTM if name == "Bidirectional" else getattr(module, name)
        options = {"recurrent_dropout": recurrent_dropout, "seed": 3, "dtype": "float64"}
        layer = inside(support.UNITS, return_state=True, return_sequences=True, **options)
        if name == "Bidirectional":
            layer = module.Bidirectional(layer, dtype="float64")
        support.randomize(layer)
        count = {"LSTM": 2, "Bidirectional": 4}.get(name, 1)
        states = [support.draw(1, support.UNITS, seed=k) for k in range(count)]
        found.append(support.outcome(layer, initial=states, training=True))
    support.assert_same(*found)


WRONG = [[(3, 3)], [(2, 2)], [(4, 2)], [(3, 2, 1)], [(3, 1)], [(2,)], [(3, 2)]]


@pytest.mark.parametrize("shapes", WRONG, ids=str)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "SimpleRNN"])
def test_other_states_are_refused(name: str, shapes: list[tuple[int, ...]]) -> None:
    layer = getattr(gpu_rnn.keras, name)(2, recurrent_dropout=0.1)
    count = 1 + (name == "LSTM")
    states = [torch.ones(shape) for shape in shapes] * count
    if shapes == [(3, 2)]:  # one too many
        states.append(torch.ones(3, 2))
    with pytest.raises(ValueError, match=rf"initial_state of .* is {count} of shape \(B, units\) = \(3, 2\)"):
        layer(torch.ones(3, 5, 4), initial_state=states)
    layer(torch.ones(7, 5, 4), training=True)  # an error leaves nothing behind


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_a_bidirectional_needs_the_states_of_both_directions(count: int, dropout: float) -> None:
    layer = gpu_rnn.keras.Bidirectional(gpu_rnn.keras.LSTM(2, dropout=dropout))
    with pytest.raises(ValueError, match=f"is a list of 4 states, .*; got {count}"):
        layer(torch.ones(3, 5, 4), initial_state=[torch.ones(3, 2)] * count, training=True)


@pytest.mark.parametrize("wrap", [lambda layer: layer, gpu_rnn.keras.Bidirectional])
def test_another_number_of_features_is_refused(wrap: Any) -> None:
    layer = wrap(gpu_rnn.keras.LSTM(2, dropout=0.5))
    layer(torch.ones(3, 5, 4))
    for features in (1, 3, 1000):
        with pytest.raises(ValueError, match=f"expected 4 features, got {features}"):
            layer(torch.ones(3, 5, features), training=True)
    layer(torch.ones(2, 5, 4), training=True)  # an error leaves nothing behind


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


# bfloat16 has 8 bits: 2 units in the last place of values below 1.
@pytest.mark.parametrize(
    ("policy", "tolerance"), [("float32", 1e-6), ("mixed_bfloat16", 2**-7), ("mixed_float16", 2**-10)]
)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "SimpleRNN"])
def test_dtypes(name: str, policy: str, tolerance: float) -> None:
    theirs, ours = support.pair(name, {"dtype": policy, "return_sequences": True})
    x = support.draw(support.BATCH, support.STEPS, support.FEATURES)
    found, expected = ours(x), theirs(x)
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.float(), expected.float(), rtol=0, atol=tolerance)
    assert {v.dtype for v in ours.trainable_variables} == {v.dtype for v in theirs.trainable_variables}


def test_whole_numbers_are_taken() -> None:
    theirs, ours = support.pair("LSTM", {})
    x = torch.arange(support.BATCH * support.STEPS * support.FEATURES).view(support.BATCH, support.STEPS, -1) % 5
    torch.testing.assert_close(ours(x), theirs(x), **support.TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"activation": "softsign"}], ids=str)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "SimpleRNN"])
def test_a_gpu_computes_the_same(
    name: str, options: dict[str, Any], masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn.rnn, "fp32_precision", "ieee")
    found = []
    for device in ("cpu", "gpu:0"):
        with keras.device(device):
            layer = getattr(gpu_rnn.keras, name)(support.UNITS, return_sequences=True, **options)
            both = gpu_rnn.keras.Bidirectional(layer)
            support.randomize(both)
            x = keras.ops.convert_to_tensor(support.draw(support.BATCH, support.STEPS, support.FEATURES).float())
            y = both(x, mask=keras.ops.convert_to_tensor(support.mask_of("any")) if masked else None)
            y.square().sum().backward()
            found.append([y.detach().cpu(), *(v.value.grad.cpu() for v in both.trainable_variables)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["LSTM", "GRU", "SimpleRNN"])
def test_nan_at_masked_steps_reaches_nothing(name: str) -> None:
    """In Keras's layers its gradient is NaN."""
    _, ours = support.pair(name, {"return_sequences": True})
    mask = support.mask_of("any")
    x = support.draw(support.BATCH, support.STEPS, support.FEATURES)
    results = []
    for padding in (0.0, float("nan")):
        padded = torch.where(mask[..., None], x, padding).requires_grad_()
        y = ours(padded, mask=mask)
        results.append([y, *torch.autograd.grad(y.sum(), [padded, *(v.value for v in ours.trainable_variables)])])
    torch.testing.assert_close(*results, rtol=0, atol=0)
