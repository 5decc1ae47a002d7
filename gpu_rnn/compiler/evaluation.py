# SPDX-License-Identifier: Apache-2.0
"""A program's operations in torch, as one function."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from gpu_rnn.compiler.operations import OPERATIONS, Argument, Op
from gpu_rnn.memo import memoize


@memoize(1024)
def runner(
    ops: tuple[Op, ...], wanted: tuple[Argument, ...] | None = None, **replaced: Callable[..., Any]
) -> Callable[[dict[str, Any]], None]:
    """Operations in torch as one function of a dict, which holds tensors of any one shape and receives the results.

    Interpreting them one by one takes longer than a small tensor's arithmetic. Of the results, the dict receives those
    that are `wanted`, by default all; others are freed after their last use, so that the next take their memory, which
    is in the cache. `replaced`: other functions for operations, or for some that only these operations have.
    Its text is made of names that the parser let through and of operations' names, nothing else.
    """
    made = dict.fromkeys(op.result for op in ops)
    returned = dict.fromkeys(made if wanted is None else (name for name in wanted if name in made))
    taken = dict.fromkeys(arg for op in ops for arg in op.args if isinstance(arg, str) and arg not in made)
    last = {arg: op.result for op in ops for arg in op.args if arg in made and arg not in returned}
    done: dict[str, list[str]] = {}
    for name, reader in last.items():
        done.setdefault(reader, []).append(f"    del {name}")
    lines = [f"    {name} = values['{name}']" for name in taken]
    if any(_chooses_numbers(op) for op in ops):
        lines.insert(0, "    one = like(values)")
    for op in ops:
        args = list(map(str, op.args))
        if _chooses_numbers(op):
            args[1] = f"one * {args[1]}"
        lines.append(f"    {op.result} = {op.name}_({', '.join(args)})")
        lines += done.get(op.result, [])
    lines.append(f"    values.update({', '.join(f'{name}={name}' for name in returned)})")
    names: dict[str, Any] = {f"{name}_": operation.torch for name, operation in OPERATIONS.items()}
    names |= {"inf": float("inf"), "nan": float("nan"), "like": _one}
    names |= {f"{name}_": function for name, function in replaced.items()}
    exec("\n".join(["def run(values):", *lines]), names)
    return names["run"]


def _chooses_numbers(op: Op) -> bool:
    """Whether torch.where would choose between two plain numbers, which it makes tensors of its default dtype."""
    return op.name == "where" and not any(isinstance(arg, str) for arg in op.args[1:])


def _one(values: Mapping[str, Any]) -> Any:
    """A 1 of the dtype of a call's values, on their device."""
    return next(value for value in values.values() if value.is_floating_point()).new_ones(())
