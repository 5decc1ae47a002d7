# SPDX-License-Identifier: Apache-2.0
"""Transforms of a layer's call and their nestings, each written once over `Ways`: torch.func's, or plain autograd and
loops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from gpu_rnn import functional
from tests.support.loops import RECURRENCES, draw

T, B, I, H = 3, 2, 2, 3  # noqa: E741
MEMBERS = 2

Function = Callable[..., Any]


class Point(NamedTuple):
    """What a call takes."""

    x: Tensor
    hx: tuple[Tensor, ...]
    weights: list[Tensor]
    controls: dict[str, Any]

    def along(self, seed: int) -> Point:
        """A random direction, or another point, of the same shapes; with the same controls."""
        found = [draw(*t.shape, seed=seed + k, scale=0.5).to(t.dtype) for k, t in enumerate(tree_leaves(self[:3]))]
        return Point(*tree_unflatten(found, tree_flatten(self[:3])[1]), self.controls)

    def to(self, like: Tensor) -> Point:
        """The same values on the device of a tensor, and what is not bool or an integer in its dtype."""
        return tree_map(lambda t: t.to(like if t.is_floating_point() else like.device), self)


class Case(NamedTuple):
    """A cell, how it is stacked, and what steers it."""

    cell: str
    layers: int = 1
    bidirectional: bool = False
    controls: tuple[str, ...] = ()
    bias: bool = True

    @property
    def rows(self) -> int:
        return self.layers * (2 if self.bidirectional else 1)

    def point(self) -> Point:
        recurrence = RECURRENCES[self.cell]
        gates, directions = len(recurrence.gates) * H, 2 if self.bidirectional else 1
        shapes: list[tuple[int, ...]] = []
        for layer in range(self.layers):
            own: list[tuple[int, ...]] = [
                (gates, directions * H if layer else I),
                (gates, H),
                *[(gates,)] * (2 * self.bias),
            ]
            shapes += (own + [(len(recurrence.params), H)] * bool(recurrence.params)) * directions
        weights = [draw(*shape, seed=10 + k, scale=0.7) for k, shape in enumerate(shapes)]
        hx = tuple(draw(self.rows, B, H, seed=5 + k, scale=0.5) for k in range(len(recurrence.states)))
        return Point(draw(T, B, I, seed=1), hx, weights, self.controls_at(0))

    def controls_at(self, seed: int) -> dict[str, Any]:
        """The controls, drawn."""
        recurrence, rows = RECURRENCES[self.cell], self.rows
        states = len(recurrence.states)
        every = {
            "mask": lambda: draw(T, B, seed=seed + 30) > -0.5,
            "lengths": lambda: torch.tensor([[3, 1], [2, 3], [0, 2]])[seed % 3],
            "resets": lambda: draw(T, B, seed=seed + 31) > 0.3,
            "reset_state": lambda: tuple(draw(rows, B, H, seed=seed + 32 + k) for k in range(states)),
            "recurrent_mask": lambda: 2.0 * (draw(rows, B, 1, H, seed=seed + 36) > 0),
            "zone": lambda: draw(states, T, rows, B, H, seed=seed + 37) > 0.6,
        }
        return {name: every[name]() for name in self.controls}

    def call(self, backend: str) -> Function:
        """x, hx, weights, controls -> y and the final states in one vector."""
        options = {
            "num_layers": self.layers,
            "bidirectional": self.bidirectional,
            "bias": self.bias,
            "backend": backend,
        }

        def function(x: Tensor, hx: Any, weights: Any, controls: Any) -> Tensor:
            given = {name: c.to(x.dtype) if name == "recurrent_mask" else c for name, c in controls.items()}
            if "reset_state" in given:
                given["reset_state"] = tuple(s.to(x.dtype) for s in given["reset_state"])
            y, final = functional.rnn(x, tuple(hx), list(weights), RECURRENCES[self.cell], **options, **given)
            return torch.cat([y.flatten(), *(state.flatten() for state in final)])

        return function


class Plain:
    """What transforms mean: loops over members and rows of plain autograd."""

    @staticmethod
    def grad(function: Function, argnums: Any = 0) -> Function:
        def found(*args: Any) -> Any:
            leaves, tree = tree_flatten(args)
            with torch.enable_grad():
                own = [
                    t.view_as(t) if t.requires_grad else t.detach().requires_grad_() if _real(t) else t for t in leaves
                ]
                given = tree_unflatten(own, tree)
                wanted = given[argnums] if isinstance(argnums, int) else tuple(given[k] for k in argnums)
                flat, kind = tree_flatten(wanted)
                value = function(*given)
                grads = torch.autograd.grad(value, flat, create_graph=True, allow_unused=True, materialize_grads=True)
            return tree_unflatten(list(grads), kind)

        return found

    @staticmethod
    def vjp(function: Function, *args: Any) -> tuple[Any, Function]:
        return function(*args), lambda v: Plain.grad(lambda *a: (function(*a) * v).sum(), tuple(range(len(args))))(
            *args
        )

    @staticmethod
    def jacrev(function: Function) -> Function:
        def found(x: Tensor) -> Tensor:
            count = function(x).numel()
            rows = [Plain.grad(lambda x, k=k: function(x).flatten()[k])(x) for k in range(count)]
            return torch.stack(rows).view(*function(x).shape, *x.shape)

        return found

    jacfwd = jacrev

    @staticmethod
    def jvp(function: Function, args: Sequence[Any], along: Sequence[Any]) -> tuple[Any, Any]:
        """As the derivative of the linear map of vjp."""
        value = function(*args)
        zero = torch.zeros_like(value)

        def pairing(v: Tensor) -> Tensor:
            grads = tree_leaves(Plain.vjp(function, *args)[1](v))
            return sum((g * d).sum() for g, d in zip(grads, tree_leaves(list(along)), strict=True))

        return value, Plain.grad(pairing)(zero)

    @staticmethod
    def vmap(function: Function, in_dims: Any = 0) -> Function:
        def found(*args: Any) -> Any:
            dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(args)
            size = next(t.shape[d] for a, d in zip(args, dims, strict=True) if d is not None for t in tree_leaves(a))
            each = []
            for k in range(size):
                own = [
                    a if d is None else tree_map(lambda t, d=d, k=k: t.select(d, k), a)
                    for a, d in zip(args, dims, strict=True)
                ]
                each.append(tree_flatten(function(*own)))
            return tree_unflatten([torch.stack(parts) for parts in zip(*(e[0] for e in each), strict=True)], each[0][1])

        return found


def _real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def members(case: Case, p: Point) -> Point:
    """So many points side by side, along a new first axis."""
    each = [p, *(p.along(100 * k)._replace(controls=case.controls_at(k)) for k in range(1, MEMBERS))]
    return tree_map(lambda *ts: torch.stack(ts), *[tuple(e) for e in each])


def _loss(f: Function) -> Function:
    return lambda *args: f(*args).sin().sum()


def _of_x(f: Function, p: Point) -> Function:
    return lambda x: f(x, *p[1:])


def _some(f: Function) -> Function:
    """Of a Jacobian's rows a few of every step and of the final states: each is a recurrence of its own."""
    return lambda *args: f(*args)[::9]


