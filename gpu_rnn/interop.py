# SPDX-License-Identifier: Apache-2.0
"""Weights of other libraries' layouts, to and from the state_dict of a layer of torch.nn or of this library.

========  =======================================  ======  =========  =====================================
layout    input weights, recurrent weights         LSTM    GRU        biases
========  =======================================  ======  =========  =====================================
torch     (G·H, I), (G·H, H), layer by layer       i f g o r z n      two of (G·H)
Keras     (I, G·H), (H, G·H)                       i f g o z r n      (G·H); (2, 3·H) with reset_after=True
CuDNN     (I, G·H), (H, G·H), a gate read (H, I)   i f g o z r n      (2·G·H)
ONNX      W (D, G·H, I), R (D, G·H, H)             i o f g z r n      B (D, 2·G·H)
Haste     (I, 4·H), (H, 4·H)                       i g f o            (4·H)
Flax      (I, H), (H, H) for each gate             i f g o r z n      (H) for each gate; two of the GRU's n
========  =======================================  ======  =========  =====================================

G gates (g is the LSTM's cell gate, which Keras and ONNX call c; n is the GRU's candidate, theirs is h), H units,
I input features, D directions. Sources: torch.nn's documentation, Keras's LSTM and GRU layers, ONNX's operators LSTM,
GRU and RNN, Haste's `lstm.py`. CuDNN is CuDNNLSTM and CuDNNGRU of Keras 2: each gate's block of I·H numbers is, in the
order in which it lies in memory, cuDNN's matrix (H, I); `from_keras` knows them by their biases. A stack is a list of
layers everywhere but in torch, whose state_dict holds them all.

`cell` is "lstm", "gru" (the reset gate after the product: torch, Keras's reset_after=True, ONNX's
linear_before_reset=1), "gru_reset_before" (reset_after=False, linear_before_reset=0), or "rnn" (Elman's, Keras's
SimpleRNN). All functions copy, and raise TypeError for weights that are no arrays or tensors of floating-point numbers
of 16, 32 or 64 bits; NumPy's may have either byte order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from gpu_rnn.layers.flax_layout import from_flax as from_flax
from gpu_rnn.layers.flax_layout import to_flax as to_flax
from gpu_rnn.layers.onnx_attributes import onnx_attributes as onnx_attributes
from gpu_rnn.layers.onnx_attributes import options_of_onnx as options_of_onnx
from gpu_rnn.layers.weight_layouts import (
    ORDERS,
    PEEPHOLES,
    Direction,
    Layer,
    State,
    Weight,
    array_of,
    check_cell,
    check_names,
    expect,
    join,
    reorder,
    split,
    tensor_of,
)


def direction_of_keras(kernel: Tensor, recurrent_kernel: Tensor, bias: Tensor | None, cell: str) -> Direction:
    """One Keras layer's weights in torch's layout, as differentiable functions of them.

    Args:
        kernel: (I, G·H).
        recurrent_kernel: (H, G·H).
        bias: (G·H), with reset_after=True (2, 3·H), or None.
        cell: see above.
    """
    orders = ORDERS[cell]["keras"], ORDERS[cell]["torch"]
    w_ih, w_hh = reorder(kernel.T, *orders), reorder(recurrent_kernel.T, *orders)
    if bias is None:
        return Direction(w_ih, w_hh)
    rows = bias if bias.dim() == 2 else torch.stack([bias, torch.zeros_like(bias)])
    return Direction(w_ih, w_hh, reorder(rows, *orders, dim=1))


def keras_of_cudnn(kernel: Tensor, recurrent_kernel: Tensor, bias: Tensor) -> list[Tensor]:
    """The weights of Keras 2's CuDNNLSTM or CuDNNGRU as those of Keras's LSTM, or GRU with reset_after=True.

    Args:
        kernel, recurrent_kernel: (I, G·H) and (H, G·H) with G = 4 or 3 gates.
        bias: (2·G·H): those that the input's products get, and then the recurrent products'.
    """
    hidden, rows = recurrent_kernel.shape
    gates = rows // hidden

    def turned(weights: Tensor) -> Tensor:
        return torch.cat([block.reshape(hidden, -1).T for block in weights.chunk(gates, 1)], 1)

    both = bias.view(2, rows)
    return [turned(kernel), turned(recurrent_kernel), both.sum(0) if gates == len(ORDERS["lstm"]["keras"]) else both]


def from_keras(*layers: Sequence[Weight], cell: str) -> State:
    """A torch state_dict from `get_weights()` of Keras layers, the lowest of a stack first.

    Args:
        layers: each kernel, recurrent_kernel and, with use_bias, bias; of a Bidirectional the forward layer's and
            then the backward layer's. Also those of Keras 2's CuDNNLSTM and CuDNNGRU.
        cell: see above.

    Returns:
        A state_dict for `gpu_rnn.LSTM`, `GRU` or `RNN`, also those of torch.nn, with ``bias=False`` if there were none.

    Raises:
        TypeError: a layer that is no list of arrays of floating-point numbers.
        ValueError: an unknown cell; weights whose number or shapes are not that cell's, or not alike in both
            directions.

    Example::

        >>> import gpu_rnn, numpy as np, torch
        >>> from gpu_rnn import interop
        >>> weights = [np.ones((3, 32)), np.ones((8, 32)), np.zeros(32)]  # keras.layers.LSTM(8).get_weights()
        >>> layer = gpu_rnn.LSTM(3, 8, dtype=torch.float64)
        >>> layer.load_state_dict(interop.from_keras(weights, cell="lstm"))
        <All keys matched successfully>
    """
    check_cell(cell)
    return join([[_from_keras(arrays, cell) for arrays in _split_keras(layer)] for layer in layers])


def to_keras(state: Mapping[str, Weight], cell: str) -> list[list[np.ndarray]]:
    """For each layer what its Keras counterpart's `set_weights()` takes; `from_keras` describes it.

    One list for each layer of the stack: a single layer's is ``to_keras(state, cell)[0]``. Keras has one bias
    except in a GRU with reset_after=True: torch's two are added.

    Raises:
        ValueError: an unknown cell or keys; projections or peepholes, which Keras's layers do not have.

    Example::

        >>> import gpu_rnn
        >>> from gpu_rnn import interop
        >>> state = gpu_rnn.GRU(3, 8, num_layers=2).state_dict()
        >>> first, second = interop.to_keras(state, cell="gru")
        >>> [array.shape for array in second]
        [(8, 24), (8, 24), (2, 24)]
    """
    check_cell(cell)
    layers = split(state, cell)
    _refuse_peepholes(layers, "Keras's layers")
    return [[array for direction in layer for array in _to_keras(direction, cell)] for layer in layers]


def from_onnx(*nodes: Mapping[str, Weight], cell: str) -> State:
    """A torch state_dict from the inputs W, R, and B and P where given, of ONNX's LSTM, GRU or RNN nodes.

    Args:
        nodes: each a mapping of those names to arrays, the lowest of a stack first. W is (D, G·H, I), R (D, G·H, H),
            B (D, 2·G·H), P (D, 3·H), an LSTM's peepholes. A node with direction="reverse" runs on a flipped input.
            Its attributes are the layer's options: `options_of_onnx`.
        cell: see above; it stands for linear_before_reset.

    Raises:
        ValueError: an unknown cell; weights of other names or shapes.

    Example::

        >>> import gpu_rnn, torch
        >>> from gpu_rnn import interop
        >>> node = {"W": torch.randn(2, 32, 3), "R": torch.randn(2, 32, 8)}
        >>> layer = gpu_rnn.LSTM(3, 8, bias=False, bidirectional=True)
        >>> layer.load_state_dict(interop.from_onnx(node, cell="lstm"))
        <All keys matched successfully>
    """
    check_cell(cell)
    return join([_from_onnx(node, cell) for node in nodes])


def to_onnx(state: Mapping[str, Weight], cell: str) -> list[dict[str, np.ndarray]]:
    """For each layer the inputs W, R, and B and P where it has them, of its ONNX node; `from_onnx` describes them.

    The node's attributes are hidden_size, direction, linear_before_reset=1 for cell="gru", and clip and activations
    where they are not the defaults: `onnx_attributes` has a layer's.

    Raises:
        ValueError: an unknown cell or keys; projections, which ONNX's operators do not have.

    Example::

        >>> import gpu_rnn
        >>> from gpu_rnn import interop
        >>> (node,) = interop.to_onnx(gpu_rnn.RNN(3, 8).state_dict(), cell="rnn")
        >>> {name: array.shape for name, array in node.items()}
        {'W': (1, 8, 3), 'R': (1, 8, 8), 'B': (1, 16)}
    """
    check_cell(cell)
    return [_to_onnx(layer, cell) for layer in split(state, cell)]


def from_haste(*layers: Mapping[str, Weight]) -> State:
    """A torch state_dict from the state_dicts of Haste's LSTM layers, the lowest of a stack first.

    Args:
        layers: each with kernel (I, 4·H), recurrent_kernel (H, 4·H) and bias (4·H).

    Raises:
        ValueError: weights of other names or shapes.

    Example::

        >>> import gpu_rnn, torch
        >>> from gpu_rnn import interop
        >>> theirs = {"kernel": torch.randn(3, 32), "recurrent_kernel": torch.randn(8, 32), "bias": torch.randn(32)}
        >>> gpu_rnn.LSTM(3, 8).load_state_dict(interop.from_haste(theirs))
        <All keys matched successfully>
    """
    return join([[_from_haste(layer)] for layer in layers])


def to_haste(state: Mapping[str, Weight]) -> list[State]:
    """For each layer of an LSTM the state_dict of Haste's; `from_haste` describes it. Torch's two biases are added.

    Raises:
        ValueError: a bidirectional layer, peepholes or projections, which Haste's LSTM does not have.

    Example::

        >>> import gpu_rnn, torch
        >>> from gpu_rnn import interop
        >>> (theirs,) = interop.to_haste(gpu_rnn.LSTM(3, 8).state_dict())
        >>> theirs["recurrent_kernel"].shape
        torch.Size([8, 32])
    """
    layers = split(state, "lstm")
    _refuse_peepholes(layers, "Haste's LSTM")
    if any(len(layer) == 2 for layer in layers):
        raise ValueError(
            "Haste's LSTM has one direction: convert each direction's weights by itself, without '_reverse'"
        )
    return [_to_haste(direction) for (direction,) in layers]


def _split_keras(layer: Sequence[Weight]) -> list[Sequence[Weight]]:
    """The weights of a layer, or of the two in a Bidirectional."""
    if not isinstance(layer, (list, tuple)):
        raise TypeError(f"a Keras layer is given as the list layer.get_weights(), got {type(layer).__name__}")
    if len(layer) in (2, 3):
        return [layer]
    if len(layer) in (4, 6):
        return [layer[: len(layer) // 2], layer[len(layer) // 2 :]]
    raise ValueError(
        "a Keras layer has the weights kernel, recurrent_kernel and, with use_bias, bias, a Bidirectional twice "
        f"as many; got {len(layer)} arrays. Give layer.get_weights() of each layer, one argument a layer"
    )


def _from_keras(arrays: Sequence[Weight], cell: str) -> Direction:
    kernel, recurrent_kernel, *biases = map(tensor_of, arrays)
    gates = len(ORDERS[cell]["keras"])
    expect(recurrent_kernel, (None, None), f"a {cell}'s recurrent_kernel")
    expect(
        recurrent_kernel, (recurrent_kernel.shape[0], gates * recurrent_kernel.shape[0]), f"a {cell}'s recurrent_kernel"
    )
    rows = recurrent_kernel.shape[1]
    expect(kernel, (None, rows), f"a {cell}'s kernel")
    if biases and cell in ("lstm", "gru") and biases[0].shape == (2 * rows,):
        kernel, recurrent_kernel, *biases = keras_of_cudnn(kernel, recurrent_kernel, biases[0])
    if biases:
        # The shape of its bias is how a Keras GRU shows where its reset gate acts.
        expect(biases[0], (2, rows) if cell == "gru" else (rows,), f"a {cell}'s bias")
    direction = direction_of_keras(kernel, recurrent_kernel, biases[0] if biases else None, cell)
    return direction._replace(weight_ih=direction.weight_ih.contiguous(), weight_hh=direction.weight_hh.contiguous())


def _to_keras(direction: Direction, cell: str) -> list[np.ndarray]:
    orders = ORDERS[cell]["torch"], ORDERS[cell]["keras"]
    weights = [reorder(part, *orders).T for part in direction[:2]]
    if direction.bias is not None:
        rows = reorder(direction.bias, *orders, dim=1)
        weights.append(rows if cell == "gru" else rows.sum(0))
    return [array_of(part.contiguous()) for part in weights]


def _from_onnx(node: Mapping[str, Weight], cell: str) -> Layer:
    check_names(node, {"W", "R"}, {"B", "P"}, "an ONNX node")
    tensors = {name: tensor_of(value) for name, value in node.items()}
    for name, axes in {"W": 3, "R": 3, "B": 2, "P": 2}.items():
        if name in tensors:
            expect(tensors[name], (None,) * axes, f"a {cell}'s {name}")
    gates, (directions, _, hidden) = len(ORDERS[cell]["onnx"]), tensors["R"].shape
    if directions not in (1, 2):
        raise ValueError(f"W and R have one direction or two along their first axis, got {directions}")
    expect(tensors["R"], (directions, gates * hidden, hidden), f"a {cell}'s R")
    expect(tensors["W"], (directions, gates * hidden, None), f"a {cell}'s W")
    if "B" in tensors:
        expect(tensors["B"], (directions, 2 * gates * hidden), f"a {cell}'s B")
    if "P" in tensors:
        if cell != "lstm":
            raise ValueError(f"a {cell} has no peepholes, and the node has P: is `cell` the right one?")
        expect(tensors["P"], (directions, 3 * hidden), "an lstm's P")
    return [_onnx_direction({name: value[d] for name, value in tensors.items()}, cell) for d in range(directions)]


def _onnx_direction(tensors: State, cell: str) -> Direction:
    orders = ORDERS[cell]["onnx"], ORDERS[cell]["torch"]
    bias = reorder(tensors["B"].unflatten(0, (2, -1)), *orders, dim=1) if "B" in tensors else None
    peephole = (
        reorder(tensors["P"].unflatten(0, (3, -1)), PEEPHOLES["onnx"], PEEPHOLES["torch"]) if "P" in tensors else None
    )
    return Direction(reorder(tensors["W"], *orders), reorder(tensors["R"], *orders), bias, peephole)


def _to_onnx(layer: Layer, cell: str) -> dict[str, np.ndarray]:
    orders = ORDERS[cell]["torch"], ORDERS[cell]["onnx"]
    w_ih, w_hh, bias, peephole = ([part for part in parts if part is not None] for parts in zip(*layer, strict=True))
    node = {"W": [reorder(w, *orders) for w in w_ih], "R": [reorder(w, *orders) for w in w_hh]}
    if bias:
        node["B"] = [reorder(rows, *orders, dim=1).flatten() for rows in bias]
    if peephole:
        node["P"] = [reorder(p, PEEPHOLES["torch"], PEEPHOLES["onnx"]).flatten() for p in peephole]
    return {name: array_of(torch.stack(parts)) for name, parts in node.items()}


def _from_haste(layer: Mapping[str, Weight]) -> Direction:
    names = ("kernel", "recurrent_kernel", "bias")
    check_names(layer, set(names), set(), "Haste's LSTM")
    kernel, recurrent_kernel, bias = (tensor_of(layer[name]) for name in names)
    expect(recurrent_kernel, (None, None), "Haste's recurrent_kernel")
    hidden = recurrent_kernel.shape[0]
    expect(recurrent_kernel, (hidden, 4 * hidden), "Haste's recurrent_kernel")
    expect(kernel, (None, 4 * hidden), "Haste's kernel")
    expect(bias, (4 * hidden,), "Haste's bias")
    orders = ORDERS["lstm"]["haste"], ORDERS["lstm"]["torch"]
    w_ih, w_hh = (reorder(w.T, *orders).contiguous() for w in (kernel, recurrent_kernel))
    return Direction(w_ih, w_hh, reorder(torch.stack([bias, torch.zeros_like(bias)]), *orders, dim=1))


def _to_haste(direction: Direction) -> State:
    orders = ORDERS["lstm"]["torch"], ORDERS["lstm"]["haste"]
    w_ih, w_hh = (reorder(w, *orders).T.contiguous() for w in direction[:2])
    rows = w_ih.new_zeros(2, w_ih.shape[1]) if direction.bias is None else direction.bias  # Haste always has one
    return {"kernel": w_ih, "recurrent_kernel": w_hh, "bias": reorder(rows.sum(0), *orders)}


def _refuse_peepholes(layers: Sequence[Layer], where: str) -> None:
    if any(direction.weight_peephole is not None for layer in layers for direction in layer):
        raise ValueError(f"{where} have no peepholes (weight_peephole): these weights cannot be converted")
