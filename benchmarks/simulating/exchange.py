# SPDX-License-Identifier: Apache-2.0
"""Words that blocks publish for each other through L2, or through the shared memory of a cluster, as one block of many
alike sees them.

A strong store publishes and a strong load waits; in a cluster a store into other blocks' shared memory does, and the
look whether all of them have come. All blocks run the same code at the same time, so what arrives was published when
this block published its own, a hop ago. In a step the tiles publish in turn, once for each product: such stores in a
row are one publication, such loads in a row wait for one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from benchmarks.simulating.instructions import Instruction


class Word(NamedTuple):
    """What publishes or waits in a path: the publication that it belongs to, counted from the step's first."""

    stores: bool
    publication: int


def publishes(instruction: Instruction) -> bool:
    return instruction.base == "STAS" or (instruction.base == "STG" and ".STRONG" in instruction.op)


def awaits(instruction: Instruction) -> bool:
    return instruction.op.startswith("SYNCS.PHASECHK") or (instruction.base == "LDG" and ".STRONG" in instruction.op)


def words(code: Sequence[Instruction], path: Sequence[int], tiles: int) -> dict[int, Word]:
    """What publishes and what waits in a path, by its place; `tiles`: how many may look ahead in a step."""
    products = [place for place, index in enumerate(path) if code[index].base == "HMMA"]
    waits = [place for place, index in enumerate(path) if awaits(code[index])]
    turns = _turns(code, path)
    ahead = {place for place in waits if _until(turns, place, len(path)) < _until(products, place, len(path))}
    if tiles and products and ahead:
        return dict(_of_turns(code, path, turns, ahead, max(1, len(turns) // tiles)))
    return dict(_alternating(code, path))


def _alternating(code: Sequence[Instruction], path: Sequence[int]) -> Iterator[tuple[int, Word]]:
    counts, fresh = {True: -1, False: -1}, {True: True, False: True}
    for place, index in enumerate(path):
        if code[index].base == "BAR":
            fresh = {True: True, False: True}
        elif (stores := publishes(code[index])) or awaits(code[index]):
            counts[stores] += fresh[stores]
            fresh = {stores: False, not stores: True}
            yield place, Word(stores, counts[stores])


def _of_turns(
    code: Sequence[Instruction], path: Sequence[int], turns: Sequence[int], ahead: Collection[int], joins: int
) -> Iterator[tuple[int, Word]]:
    """Where tiles look ahead: waits are for the tile that takes its turn, but for the next one's if `ahead`."""
    firsts = publications(code, path)
    for place, index in enumerate(path):
        if publishes(code[index]):
            yield place, Word(True, sum(first <= place for first in firsts) - 1)
        elif awaits(code[index]):
            yield place, Word(False, sum(turn < place for turn in turns) // joins + (place in ahead))


def _turns(code: Sequence[Instruction], path: Sequence[int]) -> list[int]:
    """Where a tile's sums are joined, by one barrier or several, or, without barriers, where it publishes."""
    barriers = [place for place, index in enumerate(path) if code[index].base == "BAR"]
    matter = [place for place, index in enumerate(path) if _matters(code[index])]
    begun = bool(matter) and publishes(code[path[matter[0]]])  # the loop begins with a turn's end
    return barriers or publications(code, path)[begun:]


def publications(code: Sequence[Instruction], path: Sequence[int]) -> list[int]:
    """Where a path begins to publish: such stores in a row are one publication."""
    places = [k for k, index in enumerate(path) if _matters(code[index])]
    stores = [publishes(code[path[k]]) for k in places]
    return [k for k, (before, stored) in zip(places, pairwise([False, *stores]), strict=True) if stored and not before]


def _matters(instruction: Instruction) -> bool:
    return instruction.base == "BAR" or publishes(instruction) or awaits(instruction)


def _until(places: Sequence[int], place: int, length: int) -> int:
    """How far it is to the next of these places in a loop."""
    return min(((each - place) % length for each in places), default=length)


class Exchange:
    """When publications are there. `paths[w]` is what warp w executes in a step.

    Args:
        hop: cycles from a store through L2 to its sight in another block.
        hops: publications of a tile in a step, each of which waits for the one before.
    """

    def __init__(
        self, code: Sequence[Instruction], paths: Sequence[Sequence[int]], hop: float = 0.0, hops: int = 1
    ) -> None:
        self.hop = hop
        most = max(len(publications(code, path)) for path in paths)
        self.words = [words(code, path, most if hops == 1 else 0) for path in paths]
        self._missing: dict[int, int] = defaultdict(int)  # stores of a step's publication that are to come
        for each in self.words:
            for word in each.values():
                self._missing[word.publication] += word.stores
        self.publications = sum(count > 0 for count in self._missing.values())
        tiles = self.publications // hops
        early = any(next(iter(each.values())).stores for each in self.words if each)
        # A loop that begins with its stores waits for them within the same turn.
        self._behind = tiles - 1 if early else tiles
        self._stored: dict[int, int] = defaultdict(int)
        self._latest: dict[int, tuple[float, int]] = {}  # when the last of its stores so far arrives, and its issue
        self._there: dict[int, tuple[float, int]] = {}  # when each is there as a whole

    def wanted(self, warp: int, step: int, place: int) -> int:
        """The number of the publication that is waited for; below 0 it was there before the loop."""
        return step * self.publications + self.words[warp][place].publication - self._behind

    def arrival(self, number: int) -> tuple[float, int | None] | None:
        """When it arrives, and the issue that published it last; None: not yet known."""
        if number < 0:
            return 0.0, None
        return self._there.get(number)

    def publish(self, warp: int, step: int, place: int, arrival: float, issue: int) -> int | None:
        """Counts a store that arrives then; the number of the publication if that was its last one."""
        publication = self.words[warp][place].publication
        number = step * self.publications + publication
        self._stored[number] += 1
        self._latest[number] = max(self._latest.get(number, (0.0, issue)), (arrival, issue))
        if self._stored[number] < self._missing[publication]:
            return None
        self._there[number] = self._latest.pop(number)
        return number