# name -> (the transforms, the call as a function, its point, that many points) -> tensors. A name lists what is
# applied, the outermost first; after a colon, to which argument.
WAYS: dict[str, Callable[[Any, Function, Point, Point], Any]] = {
    "grad": lambda t, f, p, m: t.grad(_loss(f), (0, 1, 2))(*p),
    "jacrev: x": lambda t, f, p, m: t.jacrev(_of_x(_some(f), p))(p.x),
    "jacrev: hx": lambda t, f, p, m: t.jacrev(lambda h: _some(f)(p.x, (h, *p.hx[1:]), *p[2:]))(p.hx[0]),
    "jacrev: weights": lambda t, f, p, m: t.jacrev(lambda w: _some(f)(*p[:2], [p.weights[0], w, *p.weights[2:]], p[3]))(
        p.weights[1]
    ),
    "jacfwd: x": lambda t, f, p, m: t.jacfwd(_of_x(_some(f), p))(p.x),
    "jvp": lambda t, f, p, m: t.jvp(lambda *a: f(*a, p[3]), p[:3], p.along(7)[:3]),
    "vmap: x": lambda t, f, p, m: t.vmap(f, (0, None, None, None))(m.x, *p[1:]),
    "vmap: hx": lambda t, f, p, m: t.vmap(f, (None, 0, None, None))(p.x, m.hx, *p[2:]),
    "vmap: weights": lambda t, f, p, m: t.vmap(f, (None, None, 0, None))(*p[:2], m.weights, p[3]),
    "vmap: controls": lambda t, f, p, m: t.vmap(lambda c, x: f(x, *p[1:3], c), (0, 0))(m.controls, m.x),
    "vmap: all": lambda t, f, p, m: t.vmap(f)(*m),
    "vmap vjp": lambda t, f, p, m: t.vmap(t.vjp(lambda *a: f(*a, p[3]), *p[:3])[1])(torch.stack([f(*p), f(*p).cos()])),
    "vmap grad: x": lambda t, f, p, m: t.vmap(t.grad(_loss(f), (0, 1, 2)), (0, None, None, None))(m.x, *p[1:]),
    "vmap grad: all": lambda t, f, p, m: t.vmap(t.grad(_loss(f), (0, 1, 2)))(*m),
    "vmap jacrev": lambda t, f, p, m: t.vmap(t.jacrev(_of_x(_some(f), p)))(m.x),
    "vmap jvp": lambda t, f, p, m: t.vmap(lambda x, v: t.jvp(_of_x(f, p), (x,), (v,)))(m.x, m.x.cos()),
    "vmap vmap": lambda t, f, p, m: t.vmap(lambda x: t.vmap(f, (None, None, 0, None))(x, p.hx, m.weights, p[3]))(m.x),
    "grad vmap": lambda t, f, p, m: t.grad(lambda w: t.vmap(_loss(f), (0, None, None, None))(m.x, p.hx, w, p[3]).sum())(
        p.weights
    ),
    "jacrev vmap": lambda t, f, p, m: t.jacrev(t.vmap(_of_x(_some(f), p)))(m.x),
    "jvp vmap": lambda t, f, p, m: (
        t.jvp(t.vmap(f, (0, None, None, None)), (m.x, *p[1:]), (m.x.cos(), *p.along(3)[1:3], p[3]))
        if not p.controls
        else t.jvp(t.vmap(lambda x: f(x, *p[1:])), (m.x,), (m.x.cos(),))
    ),
    "grad grad": lambda t, f, p, m: t.grad(lambda *a: _norm(t.grad(_loss(f), (0, 1, 2))(*a, p[3])), (0, 1, 2))(*p[:3]),
    "grad jvp": lambda t, f, p, m: t.grad(lambda x: t.jvp(_of_x(f, p), (x,), (p.x.cos(),))[1].sin().sum())(p.x),
    "jvp grad": lambda t, f, p, m: t.jvp(t.grad(lambda x: _loss(f)(x, *p[1:])), (p.x,), (p.x.cos(),)),
    "hessian": lambda t, f, p, m: t.jacfwd(t.jacrev(lambda x: _loss(f)(x, *p[1:])))(p.x),
    "jacrev jacrev": lambda t, f, p, m: t.jacrev(t.jacrev(lambda x: _loss(f)(x, *p[1:])))(p.x),
    "jacrev jacfwd": lambda t, f, p, m: t.jacrev(t.jacfwd(lambda x: _loss(f)(x, *p[1:])))(p.x),
    "jacfwd jacfwd": lambda t, f, p, m: t.jacfwd(t.jacfwd(lambda x: _loss(f)(x, *p[1:])))(p.x),
    "vmap hessian": lambda t, f, p, m: t.vmap(t.jacfwd(t.jacrev(lambda x: _loss(f)(x, *p[1:]))))(m.x),
    "grad vmap grad": lambda t, f, p, m: t.grad(
        lambda w: _norm(t.vmap(t.grad(_loss(f)), (0, None, None, None))(m.x, p.hx, w, p[3]))
    )(p.weights),
}


