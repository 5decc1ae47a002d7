# SPDX-License-Identifier: Apache-2.0
"""Parameters of Flax's recurrent cells, of linen and of nnx, and the state_dict of a layer. `gpu_rnn.interop` has both
functions, beside those for other libraries.

linen keeps a matrix for each gate, {"ii": {"kernel"}, "hi": {"kernel", "bias"}, …}, nnx one for all of them,
{"dense_i": {"kernel"}, "dense_h": {"kernel", "bias"}}. Kernels are (I, H) or (H, H) for each gate. Source: Flax's
`recurrent.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpu_rnn.layers.weight_layouts import (
    ORDERS,
    Direction,
    State,
    array_of,
    check_names,
    expect,
    join,
    split,
    tensor_of,
)

Parameters = Mapping[str, Any]
# The gates in linen's names, in torch's order, which is nnx's as well; a SimpleCell's two matrices are "i" and "h".
GATES = {"lstm": "ifgo", "gru": "rzn", "rnn": ("",)}
# Where linen has a bias: of the LSTM beside the recurrent products, of the GRU beside both for n.
BIASED = {"lstm": {"hi", "hf", "hg", "ho"}, "gru": {"ir", "iz", "in", "hn"}, "rnn": {"i"}}
WHOLE = {"i": "dense_i", "h": "dense_h"}  # nnx's names
BIASED_WHOLE = {"lstm": "h", "gru": "i", "rnn": "i"}


def from_flax(*layers: Parameters | Sequence[Parameters], cell: str) -> State:
    """A torch state_dict from the parameters of Flax's cells, the lowest of a stack first.

    Args:
        layers: of each the parameters of its cell, of `flax.linen` as `variables["params"]`, of `flax.nnx` as
            `nnx.to_pure_dict(nnx.state(cell, nnx.Param))`; for both directions a pair of them.
        cell: "lstm" (LSTMCell and OptimizedLSTMCell), "gru" (GRUCell) or "rnn" (SimpleCell). Flax's carry is (c, h),
            where hx is (h, c).

    Raises:
        TypeError: parameters that are no mapping of names to arrays of floating-point numbers.
        ValueError: another cell; parameters of other names or shapes.

    Example::

        >>> import gpu_rnn, numpy as np, torch
        >>> from gpu_rnn import interop
        >>> gates = {f"i{gate}": {"kernel": np.ones((3, 8))} for gate in "ifgo"}
        >>> gates |= {f"h{gate}": {"kernel": np.ones((8, 8)), "bias": np.zeros(8)} for gate in "ifgo"}
        >>> layer = gpu_rnn.LSTM(3, 8, dtype=torch.float64)
        >>> layer.load_state_dict(interop.from_flax(gates, cell="lstm"))
        <All keys matched successfully>
    """
    _check(cell)
    pairs = [[layer] if isinstance(layer, Mapping) else layer for layer in layers]
    return join([[_direction(parameters, cell) for parameters in pair] for pair in pairs])


def to_flax(state: Mapping[str, Any], cell: str, *, api: str = "linen") -> list[Any]:
    """For each layer the parameters of its Flax cell, for both directions a pair of them; `from_flax` describes them.

    Flax has one bias for each gate but for the n of linen's GRUCell: torch's two are added. Where there are none, they
    are 0.

    Args:
        state: the state_dict of a layer.
        cell: "lstm", "gru" or "rnn".
        api: "linen", or "nnx" for OptimizedLSTMCell, GRUCell and SimpleCell of `flax.nnx`.

    Raises:
        ValueError: another cell or api; projections or peepholes; for nnx a GRU whose bias_hh of n is not 0, which
            nnx.GRUCell has not.

    Example::

        >>> import gpu_rnn
        >>> from gpu_rnn import interop
        >>> (parameters,) = interop.to_flax(gpu_rnn.GRU(3, 8).state_dict(), cell="gru")
        >>> sorted(parameters), parameters["hn"]["bias"].shape
        (['hn', 'hr', 'hz', 'in', 'ir', 'iz'], (8,))
    """
    _check(cell)
    if api not in ("linen", "nnx"):
        raise ValueError(f"api is 'linen' or 'nnx', not {api!r}")
    write = _linen if api == "linen" else _nnx
    layers = [[write(direction, cell) for direction in layer] for layer in split(state, cell)]
    return [layer[0] if len(layer) == 1 else tuple(layer) for layer in layers]


def _check(cell: str) -> None:
    if cell not in GATES:
        raise ValueError(
            f"cell must be one of {', '.join(GATES)}, got {cell!r}: Flax's GRUCell has its reset gate after the product"
        )


def _direction(parameters: Parameters, cell: str) -> Direction:
    if not isinstance(parameters, Mapping):
        raise TypeError(f"the parameters of a Flax cell are a mapping, got {type(parameters).__name__}")
    named = {name.rstrip("_"): part for name, part in parameters.get("params", parameters).items()}  # nnx says if_
    sides = {side: [WHOLE[side]] if WHOLE[side] in named else [side + gate for gate in GATES[cell]] for side in "ih"}
    check_names(named, {name for names in sides.values() for name in names}, set(), f"Flax's {cell}")
    w_ih, b_ih = _side(named, sides["i"], cell)
    w_hh, b_hh = _side(named, sides["h"], cell)
    gates, (rows, hidden) = len(GATES[cell]), w_hh.shape
    expect(w_hh, (gates * hidden, hidden), f"the recurrent kernels of Flax's {cell}, side by side and transposed,")
    expect(w_ih, (rows, None), f"the input kernels of Flax's {cell}, side by side and transposed,")
    biases = [w_ih.new_zeros(rows) if bias is None else bias for bias in (b_ih, b_hh)]
    return Direction(w_ih, w_hh, torch.stack(biases) if not (b_ih is None and b_hh is None) else None)


def _side(named: Parameters, names: Sequence[str], cell: str) -> tuple[Tensor, Tensor | None]:
    """(G·H, ·) and the bias (G·H), None if no gate has one, of the input's or the recurrent products."""
    kernels, biases = [], []
    for name in names:
        check_names(named[name], {"kernel"}, {"bias"}, f"{name} of Flax's {cell}")
        kernel = tensor_of(named[name]["kernel"])
        expect(kernel, (None, None), f"the kernel of {name}")
        kernels.append(kernel)
        biases.append(tensor_of(named[name]["bias"]) if "bias" in named[name] else None)
        if biases[-1] is not None:
            expect(biases[-1], (kernel.shape[1],), f"the bias of {name}")
    weights = torch.cat(kernels, 1).T.contiguous()
    if all(bias is None for bias in biases):
        return weights, None
    both = zip(kernels, biases, strict=True)
    return weights, torch.cat([kernel.new_zeros(kernel.shape[1]) if bias is None else bias for kernel, bias in both])


