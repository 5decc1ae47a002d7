# SPDX-License-Identifier: Apache-2.0
"""Weights of one direction, layer and stack in torch's layout, and whatever is checked of weights that somebody gives.

`gpu_rnn.interop` brings other libraries' layouts to this one and back; its docstring has the table of them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

Weight = Any  # a NumPy array or a tensor
State = dict[str, Tensor]

ORDERS = {
    "lstm": {"torch": "ifgo", "keras": "ifgo", "onnx": "iofg", "haste": "igfo"},
    "gru": {"torch": "rzn", "keras": "zrn", "onnx": "zrn"},
    "gru_reset_before": {"torch": "rzn", "keras": "zrn", "onnx": "zrn"},
    "rnn": {"torch": "h", "keras": "h", "onnx": "h"},
}
"""The order of each cell's gates along the rows (or columns) of its weights, layout by layout."""

PEEPHOLES = {"torch": "ifo", "onnx": "iof"}
SUFFIXES = ("", "_reverse")
KEY = re.compile(r"(weight_ih|weight_hh|bias_ih|bias_hh|weight_hr|weight_peephole|weight_unit)_l(\d+)(_reverse)?")
FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Direction(NamedTuple):
    """The weights of one direction of one layer, in torch's layout."""

    weight_ih: Tensor  # (G·H, I)
    weight_hh: Tensor  # (G·H, H)
    bias: Tensor | None = None  # (2, G·H): bias_ih and bias_hh
    weight_peephole: Tensor | None = None  # (3, H)


Layer = list[Direction]  # one direction, or two


def reorder(weights: Tensor, source: str, target: str, dim: int = 0) -> Tensor:
    """The gates' blocks along `dim` in another order, each gate a letter; as they are where the orders are equal.

    >>> import torch
    >>> reorder(torch.tensor([0, 0, 1, 1, 2, 2]), "zrn", "rzn")
    tensor([1, 1, 0, 0, 2, 2])
    """
    if source == target:
        return weights
    blocks = dict(zip(source, weights.chunk(len(source), dim), strict=True))
    return torch.cat([blocks[gate] for gate in target], dim)


def check_cell(cell: str) -> None:
    if not isinstance(cell, str) or cell not in ORDERS:
        raise ValueError(f"cell must be one of {', '.join(ORDERS)}, got {cell!r}")


def tensor_of(value: Weight) -> Tensor:
    """A copy, which is nobody's parameter."""
    tensor = value.detach().clone() if isinstance(value, Tensor) else _from_numpy(value)
    if tensor.dtype not in FLOATING:
        raise TypeError(f"weights are floating-point numbers of 16, 32 or 64 bits, got {tensor.dtype}")
    if tensor.is_meta or tensor.layout is not torch.strided:
        raise TypeError(f"weights are dense and hold numbers, got a {tensor.layout} tensor on {tensor.device}")
    return tensor


def _from_numpy(value: Any) -> Tensor:
    try:
        array = np.array(value)
    except ValueError as error:  # rows of several lengths
        raise TypeError(
            f"weights are arrays of floating-point numbers, got a {type(value).__name__} that is none"
        ) from error
    if array.dtype.name == "bfloat16":  # ml_dtypes', of which torch does not know
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        what = f"{type(value).__name__} of dtype {array.dtype}"
        hint = ": onnx.numpy_helper.to_array makes an array of it" if hasattr(value, "SerializeToString") else ""
        raise TypeError(f"weights are arrays of floating-point numbers of 16, 32 or 64 bits, got {what}{hint}")
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def array_of(value: Tensor) -> np.ndarray:
    if value.dtype == torch.bfloat16:
        raise ValueError("NumPy has no bfloat16: convert the weights with .float() first")
    return value.detach().cpu().numpy()


