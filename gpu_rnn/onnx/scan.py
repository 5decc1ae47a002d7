# SPDX-License-Identifier: Apache-2.0
"""Any recurrence as a Scan: its input products of all steps, and a body that is printed from its program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from gpu_rnn.backends.normalisation import EPSILON
from gpu_rnn.backends.tensors import OF_STATES, RESET, SKIP, Inputs
from gpu_rnn.compiler.onnx_nodes import emit_operations
from gpu_rnn.compiler.operations import Argument
from gpu_rnn.compiler.program import Program
from gpu_rnn.onnx.graph import NUMPY, Body, Nodes

SIXTEEN_BITS = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


class OneRecurrence(NamedTuple):
    """One recurrence of a layer, its tensors without the axis N; as `gpu_rnn.backends.tensors` has them otherwise."""

    w_hh: Any  # (G, H, P)
    b_hh: Any
    params: list[Any]  # (H) each
    w_hr: Any
    norm: Any
    rms: bool  # normalised by their root mean square
    states: list[Any]  # (B, P), (B, H) ...
    gates: Any  # (T, B, G·H): input products with their biases
    drop: Any  # (B, 1 or G, P)


def input_products(nodes: Nodes, program: Program, inputs: Inputs, n: int, x: Any, w_ih: Any, rms: bool) -> Any:
    """(T, B, G·H): W_ih x of all steps, normalised where they are, with what biases can be added before the steps."""
    weights, (_, count, hidden, _) = inputs.weights, inputs.weights.w_hh.shape
    product = nodes("MatMul", x, nodes.turned(nodes.reshaped(w_ih, count * hidden, -1), 1, 0))
    if weights.norm_ih is not None:
        each = _normalised(nodes, nodes.reshaped(product, 0, 0, count, hidden), hidden, rms)
        product = nodes.reshaped(nodes("Mul", each, nodes.pick(weights.norm_ih, n)), 0, 0, count * hidden)
    if weights.b_ih is None:
        return product
    summed = nodes.array([[gate in program.summed] for gate in program.gates], np.bool_)
    of_products = nodes("Where", summed, nodes.pick(weights.b_hh, n), nodes.number(0.0))
    bias = nodes("Add", nodes.pick(weights.b_ih, n), of_products)
    return nodes("Add", product, nodes.reshaped(bias, count * hidden))


def _normalised(nodes: Nodes, values: Any, hidden: int, rms: bool) -> Any:
    """Over the last axis, without scale and shift."""
    if rms:
        return _by_root_mean_square(nodes, values)
    ones = nodes("Expand", nodes.number(1.0), nodes.integers(hidden))
    return nodes("LayerNormalization", values, ones, axis=-1, epsilon=EPSILON)


def _by_root_mean_square(nodes: Nodes, values: Any) -> Any:
    """Likewise. ONNX has an operator for it from version 23 on. Squares are taken in float32 where storage has 16
    bits."""
    narrow = nodes.dtype in SIXTEEN_BITS
    wide = ir.DataType.FLOAT if narrow else nodes.dtype
    values = nodes.cast(values, wide) if narrow else values
    mean = nodes("ReduceMean", nodes("Mul", values, values), nodes.integers(-1), keepdims=1)
    root = nodes("Sqrt", nodes("Add", mean, nodes.array(EPSILON, NUMPY[wide])))
    normal = nodes("Div", values, root)
    return nodes.cast(normal, nodes.dtype) if narrow else normal


def row_of(nodes: Nodes, program: Program, inputs: Inputs, n: int, gates: Any, rms: bool) -> OneRecurrence:
    weights, drop = inputs.weights, inputs.controls.drop
    of_all = [weights.w_hh, weights.b_hh, weights.w_hr, weights.norm]
    w_hh, b_hh, w_hr, norm = (None if each is None else nodes.pick(each, n) for each in of_all)
    own = None if weights.params is None else nodes.pick(weights.params, n)
    params = [nodes.pick(own, place) for place in range(len(program.params))]
    states = [nodes.pick(state, n, axis=1) for state in inputs.states]
    return OneRecurrence(
        w_hh, b_hh, params, w_hr, norm, rms, states, gates, None if drop is None else nodes.pick(drop, n, axis=1)
    )


def scan(
    nodes: Nodes, version: int, program: Program, inputs: Inputs, row: OneRecurrence, n: int, backwards: bool
) -> tuple[list[Any], list[Any]]:
    """The states of every step, y first, (T, B, ·) each, and those after the last."""
    body = Body(nodes.dtype, version)
    drop, hidden = inputs.controls.drop, inputs.weights.w_hh.shape[2]
    size = hidden, 0 if drop is None else drop.shape[2]
    states = [body.input(nodes.dtype) for _ in program.states]
    step = _Steered(nodes, body, program, inputs, n)
    x = step.scanned(row.gates, nodes.dtype)
    entered = step.entered(states)
    new = step.left(_one_step(nodes, body, program, row, size, x, entered), entered)
    over_time = [step.output(new[0]), *new[1:]]
    count, scans = len(states), step.scans
    results = nodes.several(
        "Scan",
        *row.states,
        *scans,
        outputs=count + len(over_time),
        body=body.graph([*new, *over_time]),
        num_scan_inputs=len(scans),
        scan_input_directions=[int(backwards)] * len(scans),
        scan_output_directions=[int(backwards)] * len(over_time),
    )
    return results[count:], results[:count]


class _Steered:
    """What steers a step of one recurrence: lengths, flags, resets, units that keep their states."""

    def __init__(self, nodes: Nodes, body: Body, program: Program, inputs: Inputs, n: int) -> None:
        self.nodes, self.body, self.program, self.inputs, self.n = nodes, body, program, inputs, n
        self.scans: list[Any] = []
        controls = inputs.controls
        self.runs = None if controls.lengths is None else self._flag(self._within(controls.lengths))
        self.reset = self.skip = None
        if controls.flags is not None:
            place = n if inputs.weights.w_between is None else 0  # of a stack one for all layers
            bits = nodes.cast(nodes.pick(controls.flags, place, axis=2), ir.DataType.INT32)
            self.reset = self._flag(self._bit(bits, RESET))
            self.skip = self._flag(self._bit(bits, SKIP))

    def scanned(self, values: Any, dtype: ir.DataType) -> Any:
        """What stands for a step of values (T, ...)."""
        self.scans.append(values)
        return self.body.input(dtype)

    def _flag(self, values: Any) -> Any:
        """Likewise of truth values (T, B), as (B, 1)."""
        return self.scanned(self.nodes.wider(values, -1), ir.DataType.BOOL)

    def _within(self, lengths: Any) -> Any:
        nodes, steps = self.nodes, self.nodes("Shape", self.inputs.x, start=0, end=1)
        zero, one = nodes.array(0, np.int64), nodes.array(1, np.int64)
        steps = nodes("Range", zero, nodes("Squeeze", steps), one)
        return nodes("Less", nodes.wider(steps, -1), lengths)

    def _bit(self, bits: Any, which: int) -> Any:
        value, two = self.nodes.array(which, np.int32), self.nodes.array(2, np.int32)
        odd = self.nodes("Mod", self.nodes("Div", bits, value), two)
        return self.nodes.cast(odd, ir.DataType.BOOL)

    def entered(self, states: Sequence[Any]) -> list[Any]:
        """The states that the step starts from."""
        if self.reset is None:
            return list(states)
        values = [self._reset_value(k) for k in range(len(states))]
        return [self.body("Where", self.reset, value, state) for value, state in zip(values, states, strict=True)]

    def _reset_value(self, k: int) -> Any:
        if not self.inputs.reset_values:
            return self.body.number(self.program.initial[k])
        values = self.nodes.pick(self.inputs.reset_values[k], self.n, axis=2)  # (1 or T, B, ·)
        if self.inputs.reset_values[k].shape[0] == 1:
            return self.nodes.pick(values, 0)
        return self.scanned(values, self.nodes.dtype)

    def left(self, new: Sequence[Any], entered: Sequence[Any]) -> list[Any]:
        """The states after the step."""
        new, where = list(new), self.body
        (keeping,) = (getattr(self.inputs.controls, name) for name in OF_STATES)
        if keeping is not None:
            keeps = [self._keeps(keeping, k) for k in range(len(new))]
            new = [where("Where", *each) for each in zip(keeps, entered, new, strict=True)]
        if self.runs is not None:
            return [where("Where", self.runs, after, before) for after, before in zip(new, entered, strict=True)]
        if self.skip is None:
            return new
        return [where("Where", self.skip, before, after) for after, before in zip(new, entered, strict=True)]

    def _keeps(self, keeping: Any, k: int) -> Any:
        """(B, ·) bool: the units of a state that stay as they are."""
        of_state = self.nodes.pick(self.nodes.pick(keeping, k), self.n, axis=2)
        width = self.inputs.states[k].shape[-1]
        return self.scanned(self.nodes.part(of_state, slice(0, width), axis=-1), ir.DataType.BOOL)

    def output(self, h: Any) -> Any:
        """y: 0 beyond a row's length."""
        return h if self.runs is None else self.body("Where", self.runs, h, self.body.number(0.0))


