# SPDX-License-Identifier: Apache-2.0
"""Each constructor option of our Keras layers acts as in Keras's own, and a layer that ignored it would be noticed."""

from __future__ import annotations

import importlib.util
import inspect
from typing import Any

import numpy as np
import pytest
import torch

if importlib.util.find_spec("keras") is None:
    pytest.skip("Keras is not installed: pip install gpu-rnn[keras]", allow_module_level=True)
from benchmarks.measuring import saving
from gpu_rnn.backends import aten
from tests.support import keras_layers as support
from tests.support.keras_layers import exact, gpu_rnn, keras  # noqa: F401  (a fixture)

pytestmark = [support.quiet, pytest.mark.usefixtures("exact")]

NAMES = ("LSTM", "GRU", "SimpleRNN")
OPTIONS: dict[str, Any] = {
    "activation": "softsign",
    "recurrent_activation": "hard_sigmoid",
    "use_bias": False,
    "kernel_initializer": "he_normal",
    "recurrent_initializer": "glorot_normal",
    "bias_initializer": "ones",
    "unit_forget_bias": False,
    "kernel_regularizer": "l2",
    "recurrent_regularizer": "l1",
    "bias_regularizer": keras.regularizers.L2(0.5),
    "activity_regularizer": "l2",
    "kernel_constraint": "max_norm",
    "recurrent_constraint": "non_neg",
    "bias_constraint": "unit_norm",
    "dropout": 0.4,
    "recurrent_dropout": 0.4,
    "seed": 5,
    "return_sequences": True,
    "return_state": True,
    "go_backwards": True,
    "stateful": True,
    "reset_after": False,
    "zero_output_for_mask": True,
    "dtype": "float32",
    "trainable": False,
    "name": "mine",
}
WITHOUT_EFFECT = {"unroll", "use_cudnn"}  # on what a CPU computes; see their own tests
NEEDED = {
    "seed": {"dropout": 0.4, "recurrent_dropout": 0.4},
    "zero_output_for_mask": {"return_sequences": True},
    "unit_forget_bias": {"bias_initializer": "zeros"},
}
ONES_OF_KERAS = {("SimpleRNN", "activity_regularizer")}  # which drops it


def takes(name: str, option: str) -> bool:
    return option in inspect.signature(getattr(keras.layers, name)).parameters or option in (
        "zero_output_for_mask",
        "dtype",
        "trainable",
        "name",
    )


def observe(module: Any, name: str, options: dict[str, Any]) -> list[Any]:
    """All that can be seen of a layer: its first weights, what it says of them, and the outputs of two calls."""
    keras.utils.set_random_seed(0)
    layer = getattr(module, name)(support.UNITS, **{"dtype": "float64", "name": "layer"} | options)
    layer.build((support.BATCH, support.STEPS, support.FEATURES))
    seen: list[Any] = [layer.name, *support.arrays(layer)]
    seen += [[v.name, str(v.dtype), v.trainable, type(v.constraint).__name__] for v in layer.variables]
    mask = support.mask_of("any")
    for call in range(2):
        x = support.draw(support.BATCH, support.STEPS, support.FEATURES, seed=call)
        seen += [part.detach().numpy() for part in support.flat(layer(x, mask=mask, training=True))]
        seen += [float(loss.detach()) for loss in layer.losses]
    return seen


