# SPDX-License-Identifier: Apache-2.0
"""Where h comes from outside of a loop that may skip steps and reset rows: no step made it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gpu_rnn.backends.tensors import RESET, SKIP, Call, processing_order, reorder, state_dtype

NEVER = -1  # reset: the row has what it began with
NONE_MADE = -2  # before which even that came


@dataclass(frozen=True)
class Outside:
    """Rows whose h is what they began with or were reset to, step by step.

    Attributes:
        call: whose controls have flags.
        order: as `processing_order` has it. The attributes below stand in it; what methods take and return, in time.
        since: (T, B, N), the step of the last reset up to each.
        made: (T, B, N), the last step up to each that was not skipped.
        entered: (T, B, N, 1), whether the step starts from such an h.
        left: (T, B, N, 1), whether it is there after the step, too.
    """

    call: Call
    order: Tensor | None
    since: Tensor
    made: Tensor
    entered: Tensor
    left: Tensor

    @staticmethod
    def of(call: Call) -> Outside:
        flags = call.controls.flags
        assert flags is not None
        order = processing_order(len(flags), None, call.reverse, flags.device)
        flags = reorder(flags, order)
        step = torch.arange(len(flags), device=flags.device)[:, None, None]
        since = torch.where((flags & RESET).bool(), step, NEVER).cummax(0).values
        made = torch.where((flags & SKIP).bool(), NONE_MADE, step).cummax(0).values
        before = torch.cat([torch.full_like(made[:1], NONE_MADE), made[:-1]])
        return Outside(call, order, since, made, (since > before).unsqueeze(-1), (since > made).unsqueeze(-1))

    def _values(self) -> Tensor:
        """(T, B, N, P): what h comes from outside last, in processing order."""
        given, began = self.call.reset_values, (self.since == NEVER).unsqueeze(-1)
        first = self.call.states[0]
        if not given:
            return torch.where(began, first, self.call.program.initial[0])
        values = given[0].to(first.dtype)
        return torch.where(
            began, first, values if len(values) == 1 else self._at(reorder(values, self.order), self.since)
        )

    def _at(self, values: Tensor, steps: Tensor) -> Tensor:
        """The values (T, B, N, X) of these steps, (T, B, N); what stands where there is none is of no use."""
        return values.gather(0, steps.clamp(min=0).unsqueeze(-1).expand(values.shape))

    def entering(self) -> Tensor:
        """(T, B, N, P): the h from outside that a step starts from, else 0."""
        return reorder(torch.where(self.entered, self._values(), 0), self.order)

    def leaving(self, h: Tensor) -> Tensor:
        """h after each step (T, B, N, P), where it is one from outside that."""
        return reorder(torch.where(self.left, self._values(), reorder(h, self.order)), self.order)

    def carried(self, made: Tensor) -> Tensor:
        """What steps made (T, B, N, X), where they are skipped what was made last; 0 where h is from outside."""
        last = self._at(reorder(made, self.order), self.made)
        return reorder(torch.where(self.left, 0, last), self.order)

    def gradients(self, d_entering: Tensor, d_leaving: Tensor, d_final: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The gradients of the first h, (B, N, P), and of the values that it is reset to, if there are any, from those
        of h before and after each step, (T, B, N, P), and of the last, (B, N, P)."""
        wide, (before, after) = state_dtype(d_final.dtype), (reorder(d, self.order) for d in (d_entering, d_leaving))
        d = torch.where(self.entered, before, 0).to(wide) + torch.where(self.left, after, 0)
        d[-1] += torch.where(self.left[-1], d_final, 0)
        began = (self.since == NEVER).unsqueeze(-1)
        d_first, d = torch.where(began, d, 0).sum(0), torch.where(began, 0, d)
        if not self.call.reset_values:
            return d_first, []
        if len(self.call.reset_values[0]) == 1:
            return d_first, [d.sum(0, keepdim=True)]
        at = self.since.clamp(min=0).unsqueeze(-1).expand(d.shape)
        return d_first, [reorder(torch.zeros_like(d).scatter_add_(0, at, d), self.order)]
