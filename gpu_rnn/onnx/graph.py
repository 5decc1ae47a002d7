# SPDX-License-Identifier: Apache-2.0
"""Nodes of an ONNX graph: of the one that torch.onnx.export writes, and of a Scan's body inside of it."""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Any

import numpy as np
import onnx_ir as ir
from torch.onnx._internal.exporter._torchlib.ops.hop import call_op

# The types whose numbers NumPy has; a constant of another one is cast.
NUMPY: dict[ir.DataType, Any] = {
    ir.DataType.FLOAT: np.float32,
    ir.DataType.DOUBLE: np.float64,
    ir.DataType.FLOAT16: np.float16,
}


class Nodes:
    """Emits nodes into the graph that is being written: ``nodes("Add", a, b)`` is their sum.

    What is the same in both kinds of graphs; `dtype` is that of the numbers. Values are `ir.Value`, which stand for the
    tensors of an operation where `Inputs` has those: hence no narrower type.
    """

    def __init__(self, dtype: ir.DataType) -> None:
        self.dtype = dtype

    def __call__(self, operator: str, *inputs: Any, **attributes: Any) -> Any:
        (value,) = self.several(operator, *inputs, outputs=1, **attributes)
        return value

    def several(self, operator: str, *inputs: Any, outputs: int, **attributes: Any) -> list[Any]:
        """A node with several outputs; an optional input that is left out is None."""
        return list(call_op(operator, *inputs, _num_outputs=outputs, **attributes))

    def array(self, values: Any, dtype: Any) -> Any:
        """A constant."""
        return self("Constant", value=ir.tensor(np.asarray(values, dtype)))

    def integers(self, *values: int) -> Any:
        """A constant list, as operators take axes, shapes and sizes."""
        return self.array(values, np.int64)

    def number(self, value: float) -> Any:
        """A constant in the graph's dtype."""
        if self.dtype in NUMPY:
            return self.array(value, NUMPY[self.dtype])
        return self.cast(self.array(value, np.float32), self.dtype)

    def cast(self, value: Any, dtype: ir.DataType) -> Any:
        return self("Cast", value, to=int(dtype))

    def pick(self, values: Any, index: int | Sequence[int], axis: int = 0) -> Any:
        """values[index] along an axis: one place, whose axis goes, or several."""
        return self("Gather", values, self.array(index, np.int64), axis=axis)

    def part(self, values: Any, places: slice, axis: int = 0) -> Any:
        """values[places] along an axis."""
        ends = self.integers(places.start), self.integers(places.stop)
        return self("Slice", values, *ends, self.integers(axis))

    def parts(self, values: Any, sizes: Sequence[int], axis: int = -1) -> list[Any]:
        """Split along an axis."""
        if len(sizes) == 1:
            return [values]
        return self.several("Split", values, self.integers(*sizes), outputs=len(sizes), axis=axis)

    def reshaped(self, values: Any, *shape: int) -> Any:
        """With -1 and 0 as ONNX's Reshape reads them: what is left, and as it was."""
        return self("Reshape", values, self.integers(*shape))

    def turned(self, values: Any, *order: int) -> Any:
        return self("Transpose", values, perm=list(order))

    def wider(self, values: Any, axis: int) -> Any:
        """With an axis of 1 more."""
        return self("Unsqueeze", values, self.integers(axis))

    def stacked(self, values: Sequence[Any], axis: int) -> Any:
        """As torch.stack."""
        return self.joined([self.wider(value, axis) for value in values], axis)

    def joined(self, values: Sequence[Any], axis: int) -> Any:
        """As torch.cat."""
        return values[0] if len(values) == 1 else self("Concat", *values, axis=axis)


class Body(Nodes):
    """The nodes of a step, which may read values of the graph around it.

    Its names begin with `NAMES`: a name of the graph around it may not be taken again.
    """

    NAMES = "gpu_rnn_step"

    def __init__(self, dtype: ir.DataType, version: int) -> None:
        super().__init__(dtype)
        self.version = version
        self.nodes: list[ir.Node] = []
        self.inputs: list[ir.Value] = []

    def of_dtype(self, dtype: ir.DataType) -> Body:
        """The same, with constants in another dtype."""
        same = copy(self)
        same.dtype = dtype
        return same

    def several(self, operator: str, *inputs: Any, outputs: int, **attributes: Any) -> list[Any]:
        given = ir.convenience.convert_attributes(attributes)
        node = ir.Node("", operator, inputs=inputs, attributes=given, num_outputs=outputs, version=self.version)
        self.nodes.append(node)
        for place, value in enumerate(node.outputs):
            value.name = f"{self.NAMES}_{len(self.nodes)}_{place}"
        return list(node.outputs)

    def input(self, dtype: ir.DataType) -> Any:
        """What each step gets anew: the states first, then the scanned values."""
        name = f"{self.NAMES}_input_{len(self.inputs)}"
        self.inputs.append(ir.Value(name=name, type=ir.TensorType(dtype)))
        return self.inputs[-1]

    def graph(self, outputs: Sequence[Any]) -> ir.Graph:
        """The whole; each output is a value of its own, as one may not be an input or stand twice."""
        each = [self("Identity", output) for output in outputs]
        return ir.Graph(self.inputs, each, nodes=self.nodes, name=self.NAMES)
