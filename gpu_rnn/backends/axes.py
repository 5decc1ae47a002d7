# SPDX-License-Identifier: Apache-2.0
"""The axes of a tensor, written in its field's annotation: `gpu_rnn.call.checks` compares shapes with them, and
`gpu_rnn.call.vmap` and `gpu_rnn.call.wavefront` find the batch, the recurrences and the steps there."""

from __future__ import annotations

from typing import Annotated, Literal, NamedTuple, get_origin, get_type_hints

import torch

from gpu_rnn.memo import memoize


class Axes(NamedTuple):
    """The axes of a tensor, "|" between alternatives: of a whole tensor, ``T B I | T B N I``, or of one axis,
    ``1|T``."""

    axes: str
    dtype: torch.dtype | Literal["state"] | None = None  # "state": `state_dtype` of x's; None: that of x

    @memoize(256)  # of a tuple: what is kept is as good for another that is equal
    def place(self, axis: str) -> int | None:
        """Where an axis stands, of the last alternative; None without it. M is N, but of a stack."""
        words = [word.replace("M", "N").split("|") for word in self.axes.split(" | ")[-1].split()]
        return next((place for place, word in enumerate(words) if axis in word), None)


def axes_of(fields: type) -> dict[str, tuple[Axes, ...]]:
    """Of each field with axes of its own: one; of a list that of the first tensor and that of the others; of a pair
    that of each."""
    hints = get_type_hints(fields, include_extras=True)
    return {name: hint.__metadata__ for name, hint in hints.items() if get_origin(hint) is Annotated}
