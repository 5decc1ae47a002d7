# SPDX-License-Identifier: Apache-2.0
"""The backends: what each has to answer (`Backend`, `Loop`), and the table of them.

To add one, write a module with these functions and enter it in `TABLE`. The type checker holds each to its protocol.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import NamedTuple, Protocol

from torch import Tensor

from gpu_rnn.backends import aten, reference, resident
from gpu_rnn.backends.group import launch as group
from gpu_rnn.backends.group.choice import source_of_cost
from gpu_rnn.backends.native import launch as native
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.rates import Rates
from gpu_rnn.backends.step import launch as step
from gpu_rnn.backends.tensors import Call, LoopGradients, Result, Weights


class Backend(Protocol):
    """What dispatch asks of a backend."""

    def unsupported(self, problem: Problem) -> list[str]:
        """Every reason why it cannot run a problem, in words that say what to change; empty where it can."""

    def cost(self, problem: Problem, constants: Rates | None = None) -> float:
        """Seconds for one pass by a model, with the device's own constants or those given."""

    def prepare(self, problem: Problem) -> None:
        """Compiles what a supported problem needs. What fails is a reason of `unsupported` from then on."""


class Loop(Backend, Protocol):
    """A backend that runs one layer's time loop; the products before and after it are taken for it (`linear`)."""

    def forward(self, call: Call, gates: Tensor, save: bool, all_states: bool) -> Result:
        """From the input products (T, B, N, G, H), which it may overwrite, every output; see `Result`."""

    def backward(
        self, call: Call, saved: Result, d_y: Tensor, d_final: list[Tensor], d_inner: Tensor | None
    ) -> LoopGradients:
        """From the gradients of y (T, B, N, P), of each final state (B, N, ·) and, where the states of all steps are
        wanted, of those (S - 1, T, B, N, H), the gradients that the loop makes."""


def modelled(problem: Problem) -> str:
    """The source of a cost that is a model alone."""
    return "modelled"


def never(problem: Problem) -> bool:
    """What is said of no problem."""
    return False


class Repeated(Protocol):
    """A forward pass in inference that was made before; all tensors lie as those of `persistent.whole`."""

    by_address: bool
    """Whether it reads no shapes: weights of one recurrence may then lack their axis N, and gates be in one axis."""

    def __call__(self, gates: Tensor, states: Iterable[Tensor], weights: Weights) -> tuple[Tensor, list[Tensor]]:
        """y (T, B, N, P) and the final states (B, N, ·)."""


class ByForward:
    """Of any loop, by its own `forward`."""

    by_address = False

    def __init__(self, loop: Loop, call: Call, gates: Tensor) -> None:
        self.loop = loop
        self.fixed = call.controls, call.reset_values, call.reverse, call.problem, call.joined
        self.program, self.rms = call.program, call.rms

    def __call__(self, gates: Tensor, states: Iterable[Tensor], weights: Weights) -> tuple[Tensor, list[Tensor]]:
        call = Call(self.program, weights, list(states), *self.fixed, rms=self.rms)
        result = self.loop.forward(call, gates, save=False, all_states=False)
        return result.y, result.final


class Entry(NamedTuple):
    """A backend and what it runs."""

    backend: Backend
    loop: Loop | None = None  # the same module, where it is one
    whole_stacks: bool = False  # a stack in one call, never a layer of one
    wavefront: bool = False  # the layers of a stack side by side, as N
    again: Callable[[Call, Tensor], Repeated] | None = None
    """Makes of a call in inference and its gates what runs the same once more (`gpu_rnn.call.plans`), where that is
    more than its `forward`."""
    adds_b_hh: Callable[[Problem], bool] = never
    """Whether its forward pass adds b_hh of the summed gates itself, where their input products lack it."""
    source: Callable[[Problem], str] = modelled
    """Where what its cost says of a problem's time loop comes from: "simulated" from the machine code of that very
    build, "published" by others, or "modelled"."""


# Of equals dispatch takes the first. The step loop runs no wavefronts: it would need graphs for each number of layers.
TABLE = {
    "resident": Entry(
        resident,
        resident,
        wavefront=True,
        again=resident.Again,
        adds_b_hh=resident.adds_b_hh,
        source=resident.source,
    ),
    "group": Entry(group, group, wavefront=True, source=source_of_cost),
    "aten": Entry(aten, whole_stacks=True, source=aten.source),
    "native": Entry(native, native),
    "step": Entry(step, step),
    "reference": Entry(reference),
}


class Names(NamedTuple):
    """What follows from a table."""

    BACKENDS: dict[str, Backend]
    KERNELS: dict[str, Loop]
    LOOPS: tuple[str, ...]
    WAVEFRONTS: tuple[str, ...]
    SOURCES: dict[str, Callable[[Problem], str]]
    AGAIN: dict[str, Callable[[Call, Tensor], Repeated]]
    ADDS_B_HH: dict[str, Callable[[Problem], bool]]

    @staticmethod
    def of(table: Mapping[str, Entry]) -> Names:
        return Names(
            {name: entry.backend for name, entry in table.items()},
            {name: entry.loop for name, entry in table.items() if entry.loop is not None},
            tuple(name for name, entry in table.items() if not entry.whole_stacks),
            tuple(name for name, entry in table.items() if entry.wavefront),
            {name: entry.source for name, entry in table.items()},
            {
                name: entry.again or partial(ByForward, entry.loop)
                for name, entry in table.items()
                if entry.loop is not None
            },
            {name: entry.adds_b_hh for name, entry in table.items()},
        )


BACKENDS, KERNELS, LOOPS, WAVEFRONTS, SOURCES, AGAIN, ADDS_B_HH = Names.of(TABLE)
"""All; those that are a `Loop`; those that run one layer; those that run a stack's layers side by side; of each, where
its cost comes from; of each `Loop`, what makes a call once more; of each, whether it adds b_hh."""
