# SPDX-License-Identifier: Apache-2.0
"""Choices of cases: those in which every two values of two axes meet, and those that a quick run keeps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest


def pairwise(*axes: Sequence[Any], candidates: int = 200) -> list[tuple[Any, ...]]:
    """Greedy and reproducible: of random candidates the one that brings most new pairs together."""
    rng = random.Random(0)
    places = [(i, j) for i in range(len(axes)) for j in range(i)]
    missing = {(i, a, j, b) for i, j in places for a, b in product(range(len(axes[i])), range(len(axes[j])))}

    def pairs(case: tuple[int, ...]) -> set[tuple[int, int, int, int]]:
        return {(i, case[i], j, case[j]) for i, j in places}

    chosen = []
    while missing:
        i, a, j, b = min(missing)  # at least one new pair each time
        drawn = [[rng.randrange(len(axis)) for axis in axes] for _ in range(candidates)]
        for case in drawn:
            case[i], case[j] = a, b
        best = max(map(tuple, drawn), key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        chosen.append(tuple(axis[k] for axis, k in zip(axes, best, strict=True)))
    return chosen


def spread(cases: Sequence[tuple[Any, ...]], every: int = 3, apart: bool = False) -> list[Any]:
    """One case in `every`, drawn once and for all, and the first with each value they lack; the others are slow.

    `apart`: each part of a case is an argument of its own.
    """
    kept = set(random.Random(0).sample(range(len(cases)), len(cases) // every))
    seen = {part for number in kept for part in enumerate(cases[number])}
    marked = []
    for number, case in enumerate(cases):
        marks = [] if number in kept or set(enumerate(case)) - seen else [pytest.mark.slow]
        seen.update(enumerate(case) if not marks else ())
        marked.append(pytest.param(*(case if apart else [case]), marks=marks))
    return marked
