# SPDX-License-Identifier: Apache-2.0
"""Jagged nested tensors: rows of several lengths, one after the other in memory, without padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gpu_rnn.layers.base import LayerBase


def run(layer: LayerBase, input: Any, hx: Any, steering: tuple[Any, ...], asked: Mapping[str, Any]) -> tuple[Any, ...]:
    """A call of the layer on a jagged input: as on the padded one with its lengths.

    The output has the input's offsets, so that torch takes both for alike. The host waits once, for the lengths.

    Args:
        steering: mask, lengths, resets and reset_state, which are refused.
        asked: the call's other arguments.

    Raises:
        TypeError: another axis than the second has several lengths.
        ValueError: there is a mask, or another of those.
    """
    _check(input)
    if any(value is not None for value in steering):
        raise ValueError(
            "mask, lengths, resets and reset_state cannot come with a jagged input, whose rows have lengths already: "
            "pad it with torch.nested.to_padded_tensor(input, 0.0), and give lengths="
        )
    values, offsets, lengths = input.values(), input.offsets(), _lengths(input)
    shortest, longest = torch.stack(lengths.aminmax()).tolist() if len(lengths) else (0, 0)
    steps = torch.arange(longest, device=values.device)
    rows, times = (steps < lengths[:, None]).nonzero(as_tuple=True)
    width = torch.sym_max(longest, 1)  # a layer takes a step at least; if all rows are empty, no length reaches it
    padded = values.new_zeros(len(lengths), width, values.shape[1])
    padded = padded.index_put((rows, times), values[offsets[rows] + times])
    sequence = padded if layer.batch_first else padded.transpose(0, 1)
    y, *states = layer.forward(sequence, hx, lengths=lengths, **asked)
    if layer.return_sequences:
        y = (y if layer.batch_first else y.transpose(0, 1))[rows, times]
        has_holes = input.lengths() is not None  # between the rows, as torch.nested.narrow leaves them
        ends = torch.cat([offsets.new_zeros(1), lengths.cumsum(0)]) if has_holes else offsets
        y = torch.nested.nested_tensor_from_jagged(y, ends, min_seqlen=shortest, max_seqlen=longest)
    return (y, *states)


def padded_size(layer: LayerBase, input: Any) -> Tensor:
    """A tensor of the size, dtype and device that `run` gives the layer, which holds one number.

    Raises:
        TypeError: another axis than the second has several lengths.
    """
    _check(input)
    lengths = _lengths(input)
    sizes = (len(lengths), max([1, *lengths.tolist()]))
    rows_first = sizes if layer.batch_first else sizes[::-1]
    return input.values().new_empty(1, 1, 1).expand(*rows_first, input.shape[2])


def _lengths(input: Any) -> Tensor:
    lengths = input.lengths()  # None where the rows have nothing between them
    return input.offsets().diff() if lengths is None else lengths


def _check(input: Any) -> None:
    is_ragged = torch.compiler.is_compiling() or not isinstance(input.shape[1], int)  # to Dynamo every size is an int
    if input.dim() != 3 or not is_ragged:
        raise TypeError(f"a jagged input is (B, j, I), a length for each row, got {tuple(map(str, input.shape))}")
