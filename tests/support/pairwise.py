# SPDX-License-Identifier: Apache-2.0
"""A choice of cases in which every two values of two axes meet."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from typing import Any


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
