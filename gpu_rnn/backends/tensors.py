# SPDX-License-Identifier: Apache-2.0
"""The canonical layout of one layer's call: its tensors, by name and shape, and their order in time.

Sizes: T time, B batch, N independent recurrences (directions, members), G gates, H hidden units, I input features,
P width of the product's input (H, or proj_size), S states, U per-unit parameters, K split gates, M 1 for a stack, else
N.

The axes of a tensor stand in its field's annotation. Shapes are checked, and calls batched by vmap, by what is written
there: a new field is an entry here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor as wrapped
from torch._C._functorch import unwrap_if_dead

from gpu_rnn.backends.axes import Axes, axes_of
from gpu_rnn.backends.normalisation import Normalised, Normaliser
from gpu_rnn.compiler.program import Program

if TYPE_CHECKING:
    from gpu_rnn.backends.problem import Problem

SKIP, RESET = 1, 2  # bits of `LayerControls.flags`
CPU_CHUNK, GPU_CHUNK = 1 << 15, 1 << 22  # elements (T, B, N, H) of a chunk: 128 KiB a tensor in fp32; fewer launches


class Weights(NamedTuple):
    """The weights of one layer; None where the layer has none.

    With `w_between`, N are the layers of a stack, which run as a wavefront (`gpu_rnn.call.wavefront`).
    """

    w_ih: Annotated[Tensor, Axes("M G H I")]  # of a stack the first layer's
    w_hh: Annotated[Tensor, Axes("N G H P")]
    b_ih: Annotated[Tensor | None, Axes("N G H")] = None
    b_hh: Annotated[Tensor | None, Axes("N G H")] = None
    params: Annotated[Tensor | None, Axes("N U H")] = None
    w_hr: Annotated[Tensor | None, Axes("N P H")] = None  # projection of h
    # Recurrent products are normalised over H, gate by gate, and scaled by this; likewise the input products.
    norm: Annotated[Tensor | None, Axes("N G H")] = None
    norm_ih: Annotated[Tensor | None, Axes("N G H")] = None
    w_between: Annotated[Tensor | None, Axes("N-1 G H H")] = (
        None  # the input weights of a stack's layers after the first
    )


class LayerControls(NamedTuple):
    """What steers the steps. No gradients; `lengths` and `flags` never come together.

    With `lengths`, a reversed row starts at its own last step, and outputs beyond a row's length are 0. With `flags`,
    a step first sets the states where RESET says so, then computes, and keeps the states it entered with where SKIP
    says so; y is h then, too.
    """

    lengths: Annotated[Tensor | None, Axes("B", torch.int64)] = None
    # In the order of time, each as its direction meets it; of a stack one for all layers.
    flags: Annotated[Tensor | None, Axes("T B M", torch.uint8)] = None
    drop: Annotated[Tensor | None, Axes("B N 1|G P")] = None  # factors of what enters the products
    zone: Annotated[Tensor | None, Axes("S T B N H", torch.bool)] = None  # units that keep the state they entered with
    between: Annotated[Tensor | None, Axes("N-1 T B H")] = (
        None  # factors of what a stack's layers take from those below
    )

    @property
    def of_loops(self) -> dict[str, Tensor | None]:
        """What a time loop takes of it, by name: what acts between a stack's layers is none of its."""
        return dict(zip(OF_LOOPS, self, strict=False))

    def dense(self, dtype: torch.dtype) -> LayerControls:
        """As a loop reads them by their addresses: factors in that dtype, flags and lengths in their own."""
        if self is PLAIN:
            return self
        return LayerControls(*[value if value is None else dense_of_its_kind(value, dtype) for value in self])

    def counts(self, steps: int) -> Tensor | None:
        """(T, B): the steps that count, None if all do; of one layer, whose directions count alike."""
        if self.flags is not None:
            return (self.flags[:, :, 0] & SKIP) == 0
        if self.lengths is None:
            return None
        return within_lengths(self.lengths, steps)

    @property
    def described(self) -> dict[str, Any]:
        """Which of them there are, as `Problem` has it: whether, of `drop` how many masks."""
        there = {name: value is not None for name, value in self.of_loops.items()}
        return there | {"drop": 0 if self.drop is None else self.drop.shape[2]}


