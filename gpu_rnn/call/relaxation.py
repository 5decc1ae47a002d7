# SPDX-License-Identifier: Apache-2.0
"""One layer parallel in time: its steps in chunks, all of which run as rows of one launch from guessed states, until
the states between them stand still.

    pass 1   chunk 0 from its state   chunk 1 from a guess         chunk 2 from a guess …
    pass 2                            chunk 1 from where 0 ended   chunk 2 from where 1 ended …
    …        until no border moves by more than the tolerance; only chunks whose border moved run again

The first n chunks are exact after n passes, and as a recurrence forgets, far more are: what a chunk makes of a wrong
start is gone at its end. The backward pass does the same with the gradients of the states, from the last chunk on; it
is linear in them. This is waveform relaxation (Lelarasmee et al., IEEE TCAD 1982) over windows, with the whole
recurrence as its own fine solver.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from gpu_rnn.backends import Loop
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.tensors import Call, LoopGradients, Result
from gpu_rnn.call.time_chunks import TimeChunks, some
from gpu_rnn.dispatch.relaxation_plan import Outcome, TimePlan, note

Loops = Callable[[Problem], Loop]  # the loop that a launch runs on


def forward(
    call: Call, gates: Tensor, plan: TimePlan, tolerance: float, loops: Loops, save: bool, all_states: bool
) -> Result | None:
    """`Loop.forward`, or None where the borders do not settle: then no state differs by more than `tolerance` between
    the end of a chunk and the beginning of the next."""
    chunks = TimeChunks(call, len(gates), plan.chunks)
    passes = _Forward(chunks, gates, loops, save, all_states)
    guess = [chunks.repeated(state, 0) for state in call.states]
    final = _settle(passes, chunks, plan, tolerance, guess)
    return None if final is None else passes.in_time(final)


def backward(
    call: Call,
    saved: Result,
    plan: TimePlan,
    tolerance: float,
    loops: Loops,
    d_y: Tensor,
    d_final: list[Tensor],
    d_inner: Tensor | None,
) -> LoopGradients | None:
    """`Loop.backward`, or None likewise. Here `tolerance` is a part of the largest gradient of a state at a border."""
    chunks = TimeChunks(call, len(saved.gates), plan.chunks)
    passes = _Backward(chunks, saved, loops, d_y, d_final, d_inner)
    d_initial = _settle(passes, chunks, plan, tolerance, passes.guess())
    return None if d_initial is None else passes.in_time(d_initial)


class _Passes(Protocol):
    """The passes in one direction; a value is (K·B, N, ·) for each state."""

    free: Tensor | None  # (K·B, N): rows whose value does not matter
    sums: bool  # whether what a pass leaves is a sum over all rows, so that all have to run

    def run(self, values: list[Tensor], rows: Tensor | None) -> None:
        """Runs some rows, or all, from these values at their borders."""

    def handed(self) -> tuple[list[Tensor], list[Tensor]]:
        """The values that all rows should have had, and those that leave the last chunk."""

    def scale(self, values: list[Tensor]) -> Tensor | float:
        """What a tolerance is a part of."""


def _settle(
    passes: _Passes, chunks: TimeChunks, plan: TimePlan, tolerance: float, values: list[Tensor]
) -> list[Tensor] | None:
    """Runs until the values stand still: those that leave the last chunk then, or None where they do not."""
    problem, rows = chunks.call.problem, None
    for number in range(1, plan.passes + 1):
        passes.run(values, rows)
        wanted, leaving = passes.handed()
        moved = _moved(wanted, values, tolerance * passes.scale(wanted), passes.free)
        count = int(moved.sum())  # the one answer that the host waits for in a pass
        if not count:
            note(problem, plan, tolerance, Outcome(number, settled=True))
            return leaving
        rows = None if passes.sums else chunks.again(moved, count)
        values = wanted if rows is None else _replaced(values, wanted, rows)
    note(problem, plan, tolerance, Outcome(plan.passes, settled=False))
    return None


def _moved(wanted: Sequence[Tensor], values: Sequence[Tensor], bound: Tensor | float, free: Tensor | None) -> Tensor:
    """(K·B): the rows whose value is off by more than a bound, or is no number. Infinities stand still."""
    off = [
        ~((want == value) | ((want - value).abs() <= bound)).all(-1) for want, value in zip(wanted, values, strict=True)
    ]
    of_each = torch.stack(off).any(0)
    return (of_each if free is None else of_each & ~free).any(1)


def _replaced(values: Sequence[Tensor], wanted: Sequence[Tensor], rows: Tensor) -> list[Tensor]:
    """The values, those of some rows as they should be."""
    pairs = zip(values, wanted, strict=True)
    return [value.index_copy(0, rows, want.index_select(0, rows)) for value, want in pairs]


def _put(whole: Tensor, part: Tensor, rows: Tensor, axis: int) -> Tensor:
    """The whole, of this module's own, with what some rows have now."""
    return whole.index_copy_(axis, rows, part)


