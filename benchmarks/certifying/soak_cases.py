# SPDX-License-Identifier: Apache-2.0
"""What the soak draws: cells, dtypes, options and sizes, each case from the seed and its number alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from benchmarks.certifying import random_calls, recurrences
from benchmarks.certifying.given import Given
from benchmarks.certifying.precisions import PRECISIONS
from benchmarks.certifying.random_calls import Sizes
from gpu_rnn import cells
from gpu_rnn.activations import ACTIVATIONS
from gpu_rnn.recurrence import Recurrence

# Cases in a row with the same cell, dtype, options and H: what a kernel is compiled for. Compiling takes seconds, a
# case a part of one.
SAME = 6
MOST_OPTIONS = 5
# Features and units: the normalised product of one feature, or of two units, hardly depends on them, and rounding is
# all there is of its gradient.
LEAST_NORMALISED = 3
UNBOUNDED = ("exp",)  # fed back it overflows within a few steps, in plain PyTorch too: nothing could be compared


@dataclass(frozen=True)
class Limits:
    """The largest sizes, and the bounds of H, of which each is drawn as often."""

    T: int
    B: int
    I: int  # noqa: E741
    H: tuple[tuple[int, int], ...]


LIMITS = {
    # T beyond two graphs of the step backend (backends/step/cuda_graphs.py); H for one block, for a few, and for many.
    "cuda": Limits(80, 70, 40, ((1, 32), (33, 128), (129, 700))),
    "cpu": Limits(5, 4, 4, ((1, 20),)),  # what an emulated GPU runs in a second
}


@dataclass(frozen=True)
class Case:
    """A call of `functional.rnn`, or of as many as there are heads, by vmap."""

    number: int
    cell: str
    activations: tuple[str, str]
    precision: str  # of PRECISIONS, a dtype or tf32
    options: frozenset[str]
    heads: int
    sizes: Sizes
    seed: int  # of the tensors
    captured: bool  # on a GPU, replayed from a CUDA graph

    def __str__(self) -> str:
        sizes = " ".join(f"{name} {size}" for name, size in zip("TBIH", self.sizes, strict=True))
        heads = f", {self.heads} heads" if self.heads > 1 else ""
        named = f"{self.cell}({', '.join(self.activations)})" if any(self.activations) else self.cell
        return f"{named} {self.precision}, {sizes}{heads}, {' '.join(sorted(self.options)) or 'no options'}"

    @cached_property
    def recurrence(self) -> Recurrence:
        further = random_calls.of_the_cell(self.options)
        if any(self.activations):
            return recurrences.WITH_ACTIVATIONS[self.cell](*self.activations, **further)
        return cells.CELLS[self.cell](**further) if further else recurrences.RECURRENCES[self.cell]

    def members(self, device: torch.device) -> list[Given]:
        """A call's tensors for each head, float64, with the values that the dtype can hold."""
        scale = self.sizes.H**-0.5  # as layers start: larger weights blow any rounding up
        draw = partial(random_calls.tensors, self.cell, self.recurrence, self.sizes, self.options, weight_scale=scale)
        drawn = [draw(self.seed + k).to(PRECISIONS[self.precision][0]).to(torch.float64) for k in range(self.heads)]
        shared = {name: getattr(drawn[0], name) for name in CONTROLS}
        return [random_calls.on(replace(made, **shared), device) for made in drawn]


CONTROLS = ("mask", "lengths", "resets", "recurrent_mask", "zone")  # the same for all heads


