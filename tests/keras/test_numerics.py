# SPDX-License-Identifier: Apache-2.0
"""Our Keras layers compute what Keras's own do, values and gradients, for combinations of all options."""

from __future__ import annotations

import functools
import importlib.util
from collections import Counter
from typing import Any

import pytest
import torch

if importlib.util.find_spec("keras") is None:
    pytest.skip("Keras is not installed: pip install gpu-rnn[keras]", allow_module_level=True)
from tests.support import keras_layers as support
from tests.support.keras_layers import combinations, exact, gpu_rnn, keras  # noqa: F401  (a fixture)

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


@pytest.mark.parametrize("wrap", [lambda layer: layer, gpu_rnn.keras.Bidirectional])
def test_another_number_of_features_is_refused(wrap: Any) -> None:
    layer = wrap(gpu_rnn.keras.LSTM(2, dropout=0.5))
    layer(torch.ones(3, 5, 4))
    for features in (1, 3, 1000):
        with pytest.raises(ValueError, match=f"expected 4 features, got {features}"):
            layer(torch.ones(3, 5, features), training=True)
    layer(torch.ones(2, 5, 4), training=True)  # an error leaves nothing behind


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