def _one_step(
    nodes: Nodes, body: Body, program: Program, row: OneRecurrence, size: tuple[int, int], x: Any, states: Sequence[Any]
) -> list[Any]:
    """The new states: products, stage after stage, and the program between them, which computes in float32 where
    storage has 16 bits."""
    hidden, _ = size
    narrow = body.dtype
    wide = body.of_dtype(ir.DataType.FLOAT if narrow in SIXTEEN_BITS else narrow)

    def widened(value: Any) -> Any:
        return value if wide.dtype == narrow else body.cast(value, wide.dtype)

    of_gates = dict(zip(program.gates, body.parts(x, [hidden] * len(program.gates)), strict=True))
    values = {f"s_{name}": widened(state) for name, state in zip(program.state_names, states, strict=True)}
    values |= {f"p_{name}": widened(param) for name, param in zip(program.params, row.params, strict=True)}
    entering, outputs = states[0], list[Any]()
    for stage, rows in zip(program.stages, program.rows, strict=True):
        products = _products(nodes, body, row, rows, size, entering)
        for place, gate, product in zip(range(rows.start, rows.stop), stage.gates, products, strict=True):
            if gate in program.summed:
                values[f"a_{gate}"] = widened(body("Add", of_gates[gate], product))
                continue
            product = product if row.b_hh is None else body("Add", product, nodes.pick(row.b_hh, place))
            values[f"x_{gate}"], values[f"r_{gate}"] = widened(of_gates[gate]), widened(product)
        emit_operations(wide, stage.ops, values)
        like = of_gates[stage.gates[0]]
        outputs = [_spread(wide, values, output, like) for output in stage.outputs]
        if wide.dtype != narrow:
            outputs = [body.cast(output, narrow) for output in outputs]
        entering = outputs[0]
    if row.w_hr is not None:
        outputs[0] = body("MatMul", outputs[0], nodes.turned(row.w_hr, 1, 0))
    return outputs


