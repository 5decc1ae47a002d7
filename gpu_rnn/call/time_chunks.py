# SPDX-License-Identifier: Apache-2.0
"""A layer's steps in chunks that are rows of one launch (`gpu_rnn.call.relaxation`), and the borders between them.

K chunks of L steps: what has a value for each step, (T, B, …), is (L, K·B, …) here, and what has one for each row
(K·B, …); row k·B + b is chunk k, in the order of time, of row b. The last chunk is filled up with masked steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from gpu_rnn.backends.tensors import CONTROL_AXES, RESET, SKIP, Call, LayerControls, Result
from gpu_rnn.dispatch.relaxation_plan import launched


class TimeChunks:
    """A call cut into chunks."""

    def __init__(self, call: Call, total: int, count: int) -> None:
        self.call, self.total, self.count, self.steps = call, total, count, -(-total // count)
        self.batch, n = call.states[0].shape[:2]
        self.within = self._within()
        flags = self._flags(n)
        flags = None if flags is None else self.rows(flags)
        self.borders = Borders(count, self.batch, call.reverse, flags)
        controls = {name: self._cut(name, value) for name, value in call.controls.of_loops.items() if value is not None}
        cut = LayerControls(**controls | {"lengths": None, "flags": flags})
        resets = [self.repeated(value, 1) if len(value) == 1 else self.rows(value) for value in call.reset_values]
        self.whole = replace(call, controls=cut, reset_values=resets, kept=None)

    def _cut(self, name: str, control: Tensor) -> Tensor | None:
        """A control of all rows; lengths and flags are others by then."""
        axes = CONTROL_AXES[name]
        steps, batch = axes.place("T"), axes.place("B")
        if name in ("lengths", "flags") or batch is None:
            return None
        if steps is None:
            return self.repeated(control, batch)
        return self.rows_of_each(control) if steps else self.rows(control)

    def _within(self) -> Tensor | None:
        """(K·L, B or 1): the steps that a row has; None where all have all."""
        lengths, padded, device = self.call.lengths, self.count * self.steps, self.call.states[0].device
        if lengths is None and padded == self.total:
            return None
        steps = torch.arange(padded, device=device)[:, None]
        return steps < (self.total if lengths is None else lengths)

    def _flags(self, n: int) -> Tensor | None:
        """(K·L, B, N): those of the call, and lengths as masks."""
        flags = self.call.controls.flags
        if self.within is None:
            return flags
        skip = ((~self.within).to(torch.uint8) * SKIP).unsqueeze(-1).expand(-1, self.batch, n)
        return skip if flags is None else self.padded(flags) | skip

    def padded(self, values: Tensor) -> Tensor:
        """(K·L, …) of (T, …)."""
        missing = self.count * self.steps - len(values)
        return torch.cat([values, values.new_zeros(missing, *values.shape[1:])]) if missing else values

    def rows(self, values: Tensor) -> Tensor:
        """(L, K·B, …) of (T, B, …), without gaps."""
        return self.padded(values).unflatten(0, (self.count, self.steps)).transpose(0, 1).flatten(1, 2).contiguous()

    def rows_of_each(self, values: Tensor) -> Tensor:
        """(S, L, K·B, …) of (S, T, B, …)."""
        if not len(values):
            return values.new_empty(0, self.steps, self.count * self.batch, *values.shape[3:])
        return torch.stack([self.rows(value) for value in values])

    def in_time(self, rows: Tensor) -> Tensor:
        """(T, B, …) of (L, K·B, …)."""
        values = rows.unflatten(1, (self.count, self.batch)).transpose(0, 1).flatten(0, 1)
        return values if len(values) == self.total else values[: self.total].clone()

    def each_in_time(self, rows: Tensor) -> Tensor:
        """(S, T, B, …) of (S, L, K·B, …)."""
        if not len(rows):
            return rows.new_empty(0, self.total, self.batch, *rows.shape[3:])
        return torch.stack([self.in_time(each) for each in rows])

    def repeated(self, values: Tensor, axis: int) -> Tensor:
        """What has a value for each row of the batch along an axis, for each chunk."""
        return values.repeat(*(self.count if place == axis else 1 for place in range(values.dim())))

    def of_resets(self, d_values: Sequence[Tensor]) -> list[Tensor]:
        """The gradients of the values to reset to from those of the rows: of one for all steps the sum over chunks."""
        pairs = zip(d_values, self.call.reset_values, strict=True)
        return [
            d.unflatten(1, (self.count, self.batch)).sum(1) if len(value) == 1 else self.in_time(d)
            for d, value in pairs
        ]

    def part(self, states: Sequence[Tensor], rows: Tensor | None) -> Call:
        """All rows, or some, as a backend takes them; `states` (K·B, N, ·) is what each begins with."""
        call = self.whole
        problem = launched(call.problem, self.steps, self.count * self.batch if rows is None else len(rows))
        controls = {
            name: None if value is None else some(value, rows, CONTROL_AXES[name].place("B") or 0)
            for name, value in call.controls.of_loops.items()
        }
        return replace(
            call,
            problem=problem,
            controls=LayerControls(**controls),
            states=[some(state, rows, 0) for state in states],
            reset_values=[some(value, rows, 1) for value in call.reset_values],
        )

    def again(self, moved: Tensor, count: int) -> Tensor | None:
        """The rows that run once more, given which of them have to and how many those are; None for all.

        Their number is filled up to a half, a quarter, … of all: each other number might be a build of its own.
        """
        size = self.count * self.batch
        if 2 * count > size:
            return None
        while size >= 2 * count:
            size //= 2
        return moved.to(torch.uint8).argsort(descending=True, stable=True)[:size]

    def silenced(self, y: Tensor) -> Tensor:
        """What is 0 after a row's end, as y of a call with lengths is, (T, B, N, ·), or each in (S, T, B, N, ·)."""
        if self.within is None or self.call.lengths is None:
            return y
        return torch.where(self.within[: self.total, :, None, None], y, 0)

    def held(self, values: Tensor, initial: Tensor) -> Tensor:
        """A state after each step (T, B, N, ·) as (K·L, B, N, ·), with the initial one where a row has no step: a
        reversed row begins there."""
        values = self.padded(values)
        return values if self.within is None else torch.where(self.within[:, :, None, None], values, initial)

    def saved(self, result: Result) -> tuple[Result, list[Tensor]]:
        """What the forward pass saved, as rows, and the states that these begin with."""
        initial = self.call.states
        after = [self.held(each, first) for each, first in zip((result.y, *result.inner), initial, strict=True)]
        starts, _ = self.borders.starts(initial, [self._ends(each) for each in after])
        y, *inner = (self.rows(each) for each in after)
        rows = self.rows(result.gates), self.rows(result.recurrent)
        of_others = torch.stack(inner) if inner else self.rows_of_each(result.inner)
        return Result(y, [], *rows, of_others), starts

    def _ends(self, after: Tensor) -> Tensor:
        """(K·B, N, ·): a state as each chunk leaves it."""
        return self.borders.by_direction(after[self.steps - 1 :: self.steps], after[:: self.steps]).flatten(0, 1)


