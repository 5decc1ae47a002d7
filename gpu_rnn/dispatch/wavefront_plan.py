# SPDX-License-Identifier: Apache-2.0
"""How a stack is cut into a wavefront (`gpu_rnn.call.wavefront`): chunks of steps, in diagonals that run together."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from torch import Tensor

from gpu_rnn.backends.problem import Problem
from gpu_rnn.devices import Device

BETWEEN = 1.5e-5  # predicted seconds of a diagonal beside its launch: a product, and some copies of what it leaves
# Seconds that the host takes to put a diagonal in the queue: forward 9e-5, backward 1.4e-4 of CPU time on an AMD EPYC.
# A shorter chunk would leave the device waiting.
HOST = 1e-4


class Diagonal(NamedTuple):
    """The chunks that run together: that of layer `first` begins at step `start`, and each layer above is a chunk
    behind."""

    first: int
    last: int  # one above the uppermost layer
    start: int
    chunk: int

    @property
    def layers(self) -> slice:
        return slice(self.first, self.last)

    @property
    def count(self) -> int:
        return self.last - self.first

    def of(self, whole: Tensor) -> Tensor:
        """A view (chunk, B, layers, …) of (L, T, B, …)."""
        layer, step, batch, *rest = _strides(whole)
        size = (self.chunk, whole.shape[2], self.count, *whole.shape[3:])
        return whole.as_strided(size, (step, batch, layer - self.chunk * step, *rest), self._offset(whole, self.start))

    def rows(self, whole: Tensor) -> Tensor:
        """The same as matrices (layers, chunk·B, …)."""
        layer, step, batch, *_ = _strides(whole)
        size = (self.count, self.chunk * whole.shape[2], batch)
        return whole.as_strided(size, (layer - self.chunk * step, batch, 1), self._offset(whole, self.start))

    def before(self, whole: Tensor, initial: Tensor) -> Tensor:
        """(B, layers, ·): of a state after each step, (L, T, B, ·), what each layer's chunk begins with."""
        if self.start == 0:
            return initial[:, self.layers]
        layer, step, batch, unit = _strides(whole)
        size = (whole.shape[2], self.count, whole.shape[3])
        found = whole.as_strided(size, (batch, layer - self.chunk * step, unit), self._offset(whole, self.start - 1))
        found = found.to(initial.dtype, copy=True)
        if self.start == (self.count - 1) * self.chunk:  # the uppermost layer begins with its first step
            found[:, -1] = initial[:, self.last - 1]
        return found

    def _offset(self, whole: Tensor, step: int) -> int:
        layer, of_step, *_ = _strides(whole)
        return int(whole.storage_offset()) + self.first * layer + step * of_step

    def above(self, layer: int) -> Diagonal:
        """The part above a layer."""
        behind = max(0, layer + 1 - self.first)
        first, start = self.first + behind, self.start - behind * self.chunk
        return Diagonal(first, max(self.last, first), start, self.chunk)

    def below(self, layer: int) -> Diagonal:
        """The part below a layer."""
        return self._replace(last=max(self.first, min(self.last, layer)))

    def shifted(self, layers: int) -> Diagonal:
        """The same steps of the layers so many above."""
        return self._replace(first=self.first + layers, last=self.last + layers)


def _strides(whole: Tensor) -> list[int]:
    """Of a contiguous tensor, by its shape: along axes of size 1, as of T or B, `Tensor.stride` may give anything."""
    assert whole.is_contiguous()
    found = [1]
    for size in reversed(whole.shape[1:]):
        found.append(found[-1] * size)
    return found[::-1]


def diagonals(layers: int, steps: int, chunk: int) -> list[Diagonal]:
    """All chunks of all layers, in an order in which each finds what it needs; the odd steps come first, layer by
    layer."""
    odd, count = steps % chunk, steps // chunk
    found = [Diagonal(layer, layer + 1, 0, odd) for layer in range(layers) if odd]
    for number in range(count + layers - 1):
        first = max(0, number - count + 1)
        found.append(Diagonal(first, min(layers, number + 1), odd + (number - first) * chunk, chunk))
    return found


def possible(problem: Problem) -> bool:
    """Whether a stack can run so, and its device may gain by it."""
    plain = not (problem.proj_size or problem.norm or problem.transforms or problem.dtype.is_complex)
    return problem.layers > 1 and problem.N == 1 and plain and idles(problem.device)


def idles(device: Device) -> bool:
    """Whether one layer may leave a part of the device idle. On a CPU a product takes all of it."""
    return device.is_gpu


def launched(problem: Problem, steps: int, layers: int) -> Problem:
    """What a launch of so many steps and layers of a stack is to a backend."""
    flags = problem.flags or problem.lengths
    one = replace(problem, T=steps, N=layers, layers=1, reverse="0" * layers)
    return replace(one, flags=flags, lengths=False, packed=False)


def plan(problem: Problem, cost: Callable[[Problem], float]) -> tuple[int, float]:
    """The chunk that takes least by a cost model, and the seconds that it predicts.

    A launch takes a + b·steps, so K chunks take (K + L - 1)(a + b·T/K), which is least at K = √(b·T·(L - 1)/a).
    """
    layers, total = problem.layers, problem.T
    single = replace(problem, layers=1)
    bare = replace(problem, I=0)  # the products of the input are the same, however they are cut
    products = layers * (cost(single) - cost(replace(single, I=0)))
    one, whole = (cost(launched(bare, steps, layers)) for steps in (1, total + 1))
    step = (whole - one) / total
    start = BETWEEN + max(one - step, 0.0)
    count = round(math.sqrt(step * total * (layers - 1) / start))
    if start + step < HOST:
        count = min(count, int(step * total / (HOST - start)))
    chunk = total // min(max(1, count), total)
    odd, count = total % chunk, total // chunk
    seconds = products + (count + layers - 1) * max(HOST, start + step * chunk)
    if odd:
        seconds += layers * max(HOST, BETWEEN + cost(launched(bare, odd, 1)))
    return chunk, seconds