def _norm(tensors: Any) -> Tensor:
    return sum((t * t).sum() for t in tree_leaves(tensors))


CASES = {
    "lstm both ways": Case("lstm", bidirectional=True),
    "rnn": Case("rnn"),
    "gru stack": Case("gru", layers=2),
    "lstm lengths": Case("lstm", controls=("lengths",), bidirectional=True),
    "gru mask resets": Case("gru", controls=("mask", "resets", "reset_state")),
    "minimal drop zone": Case("minimal", controls=("recurrent_mask", "zone")),
    "gru before": Case("gru_reset_before", bias=False),
}


# Those in which kernels see what no other test shows them: expanded and folded axes, rows of a Jacobian, both passes
# mapped.
QUICK = (
    *("grad", "jacrev: x", "vmap: all", "vmap vjp", "vmap grad: x", "vmap grad: all"),
    *("vmap vmap", "jacrev vmap", "jvp vmap", "grad grad", "hessian", "vmap hessian"),
)


def turns(cases: Sequence[str] = tuple(CASES)) -> list[Any]:
    """All pairs of a way and a case; the cases take turns in the quick ways, all other pairs are slow."""
    now = {(way, cases[k % len(cases)]) for k, way in enumerate(QUICK)}
    pairs = [(way, case) for way in WAYS for case in cases]
    return [pytest.param(*pair, marks=() if pair in now else pytest.mark.slow) for pair in pairs]


def found(case: Case, way: str, ways: Any, backend: str, like: Tensor) -> list[Tensor]:
    """What a nesting gives on a backend, in a dtype on a device."""
    p = case.point()
    args = case.call(backend), p.to(like), Point(*members(case, p)).to(like)
    return [t.detach() for t in tree_leaves(WAYS[way](ways, *args))]


def assert_right(case: Case, way: str, backend: str, dtype: torch.dtype, tolerance: float, device: str = "cpu") -> None:
    """torch.func on a backend beside plain autograd and loops over the reference in float64."""
    actual = found(case, way, torch.func, backend, torch.empty(0, dtype=dtype, device=device))
    expected = found(case, way, Plain, "reference", torch.empty(0, dtype=torch.float64))
    for value, truth in zip(actual, expected, strict=True):
        assert value.shape == truth.shape and value.dtype == dtype
        scale = max(truth.abs().max().item(), 1.0)
        torch.testing.assert_close(value.double().cpu(), truth, rtol=0, atol=tolerance * scale)
