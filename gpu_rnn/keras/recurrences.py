# SPDX-License-Identifier: Apache-2.0
"""Keras's cells and activations as recurrences of this library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import torch
from torch import Tensor

from gpu_rnn import cells
from gpu_rnn.activations import Activation
from gpu_rnn.recurrence import Recurrence
from gpu_rnn.tracing import TraceError


def squareplus(x: Tensor) -> Tensor:
    """(x + sqrt(x² + 4)) / 2"""
    return (x + torch.sqrt(x * x + 4)) / 2


def sparse_sigmoid(x: Tensor) -> Tensor:
    """clip((x + 1) / 2, 0, 1)"""
    return ((x + 1) / 2).clamp(0, 1)


# The functions that are the same in both libraries go by this library's names: a recurrence of names is shared, and
# ATen knows it. Keras's leaky_relu is not torch's (its slope is 0.2), so it is traced, as every other function is.
SAME = ("tanh", "sigmoid", "hard_sigmoid", "relu", "elu", "selu", "softsign", "softplus", "hard_tanh", "silu", "gelu", "linear")
KNOWN: dict[Callable[..., Any], str | Activation] = {
    **{getattr(keras.activations, name): name for name in SAME},
    keras.activations.exponential: "exp",
    keras.activations.squareplus: squareplus,  # Keras makes tensors of the constants in these two, which a trace refuses
    keras.activations.sparse_sigmoid: sparse_sigmoid,
    keras.ops.tanh: "tanh",
    keras.ops.sigmoid: "sigmoid",
    torch.tanh: "tanh",
    torch.sigmoid: "sigmoid",
}


def of(cell: Any) -> Recurrence:
    """The recurrence of a Keras cell.

    Raises:
        ValueError: an activation that does not work on each unit by itself, or that cannot be traced.
    """
    own = [_activation(cell.activation)]
    if not isinstance(cell, keras.layers.SimpleRNNCell):
        own.append(_activation(cell.recurrent_activation))
    if isinstance(cell, keras.layers.LSTMCell):
        recurrence = cells.lstm(*own)
    elif isinstance(cell, keras.layers.GRUCell):
        recurrence = cells.gru(*own, reset_after=bool(cell.reset_after))
    else:
        recurrence = cells.rnn(*own)
    if not all(isinstance(name, str) for name in own):
        _trace(recurrence)
    return recurrence


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
    return [reason for reason, found in reasons.items() if found]


def _activation(function: Any) -> str | Activation:
    if isinstance(function, torch.nn.Module):  # a layer; if it has weights the trace will say so
        return lambda x: function(x)
    return KNOWN.get(function, function)


def _trace(recurrence: Recurrence) -> None:
    try:
        recurrence.program  # noqa: B018  (traced on first use; better here than in the first call)
    except TraceError as error:
        raise ValueError(
            f"{error}\nActivations run inside the kernels, unit by unit: one that mixes units (softmax) or has weights "
            "cannot. Write it as plain torch arithmetic, or use keras.layers' own layer here."
        ) from error
