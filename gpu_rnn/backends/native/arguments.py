# SPDX-License-Identifier: Apache-2.0
"""What a time loop in C is given: one structure, declared in C and in ctypes from the same names."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from gpu_rnn.memo import memoize

NUMBERS = (
    *("steps", "batch", "across", "units", "width", "features"),  # `width` of h, which may be projected
    *("threads", "team", "tiles", "save", "masks", "flags_across", "reset_steps"),
)
# Tensors, by what they hold; null where there is none. Their shapes are those of `gpu_rnn.backends.tensors`.
POINTERS = {
    "const uint8_t": ("reverse", "flags", "zone"),
    "const int64_t": ("lengths",),
    "const scalar": (
        *("w_hh", "b_hh", "params", "w_hr", "norm", "drop", "d_y", "d_inner"),
        *("x", "w_ih", "b_ih"),  # where the loop takes the input products, too
    ),
    "scalar": (
        *("gates", "recurrent", "inner", "y", "normal", "rstd"),
        *("d_gates", "d_recurrent", "d_params", "d_norm", "d_normed", "made", "d_made"),
    ),
}
# One of each state.
OF_EACH_STATE = {"const scalar": ("initial", "resets", "d_final"), "scalar": ("final", "d_initial", "d_resets")}


def declared() -> str:
    """The structure in C."""
    lines = [f"  int64_t {', '.join(NUMBERS)};"]
    lines += [f"  {kind} {', '.join(f'*{name}' for name in names)};" for kind, names in POINTERS.items()]
    lines += [f"  {kind} {', '.join(f'*{name}[STATES]' for name in names)};" for kind, names in OF_EACH_STATE.items()]
    return "\n".join(["typedef struct {", *lines, "} arguments;"])


@memoize(32)
def _structure(states: int) -> type[ctypes.Structure]:
    sizes = [(name, ctypes.c_int64) for name in NUMBERS]
    pointers = [(name, ctypes.c_void_p) for names in POINTERS.values() for name in names]
    lists = [(name, ctypes.c_void_p * states) for names in OF_EACH_STATE.values() for name in names]
    return type("Arguments", (ctypes.Structure,), {"_fields_": [*sizes, *pointers, *lists]})


def filled(states: int, given: dict[str, int | Tensor | Sequence[Tensor] | None]) -> Any:
    """The structure for a recurrence with so many states; what is not given is 0 or null."""
    structure = _structure(states)()
    for name, value in given.items():
        if isinstance(value, Tensor):
            assert value.is_contiguous(), name
            setattr(structure, name, value.data_ptr() if value.numel() else None)
        elif isinstance(value, int):
            setattr(structure, name, value)
        elif value is not None:
            assert all(each.is_contiguous() for each in value), name
            getattr(structure, name)[: len(value)] = [each.data_ptr() for each in value]
    return structure


class Packing(NamedTuple):
    """How the structure is written without ctypes, which takes longer than a short call: 8 bytes a field."""

    packed: Callable[..., bytes]  # of all fields in their order
    places: dict[str, int]  # of each name, or of the first of each state's, among the fields
    fields: int


@memoize(32)
def packing(states: int) -> Packing:
    """For a recurrence with so many states."""
    single = [*NUMBERS, *(name for names in POINTERS.values() for name in names)]
    lists = [name for names in OF_EACH_STATE.values() for name in names]
    places = {name: place for place, name in enumerate(single)}
    places |= {name: len(single) + number * states for number, name in enumerate(lists)}
    fields = len(single) + len(lists) * states
    return Packing(struct.Struct(f"{fields}q").pack, places, fields)
