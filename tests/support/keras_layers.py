# SPDX-License-Identifier: Apache-2.0
"""Keras's own layer beside ours: same weights, same seed, same input, everything that comes out compared.

Keras is imported here, on its PyTorch backend.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping, Sequence
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"  # Keras reads both when it is imported
os.environ["KERAS_TORCH_DEVICE"] = "cpu"  # the test for a GPU asks for one

import keras
import numpy as np
import pytest
import torch
from keras.src.backend.common import dtypes
from torch import Tensor

import gpu_rnn.keras
from tests.support.pairwise import pairwise

__all__ = ["gpu_rnn", "keras"]

BATCH, STEPS, FEATURES, UNITS = 4, 6, 3, 5
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}
# A few steps' rounding of values below 1, of 24, 8 and 11 bits, where another library computes in float32.
POLICIES = {"float32": 1e-6, "mixed_bfloat16": 2**-6, "mixed_float16": 2**-9, "bfloat16": 2**-5, "float16": 2**-8}
# NumPy 2 asks an array-like class for an argument that Keras's variables do not have.
quiet = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")

# Seen with 3.15.1 and 3.11.3; the older one has sizes as numbers where it makes states, and asks for another ONNX
# exporter.
KEEPS_SYMBOLS = tuple(map(int, keras.__version__.split(".")[:2])) >= (3, 15)
symbols = pytest.mark.skipif(
    not KEEPS_SYMBOLS, reason=f"Keras {keras.__version__} exports no symbolic sizes: 3.15 does"
)

MASKS = {
    "right": [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0]],
    "left": [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]],
    "any": [[1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 0], [0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 1, 1]],
    "none valid": [[0] * STEPS] * BATCH,
}


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keras in float64: its matmul multiplies float64 in float32, unless this table lets it be."""
    monkeypatch.setitem(dtypes.BIT64_TO_BIT32_DTYPE, "float64", "float64")


def mask_of(pattern: str | None) -> Tensor | None:
    return None if pattern is None else torch.tensor(MASKS[pattern]).bool()


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def pair(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any] | None = None) -> tuple[Any, Any]:
    """Keras's layer and ours, of the same weights; their options differ only where Keras's layer has a bug."""
    common = {"dtype": "float64"}
    theirs, ours = common | {**theirs}, common | {**(theirs if ours is None else ours)}
    layers = getattr(keras.layers, name)(UNITS, **theirs), getattr(gpu_rnn.keras, name)(UNITS, **ours)
    for layer in layers:
        randomize(layer)
    return layers


def randomize(layer: Any) -> None:
    """Builds a layer and gives it weights, biases too, that depend on their shapes alone."""
    if not layer.built:
        layer.build((BATCH, STEPS, FEATURES))
    for number, variable in enumerate(layer.trainable_variables):
        variable.assign(0.5 * draw(*variable.shape, seed=number))


def flat(outputs: Any) -> list[Tensor]:
    """A layer's outputs in order."""
    return [outputs] if isinstance(outputs, Tensor) else [tensor for part in outputs for tensor in flat(part)]


def outcome(
    layer: Any,
    mask: Tensor | None = None,
    initial: Sequence[Tensor] | None = None,
    training: bool = False,
    calls: int = 1,
) -> list[Tensor | None]:
    """All outputs of the last of some calls, then its gradients: of x, of the initial states and of the weights."""
    given = None if initial is None else [state.clone().requires_grad_() for state in initial]
    for call in range(calls):
        x = draw(BATCH, STEPS, FEATURES, seed=call).requires_grad_()
        outputs = flat(layer(x, mask=mask, initial_state=given, training=training))
    wanted = [x, *(given or ()), *(variable.value for variable in layer.trainable_variables)]
    seeds = [draw(*output.shape, seed=number) for number, output in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, wanted, seeds, allow_unused=True)
    return [*(output.detach() for output in outputs), *gradients]


def assert_same(
    found: Sequence[Tensor | None], expected: Sequence[Tensor | None], tolerance: Mapping[str, float] = TOLERANCE
) -> None:
    """As assert_close; a gradient of nothing is 0."""
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        if a is None or b is None:
            assert all(part is None or not part.any() for part in (a, b))
        else:
            torch.testing.assert_close(a, b, **tolerance)


def arrays(layer: Any) -> list[np.ndarray]:
    return [variable.value.detach().numpy().copy() for variable in layer.variables]


def flat_sizes(layer: Any) -> list[int]:
    """The sizes of a layer's states, or of those of a Bidirectional's two."""
    parts = (layer.forward_layer, layer.backward_layer) if isinstance(layer, keras.layers.Bidirectional) else (layer,)
    return [size for part in parts for size in part.state_size]


def seeds(layer: Any) -> list[Any]:
    """The variables that hold the states of a layer's random generators."""
    return [variable for variable in layer.variables if variable.name == "seed_generator_state"]


RANDOM_CASES = 60  # for each layer, and for Bidirectional


def combinations(*axes: tuple[Any, ...]) -> list[tuple[Any, ...]]:
    """Some in which every two values meet, and random ones."""
    rng = random.Random(0)
    return [*pairwise(*axes), *(tuple(map(rng.choice, axes)) for _ in range(RANDOM_CASES))]
