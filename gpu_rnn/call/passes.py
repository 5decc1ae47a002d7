# SPDX-License-Identifier: Apache-2.0
"""The two passes of one layer on the backend that dispatch chooses, and the reference's derivatives of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor as wrapped
from torch.profiler import record_function

from gpu_rnn import cells
from gpu_rnn.backends import ADDS_B_HH, KERNELS, LOOPS, Loop, linear, precision, rebuilding, reference
from gpu_rnn.backends.normalisation import room_for
from gpu_rnn.backends.problem import Problem
from gpu_rnn.backends.tensors import Call, Inputs, Result, in_memory
from gpu_rnn.call import arguments, autocast, relaxation, wavefront
from gpu_rnn.call.description import describe
from gpu_rnn.compiler.program import Program
from gpu_rnn.dispatch import choice, relaxation_plan
from gpu_rnn.dispatch.relaxation_plan import TimePlan
from gpu_rnn.memo import memoize

NOTHING = nullcontext()
ENCODED = re.compile(r"(\w+) ([01]+) (save|states|drop) (all|y)( rms)?(?: within (\d\.?\d*e[+-]\d+))?")


class Options(NamedTuple):
    """The options of a call; they travel as one string, such as ``auto 01 save y``."""

    backend: str = "auto"
    reverse: str = "0"
    save: bool = False
    all_states: bool = False
    of_x: bool = True  # the gradient of x is wanted; what records takes it always
    zeros: bool = False  # the states before the first step are zeros, which no user gave
    rms: bool = False  # products are normalised by their root mean square
    rebuilds: bool = False  # what is saved are states alone
    time_parallel: float = 0.0  # what states may move by between chunks of steps that run side by side; 0: none do

    def encode(self) -> str:
        saves = ("states" if self.rebuilds else "save") if self.save else "drop"
        words = self.backend, self.reverse, saves, "all" if self.all_states else "y"
        within = ("within", f"{self.time_parallel:.16e}") if self.time_parallel else ()
        return " ".join((*words, *["rms"] * self.rms, *within))

    @staticmethod
    @memoize(256)
    def decode(text: str) -> Options:
        words = ENCODED.fullmatch(text)
        if words is None:
            raise ValueError(
                f"the options of a layer read like 'auto 01 save y' or 'step 0 drop all', got {text[:80]!r}"
            )
        backend, reverse, save, states, rms, within = words.groups()
        choice.check_name(backend)
        tolerance = 0.0 if within is None else arguments.tolerance("time_parallel", float(within))
        flags = {"save": save != "drop", "rebuilds": save == "states", "all_states": states == "all"}
        return Options(backend, reverse, **flags, rms=rms is not None, time_parallel=tolerance)


def problem_of(text: str, options: Options, inputs: Inputs, direction: str) -> Problem:
    """One layer, or a stack that runs as a wavefront, as dispatch sees it."""
    x, weights, controls, _, reset_values = inputs
    n, _, hidden, width = weights.w_hh.shape
    layers, n = (1, n) if weights.w_between is None else (n, 1)
    return describe(
        recurrence=cells.of_text(text),
        x=x,
        steps=x.shape[0],
        batch=x.shape[1],
        hidden=hidden,
        direction=direction,
        reverse=options.reverse[:n],
        layers=layers,
        proj_size=width if weights.w_hr is not None else 0,
        bias=weights.b_ih is not None,
        norm=weights.norm is not None,
        rms=options.rms,
        rebuilds=options.rebuilds,
        controls={**controls.described, "reset_values": bool(reset_values)},
        all_states=options.all_states,
    )


def call_of(text: str, options: Options, inputs: Inputs, problem: Problem | None = None, joined: bool = True) -> Call:
    """The part of a call that both passes take alike."""
    _, weights, controls, states, reset_values = inputs
    return Call(
        Program.parse(text),
        weights,
        list(states),
        controls,
        list(reset_values),
        options.reverse,
        problem,  # type: ignore[arg-type]
        joined,
        rms=options.rms,
    )


def named(words: str) -> AbstractContextManager[Any]:
    """A part of a call under a name, for a profiler; without one it would be 5 µs for nothing."""
    return record_function(words) if torch.autograd._profiler_enabled() else NOTHING


def arithmetic(fp32: str, like: Tensor) -> AbstractContextManager[Any]:
    """Products in the call's own dtype and precision. Autocast has had its say above (`call.run`); in here it
    would cast once more, and a captured graph would keep that for calls without it."""
    return _changed(fp32, like) if autocast.on(like) or precision.differs(fp32, like) else NOTHING


@contextmanager
def _changed(fp32: str, like: Tensor) -> Iterator[None]:
    with precision.of_products(fp32, like), autocast.off(like):
        yield


def run(text: str, options: Options, inputs: Inputs, keep: bool = False) -> Result:
    """The forward pass of one layer, or of a stack, on the backend that dispatch chooses.

    `keep`: `Result.kept` is wanted, where it makes the backward pass faster.
    """
    inputs = _readable(inputs)
    problem = problem_of(text, options, inputs, "training" if options.save else "inference")
    if options.save and options.rebuilds:  # what is left of what is saved is what all states are
        options, keep = options._replace(save=False, all_states=True), False
    if options.time_parallel and (plan := _in_chunks(problem, options, inputs.x)) is not None:
        result = _run_in_chunks(text, options, inputs, problem, plan)
        if result is not None:
            return result
    name, chunk = _chosen(problem, options.backend)
    call = call_of(text, options, inputs, problem, joined=not ADDS_B_HH[name](problem))
    if chunk:
        with arithmetic(problem.precision, inputs.x), named(f"gpu_rnn::{name}_forward"):
            return wavefront.forward(call, inputs.x, chunk, KERNELS[name], options.save, options.all_states)
    if name == "reference":
        with autocast.off(inputs.x), named("gpu_rnn::reference_forward"):
            result = reference.forward(call, inputs.x, options.save, options.all_states)
            # Of their own, as every loop's are: a recurrence may hand on the states that it was given.
            return result._replace(final=[state.clone() for state in result.final])
    return forward_on(name, call, inputs.x, options.save, options.all_states, keep)


def forward_on(name: str, call: Call, x: Tensor, save: bool, all_states: bool, keep: bool = False) -> Result:
    """The input products of x, and a backend's loop."""
    with arithmetic(call.problem.precision, x):
        if keep and call.weights.norm is not None:
            call = replace(call, kept=room_for(x, call.weights.w_hh.shape[:3]))
        gates = linear.project(x, call.weights, call.program, call.kept, call.joined, call.normaliser)
        with named(f"gpu_rnn::{name}_forward"):
            return KERNELS[name].forward(call, gates.contiguous(), save, all_states)


