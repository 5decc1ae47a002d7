# SPDX-License-Identifier: Apache-2.0
"""Our Keras layers in programs that torch.export and Keras's model.export write, for batches and lengths not yet
known."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.export import Dim

if importlib.util.find_spec("keras") is None:
    pytest.skip("Keras is not installed: pip install gpu-rnn[keras]", allow_module_level=True)
from tests.support import keras_layers as support
from tests.support.keras_layers import gpu_rnn, keras

pytestmark = [support.quiet, support.symbols]

SEQUENCES = {"return_sequences": True}
LAYERS: list[tuple[str, dict[str, Any]]] = [
    ("LSTM", {}),
    ("GRU", SEQUENCES | {"activation": "softsign", "reset_after": False}),
    ("SimpleRNN", SEQUENCES | {"go_backwards": True, "return_state": True}),
    ("LSTM", SEQUENCES | {"use_cudnn": False}),
]
OTHERS = [(7, 9), (1, 1), (2, 30)]  # sizes other than the example's


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def inputs(batch: int, steps: int) -> torch.Tensor:
    return support.draw(batch, steps, support.FEATURES).float()


def exported(model: Any) -> Any:
    """A program of a model for any batch and any number of steps. Keras's layers take what they are given as *args."""
    sizes = {0: Dim("batch", min=1, max=64), 1: Dim("steps", min=1, max=512)}
    model(inputs(3, 6))
    return torch.export.export(model, (inputs(3, 6),), dynamic_shapes=((sizes,),), strict=False).module()


def assert_exported(model: Any, policy: str = "float32") -> None:
    """In 16 bits a program may run on another backend than the call, and round elsewhere."""
    program = exported(model)
    for batch, steps in OTHERS:
        x = inputs(batch, steps)
        torch.testing.assert_close(
            support.flat(program(x)), support.flat(model(x)), rtol=0, atol=support.POLICIES[policy]
        )


@pytest.mark.parametrize(
    ("name", "options", "policy"),
    [
        *((name, options, "float32") for name, options in LAYERS[:2]),
        *(slow(name, options, "float32") for name, options in LAYERS[2:]),
        *(slow(name, options, policy) for name, options in LAYERS for policy in ("mixed_bfloat16", "mixed_float16")),
    ],
    ids=str,
)
def test_a_layer_is_exported_for_every_batch_and_length(name: str, options: dict[str, Any], policy: str) -> None:
    assert_exported(getattr(gpu_rnn.keras, name)(support.UNITS, dtype=policy, **options), policy)


@pytest.mark.parametrize("merge", ["sum", slow("concat"), slow(None)])
def test_a_bidirectional_and_a_model_with_masks_are_exported_too(merge: str | None) -> None:
    class Both(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.mask = keras.layers.Masking()
            self.below = gpu_rnn.keras.LSTM(4, go_backwards=True, return_sequences=True)
            self.above = gpu_rnn.keras.Bidirectional(gpu_rnn.keras.GRU(3, return_sequences=True), merge_mode=merge)

        def call(self, x: Any) -> Any:
            return self.above(self.below(self.mask(x)))

    assert_exported(Both())


def test_states_and_a_mask_are_inputs_of_a_program() -> None:
    class Step(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = gpu_rnn.keras.GRU(support.UNITS, return_state=True)
            self.layer.build((None, None, support.FEATURES))

        def forward(self, x: Any, mask: Any, h: Any) -> Any:
            return self.layer(x, mask=mask, initial_state=[h])

    def arguments(batch: int, steps: int) -> tuple[torch.Tensor, ...]:
        return inputs(batch, steps), support.draw(batch, steps) > -0.5, support.draw(batch, support.UNITS).float()

    batch, steps = Dim("batch", min=1, max=64), Dim("steps", min=1, max=512)
    model = Step()
    shapes = ({0: batch, 1: steps}, {0: batch, 1: steps}, {0: batch})
    program = torch.export.export(model, arguments(3, 6), dynamic_shapes=shapes, strict=False).module()
    for sizes in OTHERS:
        torch.testing.assert_close(program(*arguments(*sizes)), model(*arguments(*sizes)), rtol=1e-6, atol=1e-6)


# The exporter that Keras asks for warns of every size that it reads, and is deprecated in torch.
onnx_exporter = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def onnx_file(layer: Any, folder: Path) -> tuple[Any, Path]:
    pytest.importorskip("onnx", reason="ONNX is not installed: pip install onnx")
    model = keras.Sequential([keras.Input((None, support.FEATURES)), layer])
    model(inputs(1, 4))
    model.export(folder / "model.onnx", format="onnx", verbose=False)
    return model, folder / "model.onnx"


@pytest.mark.parametrize(
    ("name", "options", "wrap"),
    [
        ("LSTM", {}, True),
        ("GRU", SEQUENCES, False),
        slow("SimpleRNN", SEQUENCES, True),
        slow("LSTM", LAYERS[3][1], False),
    ],
    ids=str,
)
def test_keras_writes_standard_layers_into_onnx_files(
    name: str, options: dict[str, Any], wrap: bool, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """One node each, for every batch and length: torch.onnx's checked by ONNX's own evaluator."""
    layer = getattr(gpu_rnn.keras, name)(support.UNITS, **options)
    model, path = onnx_file(gpu_rnn.keras.Bidirectional(layer) if wrap else layer, tmp_path)
    from onnx import load
    from onnx.reference import ReferenceEvaluator

    assert [node.op_type for node in load(path).graph.node].count(name.removeprefix("Simple")) == 1
    evaluator = ReferenceEvaluator(load(path))
    for batch, steps in OTHERS:
        x = inputs(batch, steps)
        (found,) = evaluator.run(None, {evaluator.input_names[0]: x.numpy()})
        np.testing.assert_allclose(found, model(x).detach().numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ([gpu_rnn.keras.LSTM(3, activation="softsign")], "activations other than Keras's defaults"),
        (
            [keras.layers.Masking(), gpu_rnn.keras.Bidirectional(gpu_rnn.keras.GRU(3, reset_after=False))],
            "False, a mask",
        ),
    ],
)
def test_what_the_exporter_of_old_cannot_write_is_refused_in_words(
    layers: list[Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(NotImplementedError, match=words) as error:
        onnx_file(keras.Sequential(layers), tmp_path)
    for way in ("import gpu_rnn.onnx", "input_signature=", "torch.onnx.export(model.eval()"):
        assert way in str(error.value)


for _test in (
    test_keras_writes_standard_layers_into_onnx_files,
    test_what_the_exporter_of_old_cannot_write_is_refused_in_words,
):
    for _mark in onnx_exporter:
        _mark(_test)