def expect(weights: Tensor, shape: tuple[int | None, ...], what: str) -> None:
    """Raises ValueError unless the shapes agree; None stands for any size but 0."""
    fits = weights.dim() == len(shape) and all(b in (None, a) and a for a, b in zip(weights.shape, shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{what} should have shape ({wanted}), got {tuple(weights.shape)}: is `cell` the right one?")


def check_names(arrays: Mapping[str, Weight], needed: set[str], allowed: set[str], what: str) -> None:
    if not isinstance(arrays, Mapping):
        raise TypeError(f"{what} is a mapping of names to arrays, got {type(arrays).__name__}")
    if not needed <= set(arrays) <= needed | allowed:
        optional = f", and may have {', '.join(sorted(allowed))}" if allowed else ""
        raise ValueError(
            f"{what} has {', '.join(sorted(needed))}{optional}; got {', '.join(map(str, arrays)) or 'none'}"
        )


def join(layers: Sequence[Layer]) -> State:
    """The state_dict of a stack."""
    check_stack(layers)
    state: State = {}
    for number, layer in enumerate(layers):
        for suffix, direction in zip(SUFFIXES, layer, strict=False):
            state |= {f"{name}_l{number}{suffix}": part for name, part in _named(direction).items()}
    return state


def check_stack(layers: Sequence[Layer]) -> None:
    """Raises ValueError unless one module can hold the layers."""
    if not layers:
        raise ValueError("give the weights of at least one layer")
    alike = {
        (len(layer), part.weight_hh.shape, part.bias is None, part.weight_peephole is None)
        for layer in layers
        for part in layer
    }
    if len(alike) > 1:
        raise ValueError(
            "the layers of a stack in one module have the same size, directions and biases, and so have the "
            "directions of a "
            "layer: convert these one by one, for a module each"
        )
    for number, layer in enumerate(layers):
        width = len(layer) * layer[0].weight_hh.shape[1] if number else layer[0].weight_ih.shape[1]
        for direction in layer:
            expect(direction.weight_ih, (None, width), f"the input weights of layer {number}, in torch's layout,")


def _named(direction: Direction) -> State:
    """The parts of a state_dict that a direction is."""
    named = {"weight_ih": direction.weight_ih, "weight_hh": direction.weight_hh}
    if direction.bias is not None:
        named |= {"bias_ih": direction.bias[0].clone(), "bias_hh": direction.bias[1].clone()}
    return named if direction.weight_peephole is None else named | {"weight_peephole": direction.weight_peephole}


def split(state: Mapping[str, Weight], cell: str) -> list[Layer]:
    """The layers in a state_dict, with `join` its inverse."""
    if not isinstance(state, Mapping):
        raise TypeError(f"a layer's weights are given as its state_dict(), got {type(state).__name__}")
    if any(str(name).startswith("norm_") for name in state):
        raise ValueError("layer and RMS normalisation (norm_ih, norm_hh) exist in this library's layout only")
    unknown = [str(name) for name in state if not isinstance(name, str) or KEY.fullmatch(name) is None]
    if unknown or "weight_ih_l0" not in state:
        raise ValueError(
            "the state_dict of one layer has keys like weight_ih_l0 and bias_hh_l0_reverse; got "
            f"{', '.join(unknown or state) or 'none'}. Of a model give model.<layer>.state_dict()"
        )
    if any(name.startswith(("weight_hr", "weight_unit")) for name in state):
        raise ValueError(
            "projections (weight_hr) and parameters of one's own (weight_unit) exist in torch's layout only"
        )
    if all(getattr(state.get(name), "ndim", 2) == 3 for name in ("weight_ih_l0", "weight_hh_l0")):
        raise ValueError(
            "block-diagonal recurrent weights (heads) exist in this library's layout only: convert those of a layer "
            "with heads=1, whose weight_hh holds the blocks and zeros"
        )
    suffixes = SUFFIXES if any(name.endswith(SUFFIXES[1]) for name in state) else SUFFIXES[:1]
    count = 1 + max(int(match[2]) for match in map(KEY.fullmatch, state) if match)
    layers = [[_direction(state, f"_l{k}{suffix}", cell) for suffix in suffixes] for k in range(count)]
    check_stack(layers)
    return layers


def _direction(state: Mapping[str, Weight], suffix: str, cell: str) -> Direction:
    biases = ("bias_ih", "bias_hh") if {f"bias_ih{suffix}", f"bias_hh{suffix}"} & set(state) else ()
    for name in ("weight_ih", "weight_hh", *biases):
        if name + suffix not in state:
            raise ValueError(f"the state_dict has no {name}{suffix}: give the whole layer's state_dict()")
    w_ih, w_hh, *rows = (tensor_of(state[name + suffix]) for name in ("weight_ih", "weight_hh", *biases))
    gates, hidden = len(ORDERS[cell]["torch"]), w_hh.shape[-1] if w_hh.dim() else 1
    expect(w_hh, (gates * hidden, hidden), f"a {cell}'s weight_hh{suffix}")
    expect(w_ih, (gates * hidden, None), f"a {cell}'s weight_ih{suffix}")
    for name, row in zip(biases, rows, strict=True):
        expect(row, (gates * hidden,), f"a {cell}'s {name}{suffix}")
    peephole = tensor_of(state["weight_peephole" + suffix]) if "weight_peephole" + suffix in state else None
    if peephole is not None:
        if cell != "lstm":
            raise ValueError(
                f"a {cell} has no peepholes, and the state_dict has weight_peephole{suffix}: is `cell` the right one?"
            )
        expect(peephole, (3, hidden), f"an lstm's weight_peephole{suffix}")
    return Direction(w_ih, w_hh, torch.stack(rows) if rows else None, peephole)
