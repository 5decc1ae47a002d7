# SPDX-License-Identifier: Apache-2.0
"""Random cells: a tree of operations that is both a user's step function and, on whole vectors, the formula by hand.

Nothing of a tree is written twice, so a wrong number is the library's: its tracing, its derivative or its kernels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_rnn.recurrence import Recurrence

Node = tuple[Any, ...]  # (operation, *arguments); of a leaf (the name it stands under, its own name)

# Each stays within a few units however often it is fed back, and divides by nothing near 0.
SMOOTH: dict[str, tuple[int, Callable[..., Any]]] = {
    "tanh": (1, torch.tanh),
    "sigmoid": (1, torch.sigmoid),
    "sin": (1, torch.sin),
    "cos": (1, torch.cos),
    "erf": (1, torch.erf),
    "softplus": (1, F.softplus),
    "silu": (1, lambda a: F.silu(torch.tanh(a))),
    "gelu": (1, lambda a: F.gelu(torch.sin(a))),
    "bell": (1, lambda a: torch.exp(-(a * a))),
    "root": (1, lambda a: torch.sqrt(F.softplus(a) + 0.1)),
    "log": (1, lambda a: torch.log(F.softplus(a) + 0.5)),
    "log1p": (1, lambda a: torch.log1p(a * a)),
    "expm1": (1, lambda a: torch.expm1(torch.sin(a))),
    "neg": (1, lambda a: -a),
    "add": (2, lambda a, b: a + b),
    "sub": (2, lambda a, b: a - b),
    "mul": (2, lambda a, b: a * b),
    "div": (2, lambda a, b: a / (1 + b * b)),
}
WITH_KINKS = SMOOTH | {
    "relu": (1, F.relu),
    "abs": (1, torch.abs),
    "elu": (1, F.elu),
    "leaky_relu": (1, F.leaky_relu),
    "hard_tanh": (1, F.hardtanh),
    "softsign": (1, F.softsign),
    "clamp": (1, lambda a: a.clamp(-0.7, 0.4)),
    "floor": (1, lambda a: torch.floor(3 * torch.tanh(a))),
    "maximum": (2, torch.maximum),
    "minimum": (2, torch.minimum),
    "where": (3, lambda a, b, c: torch.where(a > 0.1, b, c)),
    "sign": (1, torch.sign),
    "either": (3, lambda a, b, c: torch.where((a > 0.1) | (b <= c), b, c)),
    "both": (3, lambda a, b, c: torch.where((a >= 0.1) & ~(b < c), b, c)),
    "equal": (3, lambda a, b, c: torch.where((torch.sign(a) == 1) | (torch.sign(b) != 1), b, c)),
}


@dataclass(frozen=True)
class Stage:
    """Gates, and what is returned: the new states, or the next product's input and what is handed on."""

    gates: tuple[str, ...]
    results: tuple[Node, ...]


@dataclass(frozen=True)
class Formula:
    """A cell of one or two products a step."""

    stages: tuple[Stage, ...]
    states: tuple[str, ...]
    initial: tuple[float, ...]
    params: tuple[str, ...]

    @property
    def gates(self) -> tuple[str, ...]:
        return tuple(gate for stage in self.stages for gate in stage.gates)

    def recurrence(self) -> Recurrence:
        """As a user writes it."""
        stages = [(stage.gates, _step(stage)) for stage in self.stages]
        states = dict(zip(self.states, self.initial, strict=True))
        if len(stages) == 1:
            return Recurrence(stages[0][1], gates=stages[0][0], states=states, params=self.params, name="drawn")
        return Recurrence(stages, states=states, params=self.params, name="drawn")

    def by_hand(
        self, x: Tensor, state: list[Tensor], product: Callable[..., Tensor], weights: dict[str, Tensor]
    ) -> list[Tensor]:
        """A step of `options_by_hand`: all units of a row at once."""
        count = len(self.gates)
        params = weights["weight_peephole"].unbind(0) if self.params else ()
        names = {
            "x": _named(self.gates, x.chunk(count)),
            "s": _named(self.states, state),
            "p": _named(self.params, params),
        }
        entering, handed_on = state[0], []
        for stage in self.stages:
            names |= {"r": _named(self.gates, product(entering).chunk(count)), "v": handed_on}
            entering, *handed_on = [evaluate(node, names).expand_as(state[0]) for node in stage.results]
        return [entering, *handed_on]


