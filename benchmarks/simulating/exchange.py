# SPDX-License-Identifier: Apache-2.0
"""Words that blocks publish for each other through L2, as one block of many alike sees them.

A strong store publishes, a strong load waits. All blocks run the same code at the same time, so what arrives was
published when this block published its own, a hop ago. In a step the tiles publish in turn: strong stores in a row are
one publication, strong loads in a row wait for one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.simulating.instructions import Instruction


class Word(NamedTuple):
    """A strong load or store of a path: the publication that it belongs to, counted from the step's first."""

    stores: bool
    publication: int


def strong(instruction: Instruction) -> bool:
    return ".STRONG" in instruction.op and instruction.base in ("LDG", "STG")


def words(code: Sequence[Instruction], path: Sequence[int]) -> dict[int, Word]:
    """The strong loads and stores of a path, by their place in it."""
    return dict(_words(code, path))


def _words(code: Sequence[Instruction], path: Sequence[int]) -> Iterator[tuple[int, Word]]:
    counts, fresh = {True: -1, False: -1}, {True: True, False: True}
    for place, index in enumerate(path):
        if code[index].base == "BAR":
            fresh = {True: True, False: True}
        elif strong(code[index]):
            stores = code[index].base == "STG"
            counts[stores] += fresh[stores]
            fresh = {stores: False, not stores: True}
            yield place, Word(stores, counts[stores])


class Exchange:
    """When publications are there. `paths[w]` is what warp w executes in a step.

    Args:
        hop: cycles from a store to its sight in another block.
    """

    def __init__(self, code: Sequence[Instruction], paths: Sequence[Sequence[int]], hop: float) -> None:
        self.hop = hop
        self.words = [words(code, path) for path in paths]
        self._missing: dict[int, int] = defaultdict(int)  # stores of a step's publication that are to come
        for each in self.words:
            for word in each.values():
                self._missing[word.publication] += word.stores
        self.tiles = sum(count > 0 for count in self._missing.values())
        early = any(next(iter(each.values())).stores for each in self.words if each)
        # A loop that begins with its stores waits for them within the same turn.
        self._behind = self.tiles - 1 if early else self.tiles
        self._stored: dict[int, int] = defaultdict(int)
        self._there: dict[int, tuple[float, int]] = {}  # when each was published whole, and by which issue

    def wanted(self, warp: int, step: int, place: int) -> int:
        """The number of the publication that a strong load waits for; below 0 it was there before the loop."""
        return step * self.tiles + self.words[warp][place].publication - self._behind

    def arrival(self, number: int) -> tuple[float, int | None] | None:
        """When it arrives, and the issue that published it last; None: not yet known."""
        if number < 0:
            return 0.0, None
        if number not in self._there:
            return None
        time, issue = self._there[number]
        return time + self.hop, issue

    def publish(self, warp: int, step: int, place: int, time: float, issue: int) -> int | None:
        """Counts a strong store; the number of the publication if that was its last one."""
        publication = self.words[warp][place].publication
        number = step * self.tiles + publication
        self._stored[number] += 1
        if self._stored[number] < self._missing[publication]:
            return None
        self._there[number] = time, issue
        return number