class Borders:
    """Who begins where whom ends: forwards a chunk begins where the chunk before it ends, backwards in time where the
    one after it does. A chunk whose steps are all masked changes nothing: those after it begin where it begins."""

    def __init__(self, count: int, batch: int, reverse: str, flags: Tensor | None) -> None:
        self.count, self.batch, self.reverse = count, batch, reverse
        self.source, self.free = None, None
        if flags is None:
            return
        masked = self._in_order((flags == SKIP).all(0).unsqueeze(-1))
        numbers = torch.arange(1, count + 1, device=flags.device)[:, None, None, None]
        last = torch.where(masked, 0, numbers).cummax(0).values
        self.source = torch.cat([torch.zeros_like(last[:1]), last])  # (K + 1, B, N, 1): 0 is the initial state
        first = self.by_direction(flags[:1], flags[-1:]).squeeze(0)
        self.free = (first & RESET).bool()  # (K·B, N): what it begins with is not what it was handed

    def by_direction(self, forwards: Tensor, backwards: Tensor) -> Tensor:
        """(·, ·, N, …): of recurrences that run forwards in time the first, of the others the second."""
        if "1" not in self.reverse:
            return forwards
        if "0" not in self.reverse:
            return backwards
        sizes = [len(list(run)) for _, run in groupby(self.reverse)]
        pairs = zip(forwards.split(sizes, 2), backwards.split(sizes, 2), strict=True)
        first = int(self.reverse[0])
        return torch.cat([pair[(first + number) % 2] for number, pair in enumerate(pairs)], 2)

    def _in_order(self, rows: Tensor) -> Tensor:
        """(K, B, N, ·) of (K·B, N, ·): chunks in the order in which a recurrence meets them."""
        values = rows.unflatten(0, (self.count, self.batch))
        return self.by_direction(values, values.flip(0)) if "1" in self.reverse else values

    def _rows(self, values: Tensor) -> Tensor:
        """The inverse."""
        return (self.by_direction(values, values.flip(0)) if "1" in self.reverse else values).flatten(0, 1)

    def starts(self, initial: Sequence[Tensor], ends: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The states that rows begin with and the final ones, given those before the first step, (B, N, ·), and those
        that rows end with, (K·B, N, ·)."""
        starts, final = [], []
        for first, end in zip(initial, ends, strict=True):
            every = torch.cat([first.unsqueeze(0), self._in_order(end.to(first.dtype))])
            if self.source is not None:
                every = every.gather(0, self.source.expand(*self.source.shape[:3], every.shape[-1]))
            starts.append(self._rows(every[:-1]))
            final.append(every[-1].clone())
        return starts, final

    def d_ends(self, d_starts: Sequence[Tensor], d_final: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The transpose: the gradients of the states that rows end with and of those before the first step."""
        d_ends, d_initial = [], []
        for d_start, d_last in zip(d_starts, d_final, strict=True):
            every = torch.cat([self._in_order(d_start.to(d_last.dtype)), d_last.unsqueeze(0)])
            if self.source is not None:
                index = self.source.expand(*self.source.shape[:3], every.shape[-1])
                every = torch.zeros_like(every).scatter_add(0, index, every)
            d_ends.append(self._rows(every[1:]))
            d_initial.append(every[0].clone())
        return d_ends, d_initial


def some(values: Tensor, rows: Tensor | None, axis: int) -> Tensor:
    """Those of some rows; None: of all."""
    return values if rows is None else values.index_select(axis, rows)
