# SPDX-License-Identifier: Apache-2.0
"""What functions in C are given: a structure each, which C declares and Python packs from the same names."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from gpu_rnn.memo import memoize


class Structure(NamedTuple):
    """8 bytes a field: numbers, then addresses of tensors by what these hold, then one of each state's tensors. A null
    stands for none."""

    name: str
    numbers: tuple[str, ...]
    pointers: Mapping[str, tuple[str, ...]]
    of_each_state: Mapping[str, tuple[str, ...]]

    def declared(self) -> str:
        """In C."""
        lines = [f"  int64_t {', '.join(self.numbers)};"]
        lines += [f"  {kind} {_listed(names)};" for kind, names in self.pointers.items()]
        lines += [f"  {kind} {_listed(names, '[STATES]')};" for kind, names in self.of_each_state.items()]
        return "\n".join(["typedef struct {", *lines, f"}} {self.name};"])

    def packing(self, states: int) -> Packing:
        """For a recurrence with so many states."""
        single = [*self.numbers, *(name for names in self.pointers.values() for name in names)]
        lists = [name for names in self.of_each_state.values() for name in names]
        places = {name: place for place, name in enumerate(single)}
        places |= {name: len(single) + number * states for number, name in enumerate(lists)}
        fields = len(single) + len(lists) * states
        return Packing(struct.Struct(f"{fields}q").pack, places, fields)


def _listed(names: Sequence[str], after: str = "") -> str:
    return ", ".join(f"*{name}{after}" for name in names)


class Packing(NamedTuple):
    """How a structure is written. ctypes would take longer than a short call."""

    packed: Callable[..., bytes]  # of all fields in their order
    places: dict[str, int]  # of each name, or of the first of each state's, among the fields
    fields: int

    def numbered(self, numbers: Mapping[str, int]) -> list[int]:
        """All fields, with these numbers."""
        fields = [0] * self.fields
        for name, number in numbers.items():
            fields[self.places[name]] = number
        return fields

    def put(
        self,
        fields: list[int],
        tensors: Mapping[str, Tensor | None],
        lists: Mapping[str, Sequence[Tensor | None]],
    ) -> None:
        """Enters addresses."""
        places = self.places
        for name, tensor in tensors.items():
            if tensor is not None:
                fields[places[name]] = tensor.data_ptr()  # 0 where there are no values
        for name, each in lists.items():
            for place, tensor in enumerate(each, places[name]):
                if tensor is not None:
                    fields[place] = tensor.data_ptr()


# A time loop's. The tensors' shapes are those of `gpu_rnn.backends.tensors`.
LOOP = Structure(
    "arguments",
    (
        *("steps", "batch", "across", "units", "width", "features"),  # `width` of h, which may be projected
        *("threads", "team", "tiles", "save", "silent", "masks", "flags_across", "reset_steps", "rms"),
        "gradient_threads",  # of the products that give the gradients of weights and x
    ),
    {
        "const uint8_t": ("reverse", "flags", "zone"),
        "const int64_t": ("lengths",),
        "const scalar": (
            *("w_hh", "b_hh", "params", "w_hr", "norm", "drop", "d_y", "d_inner"),
            *("x", "w_ih", "b_ih", "norm_ih"),  # where the loop takes the input products, too, and back
        ),
        "scalar": (
            *("gates", "recurrent", "inner", "y", "h", "normal", "rstd", "normal_x", "rstd_x"),
            *("d_gates", "d_recurrent", "d_params", "d_norm", "d_normed", "made", "d_made"),
            # Where the gradients of the weights are taken, too. Those of each row are `d_params` and `d_norm`.
            *("d_x", "d_w_ih", "d_w_hh", "d_b_ih", "d_b_hh", "d_w_hr", "d_norm_ih", "d_params_of_all", "d_norm_of_all"),
        ),
    },
    {"const scalar": ("initial", "resets", "d_final"), "scalar": ("final", "d_initial", "d_resets")},
)

# Of one step, which `one_step` packs in this order.
_WEIGHTS = ("w_ih", "w_hh", "b_ih", "b_hh", "params")
STEP = Structure(
    "one_step",
    ("rows", "features", "units", "save"),
    {
        "const scalar": ("x", *_WEIGHTS),
        "scalar": ("gates", "recurrent", "d_x", *(f"d_{weight}" for weight in _WEIGHTS)),
    },
    {"const scalar": ("states", "d_final"), "scalar": ("final", "d_states")},
)


@memoize(32)
def of_a_loop(states: int) -> Packing:
    """A time loop's arguments for a recurrence with so many states."""
    return LOOP.packing(states)