def same(a: list[Any], b: list[Any]) -> bool:
    return len(a) == len(b) and all(
        x.shape == y.shape and np.allclose(x, y, rtol=1e-6, atol=1e-6)
        if isinstance(x, np.ndarray) and isinstance(y, np.ndarray)
        else x == pytest.approx(y)
        if isinstance(x, float)
        else x == y
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", NAMES)
def test_each_option_acts_as_keras_own(name: str, option: str) -> None:
    if not takes(name, option):
        with pytest.raises(ValueError, match=f"Unrecognized keyword arguments passed to .*{option}"):
            getattr(gpu_rnn.keras, name)(3, **{option: OPTIONS[option]})
        return
    plain = NEEDED.get(option, {})
    options = plain | {option: OPTIONS[option]}
    found = observe(gpu_rnn.keras, name, options)
    if (name, option) not in ONES_OF_KERAS:
        equal = same(found, observe(keras.layers, name, options))
        assert equal, "Keras's own layer does something else"
    ignored = same(found, observe(keras.layers, name, plain))
    assert not ignored, "nothing of the option is to be seen"


def test_every_option_is_tested() -> None:
    parameters = {p for name in NAMES for p in inspect.signature(getattr(keras.layers, name)).parameters}
    assert (
        parameters - {"units", "kwargs"}
        == set(OPTIONS) - {"zero_output_for_mask", "dtype", "trainable", "name"} | WITHOUT_EFFECT
    )


@pytest.mark.parametrize("name", [*NAMES, "Bidirectional"])
def test_the_constructor_is_keras_own(name: str) -> None:
    assert inspect.signature(getattr(gpu_rnn.keras, name)) == inspect.signature(getattr(keras.layers, name))
    assert issubclass(getattr(gpu_rnn.keras, name), getattr(keras.layers, name))


ADDED = {  # what these have beside Keras's, in get_config and as an attribute that is not private
    "LSTM": {"use_cudnn", "implementation"},
    "GRU": {"use_cudnn", "implementation"},
    "SimpleRNN": {"seed"},
    "Bidirectional": set(),
}
HELPERS = {"recurrence", "loops_only", "kind", "cudnn", "check_cudnn", "save"}


def layer_named(module: Any, name: str, **options: Any) -> Any:
    if name == "Bidirectional":
        return module.Bidirectional(module.GRU(3, name="gru", **options), name="layer")
    return getattr(module, name)(3, name="layer", **options)


@pytest.mark.parametrize("name", ADDED)
def test_configurations_are_keras_own_and_what_it_leaves_out(name: str) -> None:
    ours, theirs = (layer_named(module, name).get_config() for module in (gpu_rnn.keras, keras.layers))
    assert set(ours) - set(theirs) == ADDED[name]
    nested = {"layer", "backward_layer"}  # of a Bidirectional
    assert {key: ours[key] for key in set(theirs) - nested} == {key: theirs[key] for key in set(theirs) - nested}
    if name != "Bidirectional":  # all that the constructor takes comes back, and Keras's layer takes it, too
        parameters = inspect.signature(getattr(keras.layers, name)).parameters
        assert set(parameters) - {"kwargs"} <= set(ours)
        assert getattr(keras.layers, name).from_config(ours).get_config() == theirs


@pytest.mark.parametrize("name", ADDED)
def test_attributes_are_keras_own(name: str) -> None:
    """A SimpleRNN has no use_cudnn."""
    ours, theirs = (layer_named(module, name) for module in (gpu_rnn.keras, keras.layers))
    added = {attribute for attribute in set(dir(ours)) - set(dir(theirs)) if not attribute.startswith("_")}
    assert added <= HELPERS
    assert set(dir(theirs)) <= set(dir(ours))
    assert hasattr(ours, "use_cudnn") == hasattr(theirs, "use_cudnn") == (name in ("LSTM", "GRU"))
    call = [inspect.signature(type(layer).call).parameters for layer in (ours, theirs)]
    assert [(key, p.default) for key, p in call[0].items()] == [(key, p.default) for key, p in call[1].items()]


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_implementation_comes_back(name: str) -> None:
    layer = layer_named(gpu_rnn.keras, name, implementation=1, dropout=0.5)
    assert type(layer).from_config(layer.get_config()).cell.dropout_mask_count == layer.cell.dropout_mask_count


def test_activity_regularizer_of_a_simple_rnn_acts() -> None:
    """Keras's takes it and drops it."""
    layer = gpu_rnn.keras.SimpleRNN(3, activity_regularizer=keras.regularizers.L2(0.5))
    y = layer(torch.ones(2, 4, 3))
    after = keras.layers.ActivityRegularization(l2=0.5)
    after(y)
    torch.testing.assert_close(layer.losses, after.losses)


def test_unroll_is_taken_and_changes_nothing() -> None:
    for name in NAMES:
        layers = [getattr(gpu_rnn.keras, name)(3, unroll=unroll) for unroll in (False, True)]
        for layer in layers:
            support.randomize(layer)
        support.assert_same(*(support.outcome(layer, support.mask_of("any")) for layer in layers))


def aten_runs(layer: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether it is ATen that runs a layer."""
    calls = []
    stack = aten.stack
    with monkeypatch.context() as patch:
        patch.setattr(aten, "stack", lambda *args: calls.append(args) or stack(*args))
        layer(torch.ones(2, 4, 3))
    return bool(calls)


@pytest.mark.parametrize(("use_cudnn", "expected"), [("auto", True), (True, True), (False, False)])
@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_use_cudnn(name: str, use_cudnn: Any, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = getattr(gpu_rnn.keras, name)(3, use_cudnn=use_cudnn)
    assert aten_runs(layer, monkeypatch) is expected
    again = type(layer).from_config(layer.get_config())
    assert again.use_cudnn == use_cudnn
    both = gpu_rnn.keras.Bidirectional(layer)
    assert both.forward_layer.use_cudnn == both.backward_layer.use_cudnn == use_cudnn
    assert aten_runs(both, monkeypatch) is expected


def test_use_cudnn_overrules_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_RNN_BACKEND", "reference")
    assert not aten_runs(gpu_rnn.keras.LSTM(3), monkeypatch)
    assert aten_runs(gpu_rnn.keras.LSTM(3, use_cudnn=True), monkeypatch)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("LSTM", {"activation": "relu"}, "activation other than tanh"),
        ("GRU", {"recurrent_activation": "hard_sigmoid"}, "recurrent_activation other than sigmoid"),
        ("GRU", {"reset_after": False}, "reset_after=False"),
        ("LSTM", {"recurrent_dropout": 0.5}, "recurrent_dropout"),
        ("GRU", {"activation": "relu", "reset_after": False}, "activation other than tanh, no reset_after=False"),
    ],
)
def test_use_cudnn_refuses_what_cudnn_lacks(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"^use_cudnn=True, and cuDNN has no {words}\. Use use_cudnn='auto'"):
        getattr(gpu_rnn.keras, name)(3, use_cudnn=True, **options)


def test_use_cudnn_refuses_masks() -> None:
    layer = gpu_rnn.keras.LSTM(3, use_cudnn=True)
    layer(torch.ones(2, 4, 3))
    with pytest.raises(ValueError, match="cuDNN has no mask"):
        layer(torch.ones(2, 4, 3), mask=torch.ones(2, 4).bool())


@pytest.mark.parametrize("name", ["LSTM", "GRU"])
def test_dropout_with_a_mask_for_each_gate(name: str) -> None:
    """Keras's implementation=1 crashes here unless use_cudnn=False."""
    options = {"dropout": 0.4, "implementation": 1, "seed": 3}
    theirs, ours = support.pair(name, options | {"use_cudnn": False}, options)
    support.assert_same(support.outcome(ours, training=True), support.outcome(theirs, training=True))


@pytest.mark.parametrize(
    ("name", "options"),
    [(name, options) for name in NAMES for options in ({}, {"recurrent_dropout": 0.4})]
    + [("LSTM", {"use_cudnn": False}), ("GRU", {"use_cudnn": False})],
)
def test_dropout_of_everything_drops_everything(name: str, options: dict[str, Any]) -> None:
    """With Keras's layers it depends on which of their loops runs."""
    _, ours = support.pair(name, options | {"dropout": 1.0, "seed": 3})
    x = support.draw(support.BATCH, support.STEPS, support.FEATURES)
    seed = ours.cell.seed_generator.state.numpy()
    found = ours(x, training=True)
    ours.cell.seed_generator.state.assign(seed)
    torch.testing.assert_close(found, ours(torch.zeros_like(x), training=True), **support.TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_recurrent_dropout_of_everything_leaves_no_product(name: str) -> None:
    _, ours = support.pair(name, {"recurrent_dropout": 1.0})
    x = support.draw(support.BATCH, support.STEPS, support.FEATURES)
    found = ours(x, training=True)
    ours.cell.recurrent_kernel.assign(torch.zeros_like(ours.cell.recurrent_kernel.value))
    torch.testing.assert_close(found, ours(x), **support.TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_unrolled_backwards_with_a_mask(name: str) -> None:
    """AttributeError in Keras's layers."""
    options = {"go_backwards": True, "return_sequences": True}
    theirs, ours = support.pair(name, options, options | {"unroll": True})
    mask = support.mask_of("any")
    support.assert_same(support.outcome(ours, mask), support.outcome(theirs, mask))


@pytest.mark.parametrize("name", NAMES)
def test_a_stateful_layer_has_gradients(name: str) -> None:
    """In Keras's LSTM and GRU a stateful layer's state is overwritten before the backward pass has read it."""
    options = {"stateful": True, "return_sequences": True}
    theirs, ours = support.pair(name, options | ({} if name == "SimpleRNN" else {"use_cudnn": False}), options)
    support.assert_same(support.outcome(ours, calls=3), support.outcome(theirs, calls=3))


def test_resetting_the_state_and_another_batch_size() -> None:
    layer = gpu_rnn.keras.GRU(3, stateful=True)
    x = torch.ones(2, 4, 3)
    first, second = layer(x), layer(x)
    assert not torch.allclose(first, second)
    layer.reset_state()
    torch.testing.assert_close(layer(x), first)
    with pytest.raises(ValueError, match="batch size"):
        layer(torch.ones(3, 4, 3))


def test_a_bidirectional_with_states_has_masks() -> None:
    """TypeError in Keras's."""
    both = gpu_rnn.keras.Bidirectional(
        gpu_rnn.keras.GRU(3, return_state=True, return_sequences=True, stateful=True), merge_mode="sum"
    )
    mask = torch.ones(2, 4).bool()
    both(torch.ones(2, 4, 3), mask=mask)
    found = both.compute_mask(None, mask)
    assert found[0] is not None and found[1:] == (None, None)


@pytest.mark.parametrize("merge", ["concat", None])
@pytest.mark.parametrize("sequences", [False, True])
@pytest.mark.parametrize("return_state", [False, True])
@pytest.mark.parametrize("name", [*NAMES, "Bidirectional"])
def test_symbolic_shapes_and_masks(name: str, return_state: bool, sequences: bool, merge: str | None) -> None:
    found = []
    for module in (gpu_rnn.keras, keras.layers):
        inner = "LSTM" if name == "Bidirectional" else name
        layer = getattr(module, inner)(support.UNITS, return_sequences=sequences, return_state=return_state)
        if name == "Bidirectional":
            layer = module.Bidirectional(layer, merge_mode=merge)
        symbolic = support.keras.tree.flatten(layer(keras.Input((None, 3))))
        real = support.keras.tree.flatten(layer(torch.ones(2, 4, 3)))
        assert [tuple(s.shape)[-1] for s in symbolic] == [tuple(r.shape)[-1] for r in real]
        shapes = keras.tree.flatten(layer.compute_output_shape((None, None, 3)))
        found.append(([(tuple(s.shape), s.dtype) for s in symbolic], shapes))
    assert found[0] == found[1]


@pytest.mark.parametrize("name", NAMES)
def test_a_misspelt_option_is_answered(name: str) -> None:
    with pytest.raises(ValueError, match=r"recurent_dropout.*; did you mean recurrent_dropout\?"):
        getattr(gpu_rnn.keras, name)(4, recurent_dropout=0.1)
    with pytest.raises(ValueError, match="Unrecognized keyword arguments") as said:
        getattr(gpu_rnn.keras, name)(4, something=0.1)
    assert "mean" not in str(said.value)


@pytest.mark.parametrize("name", [*NAMES, "Bidirectional"])
def test_a_misspelt_argument_of_a_call_is_answered(name: str) -> None:
    layer = getattr(gpu_rnn.keras, name)(gpu_rnn.keras.GRU(4) if name == "Bidirectional" else 4)
    x = np.ones((2, 3, 5), "float32")
    for misspelt, meant in (("masks", "mask"), ("init_state", "initial_state"), ("trainning", "training")):
        with pytest.raises(TypeError, match=rf"^{name}.call\(\) got an .* '{misspelt}'; did you mean {meant}\?$"):
            layer(x, **{misspelt: None})
    with pytest.raises(TypeError, match=r"'something'$"):
        layer(x, something=None)


@pytest.mark.parametrize("name", ADDED)
def test_states_alone_may_be_saved(name: str) -> None:
    """Less, for the same gradients; the configuration is the same."""
    x, layer = torch.randn(2, 40, 3), layer_named(gpu_rnn.keras, name)
    layer.build(x.shape)
    parameters, config = [weight.value for weight in layer.trainable_weights], layer.get_config()
    gradients, saved = [], []
    for save in ("gates", "states"):
        layer.save = save
        saved.append(saving.saved(lambda: layer(x), [x, *parameters]))
        gradients.append(torch.autograd.grad(layer(x).sum(), parameters))
    assert saved[1] < saved[0]
    torch.testing.assert_close(*gradients)
    assert layer.save == "states" and layer.get_config() == config
    if name != "Bidirectional":
        assert gpu_rnn.keras.Bidirectional(layer).backward_layer.save == "states"
    with pytest.raises(ValueError, match="save is 'gates' or 'states'"):
        layer.save = "all"