def _in_chunks(problem: Problem, options: Options, x: Tensor) -> TimePlan | None:
    """How the pass runs parallel in time, if it does. A graph that is captured holds no questions."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    plan = relaxation_plan.plan(problem, options.backend, options.time_parallel)
    return None if plan.against else plan


def _run_in_chunks(text: str, options: Options, inputs: Inputs, problem: Problem, plan: TimePlan) -> Result | None:
    """The forward pass parallel in time; None where it does not settle."""
    call = call_of(text, options, inputs, problem)
    with arithmetic(problem.precision, inputs.x), named("gpu_rnn::chunks_forward"):
        gates = linear.project(inputs.x, inputs.weights, call.program, normaliser=call.normaliser)
        loops = partial(_loop, options.backend)
        return relaxation.forward(call, gates, plan, options.time_parallel, loops, options.save, options.all_states)


def _loop(backend: str, problem: Problem) -> Loop:
    return KERNELS[choice.select(problem, backend, tuple(KERNELS))]


def _readable(inputs: Inputs) -> Inputs:
    """The same call, its tensors as a loop reads them by their addresses."""
    primals = inputs.primals
    zero = torch._is_zerotensor  # a generator or `elsewhere` calls for each
    if True not in [p.is_neg() or zero(p) or wrapped(p) for p in primals if p is not None]:
        return inputs
    return inputs.with_primals([None if primal is None else in_memory(primal) for primal in primals])


def _chosen(problem: Problem, backend: str) -> tuple[str, int]:
    """The loop that dispatch chooses, and of a stack the steps that its layers run together as a wavefront, else 0."""
    if problem.layers > 1:
        return choice.wavefront(problem, backend)
    return choice.select(problem, backend, LOOPS), 0


def run_backward(
    text: str,
    options: Options,
    d_outputs: Sequence[Tensor],  # of y, of the final states, and of `Result.inner` where all states are wanted
    inputs: Inputs,
    saved: Result,
) -> list[Tensor | None]:
    """The gradients of `Inputs.primals`."""
    problem = problem_of(text, options, inputs, "backward")
    name, chunk = _chosen(problem, options.backend)
    if name == "reference":
        with autocast.off(inputs.x), named("gpu_rnn::reference_backward"):
            return vjp(text, options, inputs, d_outputs)
    inputs, d_outputs = _readable(inputs), [in_memory(d) for d in d_outputs]
    call = call_of(text, options, inputs, problem)
    if not saved.gates.numel():
        saved = _again(text, options, call, inputs, saved)
    d_y, *d_final = d_outputs
    d_inner = d_final.pop() if options.all_states else None
    plan = _in_chunks(problem, options, inputs.x) if options.time_parallel else None
    with arithmetic(problem.precision, inputs.x):
        with named(f"gpu_rnn::{name}_backward"):
            of_loop = None
            if chunk:
                of_loop = wavefront.backward(call, saved, chunk, KERNELS[name], d_y, d_final, d_inner)
            elif plan is not None:
                within = plan, options.time_parallel, partial(_loop, options.backend)
                of_loop = relaxation.backward(call, saved, *within, d_y, d_final, d_inner)
            if of_loop is None:
                of_loop = KERNELS[name].backward(call, saved, d_y, d_final, d_inner)
        saved = wavefront.steps_first(saved) if chunk else saved
        d_x, d_weights = linear.gradients(call, inputs.x, saved, of_loop, options.of_x)
    grads = [d_x, *d_weights, *of_loop.d_states, *of_loop.d_resets]
    return [
        None if primal is None or d is None else d.to(primal.dtype)
        for primal, d in zip(inputs.primals, grads, strict=True)
    ]


def _again(text: str, options: Options, call: Call, inputs: Inputs, saved: Result) -> Result:
    """With the gates that were not saved: of states that were, or of another forward pass."""
    if not (options.save and options.rebuilds):
        return run(text, options._replace(save=True, rebuilds=False), inputs, keep=True)
    with arithmetic(call.problem.precision, inputs.x), named("gpu_rnn::gates_again"):
        return rebuilding.rebuilt(call, inputs.x, saved)


def vjp(text: str, options: Options, inputs: Inputs, d_outputs: Sequence[Tensor]) -> list[Tensor | None]:
    """The reference's vector-Jacobian product, itself differentiable to any order; `d_outputs` as in `run_backward`."""
    primals = inputs.primals
    present = [index for index, primal in enumerate(primals) if primal is not None]
    _, pull = pullback(pure(text, options, inputs), *(primals[index] for index in present))
    grads = dict(zip(present, pull(tuple(d_outputs)), strict=True))
    return [grads.get(index) for index in range(len(primals))]


