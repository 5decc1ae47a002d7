# SPDX-License-Identifier: Apache-2.0
"""vmap over a layer: the new axis is folded into the batch, or with mapped weights into N, and runs as one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpu_rnn.execution import Options
from gpu_rnn.program import Program
from gpu_rnn.reference import Weights

FIRST_WEIGHT, LENGTHS = 1, 1 + len(Weights._fields)
Dims = Sequence[int | None]


def forward(
    function: Any, size: int, in_dims: Dims, text: str, options: Options, tensors: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Forward over a mapped axis of length `size`; tensors (x, *weights, lengths, *states)."""
    if all(dim is None for dim in in_dims[FIRST_WEIGHT:LENGTHS]):
        return _into_batch(function, size, in_dims, text, options, tensors)
    if in_dims[LENGTHS] is not None:
        return _one_by_one(function, size, in_dims, text, options, tensors)
    folded = _fold_inputs(size, in_dims, tensors)
    outputs = function.apply(text, options._replace(reverse=options.reverse * size), *folded)
    count = len(tensors) - LENGTHS - 1
    axes = [2, *[1] * count, 2, 2, 3]  # of N in y, the final states, gates, recurrent, inner
    return _unfold(outputs, axes, size)


def backward(
    function: Any, size: int, in_dims: Dims, text: str, options: Options, tensors: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Backward over a mapped axis: always into N, since each member has weight gradients of its own."""
    if in_dims[LENGTHS] is not None:
        return _one_by_one(function, size, in_dims, text, options, tensors)
    states = len(Program.parse(text).states)
    count = LENGTHS + 1 + states
    inputs = tensors[:count]
    shared = inputs[0].dim() - (in_dims[0] is not None) == 3
    n = tensors[FIRST_WEIGHT].shape[0 if in_dims[FIRST_WEIGHT] != 0 else 1]
    folded = _fold_inputs(size, in_dims[:count], inputs)
    axes = [2, 2, 2, 3, 2, *[1] * states]  # of N in y, gates, recurrent, inner, d_y, d_final
    for tensor, dim, axis in zip(tensors[count:], in_dims[count:], axes, strict=True):
        folded.append(tensor if tensor.dim() == 1 and dim is None else _fold(tensor, dim, axis, size))
    outputs = list(function.apply(text, options._replace(reverse=options.reverse * size), *folded))
    weights = sum(t is not None for t in inputs[FIRST_WEIGHT:LENGTHS])
    found, dims = _unfold(outputs, [2, *[0] * weights, *[1] * states], size)
    if shared:  # x served all N recurrences of a member: its gradient is their sum
        assert found[0].shape[3] == n
        found = (found[0].sum(3), *found[1:])
    return found, dims


def _fold(tensor: Tensor, dim: int | None, axis: int, size: int) -> Tensor:
    """The mapped axis, or `size` copies, merged with the axis that stands at `axis` without it."""
    mapped = tensor.unsqueeze(axis) if dim is None else tensor.movedim(dim, axis)
    return mapped.expand(*mapped.shape[:axis], size, *mapped.shape[axis + 1 :]).flatten(axis, axis + 1)


def _unfold(
    outputs: Sequence[Tensor], axes: Sequence[int], size: int
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """The inverse, for results; a tensor that was not saved is empty and has no axis."""
    found, dims = [], []
    for output, axis in zip(outputs, axes, strict=True):
        empty = output.dim() == 1
        found.append(output if empty else output.unflatten(axis, (size, -1)))
        dims.append(None if empty else axis)
    return tuple(found), tuple(dims)


def _fold_inputs(size: int, in_dims: Dims, tensors: Sequence[Any]) -> list[Any]:
    """x, weights, lengths and states with the mapped axis in N; x gets an axis N of its own."""
    x, dim = tensors[0], in_dims[0]
    if x.dim() - (dim is not None) == 3:
        n = tensors[FIRST_WEIGHT].shape[0 if in_dims[FIRST_WEIGHT] != 0 else 1]
        x = x.movedim(dim, 2) if dim is not None else x.unsqueeze(2)  # (T, B, V or 1, I)
        x = x.unsqueeze(3).expand(*x.shape[:2], size, n, x.shape[-1]).flatten(2, 3)
    else:
        x = _fold(x, dim, 2, size)
    folded = [x]
    for index, (tensor, dim) in enumerate(zip(tensors[1:], in_dims[1:], strict=True), 1):
        if tensor is None or index == LENGTHS:
            folded.append(tensor)
        else:
            folded.append(_fold(tensor, dim, 0 if index < LENGTHS else 1, size))
    return folded


def _into_batch(
    function: Any, size: int, in_dims: Dims, text: str, options: Options, tensors: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    x, *weights = tensors[:LENGTHS]
    lengths, *states = tensors[LENGTHS:]
    folded = [_fold(x, in_dims[0], 1, size), *weights]
    folded.append(None if lengths is None else _fold(lengths, in_dims[LENGTHS], 0, size))
    folded += [_fold(s, dim, 0, size) for s, dim in zip(states, in_dims[LENGTHS + 1 :], strict=True)]
    outputs = function.apply(text, options, *folded)
    return _unfold(outputs, [1, *[0] * len(states), 1, 1, 2], size)


def _one_by_one(
    function: Any, size: int, in_dims: Dims, text: str, options: Options, tensors: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Where the members have lengths and weights of their own: no one launch holds them."""
    found = []
    for index in range(size):
        own = [t if dim is None else t.select(dim, index) for t, dim in zip(tensors, in_dims, strict=True)]
        found.append(function.apply(text, options, *own))
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True)), (0,) * len(found[0])