PLAIN = LayerControls()
OF_LOOPS = LayerControls._fields[:-1]  # without `between`
CONTROL_AXES = {name: axes for name, (axes,) in axes_of(LayerControls).items()}
OF_STATES = tuple(name for name, axes in CONTROL_AXES.items() if axes.place("S") == 0)  # a value a unit, state and step


class Inputs(NamedTuple):
    """Every tensor that a layer's forward pass takes."""

    x: Annotated[Tensor, Axes("T B I | T B N I")]
    weights: Weights
    controls: LayerControls
    states: Annotated[list[Tensor], Axes("B N P"), Axes("B N H")]  # before the first step: h, then the others
    # Of each state; empty: the recurrence's initial values.
    reset_values: Annotated[list[Tensor], Axes("1|T B N P"), Axes("1|T B N H")]

    @staticmethod
    def of(x: Tensor, *rest: Any) -> Inputs:
        """From x, each weight, each control, the list of states and the list of reset values."""
        return Inputs(x, Weights(*rest[:WEIGHTS]), LayerControls(*rest[WEIGHTS:-2]), rest[-2], rest[-1] or [])

    @staticmethod
    def flat(tensors: Sequence[Any], states: int) -> Inputs:
        """From all tensors in a row."""
        first = FIRST_STATE + states
        return Inputs.of(*tensors[:FIRST_STATE], list(tensors[FIRST_STATE:first]), list(tensors[first:]))

    @property
    def row(self) -> list[Tensor | None]:
        """All tensors in a row; `flat` reads it."""
        return [self.x, *self.weights, *self.controls, *self.states, *self.reset_values]

    @property
    def primals(self) -> list[Tensor | None]:
        """The differentiable ones."""
        return primals(self.row)

    def with_primals(self, values: Sequence[Any]) -> Inputs:
        """The same call of other differentiable tensors."""
        return Inputs.flat([*values[:FIRST_CONTROL], *self.controls, *values[FIRST_CONTROL:]], len(self.states))


WEIGHTS = len(Weights._fields)
FIRST_CONTROL = 1 + WEIGHTS
FIRST_STATE = FIRST_CONTROL + len(LayerControls._fields)


def primals(row: Sequence[Any]) -> list[Any]:
    """Of `Inputs.row`, or of what lies like it, the part of the differentiable tensors."""
    return [*row[:FIRST_CONTROL], *row[FIRST_STATE:]]


def like_row(values: Sequence[Any]) -> list[Any]:
    """What belongs to the primals, laid out like `Inputs.row` with None at the controls."""
    return [*values[:FIRST_CONTROL], *[None] * len(LayerControls._fields), *values[FIRST_CONTROL:]]


@dataclass(frozen=True)
class Call:
    """What both passes of a time loop take alike; see `Inputs` for the tensors."""

    program: Program
    weights: Weights
    states: list[Tensor]
    controls: LayerControls = PLAIN
    reset_values: list[Tensor] = field(default_factory=list)
    reverse: str = "0"
    problem: Problem = None  # type: ignore[assignment]  # the reference needs none
    joined: bool = True  # the input products of summed gates have b_hh; else the forward pass adds it (`Entry`)
    d_gates: Tensor | None = None  # where a backward loop may put `LoopGradients.d_gates`, laid out as the saved gates
    # Where a forward pass may keep its normalised products for the backward pass: (2, T, B, N, G, H), input and
    # recurrent.
    kept: Normalised | None = None
    rms: bool = False  # products are normalised by their root mean square

    @property
    def normaliser(self) -> Normaliser:
        """How its products are normalised, if they are."""
        return Normaliser.of(self.rms)

    @property
    def lengths(self) -> Tensor | None:
        return self.controls.lengths

    def reset_value(self, state: int) -> Tensor | float:
        """What a reset sets a state to."""
        return self.reset_values[state] if self.reset_values else self.program.initial[state]


