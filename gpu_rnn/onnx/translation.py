# SPDX-License-Identifier: Apache-2.0
"""The registered operation of a layer as ONNX nodes: an operator of ONNX where it has the cell, else a Scan."""

from __future__ import annotations

from typing import Any

from torch.onnx._internal.exporter import _core

from gpu_rnn.backends.tensors import Inputs
from gpu_rnn.call.passes import Options
from gpu_rnn.compiler.program import Program
from gpu_rnn.onnx import operators
from gpu_rnn.onnx.graph import Nodes
from gpu_rnn.onnx.scan import input_products, row_of, scan


def rnn(*arguments: Any) -> list[Any]:
    """What `gpu_rnn::rnn` returns, of a layer that saves nothing: it takes the values of the graph that stand for the
    operation's tensors, with the program's text and the options.

    Raises:
        ValueError: a pass that keeps something for its derivative.
    """
    *tensors, text, words = arguments
    options, program, inputs = Options.decode(words), Program.parse(text), Inputs.of(*tensors)
    if options.save:
        raise ValueError("an ONNX graph is for inference: export the model under torch.no_grad()")
    dtype: Any = inputs.x.dtype
    nodes = Nodes(dtype)
    stacked = inputs.weights.w_between is not None
    operator = operators.of(text) if operators.takes(inputs) else None
    if operator is not None and not stacked and not (options.all_states and len(program.states) > 1):
        y, final = _as_operator(nodes, operator, options.reverse, inputs)
        inner: list[Any] = []
    else:
        y, final, inner = _as_scans(nodes, program, options, inputs)
    nothing = nodes("Expand", nodes.number(0.0), nodes.integers(0))
    others = nodes.stacked(inner, 0) if options.all_states and inner else nothing
    return [y, *final, nothing, nothing, others]


def _as_operator(nodes: Nodes, operator: operators.Operator, reverse: str, inputs: Inputs) -> tuple[Any, list[Any]]:
    """y (T, B, N, H) and the final states (B, N, H)."""
    each = [(0, 1)] if reverse == "01" and len(inputs.x.shape) == 3 else [(n,) for n in range(len(reverse))]
    results = []
    for places in each:
        x, w_ih = _input(nodes, inputs, places[0]), nodes.pick(inputs.weights.w_ih, places)
        directions = "".join(reverse[n] for n in places)
        results.append(operators.node(nodes, operator, inputs, x, w_ih, places, directions))
    y, final = zip(*results, strict=True)
    return nodes.joined(y, 2), [nodes.joined(states, 1) for states in zip(*final, strict=True)]


def _as_scans(nodes: Nodes, program: Program, options: Options, inputs: Inputs) -> tuple[Any, list[Any], list[Any]]:
    """y (T, B, N, P), the final states (B, N, ·) and the other states of all steps, (T, B, N, H) each.

    Of a stack, whose layers stand along N, N comes before T.
    """
    version = _core.current_tracer.opset.version  # type: ignore[union-attr]  # there is one while a graph is written
    stacked, between = inputs.weights.w_between is not None, inputs.controls.between
    every: list[list[Any]] = []
    final: list[list[Any]] = []
    for n, direction in enumerate(options.reverse):
        if stacked and n:
            x, w_ih = every[-1][0], nodes.pick(inputs.weights.w_between, n - 1)
            x = x if between is None else nodes("Mul", x, nodes.pick(between, n - 1))
        else:
            x, w_ih = _input(nodes, inputs, n), nodes.pick(inputs.weights.w_ih, n)
        gates = input_products(nodes, program, inputs, n, x, w_ih, options.rms)
        row = row_of(nodes, program, inputs, n, gates, options.rms)
        over_time, after = scan(nodes, version, program, inputs, row, n, direction == "1")
        every.append(over_time)
        final.append(after)
    y, *inner = (nodes.stacked(states, 0 if stacked else 2) for states in zip(*every, strict=True))
    return y, [nodes.stacked(states, 1) for states in zip(*final, strict=True)], inner


def _input(nodes: Nodes, inputs: Inputs, n: int) -> Any:
    """(T, B, I): what the recurrence at a place along N takes, which may have an x of its own."""
    return inputs.x if len(inputs.x.shape) == 3 else nodes.pick(inputs.x, n, axis=2)
