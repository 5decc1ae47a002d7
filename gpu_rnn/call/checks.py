# SPDX-License-Identifier: Apache-2.0
"""The tensors of the registered operations, checked before any backend: each has the axes that
`gpu_rnn.backends.tensors` gives its field. An exported program reaches the operations with whatever it is called with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from gpu_rnn.backends.axes import Axes, axes_of
from gpu_rnn.backends.tensors import Inputs, LayerControls, Result, Weights, state_dtype
from gpu_rnn.call.passes import Options
from gpu_rnn.compiler.program import Program
from gpu_rnn.memo import memoize

COMPUTED = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128)
Shapes = tuple[tuple[int, ...], ...]  # those that a tensor may have


TENSORS = {name: axes[0] for fields in (Weights, LayerControls) for name, axes in axes_of(fields).items()}
LISTS = axes_of(Inputs)
X, STATES, RESET_VALUES = LISTS["x"][0], LISTS["states"], LISTS["reset_values"]
SAVED_AXES = {name: axes[0] for name, axes in axes_of(Result).items() if name not in ("final", "kept")}
FINAL = axes_of(Result)["final"]


class Sizes(NamedTuple):
    """The sizes that `gpu_rnn.backends.tensors` names."""

    T: int
    B: int
    N: int
    I: int  # noqa: E741
    G: int
    H: int
    P: int
    S: int
    U: int
    K: int
    M: int

    @staticmethod
    def of(program: Program, reverse: str, inputs: Inputs) -> Sizes:
        """From the program, and what only the tensors tell: T, B and I of x, H of w_hh, P of w_hr."""
        x, weights = inputs.x, inputs.weights
        steps, batch, features, hidden = *x.shape[:2], x.shape[-1], weights.w_hh.shape[2]
        width = hidden if weights.w_hr is None else weights.w_hr.shape[1]
        stacked = weights.w_between is not None
        counts = len(program.gates), len(program.states), len(program.params), len(program.split)
        gates, states, params, split = counts
        n = len(reverse)
        return Sizes(steps, batch, n, features, gates, hidden, width, states, params, split, 1 if stacked else n)


@memoize(4096)
def _shapes(axes: str, sizes: Sizes, stacked: bool = False) -> Shapes:
    """The shapes that axes allow; `stacked`: N stands before T."""
    words = axes.replace("T B N", "N T B") if stacked else axes
    return tuple(shape for whole in words.split(" | ") for shape in _one(whole.split(), sizes._asdict()))


def _one(words: Sequence[str], sizes: dict[str, int]) -> Shapes:
    shapes: Shapes = ((),)
    for word in words:
        allowed = [_size(each, sizes) for each in word.split("|")]
        shapes = tuple((*shape, size) for shape in shapes for size in dict.fromkeys(allowed))
    return shapes


def _size(word: str, sizes: dict[str, int]) -> int:
    name, _, less = word.partition("-")
    return (sizes[name] if name in sizes else int(name)) - int(less or 0)


class _Check:
    """Compares tensors with their axes, in the words of one operation."""

    def __init__(self, operation: str, x: Tensor | Spec, sizes: Sizes) -> None:
        self.operation, self.sizes = operation, sizes
        self.dtype, self.device = x.dtype, x.device

    def tensor(self, name: str, tensor: Tensor | Spec, axes: Axes, stacked: bool = False) -> None:
        allowed = _shapes(axes.axes, self.sizes, stacked)
        shape = tuple(tensor.shape)
        if shape not in allowed:
            wanted = " or ".join(map(str, allowed))
            raise ValueError(f"{self.operation}: {name} ({axes.axes}) is {wanted}, got {shape}")
        dtype = state_dtype(self.dtype) if axes.dtype == "state" else axes.dtype or self.dtype
        if tensor.dtype != dtype:
            raise TypeError(f"{self.operation}: {name} is {dtype}, got {tensor.dtype}")
        if tensor.device != self.device or tensor.layout != torch.strided:
            raise RuntimeError(
                f"{self.operation}: {name} is a strided tensor on {self.device}, as x is, got {tensor.layout} on "
                f"{tensor.device}"
            )

    def each(self, name: str, tensors: Sequence[Tensor | Spec], axes: Sequence[Axes]) -> None:
        """A list with a tensor for each state: the first is h's."""
        if len(tensors) != self.sizes.S:
            raise ValueError(
                f"{self.operation}: {name} has a tensor for each of {self.sizes.S} states, got {len(tensors)}"
            )
        for number, tensor in enumerate(tensors):
            self.tensor(f"{name}[{number}]", tensor, axes[number > 0])

    def require(self, true: bool, words: str) -> None:
        if not true:
            raise ValueError(f"{self.operation}: {words}")


