# SPDX-License-Identifier: Apache-2.0
"""A program under construction: values whose operators emit operations, so that derivative rules read as formulas."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from gpu_rnn.compiler.operations import OPERATIONS, Argument, Op, constant


class Value:
    """A value under construction: the operators emit operations."""

    __slots__ = ("builder", "name")

    def __init__(self, builder: Builder, name: Argument) -> None:
        self.builder = builder
        self.name = name

    def emit(self, op: str, *args: Value | float) -> Value:
        return self.builder.emit(op, *args)

    def __add__(self, other: Value | float) -> Value:
        return self.emit("add", self, other)

    def __sub__(self, other: Value | float) -> Value:
        return self.emit("sub", self, other)

    def __rsub__(self, other: float) -> Value:
        return self.emit("sub", other, self)

    def __mul__(self, other: Value | float) -> Value:
        return self.emit("mul", self, other)

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Value | float) -> Value:
        return self.emit("div", self, other)

    def __neg__(self) -> Value:
        return self.emit("neg", self)


# What folds away when one side is a constant: (operation, which argument, its value) -> the other side, or a constant.
_IDENTITIES: dict[tuple[str, int, float], int | float] = {
    ("add", 0, 0.0): 1,
    ("add", 1, 0.0): 0,
    ("sub", 1, 0.0): 0,
    ("mul", 0, 1.0): 1,
    ("mul", 1, 1.0): 0,
    ("div", 1, 1.0): 0,
}


class Builder:
    """Collects operations, each distinct one once, with constants folded."""

    def __init__(self, prefix: str = "t", start: int = 0, known: Iterable[Op] = (), exact: bool = False) -> None:
        """`known` operations are taken as they are instead of anew. With `exact`, 0 times something is not 0: of
        infinity and NaN it is NaN."""
        self.prefix, self.start, self.exact = prefix, start, exact
        self.ops: list[Op] = []
        self.line = ""
        self._seen = {op.key[1:]: op.result for op in known}

    def value(self, name: Argument) -> Value:
        return Value(self, name if isinstance(name, str) else constant(name))

    def emit(self, op: str, *args: Value | float) -> Value:
        names = tuple(a.name if isinstance(a, Value) else constant(a) for a in args)
        folded = self._fold(op, names)
        if folded is not None:
            return Value(self, folded)
        new = Op(f"{self.prefix}{self.start + len(self.ops)}", op, names, self.line)
        result = self._seen.setdefault(new.key[1:], new.result)
        if result == new.result:
            self.ops.append(new)
        return Value(self, result)

    def _fold(self, op: str, names: tuple[Argument, ...]) -> Argument | None:
        constants = [name for name in names if isinstance(name, float)]
        if len(constants) == len(names) and op != "where":
            dtype = torch.bool if op in ("and", "or", "not") else torch.float64
            exact = [torch.tensor(value, dtype=dtype, device="cpu") for value in constants]
            return float(OPERATIONS[op].torch(*exact))
        if op == "where" and isinstance(names[0], float):
            return names[1] if names[0] else names[2]
        if op == "mul" and 0.0 in constants and not self.exact:
            return 0.0
        if op == "where" and str(names[1]) == str(names[2]):
            return names[1]
        if op in ("and", "or") and constants:
            other = next(name for name in names if isinstance(name, str))
            return other if bool(constants[0]) == (op == "and") else float(op == "or")
        for position, name in enumerate(names):
            side = _IDENTITIES.get((op, position, name)) if isinstance(name, float) else None
            if side is not None:
                return names[int(side)]
        return None
