# SPDX-License-Identifier: Apache-2.0
"""vmap over a layer: the new axis is folded into the batch, or with mapped weights into N, and runs as one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpu_rnn.backends.tensors import FIRST_CONTROL, FIRST_STATE, SAVED, WEIGHTS
from gpu_rnn.call.passes import Options
from gpu_rnn.compiler.program import Program

W_HH, W_BETWEEN, LENGTHS = 2, WEIGHTS, FIRST_CONTROL
Dims = Sequence[int | None]

BATCH: list[int | None] = [0, 1, 0, 2, 2]  # where B stands in each of `LayerControls`
MEMBERS: list[int | None] = [None, 2, 1, 3, None]  # where N stands; a stack's members run one by one
BATCH_OF_SAVED, MEMBERS_OF_SAVED = [1, 1, 2, 2, 2], [2, 2, 3, 3, 3]  # B and N in `Result.saved`


def split(text: str, options: Options, tensors: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any], list[Any]]:
    """Backward's tensors: the row of Forward's inputs, y with what it saved, the incoming gradients."""
    gradients = 1 + len(Program.parse(text).states) + options.all_states
    end = len(tensors) - gradients - 1 - SAVED
    return tensors[:end], tensors[end:-gradients], list(tensors[-gradients:])


def forward(
    function: Any, size: int, in_dims: Dims, text: str, options: Options, tensors: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Forward over a mapped axis of length `size`; tensors as in `Inputs.row`."""
    states = len(Program.parse(text).states)
    if all(dim is None for dim in in_dims[1:FIRST_CONTROL]):
        folded = _into_batch(size, in_dims, tensors, states)
        return _unfold(function.apply(text, options, *folded), [1, *[0] * states, *BATCH_OF_SAVED], size)
    if in_dims[LENGTHS] is not None:
        return _one_by_one(function, size, in_dims, text, options, tensors)
    folded = _into_members(size, in_dims, tensors, states)
    outputs = function.apply(text, options._replace(reverse=options.reverse * size), *folded)
    return _unfold(outputs, [2, *[1] * states, *MEMBERS_OF_SAVED], size)


def backward(
    function: Any, size: int, in_dims: Dims, text: str, options: Options, tensors: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Backward over a mapped axis: always into N, since each member has weight gradients of its own."""
    if in_dims[LENGTHS] is not None or tensors[W_BETWEEN] is not None:
        return _one_by_one(function, size, in_dims, text, options, tensors)
    states = len(Program.parse(text).states)
    row, _, _ = split(text, options, tensors)
    folded = _into_members(size, in_dims[: len(row)], row, states)
    axes = [2, *MEMBERS_OF_SAVED, 2, *[1] * states, 3]  # of N in y, what is saved, d_y, d_final, d_inner
    for tensor, dim, axis in zip(tensors[len(row) :], in_dims[len(row) :], axes, strict=False):
        folded.append(tensor if tensor.dim() == 1 and dim is None else _fold(tensor, dim, axis, size))
    outputs = list(function.apply(text, options._replace(reverse=options.reverse * size), *folded))
    weights = sum(t is not None for t in row[1:FIRST_CONTROL])
    axes = [2, *[0] * weights, *[1] * states, *[2] * (len(row) - FIRST_STATE - states)]
    found, dims = _unfold(outputs, axes, size)
    if _shared(in_dims, row):  # x served all N recurrences of a member: its gradient is their sum
        found = (found[0].sum(3), *found[1:])
    return found, dims


def _shared(in_dims: Dims, row: Sequence[Any]) -> bool:
    """Whether x is (T, B, I), without an axis N."""
    return row[0].dim() - (in_dims[0] is not None) == 3


def _fold(tensor: Tensor, dim: int | None, axis: int, size: int) -> Tensor:
    """The mapped axis, or `size` copies, merged with the axis that stands at `axis` without it."""
    mapped = tensor.unsqueeze(axis) if dim is None else tensor.movedim(dim, axis)
    return mapped.expand(*mapped.shape[:axis], size, *mapped.shape[axis + 1 :]).flatten(axis, axis + 1)


def _fold_row(size: int, in_dims: Dims, row: Sequence[Any], axes: Sequence[int | None]) -> list[Any]:
    """Every tensor of a row folded into its axis; those without one, and those that are not there, stay as they are."""
    return [
        tensor if tensor is None or axis is None else _fold(tensor, dim, axis, size)
        for tensor, dim, axis in zip(row, in_dims, axes, strict=True)
    ]


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


def _into_members(size: int, in_dims: Dims, row: Sequence[Any], states: int) -> list[Any]:
    """A row with the mapped axis in N; x gets an axis N of its own."""
    axes = [2, *[0] * WEIGHTS, *MEMBERS, *[1] * states, *[2] * (len(row) - FIRST_STATE - states)]
    if not _shared(in_dims, row):
        return _fold_row(size, in_dims, row, axes)
    x, dim, n = row[0], in_dims[0], row[W_HH].shape[0 if in_dims[W_HH] != 0 else 1]
    x = x.movedim(dim, 2) if dim is not None else x.unsqueeze(2)  # (T, B, V or 1, I)
    x = x.unsqueeze(3).expand(*x.shape[:2], size, n, x.shape[-1]).flatten(2, 3)
    return [x, *_fold_row(size, in_dims[1:], row[1:], axes[1:])]


def _into_batch(size: int, in_dims: Dims, row: Sequence[Any], states: int) -> list[Any]:
    """A row with the mapped axis in B."""
    axes = [1, *[None] * WEIGHTS, *BATCH, *[0] * states, *[1] * (len(row) - FIRST_STATE - states)]
    return _fold_row(size, in_dims, row, axes)


def _one_by_one(
    function: Any, size: int, in_dims: Dims, text: str, options: Options, tensors: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Where no one launch holds the members: they have lengths and weights of their own, or are whole stacks."""
    found = []
    for index in range(size):
        own = [t if dim is None else t.select(dim, index) for t, dim in zip(tensors, in_dims, strict=True)]
        found.append(function.apply(text, options, *own))
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True)), (0,) * len(found[0])
