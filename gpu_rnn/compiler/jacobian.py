# SPDX-License-Identifier: Apache-2.0
"""A stage's partial derivatives by themselves, without the incoming gradients.

A derivative is linear in what comes in. What multiplies it depends on nothing that the backward loop computes, so it is
found for many steps at once, and the loop is left with a few products and sums, as many for every cell.
"""

from __future__ import annotations

from typing import NamedTuple

from gpu_rnn.compiler.builder import Builder
from gpu_rnn.compiler.derivative import differentiate
from gpu_rnn.compiler.operations import Argument, Op, live
from gpu_rnn.compiler.program import Program
from gpu_rnn.memo import memoize


class Jacobian(NamedTuple):
    """For each output of a stage, its partial derivative by each of the stage's inputs, where it is not 0.

    With `links`, outputs that go into others, as c of an LSTM does into h, count as held fixed in the others' partial
    derivatives: what comes in for them is first made complete, in the order of the links.
    """

    ops: tuple[Op, ...]  # what the stage itself does not compute already
    partials: tuple[dict[str, Argument], ...]
    links: tuple[tuple[int, int, Argument], ...] = ()  # (output, other output, the other's derivative by it)

    @property
    def results(self) -> tuple[Argument, ...]:
        """All of them."""
        return *(value for partials in self.partials for value in partials.values()), *(
            value for *_, value in self.links
        )


@memoize(256)
def jacobian(program: Program, number: int) -> Jacobian:
    """Of stage `number`: its derivative with one incoming gradient 1, the rest 0; with links if it can."""
    stage, derivative = program.stages[number], differentiate(program, number)
    builder = Builder(prefix=f"j{number}_", known=stage.ops)
    distinct = len(set(derivative.totals)) == len(derivative.totals)
    totals = derivative.totals if distinct else derivative.seeds
    places = {op.result: place for place, op in enumerate(derivative.ops)}
    made = {op.result for op in stage.ops}
    own_ops = [op for op in derivative.ops if op.result not in made]
    partials, links = [], []
    for index, total in enumerate(totals):
        values: dict[str, Argument] = {str(name): float(name == total) for name in (*derivative.seeds, *totals)}
        arriving = _propagate(builder, own_ops, values, totals, total)
        links += [(places[name], totals.index(name), index, value) for name, value in arriving.items()]
        outputs = [values.get(output, output) if isinstance(output, str) else output for output in derivative.outputs]
        partials.append({name: value for name, value in zip(derivative.wrt, outputs, strict=True) if value != 0.0})
    ordered = tuple(link[1:] for link in sorted(links, key=lambda link: link[0]))
    complete = Jacobian(tuple(builder.ops), tuple(partials), ordered)
    return complete._replace(ops=live(builder.ops, complete.results))


def _propagate(
    builder: Builder, ops: list[Op], values: dict[str, Argument], totals: tuple[Argument, ...], total: Argument
) -> dict[str, Argument]:
    """Enters into `values` what the operations give where only one of the totals is not 0; returns what arrives at the
    others."""
    arriving = {}
    for op in ops:
        if op.result == total:
            continue
        value = _emit(builder, op, values)
        if op.result not in totals:
            values[op.result] = value
        elif value != 0.0:
            arriving[op.result] = value
    return arriving


def _emit(builder: Builder, op: Op, values: dict[str, Argument]) -> Argument:
    args = [builder.value(values.get(arg, arg) if isinstance(arg, str) else arg) for arg in op.args]
    if op.name == "div" and args[0].name == 0.0:
        return 0.0
    return builder.emit(op.name, *args).name