def pullback(function: Callable[..., Any], *point: Any) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    """A function's value at a point and its vector-Jacobian product there, itself differentiable."""
    value, pull, *_ = torch.func.vjp(function, *point)
    return value, pull


def pure(text: str, options: Options, inputs: Inputs) -> Callable[..., tuple[Tensor, ...]]:
    """The reference as a function of those primals that are not None; it returns what `run_backward` has gradients
    of."""

    def function(*point: Tensor) -> tuple[Tensor, ...]:
        call_inputs = filled(inputs, point)
        call = call_of(text, options, call_inputs)
        forward = reference.forward if call.weights.w_between is None else wavefront.in_torch
        result = forward(call, call_inputs.x, all_states=options.all_states)
        return (result.y, *result.final, *([result.inner] if options.all_states else []))

    return function


def filled(inputs: Inputs, point: Sequence[Tensor]) -> Inputs:
    """The same call at another point: `point` has those primals that are not None."""
    values = iter(point)
    return inputs.with_primals([None if primal is None else next(values) for primal in inputs.primals])


def second_vjp(
    text: str, options: Options, inputs: Inputs, d_outputs: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """The gradients of `d_outputs` and of the primals, given those of `vjp`'s results."""
    primals = inputs.primals
    present = [index for index, primal in enumerate(primals) if primal is not None]
    count = len(d_outputs)

    def gradient(*point: Tensor) -> tuple[Tensor, ...]:
        first = vjp(text, options, filled(inputs, point[count:]), point[:count])
        return tuple(first[index] for index in present)  # type: ignore[misc]

    dd = [grads[i] if grads[i] is not None else torch.zeros_like(primals[i]) for i in present]  # type: ignore[arg-type]
    with autocast.off(inputs.x):
        _, pull = pullback(gradient, *d_outputs, *(primals[index] for index in present))
        second = pull(tuple(dd))
    primal_grads = dict(zip(present, second[count:], strict=True))
    return second[:count], [primal_grads.get(index) for index in range(len(primals))]
