# SPDX-License-Identifier: Apache-2.0
"""What a warp executes in a step of a time loop: which way it takes at each branch.

A branch goes where it goes in all steps but a few; what it skips says which that is. Where no rule speaks the path is
`Lost`, rather than guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.simulating.exchange import awaits, publishes
from benchmarks.simulating.instructions import Instruction, loops

LONGEST = 50_000  # instructions of a step
SLOW = 14  # instructions around the call of a division's slow path
SPIN = 40  # around a look at the clock
WORK = frozenset({"LDS", "STG", "MUFU"})  # what a warp does for units of its own
ALL = frozenset({"HMMA", "IMMA", "BAR"})  # what every warp does


class Lost(ValueError):
    """The simulator cannot follow; the message says where."""


@dataclass(frozen=True)
class Turn:
    """How a warp goes through a time loop.

    Attributes:
        loop: the loop, with the branch at its end.
        owner: it has units of its own after the barrier.
        rounds: of an inner loop that multiplies, if there is one.
        joins: barriers of one product, each of which brings some of the sums.
        joined: of them, those that bring sums of its units.
    """

    loop: range
    owner: bool = True
    rounds: int | None = None
    joins: int = 1
    joined: frozenset[int] = frozenset([0])


def time_loop(code: Sequence[Instruction]) -> range:
    """The shortest of the loops that hold all matrix instructions or, without any, of those with a barrier; without
    these too the longest. Of the former first those of more than products: of a step, not of a part of its depth.

    Raises:
        Lost: there is no loop.
    """
    each = loops(code)
    if not each:
        raise Lost("the kernel has no loop")
    products = [sum(code[k].base == "HMMA" for k in loop) for loop in each]
    if max(products):
        whole = [loop for loop, count in zip(each, products, strict=True) if count == max(products)]
        return min([loop for loop in whole if any(_ends(code[k]) for k in loop)] or whole, key=len)
    return min((loop for loop in each if any(code[k].base == "BAR" for k in loop)), key=len, default=each[0])


def _ends(instruction: Instruction) -> bool:
    """Whether warps meet there or others get words: a step's end. An error is stored if there is one."""
    return instruction.base == "BAR" or (publishes(instruction) and not instruction.predicate)


def straight(code: Sequence[Instruction], loop: range) -> list[int]:
    """A loop without branches of its own but those that are hardly ever taken.

    Raises:
        Lost: a branch leads back within the loop.
    """
    for index in loop[:-1]:
        target = code[index].target
        if code[index].base == "BRA" and target is not None and loop.start < target <= index:
            raise Lost(f"a loop within the time loop, at {code[index].address:#x}")
    return through(code, Turn(loop))


def through(code: Sequence[Instruction], turn: Turn) -> list[int]:
    """The indices of what a warp executes in a step, in order.

    Raises:
        Lost: an indirect branch, a call, or a step that does not end.
    """
    path, index, met = [], turn.loop.start, 0
    left: dict[int, int] = {}  # rounds of each loop of products
    while index != turn.loop[-1]:
        if len(path) > LONGEST:
            raise Lost(f"no end of the step, at {code[index].address:#x}")
        instruction = code[index]
        path.append(index)
        met += instruction.base == "BAR"
        index += 1
        if instruction.base in ("BRX", "JMX", "CALL", "RET") and not instruction.predicate:
            raise Lost(f"{instruction.base} at {instruction.address:#x}")
        target = instruction.target
        if instruction.base != "BRA" or target is None:
            continue
        if target < index:
            if _multiplies(code, target, index):
                if turn.rounds is None:
                    raise Lost(f"a loop of products within the time loop, at {instruction.address:#x}")
                left[index] = left.get(index, turn.rounds) - 1
                index = target if left[index] > 0 else index
        elif _taken(code, path[-1], turn, met):
            index = target
    return [*path, turn.loop[-1]]