def _summed(direction: Direction, cell: str) -> tuple[Tensor, Tensor]:
    """The biases beside the input's products and the recurrent ones, (G·H) each, as linen has them."""
    if direction.weight_peephole is not None:
        raise ValueError("Flax's cells have no peepholes (weight_peephole): these weights cannot be converted")
    rows = len(direction.weight_ih)
    both = direction.weight_ih.new_zeros(2, rows) if direction.bias is None else direction.bias
    summed, none = both.sum(0), torch.zeros_like(both[0])
    if cell == "lstm":
        return none, summed
    if cell == "rnn":
        return summed, none
    n = slice(rows // 3 * 2, None)
    summed[n], none[n] = both[0, n], both[1, n]
    return summed, none


def _linen(direction: Direction, cell: str) -> dict[str, dict[str, np.ndarray]]:
    parameters = {}
    sides = zip("ih", direction[:2], _summed(direction, cell), strict=True)
    for side, weights, bias in sides:
        parts = zip(GATES[cell], weights.chunk(len(GATES[cell])), bias.chunk(len(GATES[cell])), strict=True)
        for gate, matrix, row in parts:
            part = {"kernel": array_of(matrix.T.contiguous())}
            parameters[side + gate] = part | ({"bias": array_of(row)} if side + gate in BIASED[cell] else {})
    return parameters


def _nnx(direction: Direction, cell: str) -> dict[str, dict[str, np.ndarray]]:
    biases = dict(zip("ih", _summed(direction, cell), strict=True))
    biased = BIASED_WHOLE[cell]
    if biases["h" if biased == "i" else "i"].any():
        raise ValueError("nnx.GRUCell has no bias beside the recurrent product of n: set that part of bias_hh to 0")
    kernels = zip("ih", direction[:2], strict=True)
    parameters = {WHOLE[side]: {"kernel": array_of(weights.T.contiguous())} for side, weights in kernels}
    parameters[WHOLE[biased]]["bias"] = array_of(biases[biased])
    return parameters


assert all("".join(GATES[cell]) in ("", ORDERS[cell]["torch"]) for cell in GATES)  # no gate changes its place
