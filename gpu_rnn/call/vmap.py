# SPDX-License-Identifier: Apache-2.0
"""vmap over a layer: the new axis is folded into the batch, or with mapped weights into N, and runs as one launch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gpu_rnn.backends.tensors import RESULT_AXES, ROW_AXES, SAVED, Weights, primals
from gpu_rnn.call.passes import Options
from gpu_rnn.compiler.program import Program

W_HH, W_BETWEEN = (1 + Weights._fields.index(name) for name in ("w_hh", "w_between"))  # x comes first
Dims = Sequence[int | None]


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
    for axis in ("B", "N"):
        places = _of_row(axis, states, tensors)
        if not _folds(in_dims, tensors, places):
            continue
        folded = _fold_row(axis, size, in_dims, tensors, places)
        reverse = options.reverse * (size if axis == "N" else 1)
        outputs = function.apply(text, options._replace(reverse=reverse), *folded)
        return _unfold(outputs, _of_results(axis, states), size)
    return _one_by_one(function, size, in_dims, text, options, tensors)


def backward(
    function: Any, size: int, in_dims: Dims, text: str, options: Options, tensors: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Backward over a mapped axis: always into N, since each member has weight gradients of its own."""
    states = len(Program.parse(text).states)
    row, saved, d_outputs = split(text, options, tensors)
    places = _of_row("N", states, row)
    if not _folds(in_dims, row, places):
        return _one_by_one(function, size, in_dims, text, options, tensors)
    folded = _fold_row("N", size, in_dims, row, places)
    y, *of_final_and_saved = _of_results("N", states)
    of_final, of_saved = of_final_and_saved[:states], of_final_and_saved[states:]
    of_others = [y, *of_saved, y, *of_final, of_saved[-1]][: len(saved) + len(d_outputs)]  # the last is of d_inner
    for tensor, dim, place in zip((*saved, *d_outputs), in_dims[len(row) :], of_others, strict=True):
        folded.append(tensor if tensor.dim() == 1 and dim is None else _fold(tensor, dim, place, size))
    outputs = function.apply(text, options._replace(reverse=options.reverse * size), *folded)
    of_gradients = [p for t, p in zip(primals(row), primals(places), strict=True) if t is not None and p is not None]
    d_primals, dims = _unfold(outputs, of_gradients, size)
    if _shared(in_dims, row):  # x served all N recurrences of a member: its gradient is their sum
        d_primals = (d_primals[0].sum(3), *d_primals[1:])
    return d_primals, dims


def _of_row(axis: str, states: int, row: Sequence[Any]) -> list[int | None]:
    """Where an axis stands in each tensor of `Inputs.row`; None in those without it."""
    *single, state, reset_value = ROW_AXES
    reset_values = len(row) - len(single) - states
    return [axes.place(axis) for axes in (*single, *[state] * states, *[reset_value] * reset_values)]


def _of_results(axis: str, states: int) -> list[int]:
    """Likewise in y, the final states and what is saved, which all have it."""
    y, final, *saved = RESULT_AXES
    places = [axes.place(axis) for axes in (y, *[final] * states, *saved)]
    return [place for place in places if place is not None]


def _folds(in_dims: Dims, row: Sequence[Any], places: Dims) -> bool:
    """Whether one launch holds the members: each mapped tensor has the axis, and N holds no layers of a stack."""
    lacking = (dim is not None and place is None for dim, place in zip(in_dims, places, strict=False))
    return row[W_BETWEEN] is None and not any(lacking)


def _shared(in_dims: Dims, row: Sequence[Any]) -> bool:
    """Whether x is (T, B, I), without an axis N."""
    return row[0].dim() - (in_dims[0] is not None) == 3


def _fold(tensor: Tensor, dim: int | None, axis: int, size: int) -> Tensor:
    """The mapped axis, or `size` copies, merged with the axis that stands at `axis` without it."""
    mapped = tensor.unsqueeze(axis) if dim is None else tensor.movedim(dim, axis)
    return mapped.expand(*mapped.shape[:axis], size, *mapped.shape[axis + 1 :]).flatten(axis, axis + 1)


def _fold_row(axis: str, size: int, in_dims: Dims, row: Sequence[Any], places: Dims) -> list[Any]:
    """Every tensor of a row folded into its axis; those without one, and those that are not there, stay as they are."""
    if axis == "N" and _shared(in_dims, row):  # x gets an axis of its own, the last but one
        x, n = row[0], row[W_HH].shape[0 if in_dims[W_HH] != 0 else 1]
        mapped = x if in_dims[0] is None else x.movedim(in_dims[0], 0)
        x = mapped.unsqueeze(-2).expand(*mapped.shape[:-1], n, mapped.shape[-1])
        row, in_dims = (x, *row[1:]), (None if in_dims[0] is None else 0, *in_dims[1:])
    return [
        tensor if tensor is None or place is None else _fold(tensor, dim, place, size)
        for tensor, dim, place in zip(row, in_dims, places, strict=False)
    ]


def _unfold(
    outputs: Sequence[Tensor], axes: Sequence[int], size: int
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """The inverse, for results; a tensor that was not saved is empty and has no axis."""
    unfolded, dims = [], []
    for output, axis in zip(outputs, axes, strict=True):
        empty = output.dim() == 1
        unfolded.append(output if empty else output.unflatten(axis, (size, -1)))
        dims.append(None if empty else axis)
    return tuple(unfolded), tuple(dims)


def _one_by_one(
    function: Any, size: int, in_dims: Dims, text: str, options: Options, tensors: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int | None, ...]]:
    """Where no one launch holds the members: they have lengths and weights of their own, or are whole stacks."""
    results = []
    for index in range(size):
        member = [t if dim is None else t.select(dim, index) for t, dim in zip(tensors, in_dims, strict=True)]
        results.append(function.apply(text, options, *member))
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])