class Result(NamedTuple):
    """What a forward pass returns.

    `gates` and `recurrent` are what the backward pass needs, empty in inference: pre-activations (the sum x + r of a
    summed gate, else x) and the products of the split gates. `inner`, the states other than h after each step, is
    empty where neither the backward pass nor the caller wants it. The steps of a reversed recurrence stand at the
    times they belong to. `kept` is `Call.kept`, filled. Of a stack, N stands before T.
    """

    y: Annotated[Tensor, Axes("T B N P")]
    final: Annotated[list[Tensor], Axes("B N P"), Axes("B N H")]
    gates: Annotated[Tensor, Axes("T B N G H")]
    recurrent: Annotated[Tensor, Axes("T B N K H")]
    inner: Annotated[Tensor, Axes("S-1 T B N H", "state")]
    kept: Annotated[Normalised | None, Axes("2 T B N G H"), Axes("2 T B N G 1")] = None

    @property
    def saved(self) -> list[Tensor]:
        """In a row with `inner` last, what the backward pass takes besides y; `of_saved` reads it."""
        nothing = self.y.new_empty(0)
        return [self.gates, self.recurrent, *(self.kept or (nothing, nothing)), self.inner]

    @staticmethod
    def of_saved(y: Tensor, gates: Tensor, recurrent: Tensor, values: Tensor, rstd: Tensor, inner: Tensor) -> Result:
        return Result(y, [], gates, recurrent, inner, Normalised(values, rstd) if values.numel() else None)


def _of_rows() -> tuple[list[Axes], list[Axes]]:
    of_lists, of_result = axes_of(Inputs), axes_of(Result)
    single = [axes[0] for fields in (Weights, LayerControls) for axes in axes_of(fields).values()]
    row = [*of_lists["x"], *single, of_lists["states"][0], of_lists["reset_values"][0]]
    saved = [axes for name in ("gates", "recurrent", "kept", "inner") for axes in of_result[name]]
    return row, [*of_result["y"], of_result["final"][0], *saved]


ROW_AXES, RESULT_AXES = (
    _of_rows()
)  # of `Inputs.row`; of y, the final states and `Result.saved`. One entry for each list
SAVED = len(RESULT_AXES) - 2  # of `Result.saved`


class LoopGradients(NamedTuple):
    """What a backward loop returns."""

    d_gates: Tensor  # (T, B, N, G, H)
    d_recurrent: Tensor  # (T, B, N, number of split gates, H)
    d_states: list[Tensor]  # before the first step, (B, N, ·)
    d_params: Tensor | None = None  # (N, number of params, H)
    d_w_hr: Tensor | None = None  # (N, P, H)
    d_norm: Tensor | None = None  # (N, G, H)
    d_products: Tensor | None = None  # (T, B, N, G, H), of the products before their normalisation
    d_resets: Sequence[Tensor] = ()  # of the reset values, like them


def elsewhere(tensor: Tensor) -> bool:
    """Whether its values are not where its address says: torch keeps a negation, as of a conjugate's imaginary part,
    and zeros that nobody wrote as a flag; what a transform of torch.func wraps, though it has ended, has no address."""
    return tensor.is_neg() or torch._is_zerotensor(tensor) or wrapped(tensor)


def in_memory(tensor: Tensor) -> Tensor:
    """With its values where its address says.

    Raises:
        RuntimeError: it holds many, of a `vmap` that has ended.
    """
    return unwrap_if_dead(tensor).clone() if elsewhere(tensor) else tensor


