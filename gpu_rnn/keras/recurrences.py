# SPDX-License-Identifier: Apache-2.0
"""Keras's cells and activations as recurrences of this library."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gpu_rnn import cells
from gpu_rnn.activations import Activation
from gpu_rnn.compiler.tracing import TraceError
from gpu_rnn.recurrence import Recurrence

# The functions that are the same in both libraries go by this library's names: a recurrence of names is shared, and
# ATen knows it. Keras's leaky_relu is not torch's (its slope is 0.2), so it is traced, as every other function is.
SAME = (
    "tanh",
    "sigmoid",
    "hard_sigmoid",
    "relu",
    "elu",
    "selu",
    "softsign",
    "softplus",
    "hard_tanh",
    "silu",
    "gelu",
    "linear",
)
KNOWN: dict[Callable[..., Any], str | Activation] = {
    **{getattr(keras.activations, name): name for name in SAME},
    keras.activations.exponential: "exp",
    keras.ops.tanh: "tanh",
    keras.ops.sigmoid: "sigmoid",
    torch.tanh: "tanh",
    torch.sigmoid: "sigmoid",
}


def of(cell: Any) -> Recurrence:
    """The recurrence of a Keras cell.

    Raises:
        ValueError: an activation that does not work on each unit by itself, that is another in training, or that cannot
            be traced.
    """
    activations = [_activation(cell.activation)]
    if not isinstance(cell, keras.layers.SimpleRNNCell):
        activations.append(_activation(cell.recurrent_activation))
    try:  # one of functions is traced when it is made
        if isinstance(cell, keras.layers.LSTMCell):
            return cells.lstm(*activations)
        if isinstance(cell, keras.layers.GRUCell):
            return cells.gru(*activations, reset_after=bool(cell.reset_after))
        return cells.rnn(*activations)
    except TraceError as error:
        raise ValueError(
            f"{error}\nActivations run inside the kernels, unit by unit: one that mixes units (softmax) or has "
            "weights, variables or tensors of its own cannot. Write it as arithmetic of x and numbers, or use "
            "keras.layers' own layer here."
        ) from error


def without_aten(recurrence: Recurrence) -> Recurrence:
    """The same recurrence, of which ATen (cuDNN, oneDNN) has no name."""
    return Recurrence.from_program(recurrence.text())


def unknown_to_aten(cell: Any) -> list[str]:
    """What ATen (cuDNN, oneDNN) lacks of a Keras LSTM or GRU cell, in words."""
    reasons = {
        "activation other than tanh": KNOWN.get(cell.activation) != "tanh",
        "recurrent_activation other than sigmoid": KNOWN.get(cell.recurrent_activation) != "sigmoid",
        "reset_after=False": not getattr(cell, "reset_after", True),
    }
    return [reason for reason, lacking in reasons.items() if lacking]


class Numbers(TorchFunctionMode):
    """Keras makes tensors of the numbers in a function. A trace takes those for somebody's weights, and these for
    numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[Tensor, float] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.as_tensor, torch.tensor) and not isinstance(args[0], Tensor) and np.ndim(args[0]) == 0:
            number = np.asarray(args[0]).item()
            tensor = torch.full((), number, **kwargs)
            self.made[tensor] = number
            return tensor
        if func in (torch.clip, torch.pow):  # a recurrence's bounds and exponents are numbers
            args, kwargs = keras.tree.map_structure(self._number, (tuple(args), kwargs))
        return func(*args, **kwargs)

    def _number(self, value: Any) -> Any:
        return self.made.get(value, value) if isinstance(value, Tensor) else value


def _activation(function: Any) -> str | Activation:
    known = KNOWN.get(function)
    if known is not None:
        return known
    _refuse_training(function)

    def activation(x: Tensor) -> Any:
        with keras.device("cpu"), Numbers():  # a trace is on the CPU, whatever the layer will be on
            return function(x)

    activation.__name__ = getattr(function, "__name__", type(function).__name__)  # as errors and a repr name it
    return activation


def _refuse_training(function: Any) -> None:
    layers = function.modules() if isinstance(function, torch.nn.Module) else ()
    for layer in layers:
        # These two layers take `training` for any function or module. A trace finds what is random in a module.
        if not isinstance(layer, keras.Layer) or isinstance(layer, keras.layers.TorchModuleWrapper):
            continue
        call = layer.function if isinstance(layer, keras.layers.Lambda) else layer.call
        if "training" in inspect.signature(call).parameters:
            raise ValueError(
                f"{type(layer).__name__} as an activation: it may be another function in training, and here an "
                "activation is one. Give it as a layer of its own, use dropout= or recurrent_dropout=, or "
                "keras.layers' own layer."
            )