def rounds(code: Sequence[Instruction], loop: range, total: int, operation: str = "HMMA") -> int | None:
    """How often inner loops go round, of so many instructions of the products that a warp executes in a step; None
    without. Beside fused multiply-adds of the products there are a few others, of the activations.

    Raises:
        Lost: it is no whole number.
    """
    inner = [k for each in loops(code) if loop.start < each.start and each.stop < loop.stop for k in each]
    within = sum(code[k].base == operation for k in set(inner))
    if not within:
        return None
    outside = sum(code[k].base == operation for k in loop) - within
    count, rest = divmod(total - outside, within)
    if operation == "FFMA" and 2 * rest > within:
        count, rest = count + 1, 0
    if rest or count < 1:
        raise Lost(f"{outside} instructions {operation} and loops of {within} make no {total} a step")
    return count


def complete(code: Sequence[Instruction], path: Sequence[int], total: int, operation: str = "HMMA") -> None:
    """Holds a path to all of a step's products.

    Raises:
        Lost: it took a wrong way and missed some.
    """
    count = sum(code[index].base == operation for index in path)
    if count < total or (operation == "HMMA" and count > total):
        raise Lost(f"a way with {count} instructions {operation}, where a step has {total}")


def _taken(code: Sequence[Instruction], index: int, turn: Turn, met: int) -> bool:
    """Whether a warp that does what all others do takes a branch forward."""
    branch = code[index]
    assert branch.target is not None
    if "DIV" in branch.op:  # for lanes that have parted: they have not
        return False
    if not branch.predicate and not branch.operands.lstrip("!").startswith(("P", "UP")):
        return True
    if branch.target > turn.loop[-1]:
        return False
    region = code[index + 1 : branch.target]
    if any(each.op.startswith("SYNCS.PHASECHK") for each in region):
        return False
    if _is_rare(region) or _polls_again(code, range(index + 1, branch.target)):
        return True
    bases = {each.base for each in region}
    if turn.joins > 1 and met and bases & WORK == {"LDS"} and not bases & ALL:
        return (met - 1) % turn.joins not in turn.joined
    return not turn.owner and met > 0 and bool(bases & WORK) and not bases & ALL


def _is_rare(region: Sequence[Instruction]) -> bool:
    """Skipped in nearly all steps: a slow path, the retiring of old words with its fence, a look at the clock."""
    bases = {each.base for each in region}
    if len(region) <= SLOW and "CALL" in bases:
        return True
    if "MEMBAR" in bases and not bases & {"MUFU", *ALL}:
        return True
    return len(region) <= SPIN and any(each.base == "CS2R" and "GLOBALTIMER" in each.operands for each in region)


def _polls_again(code: Sequence[Instruction], region: range) -> bool:
    """A loop that looks for words again: the first look had them, because it is taken to last until they are there.
    What looks outside of such a loop is a first look."""
    branches = ((code[k].target, k) for k in region if code[k].base == "BRA")
    backward = (range(target, k) for target, k in branches if target is not None and target < k)
    waiting = [loop for loop in backward if not _multiplies(code, loop.start, loop.stop)]
    looks = [k for k in region if awaits(code[k])]
    return bool(looks) and all(any(k in loop for loop in waiting) for k in looks)


def _multiplies(code: Sequence[Instruction], begin: int, end: int) -> bool:
    """Whether an inner loop is one of products, as opposed to one that waits."""
    return any(each.base in ("HMMA", "IMMA", "FFMA") for each in code[begin:end])


def regions(code: Sequence[Instruction], path: Sequence[int]) -> Iterator[int]:
    """The branches of a path between a barrier and the stores that publish: each is a region that waits by itself."""
    branches: list[int] | None = None
    for index in path:
        base = code[index].base
        if base == "BAR":
            branches = []
        elif base == "BRA" and branches is not None:
            branches.append(index)
        elif publishes(code[index]) and branches is not None:
            yield from branches
            branches = None


def early_waits(code: Sequence[Instruction], path: Sequence[int]) -> Iterator[int]:
    """Instructions that wait for a load of this step before the first look for the others' words."""
    loading: set[int] = set()
    first = next((k for k, index in enumerate(path) if awaits(code[index])), 0)
    for index in path[:first]:
        instruction = code[index]
        if loading & set(instruction.waits):
            yield index
        loading -= set(instruction.waits)
        if instruction.base == "LDG":
            loading.add(instruction.writes)


def spills(code: Sequence[Instruction], path: Sequence[int]) -> int:
    """Accesses to local memory."""
    return sum(code[index].base in ("LDL", "STL") for index in path)