def all_in_memory(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """`in_memory` of each; where all are so already they are asked at once, as `all_dense` does."""
    lie_well = [not (t.is_neg() or t._is_zerotensor() or wrapped(t)) for t in tensors]
    return tensors if False not in lie_well else [in_memory(t) for t in tensors]


def readable(tensors: Iterable[Tensor], dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a loop on a device reads all by their addresses, once they have no gaps."""
    # A short call is all overhead, and a generator or `elsewhere` calls for each; torch._is_zerotensor takes twice as
    # long as the method.
    return False not in [
        t.dtype == dtype and t.device == device and not (t.is_neg() or t._is_zerotensor() or wrapped(t))
        for t in tensors
    ]


def dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """As a loop reads it by its address: in memory, without gaps, of one dtype."""
    if tensor.dtype == dtype and tensor.is_contiguous() and not elsewhere(tensor):
        return tensor
    return in_memory(tensor.to(dtype)).contiguous()


def all_dense(tensors: Sequence[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """`dense` of each; where all are so already they are asked at once, as a frame for each is part of a short call."""
    lie_well = [
        t.dtype == dtype and t.is_contiguous() and not (t.is_neg() or t._is_zerotensor() or wrapped(t)) for t in tensors
    ]
    return tensors if False not in lie_well else [dense(t, dtype) for t in tensors]


def dense_of_its_kind(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`dense`, of that dtype if it holds numbers, else of its own."""
    return dense(tensor, dtype if tensor.is_floating_point() else tensor.dtype)


def within_lengths(lengths: Tensor, steps: int) -> Tensor:
    """(T, B): the steps that rows of these lengths, (B), have."""
    return torch.arange(steps, device=lengths.device)[:, None] < lengths


def counted(values: Tensor, counts: Tensor | None) -> Tensor:
    """(T, B, ·) with 0 at the steps that do not count, whatever stands there."""
    return values if counts is None else torch.where(counts.unsqueeze(-1), values, 0)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which states live and sums are taken: fp32 for 16-bit storage."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def chunks(gates: Tensor) -> list[slice]:
    """The steps of (T, B, N, G, H) that are handled at once where that is not all of them."""
    steps, one = len(gates), gates[:1, :, :, 0].numel()
    return parts(steps, max(1, (CPU_CHUNK if gates.is_cpu else GPU_CHUNK) // max(1, one)))


def parts(steps: int, chunk: int) -> list[slice]:
    """So many steps at a time."""
    return [slice(start, min(start + chunk, steps)) for start in range(0, steps, chunk)]


def processing_order(steps: int, lengths: Tensor | None, reverse: str, device: torch.device) -> Tensor | None:
    """(T, B or 1, N): the time at which each row's step number t lies, None when that is t for all.

    A reversed row starts at its own last step. The map is its own inverse, so it also puts results back in place.
    `reverse` has a character for each recurrence, "1" for a reversed one.
    """
    if "1" not in reverse:
        return None
    step = torch.arange(steps, device=device)[:, None, None]
    last = (lengths[None, :, None] if lengths is not None else torch.full((1, 1, 1), steps, device=device)) - 1
    return torch.where(turned(reverse, device) & (step <= last), last - step, step)


def turned(reverse: str, device: torch.device) -> Tensor:
    """(N,): which recurrences run backwards. No tensor is made from a list: that would copy from the host, and wait."""
    return torch.cat([torch.full((len(list(run)),), flag == "1", device=device) for flag, run in groupby(reverse)])


def reorder(values: Tensor, order: Tensor | None) -> Tensor:
    """Values (T, B, N, ...) in processing order, or from it back into the order of time."""
    if order is None:
        return values
    steps, batch, n = values.shape[:3]
    rows = torch.arange(batch * n, device=values.device).view(batch, n) + order * (batch * n)  # whole rows are copied
    return values.flatten(0, 2).index_select(0, rows.flatten()).unflatten(0, (steps, batch, n))


def reorder_each(values: Tensor, order: Tensor | None) -> Tensor:
    """`reorder` of each of the states in (S, T, B, N, ...)."""
    return torch.stack([reorder(value, order) for value in values]) if len(values) and order is not None else values


def bit(flags: Tensor, which: int) -> Tensor:
    """A bit of flags (..., B, N) as bool (..., B, N, 1)."""
    return (flags & which).bool().unsqueeze(-1)
