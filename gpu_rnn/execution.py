# SPDX-License-Identifier: Apache-2.0
"""The two passes of one layer on the backend that dispatch chooses, and the reference's derivatives of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import record_function

from gpu_rnn import dispatch, products, reference
from gpu_rnn.problem import Problem, rnn_precision
from gpu_rnn.program import Program
from gpu_rnn.recurrence import Recurrence
from gpu_rnn.reference import Result, Weights


class Options(NamedTuple):
    """The options of a call; they travel as one string, such as ``auto 01 save``."""

    backend: str = "auto"
    reverse: str = "0"
    save: bool = False

    def encode(self) -> str:
        return f"{self.backend} {self.reverse} {'save' if self.save else 'drop'}"

    @staticmethod
    @lru_cache(maxsize=256)
    def decode(text: str) -> Options:
        backend, reverse, save = text.split()
        return Options(backend, reverse, save == "save")


class LoopGradients(NamedTuple):
    """What a backend's backward loop returns."""

    d_gates: Tensor  # (T, B, N, G, H)
    d_recurrent: Tensor  # (T, B, N, number of split gates, H)
    d_states: list[Tensor]  # before the first step, (B, N, ·)
    d_params: Tensor | None  # (N, number of params, H)
    d_w_hr: Tensor | None = None  # (N, P, H)


@lru_cache(maxsize=256)
def _recurrence(text: str) -> Recurrence:
    return Recurrence.from_program(text)


def describe(
    text: str, options: Options, x: Tensor, weights: Weights, lengths: Tensor | None, direction: str
) -> Problem:
    """One layer as dispatch sees it."""
    n, _, hidden, width = weights.w_hh.shape
    return Problem(
        recurrence=_recurrence(text),
        T=x.shape[0],
        B=x.shape[1],
        N=n,
        I=x.shape[-1],
        H=hidden,
        dtype=x.dtype,
        device_type=x.device.type,
        device=dispatch.device_of(x.device),
        direction=direction,
        precision=rnn_precision(),
        lengths=lengths is not None,
        reverse=options.reverse,
        proj_size=width if weights.w_hr is not None else 0,
    )


def run(
    text: str, options: Options, x: Tensor, weights: Weights, lengths: Tensor | None, states: Sequence[Tensor]
) -> Result:
    """The forward pass of one layer on the backend that dispatch chooses."""
    program = Program.parse(text)
    problem = describe(text, options, x, weights, lengths, "training" if options.save else "inference")
    name = dispatch.select(problem, options.backend, dispatch.LOOPS)
    if name == "reference":
        with record_function("gpu_rnn::reference_forward"):
            return reference.forward(program, x, weights, list(states), lengths, options.reverse, options.save)
    with products.fp32_precision(problem.precision, x):
        gates = reference.project(x, weights, program).contiguous()
        with record_function(f"gpu_rnn::{name}_forward"):
            return dispatch.BACKENDS[name].forward(
                program, gates, weights, list(states), lengths, options.reverse, options.save, problem
            )


def run_backward(
    text: str,
    options: Options,
    d_y: Tensor,
    d_final: Sequence[Tensor],
    x: Tensor,
    weights: Weights,
    lengths: Tensor | None,
    states: Sequence[Tensor],
    saved: Result,
) -> list[Tensor | None]:
    """The gradients of x, of each of the weights and of the states."""
    program = Program.parse(text)
    problem = describe(text, options, x, weights, lengths, "backward")
    name = dispatch.select(problem, options.backend, dispatch.LOOPS)
    if name == "reference":
        with record_function("gpu_rnn::reference_backward"):
            return vjp(text, options, lengths, [x, *weights, *states], [d_y, *d_final])
    if not saved.gates.numel():
        saved = run(text, options._replace(save=True), x, weights, lengths, states)
    with products.fp32_precision(problem.precision, x):
        with record_function(f"gpu_rnn::{name}_backward"):
            loop = LoopGradients(
                *dispatch.BACKENDS[name].backward(
                    program, saved, weights, list(states), lengths, options.reverse, d_y, list(d_final), problem
                )
            )
        d_x, d_weights = products.gradients(
            program, x, weights, list(states), lengths, options.reverse, saved, loop.d_gates, loop.d_recurrent
        )
    d_weights = d_weights._replace(params=loop.d_params, w_hr=loop.d_w_hr)
    inputs = [x, *weights, *states]
    return [
        None if given is None or d is None else d.to(given.dtype)
        for given, d in zip(inputs, [d_x, *d_weights, *loop.d_states], strict=True)
    ]


def vjp(
    text: str,
    options: Options,
    lengths: Tensor | None,
    primals: Sequence[Tensor | None],  # x, the six weights, the states
    d_outputs: Sequence[Tensor],  # of y and of the final states
) -> list[Tensor | None]:
    """The reference's vector-Jacobian product, itself differentiable to any order."""
    present = [index for index, primal in enumerate(primals) if primal is not None]
    function = pure(text, options, lengths, primals)
    _, pull = pullback(function, *(primals[index] for index in present))
    found = dict(zip(present, pull(tuple(d_outputs)), strict=True))
    return [found.get(index) for index in range(len(primals))]


def pullback(function: Callable[..., Any], *point: Any) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    """A function's value at a point and its vector-Jacobian product there, itself differentiable."""
    value, pull, *_ = torch.func.vjp(function, *point)
    return value, pull


def pure(text: str, options: Options, lengths: Tensor | None, primals: Sequence[Tensor | None]) -> Callable[..., tuple[Tensor, ...]]:
    """The reference as a function of those primals that are not None, returning y and the final states."""
    present = [index for index, primal in enumerate(primals) if primal is not None]

    def function(*given: Tensor) -> tuple[Tensor, ...]:
        values: list[Tensor | None] = [None] * len(primals)
        for index, value in zip(present, given, strict=True):
            values[index] = value
        x, weights, states = values[0], Weights(*values[1:7]), values[7:]  # type: ignore[arg-type]
        result = reference.forward(Program.parse(text), x, weights, states, lengths, options.reverse)  # type: ignore[arg-type]
        return (result.y, *result.final)

    return function


def second_vjp(
    text: str,
    options: Options,
    lengths: Tensor | None,
    primals: Sequence[Tensor | None],
    d_outputs: Sequence[Tensor],
    grads: Sequence[Tensor | None],
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """The gradients of `d_outputs` and of the primals, given those of `vjp`'s results."""
    present = [index for index, primal in enumerate(primals) if primal is not None]
    count = len(d_outputs)

    def gradient(*given: Tensor) -> tuple[Tensor, ...]:
        values: list[Tensor | None] = [None] * len(primals)
        for index, value in zip(present, given[count:], strict=True):
            values[index] = value
        found = vjp(text, options, lengths, values, given[:count])
        return tuple(found[index] for index in present)  # type: ignore[misc]

    _, pull = pullback(gradient, *d_outputs, *(primals[index] for index in present))
    dd = [grads[i] if grads[i] is not None else torch.zeros_like(primals[i]) for i in present]  # type: ignore[arg-type]
    found = pull(tuple(dd))
    primal_grads = dict(zip(present, found[count:], strict=True))
    return found[:count], [primal_grads.get(index) for index in range(len(primals))]
