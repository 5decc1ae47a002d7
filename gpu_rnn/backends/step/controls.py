# SPDX-License-Identifier: Apache-2.0
"""What steers the steps of a call, in processing order: one kind of flags for masks, resets and lengths.

A step beyond a row's length is a masked one whose output is 0 outside of the loop.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gpu_rnn.backends.tensors import OF_STATES, RESET, SKIP, Call, bit, processing_order, reorder, reorder_each


class StepControls(NamedTuple):
    """All tensors in processing order; `tensors.reorder` by `order` is the way there and back."""

    order: Tensor | None
    beyond: Tensor | None  # (T, B, 1, 1) bool: the steps beyond each row's length
    flags: Tensor | None  # (T, B, N) uint8
    of_states: dict[str, Tensor]  # `tensors.OF_STATES` that there are, (S, T, B, N, H) bool
    values: list[Tensor | float]  # what each state is reset to, (1 or T, B, N, ·)

    @staticmethod
    def of(call: Call, steps: int) -> StepControls:
        controls, device = call.controls, call.weights.w_hh.device
        order = processing_order(steps, controls.lengths, call.reverse, device)
        flags, beyond = controls.flags, None
        if flags is not None:
            flags = reorder(flags, order)
        if controls.lengths is not None:
            beyond = (torch.arange(steps, device=device)[:, None] >= controls.lengths)[:, :, None, None]
            flags = beyond[..., 0].to(torch.uint8).mul_(SKIP).repeat(1, 1, len(call.reverse))
        of_states = {
            name: reorder_each(value, order)
            for name, value in controls.of_loops.items()
            if name in OF_STATES and value is not None
        }
        values = [call.reset_value(k) for k in range(len(call.states))]
        values = [v if isinstance(v, float) or len(v) == 1 else reorder(v, order) for v in values]
        return StepControls(order, beyond, flags, of_states, values)

    @property
    def skip(self) -> Tensor | None:
        """(T, B, N, 1): the rows that keep all states."""
        return None if self.flags is None else bit(self.flags, SKIP)

    @property
    def reset(self) -> Tensor | None:
        """(T, B, N, 1): the rows whose states are set before the step. Lengths come without."""
        return None if self.flags is None or self.beyond is not None else bit(self.flags, RESET)

    @property
    def keeps(self) -> list[Tensor | None]:
        """Of each state, (T, B, N, 1 or ·): the units that keep the value they entered with."""
        skip = self.skip
        if not self.by_unit:
            return [skip] * len(self.values)
        return [zone if skip is None else zone | skip for zone in self.of_states["zone"]]

    @property
    def by_unit(self) -> bool:
        """Whether single units keep states, not whole rows alone."""
        return "zone" in self.of_states

    def keeping(self, steps: int) -> list[bool]:
        """The steps at which a state is kept anywhere; True where that is not known."""
        return [True] * steps if self.by_unit else steps_with(self.skip, steps)

    @property
    def after(self) -> Tensor:
        """(T, B, N) uint8: SKIP of each step with RESET of the next, which is what comes after the step."""
        assert self.flags is not None
        if self.beyond is not None:
            return self.flags
        reset = (self.flags[1:] & RESET, torch.zeros_like(self.flags[:1]))
        return self.flags & SKIP | torch.cat(reset)

    def enter(self, t: int, states: list[Tensor]) -> list[Tensor]:
        """The states that step t starts from; slow, for a single step."""
        reset = self.reset
        if reset is None:
            return states
        values = [v if isinstance(v, float) else v[t if len(v) > 1 else 0] for v in self.values]
        return [torch.where(reset[t], value, state) for value, state in zip(values, states, strict=True)]

    def d_enter(self, t: int, d_states: list[Tensor]) -> list[Tensor]:
        """The gradients of `enter`'s results -> those of its argument."""
        reset = self.reset
        return d_states if reset is None else [d.masked_fill(reset[t], 0) for d in d_states]

    def d_values(self, d_entered: list[Tensor]) -> list[Tensor]:
        """Those of the reset values, from those of the states that all steps entered with, (T, B, N, ·) each."""
        d_values, reset = [], self.reset
        for value, d in zip(self.values, d_entered, strict=True):
            assert reset is not None and isinstance(value, Tensor)
            d = selected(d, words(reset, d.dtype))
            d_values.append(d.sum(0, keepdim=True) if len(value) == 1 else reorder(d, self.order))
        return d_values

    def output(self, y: Tensor) -> Tensor:
        """The outputs of all steps (T, B, N, P) in the order of time."""
        return reorder(self._within(y), self.order)

    def d_output(self, d_y: Tensor) -> Tensor:
        """The gradients of `output`'s results -> those of its argument."""
        return self._within(reorder(d_y, self.order))

    def _within(self, values: Tensor) -> Tensor:
        """0 beyond each row's length."""
        return values if self.beyond is None else selected(values, words(~self.beyond, values.dtype))


def steps_with(flags: Tensor | None, steps: int) -> list[bool]:
    """The steps at which flags (T, B, N, 1) are set anywhere; on a GPU all, as to ask would be to wait."""
    if flags is None:
        return [False] * steps
    return flags.flatten(1).any(1).tolist() if flags.is_cpu else [True] * steps


def words(flags: Tensor, dtype: torch.dtype) -> Tensor:
    """For `selected`: of each flag an integer as wide as the dtype, all bits set, or none."""
    return flags.to({2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]).neg_()


def selected(values: Tensor, chosen: Tensor) -> Tensor:
    """Values where chosen, else 0, NaN too, as a product would not; on a CPU in a sixth of the time of torch.where."""
    return torch.bitwise_and(values.view(chosen.dtype), chosen).view(values.dtype)
