# SPDX-License-Identifier: Apache-2.0
"""Cells that ONNX has operators for: LSTM, GRU and RNN, their attributes, and a layer as one such node."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

import onnx_ir as ir

from gpu_rnn import cells
from gpu_rnn.backends.tensors import Inputs
from gpu_rnn.compiler.program import Program
from gpu_rnn.layers.onnx_attributes import ONNX_ACTIVATIONS, ONNX_ROLES, node_attributes
from gpu_rnn.layers.weight_layouts import ORDERS, PEEPHOLES
from gpu_rnn.memo import memoize
from gpu_rnn.onnx.graph import Nodes
from gpu_rnn.recurrence import Recurrence

# What runtimes have the operators for; in other dtypes a recurrence is a Scan.
OPERATOR_TYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


class Operator(NamedTuple):
    """An operator of ONNX that is a cell: its name, the cell's of `weight_layouts`, and the attributes of a node."""

    name: str
    cell: str
    activations: tuple[str, ...]
    clip: float | None

    def attributes(self, hidden: int, directions: str) -> dict[str, Any]:
        """`directions`: a character for each, "1" where time runs backwards."""
        after = self.cell == "gru" if self.name == "GRU" else None
        return node_attributes(hidden, directions, self.activations, self.clip, after)


@memoize(256)
def of(text: str) -> Operator | None:
    """The operator that is a program's cell, if any, whoever wrote it: its text but for its name tells."""
    program = Program.parse(text)
    used, names = {op.name for stage in program.stages for op in stage.ops}, list(ONNX_ACTIVATIONS)
    bounds = [arg for stage in program.stages for op in stage.ops if op.name == "clamp" for arg in op.args[1:]]
    clips = [None, *sorted({bound for bound in bounds if isinstance(bound, float) and 0 < bound < float("inf")})]
    possible = [name for name in names if _operations(ONNX_ACTIVATIONS[name]) <= used]
    for name, clip in product(ONNX_ROLES, clips):
        for chosen in _choices(name, possible):
            for cell, recurrence in _cells(name, [ONNX_ACTIVATIONS[each] for each in chosen], clip, program):
                if _unnamed(recurrence.program) == _unnamed(program):
                    return Operator(name, cell, chosen, clip)
    return None


def _operations(activation: str) -> set[str]:
    return {op.name for stage in cells.rnn(activation).program.stages for op in stage.ops}


def _choices(name: str, possible: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """The activations of a node, one for each of its roles; the same wherever a role stands twice."""
    roles = list(dict.fromkeys(ONNX_ROLES[name]))
    for chosen in product(possible, repeat=len(roles)):
        of_role = dict(zip(roles, chosen, strict=True))
        yield tuple(of_role[role] for role in ONNX_ROLES[name])


def _cells(
    name: str, activations: Sequence[str], clip: float | None, program: Program
) -> Iterable[tuple[str, Recurrence]]:
    """The cells of an operator with these activations, of those that have the program's gates and parameters."""
    shape = program.gates, len(program.stages), program.params
    sigma, phi = activations[0], activations[min(1, len(activations) - 1)]
    if name == "RNN" and shape == (("h",), 1, ()):
        yield "rnn", cells.rnn(phi, clip=clip)
    # ONNX Runtime (1.32) does not cut what enters the last activation of an LSTM: with clip it is a Scan.
    if name == "LSTM" and shape[:2] == (("i", "f", "g", "o"), 1) and clip is None:
        yield "lstm", cells.lstm(phi, sigma, bool(program.params))
    if name == "GRU" and program.gates == ("r", "z", "n"):
        after = len(program.stages) == 1
        yield "gru" if after else "gru_reset_before", cells.gru(phi, sigma, after, clip=clip)


def _unnamed(program: Program) -> str:
    return program.text.partition("\n")[2]


def takes(inputs: Inputs) -> bool:
    """Whether a node has everything of a call; what it lacks is in a Scan."""
    weights, controls = inputs.weights, inputs.controls._replace(lengths=None)
    others = (*controls.of_loops.values(), weights.w_hr, weights.norm)
    return all(value is None for value in others) and inputs.x.dtype in OPERATOR_TYPES


def node(
    nodes: Nodes, operator: Operator, inputs: Inputs, x: Any, w_ih: Any, places: Sequence[int], reverse: str
) -> tuple[Any, list[Any]]:
    """One direction of a layer, or both, at their places along N.

    x (T, B, I) and w_ih (N, G, H, I), of these places alone -> y (T, B, N, H) and the final states (B, N, H).
    """
    weights, (_, gates, hidden, _) = inputs.weights, inputs.weights.w_hh.shape
    orders = ORDERS[operator.cell]
    order = [orders["torch"].index(gate) for gate in orders["onnx"]]

    def rows(values: Any, order: Sequence[int] = order) -> Any:
        """(N, G, H, ·) -> (directions, G·H, ·), the gates as ONNX has them."""
        return nodes.pick(nodes.pick(values, places), order, axis=1)

    def flat(values: Any, count: int) -> Any:
        return nodes.reshaped(values, len(places), count * hidden, -1)

    w = nodes.reshaped(nodes.pick(w_ih, order, axis=1), len(places), gates * hidden, -1)
    r, bias, peephole = flat(rows(weights.w_hh), gates), None, None
    if weights.b_ih is not None:
        both = [nodes.reshaped(rows(each), len(places), gates * hidden) for each in (weights.b_ih, weights.b_hh)]
        bias = nodes("Concat", *both, axis=1)
    if weights.params is not None:
        order_of_units = [PEEPHOLES["torch"].index(gate) for gate in PEEPHOLES["onnx"]]
        peephole = nodes.reshaped(rows(weights.params, order_of_units), len(places), len(order_of_units) * hidden)
    lengths = inputs.controls.lengths
    counts = None if lengths is None else nodes.cast(lengths, ir.DataType.INT32)
    initial = [nodes.turned(nodes.pick(state, places, axis=1), 1, 0, 2) for state in inputs.states]
    others = [counts, *initial, *([] if peephole is None else [peephole])]
    attributes = operator.attributes(hidden, reverse)
    y, *final = nodes.several(operator.name, x, w, r, bias, *others, outputs=1 + len(initial), **attributes)
    if lengths is not None:  # a row without a step keeps its states, which operators leave open
        runs = nodes("Greater", nodes.reshaped(lengths, 1, -1, 1), nodes.integers(0))
        final = [nodes("Where", runs, after, before) for after, before in zip(final, initial, strict=True)]
    return nodes.turned(y, 0, 2, 1, 3), [nodes.turned(state, 1, 0, 2) for state in final]
