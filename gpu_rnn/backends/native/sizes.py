# SPDX-License-Identifier: Apache-2.0
"""What calls of a layer of one shape have alike: shapes, threads, and the arguments in C that are no addresses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_rnn.backends.native import arguments, launch, limits
from gpu_rnn.compiler.program import Program

# The input products are the loop's own up to so many multiplications of all steps, or from so many rows on, of which
# each is one thread's: a library's took 0.09 ms longer on one thread of an EPYC, and all threads take part in it. As
# with gradients (`limits.owns_gradients`) that does not go by the number of threads, so that no result does.
ALONE, ROWS = 1 << 25, 8
OF_A_LINE = 64  # bytes of the caches


class Room(NamedTuple):
    """Tensors that lie in one, each from an aligned place on: to make a tensor is a part of a short call."""

    shapes: dict[str, tuple[int, ...]]
    first: dict[str, int]  # of each that holds anything
    size: int
    places: list[tuple[int, int]]  # of their addresses among the arguments in C, and how many bytes after the first's

    @staticmethod
    def of(shapes: dict[str, tuple[int, ...]], itemsize: int, packing: arguments.Packing) -> Room:
        first, size, each = {}, 0, OF_A_LINE // itemsize
        for name, shape in shapes.items():
            if count := math.prod(shape):
                first[name] = size
                size += -(-count // each) * each
        return Room(shapes, first, size, [(packing.places[name], itemsize * at) for name, at in first.items()])

    def view(self, name: str, whole: Tensor) -> Tensor:
        first, shape = self.first.get(name, 0), self.shapes[name]
        return whole[first : first + math.prod(shape)].view(shape)

    def views(self, names: Sequence[str], whole: Tensor) -> Tensor:
        """Of one shape, along a new first dimension."""
        first, shape = [self.first[name] for name in names], self.shapes[names[0]]
        apart = first[1] - first[0]
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        return whole.as_strided((len(names), *shape), (apart, *strides), whole.storage_offset() + first[0])


class Extent(NamedTuple):
    """What these go by."""

    x: torch.Size  # (T, B, I)
    w_hh: torch.Size  # (·, G·H, P)
    steering: tuple[tuple[str, int], ...]  # `launch.of_controls`; of none, none
    save: bool
    all_states: bool
    threads: int  # of torch


class LayerSizes(NamedTuple):
    """See above."""

    fields: list[int]  # of the arguments in C: all but addresses and threads
    threads: int
    takes_inputs: bool  # whether the input products are the loop's own
    own_gradients: bool  # whether those of the weights and of x are
    gradient_threads: int
    y: tuple[int, ...]
    gates: tuple[int, ...]
    inner: tuple[int, ...]
    saved: Room  # for the backward pass; without what is made apart
    made: Room  # in the backward pass

    @property
    def silenced(self) -> bool:
        """Whether y is 0 where a step does not count, and h stands elsewhere for the backward pass."""
        return "h" in self.saved.first


def of(
    kind: Extent, program: Program, packing: arguments.Packing, names: Sequence[str], reverse: str, rms: bool, bits: int
) -> LayerSizes:
    """Of a layer's calls; `names` are those of its weights, `bits` of a number."""
    n, (steps, batch, features), (of_gates, width) = len(reverse), kind.x, kind.w_hh[-2:]
    count, split, itemsize = len(program.gates), len(program.split), bits // 8
    gates = steps, batch, n, count, of_gates // count
    hidden, inner = gates[-1], ((len(program.states) - 1), steps, batch, n, gates[-1])
    numbers = launch.of_a_call(gates, width, dict(kind.steering), kind.save, rms, reverse)
    numbers |= {"silent": int(bool(kind.steering) and not kind.all_states), "features": features}
    products = launch.multiplications(gates, width)
    threads = min(kind.threads, launch.worth(products, batch * n))
    of_inputs = steps * batch * features * of_gates * n
    takes_inputs = count <= launch.side_by_side(program) and (of_inputs <= ALONE or batch * n >= ROWS)
    normal: dict[str, tuple[int, ...]]
    normal = {"normal_x": gates, "normal": gates, "rstd_x": (*gates[:-1], 1), "rstd": (*gates[:-1], 1)}
    saved: dict[str, tuple[int, ...]]
    saved = {"recurrent": (steps, batch, n, split, hidden)}
    saved |= {"gates": gates} | (normal if "norm" in names else {}) if takes_inputs else {}
    silenced = numbers["silent"] and numbers["flags_across"]
    saved |= ({"h": (steps, batch, n, width)} if silenced else {}) | ({} if kind.all_states else {"inner": inner})
    made: dict[str, tuple[int, ...]]
    made = {"d_gates": gates, "d_recurrent": saved["recurrent"], "d_params": (batch, n, len(program.params), hidden)}
    made |= {"d_norm": gates[1:], "d_normed": gates} if "norm" in names else {}
    made |= {"made": (*gates[:3], hidden), "d_made": (*gates[:3], width)} if "w_hr" in names else {}
    return LayerSizes(
        packing.numbered(numbers),
        threads,
        takes_inputs,
        len(program.stages) == 1 and limits.owns_gradients(gates, features, width),
        min(kind.threads, launch.worth(limits.of_gradients(gates, features, width), of_gates)),
        (steps, batch, n * width),
        gates,
        inner if kind.save or kind.all_states else (0, *inner[1:]),
        Room.of(saved if kind.save else {}, itemsize, packing),
        Room.of(made if kind.save else {}, itemsize, packing),
    )