def draw(seed: int, number: int, device: str) -> Case:
    """The case of that number. The first ones are plain, so that every backend takes some however short the soak is."""
    kind = random.Random(f"{seed} {number // SAME}")
    limits = LIMITS[device]
    cell, activations = _cell(kind)
    chosen = kind.sample(random_calls.OPTIONS, kind.randint(0, MOST_OPTIONS))
    if cell != "lstm":
        chosen = [name for name in chosen if name != "proj_size"]
    if cell not in recurrences.WITH_ACTIVATIONS:
        chosen = [name for name in chosen if name != "clip"]
    precision, heads = kind.choice([*PRECISIONS]), kind.choice((1, 1, 1, 2, 3))
    hidden = kind.randint(*kind.choice(limits.H))
    own = random.Random(f"{seed} {number} sizes")
    least = LEAST_NORMALISED if "layer_norm" in chosen else 1
    sizes = Sizes(own.randint(1, limits.T), own.randint(1, limits.B), own.randint(least, limits.I), max(hidden, least))
    options = random_calls.sensible(chosen)
    sizes = random_calls.fitting(sizes, options)
    case = Case(number, cell, activations, precision, options, heads, sizes, own.randrange(2**31), own.random() < 0.5)
    if number >= SAME:
        return case
    narrow = sizes._replace(H=kind.randint(*limits.H[0]))
    return replace(case, cell="lstm", activations=("", ""), options=frozenset(), heads=1, sizes=narrow)


def _cell(kind: random.Random) -> tuple[str, tuple[str, str]]:
    """Any recurrence, with activations of its own every second time."""
    if kind.random() < 0.5:
        return kind.choice([*cells.CELLS, "minimal", "lstm", "gru"]), (
            "",
            "",
        )  # the most used ones more often
    names = [name for name in ACTIVATIONS if name not in UNBOUNDED]
    return kind.choice([*recurrences.WITH_ACTIVATIONS]), (kind.choice(names), kind.choice(names))


Run = Callable[[], dict[str, Tensor]]


def run(case: Case, members: list[Given], backend: str) -> Run:
    """A function that does the call with `backend` and gives outputs and gradients by name, heads along a new axis."""
    one = partial(random_calls.call, recurrence=case.recurrence, options=case.options, backend=backend)
    own = [list(random_calls.leaves(made).values()) for made in members]
    wanted = [leaf for leaves in own for leaf in leaves]

    def outputs() -> list[Tensor]:
        if len(members) == 1:
            return one(members[0])
        if backend == "reference":  # the truth knows nothing of vmap
            return [torch.stack(parts) for parts in zip(*map(one, members), strict=True)]
        stacked = [torch.stack(parts) for parts in zip(*own, strict=True)]
        return list(torch.vmap(lambda *parts: one(random_calls.with_leaves(members[0], parts)))(*stacked))

    def values_and_gradients() -> dict[str, Tensor]:
        found = random_calls.values_and_gradients(outputs(), wanted)
        return dict(zip(_names(case, members), found, strict=True))

    return values_and_gradients


def _names(case: Case, members: list[Given]) -> list[str]:
    states = case.recurrence.states
    outputs = ["y", *(f"final {s}" for s in states)]
    outputs += [f"all {s}" for s in states] if "all_states" in case.options else []
    heads = [f" of head {k}" for k in range(len(members))] if len(members) > 1 else [""]
    return outputs + [f"d {name}{head}" for head in heads for name in random_calls.leaves(members[0])]


def in_dtype(members: list[Given], dtype: torch.dtype) -> list[Given]:
    """The same calls in another dtype, as new leaves."""
    return [made.to(dtype) for made in members]


def rounded_again(case: Case, members: list[Given], dtype: torch.dtype, count: int) -> Iterator[list[Given]]:
    """The same calls, float64, with every number off by at most the dtype's rounding, in `count` ways."""
    generator = torch.Generator().manual_seed(case.seed)
    most = torch.finfo(dtype).eps / 2

    def off(value: Tensor) -> Tensor:
        factors = 1 + most * (2 * torch.rand(value.shape, generator=generator, dtype=torch.float64) - 1)
        return (value.detach() * factors.to(value.device)).requires_grad_()

    for _ in range(count):
        yield [
            random_calls.with_leaves(made, [off(leaf) for leaf in random_calls.leaves(made).values()])
            for made in members
        ]