def _named(names: Sequence[str], values: Sequence[Tensor]) -> SimpleNamespace:
    return SimpleNamespace(**dict(zip(names, values, strict=True)))


def _step(stage: Stage) -> Callable[..., Any]:
    def step(x: Any, r: Any, s: Any, p: Any = None, values: Any = ()) -> Any:
        names = {"x": x, "r": r, "s": s, "p": p, "v": values}
        found = tuple(evaluate(node, names) for node in stage.results)
        return found[0] if len(found) == 1 else found

    return step


def evaluate(node: Node, names: dict[str, Any]) -> Any:
    """A tree's value, of scalars that are traced or of vectors."""
    kind, *arguments = node
    if kind == "number":
        return arguments[0]
    if kind in ("x", "r", "s", "p"):
        return getattr(names[kind], arguments[0])
    if kind == "v":
        return names["v"][arguments[0]]
    return WITH_KINKS[kind][1](*(evaluate(argument, names) for argument in arguments))


def draw(rng: random.Random, smooth: bool) -> Formula:
    """A cell of one to four gates, one to three states, up to two parameters, now and then two products a step."""
    gates = [f"g{k}" for k in range(rng.randint(1, 4))]
    states = tuple("hcd"[: rng.randint(1, 3)])
    params = tuple("pq"[: rng.choice((0, 0, 1, 2))])
    first = rng.randint(1, len(gates) - 1) if len(gates) > 1 and rng.random() < 0.25 else len(gates)
    always: list[Node] = [*(("s", name) for name in states), *(("p", name) for name in params)]
    stages, handed_on = [], 0
    for own, last in ((gates[:first], first == len(gates)), (gates[first:], True)):
        if not own:
            break
        leaves = [*map(_gate, [rng] * len(own), own), *always, *(("v", k) for k in range(handed_on))]
        handed_on = len(states) - 1 if last else rng.randint(0, 2)
        stages.append(Stage(tuple(own), tuple(_bounded(rng, leaves, smooth) for _ in range(1 + handed_on))))
    return Formula(tuple(stages), states, tuple(rng.choice((0.0, 0.0, 0.5, -1.0)) for _ in states), params)


def _gate(rng: random.Random, name: str) -> Node:
    """Input part and product of a gate, mostly as their sum: what is saved of others differs."""
    x, r = ("x", name), ("r", name)
    return rng.choice([("add", x, r)] * 4 + [("mul", ("sigmoid", x), r), ("sub", r, x), x, r])


def _bounded(rng: random.Random, leaves: Sequence[Node], smooth: bool) -> Node:
    """A tree whose values stay bounded: mixed by a gate, or cut."""
    tree = _tree(rng, leaves, rng.randint(1, 3), smooth)
    cut = (rng.choice(("tanh", "sigmoid", "sin")), tree)
    if rng.random() < 0.5:
        return cut
    keep = ("sigmoid", _tree(rng, leaves, 1, smooth))
    return ("add", ("mul", keep, rng.choice(leaves)), ("mul", ("sub", ("number", 1.0), keep), cut))


def _tree(rng: random.Random, leaves: Sequence[Node], depth: int, smooth: bool) -> Node:
    if depth == 0:
        return rng.choice(leaves)
    operations = SMOOTH if smooth else WITH_KINKS
    name = rng.choice([*operations])
    arguments = [_tree(rng, leaves, depth - 1, smooth) for _ in range(operations[name][0])]
    if name in ("add", "mul") and rng.random() < 0.2:
        arguments[1] = ("number", round(rng.uniform(-1.5, 1.5), 2))
    return (name, *arguments)
