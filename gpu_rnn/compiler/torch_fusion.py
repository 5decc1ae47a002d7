# SPDX-License-Identifier: Apache-2.0
"""A program's operations where torch runs them: fewer and faster ones that come to the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch

from gpu_rnn.compiler.operations import Argument, Op, live
from gpu_rnn.memo import memoize

FUSED: dict[str, Callable[..., Any]] = {
    "sigmoid_backward": torch.ops.aten.sigmoid_backward.default,  # (x, y) -> x·y·(1 - y)
    "tanh_backward": torch.ops.aten.tanh_backward.default,  # (x, y) -> x·(1 - y²)
    "addcmul": torch.addcmul,  # (x, y, z) -> x + y·z
}


@memoize(1024)
def fused(ops: Iterable[Op], wanted: Iterable[Argument]) -> tuple[Op, ...]:
    """The same with one operation for several where torch has one: a sum with a product, the slopes of two functions.

    Products are taken in another order: of factors beyond sigmoid's and tanh's values, one may overflow where others
    did.
    """
    made: dict[Argument, Op] = {}
    for op in ops:
        made[op.result] = _fused(op, made)
    return live(made.values(), wanted)


def _fused(op: Op, made: Mapping[Argument, Op]) -> Op:
    if op.name not in ("add", "mul") or not _of_tensors(op):
        return op
    for x, name in (op.args, op.args[::-1]):
        other = made.get(name)
        if other is None:
            continue
        slope = _slope(other, made) if op.name == "mul" else None
        if slope is not None:
            return replace(op, name=slope[0], args=(x, slope[1]))
        if op.name == "add" and other.name == "mul" and _of_tensors(other):
            return replace(op, name="addcmul", args=(x, *other.args))
    return op


def _of_tensors(op: Op) -> bool:
    return all(isinstance(arg, str) for arg in op.args)


def _slope(op: Op, made: Mapping[Argument, Op]) -> tuple[str, Argument] | None:
    """If the operation gives the slope of sigmoid or tanh at a value y of theirs: what multiplies by it, and y."""
    if op.name not in ("mul", "sub"):
        return None
    left, right = op.args
    if op.name == "mul":  # y·(1 - y)
        pairs = ((left, right), (right, left))
        return next((("sigmoid_backward", y) for y, other in pairs if _is(made.get(other), "sub", 1.0, y)), None)
    if left == 1.0 and right in made:  # 1 - y²
        y = made[right].args[0]
        if _is(made[right], "mul", y, y):
            return "tanh_backward", y
    return None


def _is(op: Op | None, name: str, *args: Argument) -> bool:
    return op is not None and (op.name, op.args) == (name, args)