def _products(
    nodes: Nodes, body: Body, row: OneRecurrence, rows: slice, size: tuple[int, int], entering: Any
) -> list[Any]:
    """(B, H) of each gate of a stage: what enters it, times its weights."""
    (hidden, masks), count = size, rows.stop - rows.start
    weights = nodes.turned(nodes.reshaped(nodes.part(row.w_hh, rows), count * hidden, -1), 1, 0)
    if masks > 1:
        dropped = [body("Mul", entering, nodes.pick(row.drop, place, axis=1)) for place in range(rows.start, rows.stop)]
        of_gates = nodes.parts(weights, [hidden] * count)
        products = [body("MatMul", *each) for each in zip(dropped, of_gates, strict=True)]
    else:
        entering = entering if masks == 0 else body("Mul", entering, nodes.pick(row.drop, 0, axis=1))
        products = body.parts(body("MatMul", entering, weights), [hidden] * count)
    if row.norm is None:
        return products
    scales = [nodes.pick(row.norm, place) for place in range(rows.start, rows.stop)]
    pairs = zip(products, scales, strict=True)
    if row.rms:
        return [body("Mul", _by_root_mean_square(body, product), scale) for product, scale in pairs]
    return [body("LayerNormalization", *pair, axis=-1, epsilon=EPSILON) for pair in pairs]


def _spread(body: Body, values: dict[str, Any], output: Argument, like: Any) -> Any:
    """An output as (B, H): constants, and what is made of a unit's parameters alone, are smaller."""
    value = values[output] if isinstance(output, str) else body.number(output)
    return body("Expand", value, body("Shape", like))