class _Forward:
    sums = False

    def __init__(self, chunks: TimeChunks, gates: Tensor, loops: Loops, save: bool, all_states: bool) -> None:
        self.chunks, self.loops, self.save, self.all_states = chunks, loops, save, all_states
        self.products, self.free = chunks.rows(gates), chunks.borders.free
        self.result: Result = None  # type: ignore[assignment]  # until a pass ran

    def run(self, values: list[Tensor], rows: Tensor | None) -> None:
        call = self.chunks.part(values, rows)
        products = self.products.clone() if rows is None else some(self.products, rows, 1)  # a loop writes to them
        part = self.loops(call.problem).forward(call, products, self.save, self.all_states)
        if rows is None:
            self.result = part
            return
        before = self.result
        self.result = Result(
            _put(before.y, part.y, rows, 1),
            [_put(whole, state, rows, 0) for whole, state in zip(before.final, part.final, strict=True)],
            _put(before.gates, part.gates, rows, 1) if self.save else part.gates,
            _put(before.recurrent, part.recurrent, rows, 1) if self.save else part.recurrent,
            _put(before.inner, part.inner, rows, 2) if before.inner.dim() > 1 else part.inner,
        )

    def handed(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.chunks.borders.starts(self.chunks.call.states, self.result.final)

    def scale(self, values: list[Tensor]) -> float:
        return 1.0

    def in_time(self, final: list[Tensor]) -> Result:
        chunks, result = self.chunks, self.result
        y = chunks.silenced(chunks.in_time(result.y))
        inner = chunks.each_in_time(result.inner) if result.inner.dim() > 1 else result.inner
        if not self.save:
            return Result(y, final, y.new_empty(0), y.new_empty(0), inner)
        return Result(y, final, chunks.in_time(result.gates), chunks.in_time(result.recurrent), inner)


class _Backward:
    free: Tensor | None = None

    def __init__(
        self,
        chunks: TimeChunks,
        saved: Result,
        loops: Loops,
        d_y: Tensor,
        d_final: list[Tensor],
        d_inner: Tensor | None,
    ) -> None:
        self.chunks, self.loops, self.d_final = chunks, loops, d_final
        self.saved, self.starts = chunks.saved(saved)
        self.d_y = chunks.rows(chunks.silenced(d_y))
        self.d_inner = None if d_inner is None else chunks.rows_of_each(chunks.silenced(d_inner))
        weights = chunks.call.weights
        self.sums = any(each is not None for each in (weights.params, weights.w_hr, weights.norm))
        self.grads: LoopGradients = None  # type: ignore[assignment]  # until a pass ran

    def guess(self) -> list[Tensor]:
        """Nothing comes back to a chunk but what the caller wants of the final states."""
        nothing = [torch.zeros_like(start) for start in self.starts]
        return self.chunks.borders.d_ends(nothing, self.d_final)[0]

    def run(self, values: list[Tensor], rows: Tensor | None) -> None:
        call, saved = self.chunks.part(self.starts, rows), self.saved
        y, gates, recurrent = (some(each, rows, 1) for each in (saved.y, saved.gates, saved.recurrent))
        of_rows = Result(y, [], gates, recurrent, some(saved.inner, rows, 2))
        d_inner = None if self.d_inner is None else some(self.d_inner, rows, 2)
        ends = [some(value, rows, 0) for value in values]
        part = self.loops(call.problem).backward(call, of_rows, some(self.d_y, rows, 1), ends, d_inner)
        if rows is None:
            self.grads = part
            return
        before = self.grads
        self.grads = part._replace(
            d_gates=_put(before.d_gates, part.d_gates, rows, 1),
            d_recurrent=_put(before.d_recurrent, part.d_recurrent, rows, 1),
            d_states=[_put(whole, d, rows, 0) for whole, d in zip(before.d_states, part.d_states, strict=True)],
            d_resets=[_put(whole, d, rows, 1) for whole, d in zip(before.d_resets, part.d_resets, strict=True)],
        )

    def handed(self) -> tuple[list[Tensor], list[Tensor]]:
        return self.chunks.borders.d_ends(self.grads.d_states, self.d_final)

    def scale(self, values: list[Tensor]) -> Tensor:
        # Of those that are finite: within a part of infinity every other row would stand still.
        return torch.stack([torch.where(value.isfinite(), value.abs(), 0).amax() for value in values]).amax()

    def in_time(self, d_initial: list[Tensor]) -> LoopGradients:
        chunks, grads = self.chunks, self.grads
        return grads._replace(
            d_gates=chunks.in_time(grads.d_gates),
            d_recurrent=chunks.in_time(grads.d_recurrent),
            d_states=d_initial,
            d_products=None if grads.d_products is None else chunks.in_time(grads.d_products),
            d_resets=chunks.of_resets(grads.d_resets),
        )