class Spec(NamedTuple):
    """What is checked of a tensor: in its place in `Inputs`, so that what passed once is known by its key."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device
    layout: torch.layout

    @staticmethod
    def each(tensors: Sequence[Tensor | None]) -> tuple[Spec | None, ...]:
        return tuple(None if t is None else Spec(t.shape, t.dtype, t.device, t.layout) for t in tensors)


def inputs(operation: str, text: str, options: Options, given: Inputs) -> Inputs:
    """The tensors of a forward pass, with lengths clamped to the steps that there are.

    Lengths out of range are no error here: on a GPU the host would have to wait to see them. `functional.rnn` looks at
    those that lie on a CPU.

    Raises:
        ValueError: a text that is no program; a tensor of another shape, missing, or one too many.
        TypeError: a tensor of another dtype.
        RuntimeError: a tensor on another device than x, or not strided.
    """
    _inputs(operation, text, options, Spec.each(given.row), len(given.states))
    lengths = given.controls.lengths
    if lengths is None:
        return given
    return given._replace(controls=given.controls._replace(lengths=lengths.clamp(0, len(given.x))))


@memoize(1024)
def _inputs(operation: str, text: str, options: Options, row: tuple[Spec | None, ...], states: int) -> None:
    given, program = Inputs.flat(row, states), Program.parse(text)
    x, weights, controls = given.x, given.weights, given.controls
    _ranks(operation, given)
    sizes = Sizes.of(program, options.reverse, given)
    check = _Check(operation, x, sizes)
    if x.dtype not in COMPUTED:
        raise TypeError(f"{operation}: x is one of {', '.join(map(str, COMPUTED))}, got {x.dtype}")
    check.require(min(sizes.T, sizes.H, sizes.P) > 0, "x has time steps and w_hh units")
    check.tensor("x", x, X)
    for (name, axes), tensor in zip(TENSORS.items(), (*weights, *controls), strict=True):
        if tensor is not None:
            check.tensor(name, tensor, axes)
    check.each("states", given.states, STATES)
    if given.reset_values:
        check.each("reset_values", given.reset_values, RESET_VALUES)
    _together(check, given, program, options)
    if weights.w_between is not None:
        _stack(check, given, options)


def devices(operation: str, x: Tensor, tensors: Sequence[Tensor | None]) -> None:
    """All that can be said of tensors whose sizes are symbols. One on "meta" among others comes this way, too.

    Raises:
        RuntimeError: a tensor on another device than x.
    """
    for tensor in tensors:
        if tensor is not None and tensor.device != x.device:
            raise RuntimeError(f"{operation}: tensors are on {x.device}, as x is, got one on {tensor.device}")


def _ranks(operation: str, given: Inputs) -> None:
    """Of the tensors that sizes are read from."""
    weights = given.weights
    for name, tensor, ranks in (("x", given.x, (3, 4)), ("w_hh", weights.w_hh, (4,)), ("w_hr", weights.w_hr, (3,))):
        if tensor is not None and len(tensor.shape) not in ranks:
            raise ValueError(
                f"{operation}: {name} has {' or '.join(map(str, ranks))} dimensions, got {tuple(tensor.shape)}"
            )


def _together(check: _Check, given: Inputs, program: Program, options: Options) -> None:
    """What comes only with something else, or not beside it."""
    _, weights, controls, _, reset_values = given
    for first, second in (("b_ih", "b_hh"), ("norm", "norm_ih")):
        both = (getattr(weights, first) is None) == (getattr(weights, second) is None)
        check.require(both, f"{first} and {second} come together or not at all")
    named = ", ".join(program.params)
    there = (weights.params is not None) == bool(program.params)
    check.require(there, f"params holds the program's per-unit parameters ({named or 'it has none'})")
    check.require(controls.lengths is None or controls.flags is None, "lengths and flags do not come together")
    check.require(not reset_values or controls.flags is not None, "reset_values come with flags")
    check.require(weights.norm is not None or not options.rms, "rms comes with norm")
    check.require(controls.between is None or weights.w_between is not None, "between comes with w_between")


def _stack(check: _Check, given: Inputs, options: Options) -> None:
    """What the layers of a stack cannot have."""
    weights, several = given.weights, len(options.reverse) > 1 and "1" not in options.reverse
    check.require(several, f"the layers of a stack, two at least, run forwards, got {options.reverse}")
    check.require(weights.w_hr is weights.norm is None, "a stack takes neither w_hr nor norm")
    check.require(len(given.x.shape) == 3, "the x of a stack has three dimensions")
    check.require(not options.rebuilds, "a stack saves its gates")


def gradients(
    operation: str, text: str, options: Options, given: Inputs, d_outputs: Sequence[Tensor], saved: Sequence[Tensor]
) -> None:
    """What a backward pass takes beside the forward pass's tensors, which are checked already: y, gates, recurrent and
    inner as `Result` has them, and gradients of y, of the final states and, where all states are wanted, of inner.

    Errors as `inputs`'.
    """
    others = Spec.each(d_outputs), Spec.each(saved)
    _gradients(operation, text, options, Spec.each(given.row), len(given.states), *others)


@memoize(1024)
def _gradients(
    operation: str,
    text: str,
    options: Options,
    row: tuple[Spec | None, ...],
    states: int,
    d_outputs: tuple[Spec, ...],
    saved: tuple[Spec, ...],
) -> None:
    given = Inputs.flat(row, states)
    sizes, stacked = Sizes.of(Program.parse(text), options.reverse, given), given.weights.w_between is not None
    check = _Check(operation, given.x, sizes)
    check.require(len(saved) == len(SAVED_AXES), f"saved holds {', '.join(SAVED_AXES)}, got {len(saved)} tensors")
    count = 1 + sizes.S + options.all_states
    check.require(len(d_outputs) == count, f"d_outputs holds {count} tensors, got {len(d_outputs)}")
    d_y, *d_final = d_outputs
    if options.all_states:
        check.tensor("d_outputs[-1]", d_final.pop(), SAVED_AXES["inner"], stacked)
    check.tensor("d_outputs[0]", d_y, SAVED_AXES["y"], stacked)
    check.each("d_outputs[1:]", d_final, FINAL)
    states = ("y", "inner") if options.save and options.rebuilds else ("y",)
    missing = not math.prod(saved[1].shape)  # what was not saved is computed again
    for (name, axes), tensor in zip(SAVED_AXES.items(), saved, strict=True):
        nothing = math.prod(tensor.shape) == math.prod(_shapes(axes.axes, sizes, stacked)[0]) == 0
        if name == "y" or not (nothing or (missing and name not in states)):
            check.tensor(name, tensor, axes, stacked)
